"""Pictures of every kind, what the network sees of them, and clear lines for the rest."""

from __future__ import annotations

import hashlib
import math
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asvit_deploy.data import images as images_module
from asvit_deploy.data.images import load_picture, open_images, pixels_of, preprocess
from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import arch
from asvit_deploy.models.config import ArchConfig

DEIT = arch("as_deit_small")
MINI = arch("as_deit_mini")


def gradient(width: int = 60, height: int = 40) -> np.ndarray:
    """A picture without symmetry, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 // (width - 1), y * 255 // (height - 1), (x * 7 + y * 3) % 256)
    return np.stack(channels, -1).astype(np.uint8)


def saved(path: Path, picture: Image.Image | np.ndarray, **options: object) -> Path:
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(path, **options)
    return path


def one_line(error: pytest.ExceptionInfo[UserError], path: Path) -> str:
    """The message, which is one line and names the file."""
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# Kinds of picture


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(gradient()[:, :, 0])
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        picture = grey.convert("RGB").convert(mode)
    path = saved(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), picture)
    assert Image.open(path).mode == mode
    loaded = load_picture(path)
    assert (loaded.mode, loaded.size) == ("RGB", (60, 40))
    tolerance = {"1": 255, "P": 51}.get(mode, 1)  # dithered; the web palette's steps
    values = np.asarray(loaded).astype(int)
    assert np.abs(values - np.asarray(grey)[:, :, None].astype(int)).max() <= tolerance
    assert len(np.unique(values)) >= {"1": 2, "P": 6}.get(mode, 60)


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    flat = Image.new("RGB", (32, 32), (200, 60, 20))
    path = saved(tmp_path / "x.jpg", flat.convert("CMYK"), quality=100)
    assert Image.open(path).mode == "CMYK"
    assert np.allclose(np.asarray(load_picture(path)), (200, 60, 20), atol=3)


def test_16_bit_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    for name in ("x.png", "x.tif"):
        loaded = load_picture(saved(tmp_path / name, values))
        assert np.asarray(loaded)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_16_bit_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "x.pgm"  # binary PGM above 255 is big-endian by its definition
    path.write_bytes(b"P5\n3 1\n65535\n" + struct.pack(">3H", 0, 30000, 65535))
    assert np.asarray(load_picture(path))[0, :, 0].tolist() == [0, 117, 255]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 3] = (0, 128, 255)
    loaded = load_picture(saved(tmp_path / "x.png", pixels))
    assert np.asarray(loaded)[0, :, 0].tolist() == [255, 127, 0]


def test_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    loaded = load_picture(saved(tmp_path / "x.png", picture, transparency=0))
    assert np.asarray(loaded)[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(tmp_path: Path, orientation: int) -> None:
    upright = gradient()
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(undo[orientation](upright))
    path = saved(tmp_path / "x.png", stored, exif=exif)
    assert np.array_equal(np.asarray(load_picture(path)), upright)


def test_one_pixel_picture(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.png", np.array([[[255, 0, 51]]], np.uint8))
    pixels = preprocess(load_picture(path), DEIT)
    mean, std = np.array(DEIT.preprocessing.mean), np.array(DEIT.preprocessing.std)
    expected = (np.array([1, 0, 0.2]) - mean) / std
    assert pixels.shape == (3, 224, 224)
    assert np.allclose(pixels, expected[:, None, None], atol=1e-6)


# Files that are no pictures


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def jpeg(path: Path) -> bytes:
    return saved(path, gradient(200, 200)).read_bytes()


def png(path: Path) -> bytes:
    return saved(path, gradient(200, 200)).read_bytes()


BAD: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "empty": ("x.png", lambda p: b"", "is empty"),
    "text": ("x.jpg", lambda p: b"no picture at all\n", "not a picture"),
    "truncated jpeg": ("x.jpg", lambda p: jpeg(p)[:2000], "broken"),
    "truncated png": ("x.png", lambda p: png(p)[:300], "broken"),
    "cut in the header": ("x.png", lambda p: png(p)[:20], "x.png"),
    "flipped byte": ("x.png", lambda p: png(p)[:60] + b"\xff\x00\xff" + png(p)[63:], "broken"),
    "bomb": ("x.png", lambda p: png_header(100_000, 90_000), "pixels"),
    "big": ("x.png", lambda p: png_header(12_000, 9_000), "12000 x 9000 pixels"),
    "ribbon": ("x.png", lambda p: png_header(1, 5000), "too elongated"),
    "postscript": (
        "x.png",
        lambda p: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "not a",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_file_is_one_line_that_names_it(
    tmp_path: Path, kind: str, recwarn: pytest.WarningsRecorder
) -> None:
    name, content, words = BAD[kind]
    path = tmp_path / name
    path.write_bytes(content(path))
    with pytest.raises(UserError) as error:
        load_picture(path)
    assert words in one_line(error, path)
    assert not recwarn.list  # nothing besides the line


@pytest.mark.parametrize("values", [np.float32([[0.1, 7e9]]), np.int32([[-5, 7]])])
def test_pixels_without_a_known_range(tmp_path: Path, values: np.ndarray) -> None:
    path = saved(tmp_path / "x.tif", values)
    with pytest.raises(UserError) as error:
        load_picture(path)
    assert "no known range" in one_line(error, path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no.png", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(UserError) as error:
            load_picture(path)
        assert words in one_line(error, path)


# Preprocessing


def by_hand(pixels: np.ndarray, config: ArchConfig) -> np.ndarray:
    """Nearest resize and centre crop by index, after torchvision's rules; uint8 [H, W, 3] in."""
    height, width = pixels.shape[:2]
    short = math.floor(config.image_size / config.preprocessing.crop_pct)
    scale = short / min(height, width)
    new = [short if side == min(height, width) else int(side * scale) for side in (height, width)]
    rows, columns = (
        np.floor((np.arange(n) + 0.5) * side / n).astype(int)
        for n, side in zip(new, (height, width), strict=True)
    )
    resized = pixels[rows][:, columns]
    top, left = (round((n - config.image_size) / 2) for n in new)
    cut = resized[top : top + config.image_size, left : left + config.image_size] / 255
    mean, std = config.preprocessing.mean, config.preprocessing.std
    return ((cut - mean) / std).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(61, 47), (47, 61), (300, 451), (57, 57), (131, 73)])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_preprocess_equals_the_rule_written_out(size: tuple[int, int], crop_pct: float) -> None:
    rules = replace(MINI.preprocessing, interpolation="nearest", crop_pct=crop_pct)
    config = replace(MINI, preprocessing=rules)
    pixels = gradient(*size)  # sizes at which no sample falls between two pixels
    result = preprocess(Image.fromarray(pixels), config)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    assert np.allclose(result, by_hand(pixels, config), atol=1e-6)


def test_crop_offset_rounds_half_to_even() -> None:
    rules = replace(MINI.preprocessing, interpolation="nearest")
    config = replace(MINI, preprocessing=rules)
    for width, left in ((57, 0), (59, 2), (61, 2)):  # 0.5, 1.5, 2.5
        pixels = gradient(width, 56)
        expected = pixels[:, left : left + 56] / 127.5 - 1
        result = preprocess(Image.fromarray(pixels), config).transpose(1, 2, 0)
        assert np.allclose(result, expected, atol=1e-6)


def test_bicubic_keeps_a_straight_ramp_straight() -> None:
    """Shrinking a linear ramp by half samples it at 2i + 0.5, away from the border."""
    ramp = np.broadcast_to(np.arange(112, dtype=np.uint8)[None, :, None], (112, 112, 3))
    for interpolation in ("bicubic", "bilinear"):
        rules = replace(MINI.preprocessing, interpolation=interpolation)
        result = preprocess(Image.fromarray(ramp), replace(MINI, preprocessing=rules))
        values = (result[0, 20] + 1) * 127.5
        expected = 2 * np.arange(56) + 0.5
        assert np.abs(values - expected)[3:-3].max() <= 0.51  # 8-bit rounding


def test_preprocess_is_what_torchvision_does() -> None:
    try:
        from torchvision import transforms
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        pytest.skip(f"no usable torchvision: {error}")
    picture = open_images(None, DEIT, 1).views[0].picture()
    pipeline = transforms.Compose([
        transforms.Resize(256, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(DEIT.preprocessing.mean, DEIT.preprocessing.std),
    ])  # fmt: skip
    assert np.allclose(pipeline(picture).numpy(), preprocess(picture, DEIT), atol=1e-6)


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures in two levels, beside files that are none."""
    root = tmp_path / "pictures"
    (root / "b").mkdir(parents=True)
    for index, name in enumerate(
        ("b/2.PNG", "b/10.jpeg", "a.png", "c.bmp", "d.webp", "e.tif", "f.gif")
    ):
        saved(root / name, np.full((8, 8, 3), index, np.uint8))
    (root / "notes.txt").write_text("no picture")
    (root / "._a.png").write_bytes(b"what some systems leave behind")
    (root / "g.png").mkdir()
    return root


def test_folder_is_read_recursively_in_order(folder: Path) -> None:
    found = open_images(folder, MINI)
    assert found.names == ["a.png", "b/10.jpeg", "b/2.PNG", "c.bmp", "d.webp", "e.tif", "f.gif"]
    assert len(list(found)) == len(found) == 7
    assert str(folder) in found.source
    assert np.array_equal(found.batch([3, 0]), np.stack([found[3], found[0]]))
    assert np.array_equal(found[-1], found[6])
    assert found[2:4].names == found.names[2:4]
    with pytest.raises(IndexError):
        found[7]


def test_limit_thins_out_evenly(folder: Path) -> None:
    assert open_images(folder, MINI, 3).names == ["a.png", "b/2.PNG", "d.webp"]
    assert open_images(folder, MINI, 3).source.startswith("3 of 7 pictures")
    assert open_images(folder, MINI, 99).names == open_images(folder, MINI).names


def test_pictures_are_read_only_when_asked_for(folder: Path) -> None:
    (folder / "b/2.PNG").write_bytes(b"broken")
    found = open_images(folder, MINI)
    assert found[0].shape == (3, 56, 56)
    with pytest.raises(UserError) as error:
        list(found)
    one_line(error, folder / "b/2.PNG")


def test_single_picture(folder: Path) -> None:
    found = open_images(folder / "a.png", MINI)
    assert found.names == ["a.png"]
    assert found[0].shape == (3, 56, 56)


def test_bad_folders(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    cases = ((tmp_path / "gone", "does not exist"), (bare, "no picture"),
             (folder / "notes.txt", "not a picture"))  # fmt: skip
    for path, words in cases:
        with pytest.raises(UserError) as error:
            open_images(path, MINI)
        assert words in one_line(error, path)
    with pytest.raises(UserError, match="at least 1"):
        open_images(folder, MINI, 0)


# Unreadable pictures


def test_unreadable_pictures_are_skipped_up_to_the_limit(folder: Path) -> None:
    (folder / "b/2.PNG").write_bytes(b"broken")
    (folder / "c.bmp").write_bytes(b"")
    said: list[str] = []
    found = open_images(folder, MINI, skip_limit=2, say=said.append)
    images, names = found.loaded()
    assert names == ["a.png", "b/10.jpeg", "d.webp", "e.tif", "f.gif"]
    assert np.array_equal(images[2], found[found.names.index("d.webp")])
    assert found.skipped == ["b/2.PNG", "c.bmp"]
    assert found.account["skipped"] == 2
    assert found.account["skipped_by_reason"] == {"no picture": 1, "empty": 1}
    assert found.source.endswith("2 skipped (no picture 1, empty 1)")
    assert [line.split(" is ")[0] for line in said[1:]] == [
        f"skipped: {folder / name}" for name in ("b/2.PNG", "c.bmp")
    ]
    again = found.readable()  # counted once, and named once
    assert (again.names, len(said), len(again.skips)) == (names, 3, 2)
    assert again[:2].names == names[:2]
    assert all(np.array_equal(a, b) for a, b in zip(again, images, strict=True))


def test_one_more_than_the_limit_ends_it(folder: Path) -> None:
    (folder / "b/2.PNG").write_bytes(b"broken")
    (folder / "c.bmp").write_bytes(b"")
    for limit, words in ((0, "2.PNG is not a picture"), (1, "c.bmp is empty")):
        with pytest.raises(UserError) as error:
            open_images(folder, MINI, skip_limit=limit).loaded()
        message = one_line(error, folder)
        assert words in message
        assert ("which makes 2 where --skip-limit allows 1" in message) == (limit == 1)


def test_nothing_readable_is_refused_and_named_in_few_lines(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.png").write_bytes(b"")
    said: list[str] = []
    with pytest.raises(UserError, match=r"none of the pictures can be read.*30 skipped"):
        open_images(tmp_path, MINI, skip_limit=99, say=said.append).loaded()
    assert len(said) == 11


# The photographs that come along


def digests(found: images_module.ImageSet) -> list[str]:
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in found]


@pytest.mark.slow
def test_photographs_are_many_distinct_and_the_same_each_time() -> None:
    found = open_images(None, MINI)
    first = digests(found)
    assert len(found) >= 200
    assert len(set(first)) == len(first)
    assert len(set(found.names)) == len(found.names)
    assert digests(open_images(None, MINI)) == first
    assert "scikit-image" in found.source
    assert f"{len(found)} crops" in found.source


def test_photographs_are_colour_first_and_mixed() -> None:
    colour = open_images(None, MINI, 64)
    assert all(np.ptp(image, axis=0).max() > 0.1 for image in colour)  # channels differ
    sources = [view.path.name for view in colour.views]
    assert sources[:4] == ["chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg"]
    counts = [sources.count(name) for name in set(sources)]
    assert len(counts) >= 8
    assert max(counts) - min(counts) <= 1


def test_first_photograph_is_the_plain_picture() -> None:
    found = open_images(None, DEIT, 1)
    assert found.names == ["chelsea"]
    path = found.views[0].path
    assert np.array_equal(found[0], preprocess(load_picture(path), DEIT))


def test_flipped_view_mirrors_its_twin() -> None:
    found = open_images(None, MINI)
    plain, flipped = (found.names.index(f"coffee-75-topleft{end}") for end in ("", "-flipped"))
    mirrored = found.views[flipped].picture()
    assert np.array_equal(np.asarray(mirrored)[:, ::-1], np.asarray(found.views[plain].picture()))


def test_without_scikit_image_the_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)  # Python's own way to say "not there"
    with pytest.raises(UserError, match=r"pip install scikit-image.*--images"):
        open_images(None, MINI)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.0,) * 3, (1.0,) * 3),
                      ((0.5, 0.1307, 0.9), (1e-3, 0.3081, 7.0))],
)  # fmt: skip
def test_pixels_come_back_from_inputs(mean, std):
    """Every value of a pixel, whatever it is normalised by."""
    config = MINI
    rules = replace(config.preprocessing, mean=mean, std=std, crop_pct=1.0)
    config = replace(config, preprocessing=rules)
    values = np.arange(56 * 56 * 3).reshape(56, 56, 3) % 256
    picture = Image.fromarray(values.astype(np.uint8))
    assert np.array_equal(pixels_of(preprocess(picture, config), config), values)
