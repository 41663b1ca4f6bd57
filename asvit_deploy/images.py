"""Pictures in: files of every usual kind to the network's input, and where pictures come from."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar, overload

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from asvit_deploy.errors import UserError
from asvit_deploy.models.registry import ArchConfig

_T = TypeVar("_T")

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Only these decoders run: Pillow's full list would start Ghostscript for a renamed EPS file.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 100_000_000
MAX_ASPECT = 100  # the resized picture would be this many times the crop
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def load_picture(path: Path) -> Image.Image:
    """Read a picture of any usual kind as RGB, 8 bits a channel, the right way up.

    Transparent pixels are laid on white, as viewers show them. 16-bit greyscale is scaled to 8
    bits over its whole range. Of an animation, the first frame counts.

    Raises:
        UserError: there is no such file, it is no picture or a broken one, it holds more than
            `MAX_PIXELS`, its sides differ more than `MAX_ASPECT` times, or its numbers have no
            known range (float, 32-bit).
    """
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "there is no such file"
        raise UserError(f"cannot read the picture {path}: {what}; check the path")
    return decode_picture(path, path)


def decode_picture(file: Path | io.BytesIO, name: object) -> Image.Image:
    """`load_picture` of a file, or of bytes that came from elsewhere; messages call it `name`."""
    try:
        with warnings.catch_warnings():
            # What matters is raised as an error: our own size limit, the decoder's complaints.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_FORMATS) as picture:
                _refuse_odd_size(name, *picture.size)
                return _to_rgb(ImageOps.exif_transpose(picture))
    except UserError:
        raise
    except UnidentifiedImageError:
        size = file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes
        what = "is empty" if size == 0 else "is not a picture that we know"
        raise UserError(f"{name} {what}; take it out or replace it") from None
    except PermissionError:
        raise UserError(f"{name} may not be read; check its permissions") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{name} holds more than {MAX_PIXELS:,} pixels; scale it down first"
        ) from None
    except Exception as error:  # Pillow's decoders raise whatever they trip over
        raise UserError(
            f"{name} is broken or cannot be decoded ({_one_line(error)}); take it out or replace it"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _refuse_odd_size(name: object, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{name} holds {width} x {height} pixels, more than {MAX_PIXELS:,}; scale it down first"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UserError(
            f"{name} is too elongated ({width} x {height} pixels, more than {MAX_ASPECT}:1); "
            "crop it first"
        )


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        picture = _sixteen_to_eight(picture)
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        picture = Image.alpha_composite(white, layer)
    return picture.convert("RGB")


def _sixteen_to_eight(picture: Image.Image) -> Image.Image:
    """Map 0…65535 to 0…255; Pillow's own conversion clips at 255."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit pixels have no known range; save it with 8 or 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def preprocess(picture: Image.Image, config: ArchConfig) -> np.ndarray:
    """An RGB picture as the network's input, float32 [3, H, W] with H = W = `config.image_size`.

    The shorter side is resized to `int(image_size / crop_pct)` (both sides, where the network's
    pictures are squashed), the centre cut out, and the result is (pixel / 255 - mean) / std. Sizes
    and offsets round as torchvision rounds them.
    """
    rules, size = config.preprocessing, config.image_size
    short = int(size / rules.crop_pct)
    width, height = picture.size
    if rules.crop_mode == "squash":
        width, height = short, short
    elif width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    picture = picture.resize((width, height), _FILTERS[rules.interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32) / 255
    mean, std = np.asarray(rules.mean, np.float32), np.asarray(rules.std, np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


@dataclass(frozen=True)
class View:
    """A whole picture, or a square window of it.

    `zoom` is the window's side as a fraction of the picture's shorter side, None for the whole
    picture; `at` is the place between the left/top (0) and right/bottom (1) ends.
    """

    name: str
    path: Path
    zoom: float | None = None
    at: tuple[float, float] = (0.5, 0.5)
    flipped: bool = False

    def picture(self) -> Image.Image:
        """The pixels of this view, RGB."""
        if self.zoom is None and not self.flipped:
            return load_picture(self.path)
        picture = _load_cached(self.path)
        if self.zoom is not None:
            side = round(self.zoom * min(picture.size))
            left = round(self.at[0] * (picture.width - side))
            top = round(self.at[1] * (picture.height - side))
            picture = picture.crop((left, top, left + side, top + side))
        return ImageOps.mirror(picture) if self.flipped else picture


@functools.lru_cache(maxsize=24)
def _load_cached(path: Path) -> Image.Image:
    """Views of one picture come far apart; all the sample photographs together fit in here."""
    return load_picture(path)


class ImageSet(Sequence[np.ndarray]):
    """Pictures as inputs of one architecture, read when asked for.

    `set[i]` is float32 [3, H, W]; `set[a:b]` is a smaller set. `names` are unique; `source` is one
    line that says what these pictures are.
    """

    def __init__(self, views: Iterable[View], source: str, config: ArchConfig) -> None:
        self.views = tuple(views)
        self.names = [view.name for view in self.views]
        self.source = source
        self.config = config

    def __len__(self) -> int:
        return len(self.views)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> ImageSet: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | ImageSet:
        if isinstance(index, slice):
            return ImageSet(self.views[index], self.source, self.config)
        return preprocess(self.views[index].picture(), self.config)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))

    def batch(self, indices: Iterable[int]) -> np.ndarray:
        """Float32 [B, 3, H, W] of the pictures at `indices`."""
        return np.stack([self[index] for index in indices])


def open_images(folder: Path | None, config: ArchConfig, limit: int | None = None) -> ImageSet:
    """The pictures of a folder (with its subfolders, sorted by path) or of one file.

    More than `limit` pictures are thinned out evenly. Without a folder: real photographs that
    scikit-image carries, in colour first, several crops of each.

    Raises:
        UserError: `folder` does not exist, holds no picture or a folder that may not be read; a
            single file is no picture; `limit` is not positive; scikit-image's photographs are
            needed and missing.
    """
    if limit is not None and limit < 1:
        raise UserError(f"the number of images must be at least 1, not {limit}")
    if folder is None:
        return _sample_photographs(config, limit)
    if folder.is_file():
        load_picture(folder)  # the one picture: refuse it now, not at its first use
        return ImageSet([View(folder.name, folder)], f"the picture {folder}", config)
    if not folder.is_dir():
        raise UserError(f"the image folder {folder} does not exist; check the path")
    paths = pictures_in(folder)
    if not paths:
        raise UserError(
            f"the folder {folder} holds no picture (looked for {', '.join(sorted(SUFFIXES))}); "
            "put some into it"
        )
    taken = thinned(paths, limit)
    views = [View(path.relative_to(folder).as_posix(), path) for path in taken]
    of = "" if len(taken) == len(paths) else f" of {len(paths)}"
    return ImageSet(views, f"{len(taken)}{of} pictures in {folder}", config)


def thinned(items: Sequence[_T], limit: int | None) -> list[_T]:
    """All of them, or exactly `limit` of them spread evenly, in their order."""
    count = len(items) if limit is None else min(limit, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def pictures_in(folder: Path) -> list[Path]:
    """Pictures of a folder and its subfolders, by name, sorted; nothing that begins with a dot.

    Raises:
        UserError: the folder, or one in it, may not be read.
    """
    found = []
    # Not rglob: it takes a folder that may not be read for an empty one.
    for place, folders, names in os.walk(folder, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(place, name) for name in names if not name.startswith(".")]
        found += [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise UserError(
        f"the image folder {error.filename} cannot be read: {error.strerror}; check its permissions"
    ) from None


# Photographs in the wheel of scikit-image (those it would download are not among them).
_COLOUR = (
    "chelsea.png",
    "coffee.png",
    "astronaut.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "ihc.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "motorcycle_right.png",
)
_GREY = ("camera.png", "coins.png", "moon.png", "brick.png", "grass.png", "gravel.png", "cell.png")
_PLACES = {
    "centre": (0.5, 0.5),
    "topleft": (0.0, 0.0),
    "bottomright": (1.0, 1.0),
    "topright": (1.0, 0.0),
    "bottomleft": (0.0, 1.0),
}


def _views(paths: Sequence[Path]) -> Iterator[View]:
    """Every crop of every photograph; any first part of it is spread evenly over them."""
    crops: list[tuple[str, float | None, tuple[float, float]]] = [("", None, (0.5, 0.5))]
    for place, at in _PLACES.items():
        crops += [(f"-{zoom:.0%}-{place}".replace("%", ""), zoom, at) for zoom in (0.75, 0.5)]
    for flipped in (False, True):
        for suffix, zoom, at in crops:
            for path in paths:
                name = f"{path.stem}{suffix}{'-flipped' if flipped else ''}"
                yield View(name, path, zoom, at, flipped)


def _sample_photographs(config: ArchConfig, limit: int | None) -> ImageSet:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the sample photographs come with scikit-image, which is not installed; "
            'run "pip install scikit-image" or name a folder of pictures with --images'
        )
    data = Path(spec.submodule_search_locations[0]) / "data"
    colour, grey = ([data / name for name in names] for names in (_COLOUR, _GREY))
    colour = [path for path in colour if path.is_file()]
    grey = [path for path in grey if path.is_file()]
    if not colour:
        raise UserError(
            f"scikit-image in {data.parent} carries no photographs; reinstall it with pip or name "
            "a folder of pictures with --images"
        )
    views = [*_views(colour), *_views(grey)][:limit]
    photographs = len({view.path for view in views})
    source = f"{photographs} photographs that scikit-image carries, {len(views)} crops"
    return ImageSet(views, source, config)
