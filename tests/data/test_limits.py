"""How much memory pictures take, by format: bounded before a decoder in C begins."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, features

from asvit_deploy.data import limits
from asvit_deploy.data.decode import load_picture

READ = "from asvit_deploy.data.decode import load_picture; load_picture(path)"
LIBRARIES = {"jp2": "jpg_2000", "webp": "webp", "avif": "avif"}
NOISE = np.random.default_rng(0).integers(0, 256, (1500, 2000, 4), np.uint8)
TURNED = Image.Exif()
TURNED[0x112] = 6

# Pillow's mode, how it is saved, and how many bytes a pixel that may take.
KINDS = {
    "rgb.png": ("RGB", {"compress_level": 1}, 6),
    "rgba.png": ("RGBA", {"compress_level": 1}, 8),
    "grey16.png": ("I;16", {}, 6),
    "plain.jpg": ("RGB", {"quality": 95, "subsampling": 0}, 6),
    "turned.jpg": ("RGB", {"exif": TURNED}, 8),
    "progressive.jpg": ("RGB", {"progressive": True, "quality": 60, "subsampling": 0}, 12),
    "cmyk.jpg": ("CMYK", {"progressive": True, "quality": 60, "subsampling": 0}, 12),
    "rgba.jp2": ("RGBA", {}, 30),
    "rgba.webp": ("RGBA", {"lossless": True, "method": 0, "quality": 0}, 24),
    "rgba.avif": ("RGBA", {"speed": 10, "quality": 100, "subsampling": "4:4:4"}, 24),
    "strip.tif": ("RGB", {"compression": "packbits", "tiffinfo": {278: 1500}}, 12),
    "rgba.tga": ("RGBA", {"compression": "tga_rle"}, 8),
    "palette.gif": ("P", {}, 6),
}


def can(name: str) -> bool:
    library = LIBRARIES.get(name.rpartition(".")[2])
    return library is None or bool(features.check(library))


def noise(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(NOISE[:, :, :2].copy().view(np.uint16)[:, :, 0])
    picture = Image.fromarray(NOISE)
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


@pytest.mark.slow
@pytest.mark.parametrize("name", filter(can, KINDS))
def test_a_format_takes_no_more_than_its_pixels_are_counted_for(ends, tmp_path, name):
    mode, options, needs = KINDS[name]
    noise(mode).save(tmp_path / name, **options)
    pixels = NOISE.shape[0] * NOISE.shape[1]
    whole = ((pixels * needs + 12_000_000) >> 20) + 1  # MiB, rounded up
    assert ends(READ, tmp_path / name, whole) == "fine"


def icon(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG", compress_level=1)
    data = file.getvalue()
    head = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 8, len(data), 22)
    return struct.pack("<HHH", 0, 1, 1) + head + data


def qoi(width: int, height: int) -> bytes:
    return b"qoif" + struct.pack(">IIBB", width, height, 3, 0) + b"\xfd" * (width * height // 62)


def flat(mode: str, **options):
    def make(path, width, height):
        Image.new(mode, (width, height)).save(path, **options)

    return make


# The most millions of pixels, and how one is made.
TOO_LARGE = {
    "rgb.png": (100, flat("RGB", compress_level=1)),
    "rgba.png": (75, flat("RGBA", compress_level=1)),
    "plain.jpg": (100, flat("L")),
    "progressive.jpg": (50, flat("L", progressive=True)),
    "cmyk.jpg": (75, flat("CMYK")),
    "turned.jpg": (75, flat("L", exif=TURNED)),
    "grey.jp2": (20, flat("L")),
    "rgb.webp": (25, flat("RGB", lossless=True, method=0, quality=0)),
    "grey.avif": (25, flat("L", speed=10)),
    "plain.tif": (50, flat("L")),
    "plain.ico": (50, lambda path, *size: path.write_bytes(icon(*size))),
    "plain.qoi": (75, lambda path, *size: path.write_bytes(qoi(*size))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", filter(can, TOO_LARGE))
def test_a_picture_of_more_pixels_is_refused_before_it_is_decoded(ends, tmp_path, name):
    millions, make = TOO_LARGE[name]
    path = tmp_path / name
    width = 10_000
    make(path, width, millions * 100 + 1)
    said = ends(READ, path, 128 if name != "turned.jpg" else 600)
    assert said.startswith(f"{path} holds {width} x {millions * 100 + 1} pixels, more than ")
    assert f"{millions},000,000" in said
    assert "scale it down" in said


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_photograph_with_a_thumbnail_is_no_progressive_one(tmp_path, kind):
    """What costs memory is a JPEG whose first scan is a part, not one that holds another."""
    small = io.BytesIO()
    Image.new("RGB", (160, 120)).save(small, "JPEG", progressive=True)
    path = tmp_path / "x.jpg"
    more = {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]} if kind == "MPO" else {}
    Image.new("RGB", (8000, 7000)).save(path, kind, **more)
    whole = path.read_bytes()
    thumbnail = b"\xff\xe3" + struct.pack(">H", len(small.getvalue()) + 2) + small.getvalue()
    path.write_bytes(whole[:2] + thumbnail + whole[2:])
    assert load_picture(path).size == (8000, 7000)


@pytest.mark.slow
def test_a_file_of_more_bytes_than_any_picture_is_not_read(ends, tmp_path):
    for name in ("x.png", "x.webp", "x.jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
        with open(tmp_path / name, "r+b") as file:
            file.truncate(limits.MAX_FILE + 1)
        assert "600,000,001 bytes, more than 600,000,000" in ends(READ, tmp_path / name, 64)


def test_scans_that_come_one_channel_after_the_other_count_as_progressive(tmp_path):
    path = tmp_path / "x.jpg"
    Image.new("RGB", (9000, 6000)).save(path)
    whole = path.read_bytes()
    at = whole.index(b"\xff\xda\x00\x0c\x03")
    path.write_bytes(whole[:at] + b"\xff\xda\x00\x08\x01\x01\x00" + whole[at + 11 :])
    with pytest.raises(Exception, match="of any progressive JPEG"):
        load_picture(path)
