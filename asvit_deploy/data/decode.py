"""One picture file to RGB pixels, the right way up."""

from __future__ import annotations

import functools
import io
import stat
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from asvit_deploy.data.limits import (
    MAX_FILE,
    MAX_PIXELS,
    MOST_SCANNED,
    most_pixels,
    most_turned,
    scans,
    sizes,
)
from asvit_deploy.data.metadata import without_exif
from asvit_deploy.data.patience import SECONDS, PatientBytes, PatientFile, patient
from asvit_deploy.errors import UserError

# Formats and the endings they go by. Only decoders that run in this process: Pillow's full list
# would start Ghostscript for a renamed EPS file. Those that Pillow can be built without are asked
# for. None but TGA's is run on a guess: it has no mark, and takes nearly anything for its own.
_ENDINGS = {
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp",),
    "DDS": (".dds",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "ICO": (".ico",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "MPO": (".mpo",),
    "PCX": (".pcx",),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "SGI": (".bw", ".rgb", ".rgba", ".sgi"),
    "SUN": (".ras",),
    "TGA": (".icb", ".tga", ".vda", ".vst"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
_LIBRARIES = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "WEBP": "webp"}
# The upright size of a picture -> how many times smaller, out of `REDUCED`, it may be decoded.
Reduction = Callable[[tuple[int, int]], int]
REDUCED = (1, 2, 4, 8)
MAX_ASPECT = 100  # the resized picture would be this many times the crop
_MOST_WITHOUT_EXIF = 100_000_000  # bytes, of a file that is read as a whole
_STRIP = 1 << 18  # pixels
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of which width becomes height.
_LYING = [turn for number, turn in _TURNS.items() if number > 4]


class PictureError(UserError):
    """A picture that cannot be read; `reason` says why in a word or two, for counting."""

    def __init__(self, message: str, reason: str = "broken") -> None:
        super().__init__(message)
        self.reason = reason


def _available() -> list[str]:
    """The formats of `_ENDINGS` that this Pillow decodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that an older Pillow has never heard of
        return [
            name for name in _ENDINGS
            if name not in _LIBRARIES or features.check(_LIBRARIES[name])
        ]  # fmt: skip


SUFFIXES = frozenset(ending for name in _available() for ending in _ENDINGS[name])


@functools.cache
def _formats(suffix: str) -> tuple[str, ...]:
    """What a file with this ending may be, whatever it is called."""
    Image.init()
    known = [name for name in _available() if name in Image.OPEN]
    return tuple(name for name in known if name != "TGA" or suffix in _ENDINGS["TGA"])


def load_picture(path: Path, reduction: Reduction | None = None) -> Image.Image:
    """Read a picture of any usual kind as RGB, 8 bits a channel, the right way up.

    Transparent pixels are laid on white, as viewers show them. 16-bit greyscale is scaled to 8
    bits over its whole range. Of an animation, the first frame counts.

    Args:
        reduction: asked of JPEGs alone, whose decoder makes each 2x2, 4x4 or 8x8 pixels one at no
            cost; sides are then rounded up.

    Raises:
        PictureError: there is no such file, it is no picture or a broken one, it holds more pixels
            than `data.limits` allows its kind (`MAX_PIXELS` at most), its sides differ more than
            `MAX_ASPECT` times, or its numbers have no known range (float, 32-bit).
    """
    _refuse_no_file(path)
    return decode_picture(path, path, path.suffix.lower(), reduction)


def _refuse_no_file(path: Path) -> None:
    """Judged from the outside, for a pipe that is opened is waited for."""
    cannot = f"cannot read the picture {path}: "
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        what = "the link leads nowhere" if path.is_symlink() else "there is no such file"
        raise PictureError(f"{cannot}{what}; check the path", "missing") from None
    except (OSError, ValueError) as error:  # such as a folder that was closed meanwhile
        reason = getattr(error, "strerror", None) or str(error)
        raise PictureError(f"{cannot}{reason}; check its permissions", "no permission") from error
    if stat.S_ISDIR(mode):
        raise PictureError(f"{cannot}it is a folder; check the path", "a folder")
    if not stat.S_ISREG(mode):
        raise PictureError(
            f"{cannot}it is a device, a pipe or a socket; name a file", "no regular file"
        )


def decode_picture(
    file: Path | io.BytesIO, name: object, suffix: str = "", reduction: Reduction | None = None
) -> Image.Image:
    """`load_picture` of a file, or of bytes that came from elsewhere; messages call it `name`."""

    def stop() -> PictureError:
        return PictureError(
            f"{name} takes more than {SECONDS} s to read; save it again, or take it out", "too long"
        )

    size = 0
    try:
        size = file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes
        if size > MAX_FILE:
            raise PictureError(
                f"{name} has {size:,} bytes, more than {MAX_FILE:,}; scale it down first",
                "too large",
            )
        with warnings.catch_warnings():
            # What matters is raised as an error: our own size limit, the decoder's complaints.
            warnings.simplefilter("ignore")
            with patient(file, stop) as opened, _opened(opened, suffix) as picture:
                most = most_pixels(picture, opened)
                for held in sizes(picture, opened):
                    _refuse_odd_size(name, *held, *most)
                _refuse_many_scans(name, picture, opened)
                if reduction is not None and isinstance(picture, JpegImageFile):
                    _reduce(picture, reduction)
                turn = _loaded(picture)
                rgb = _to_rgb(picture)
                if turn is None:
                    return rgb
                _refuse_odd_size(name, *rgb.size, *most_turned())
                if rgb is not picture:
                    picture.close()  # else its pixels would stay in memory meanwhile
                return rgb.transpose(turn)
    except UserError:
        raise
    except UnidentifiedImageError:
        what = "is empty" if size == 0 else "is not a picture that we know"
        raise PictureError(
            f"{name} {what}; take it out or replace it", "empty" if size == 0 else "no picture"
        ) from None
    except PermissionError:
        raise PictureError(
            f"{name} may not be read; check its permissions", "no permission"
        ) from None
    except Image.DecompressionBombError:
        raise PictureError(
            f"{name} holds more than {MAX_PIXELS:,} pixels; scale it down first", "too large"
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever they trip over
        if isinstance(error.__cause__, PictureError):  # of which a decoder in C made another
            raise error.__cause__ from None
        raise PictureError(
            f"{name} is broken or cannot be decoded ({_one_line(error)}); take it out or replace it"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _refuse_odd_size(name: object, width: int, height: int, most: int, kind: str) -> None:
    if width * height > most:
        limit = f"{most:,}; scale it down first"
        if most < MAX_PIXELS:
            limit = f"the {most:,} of any {kind}; scale it down, or save it as a plain RGB PNG"
        raise PictureError(
            f"{name} holds {width} x {height} pixels, more than {limit}", "too large"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise PictureError(
            f"{name} is too elongated ({width} x {height} pixels, more than {MAX_ASPECT}:1); "
            "crop it first", "too elongated",
        )  # fmt: skip


def _refuse_many_scans(name: object, picture: Image.Image, file: io.BufferedIOBase) -> None:
    width, height = picture.size
    if picture.format in ("JPEG", "MPO"):
        place = file.tell()
        passes = scans(file)
        file.seek(place)
        if passes * width * height > MOST_SCANNED and passes > 1:
            raise PictureError(
                f"{name} goes through its {width} x {height} pixels {passes} times; save it again",
                "too long",
            )


# --- metadata -----------------------------------------------------------------------------------


def _opened(file: PatientFile | PatientBytes, suffix: str) -> Image.Image:
    """The picture; where Pillow trips over the EXIF as it opens the file, without that."""
    try:
        return Image.open(file, formats=_formats(suffix))
    except (PictureError, Image.DecompressionBombError):
        raise
    except Exception:
        file.seek(0)
        data = file.read(_MOST_WITHOUT_EXIF + 1)
        rest = without_exif(data) if len(data) <= _MOST_WITHOUT_EXIF else None
        if rest is None:
            raise
        return Image.open(PatientBytes.like(file, rest), formats=_formats(suffix))


def _loaded(picture: Image.Image) -> Image.Transpose | None:
    """Read the pixels; how the orientation in the file says to turn them. An odd one says nothing.

    Not `ImageOps.exif_transpose`: it writes the metadata anew, and falls over what it cannot write.
    """
    for key, kind in (("xmp", bytes), ("XML:com.adobe.xmp", str)):
        if not isinstance(picture.info.get(key, kind()), kind):  # a tag of another type
            del picture.info[key]
    if picture.format == "TIFF":
        # Read by `load` itself. What it trips over here it does not read again.
        with suppress(Exception):
            picture.getexif()
    picture.load()
    return _turn(picture)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever a damaged block makes the parser raise
        return None


def _reduce(picture: JpegImageFile, reduction: Reduction) -> None:
    """Have it decoded as small as it may be."""
    width, height = picture.size
    upright = (height, width) if _turn(picture) in _LYING else (width, height)
    times = reduction(upright)
    if times > 1:
        picture.draft(None, (width // times, height // times))


# --- pixels -------------------------------------------------------------------------------------


def _to_rgb(picture: Image.Image) -> Image.Image:
    """The picture itself where it is RGB already."""
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return _in_strips(picture, _sixteen_to_eight)
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        return _in_strips(picture, _on_white)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _in_strips(picture: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Strip by strip: what is made on the way would take several times a large picture's memory."""
    result = Image.new("RGB", picture.size)
    width, height = picture.size
    rows = max(_STRIP // width, 1)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        result.paste(change(picture.crop(box)), box)
    return result


def _on_white(strip: Image.Image) -> Image.Image:
    layer = strip.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(white, layer).convert("RGB")


def _sixteen_to_eight(strip: Image.Image) -> Image.Image:
    """Map 0…65535 to 0…255; Pillow's own conversion clips at 255."""
    values = np.asarray(strip).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
