"""Metadata that must not cost a picture, and the formats that are read."""

from __future__ import annotations

import io
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import raises_one_line
from PIL import Image, ImageOps, features

from asvit_deploy.data.decode import SUFFIXES, decode_picture, load_picture

PIXELS = np.indices((24, 40)).sum(0)[:, :, None] * np.array([3, 2, 1]) % 256
PICTURE = Image.fromarray(PIXELS.astype(np.uint8))
EXACT = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}
KINDS = [kind for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")
         if kind not in ("WEBP", "AVIF") or features.check(kind.lower())]  # fmt: skip


def saved(kind: str, exif: bytes | Image.Exif = b"") -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, kind, **EXACT.get(kind, {}), **({"exif": exif} if exif else {}))
    return file.getvalue()


def entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack("<HHII", tag, kind, count, value)


def block(*entries: bytes, count: int | None = None, at: int = 8, after: bytes = b"") -> bytes:
    """A TIFF structure as EXIF holds it."""
    number = len(entries) if count is None else count
    head = b"II*\0" + struct.pack("<IH", at, number)
    return head + b"".join(entries) + struct.pack("<I", 0) + after


ODD = {
    "empty": b"II",
    "no TIFF": b"nothing like it at all",
    "cut in the header": block(entry(0x112, 3, 1, 6))[:6],
    "cut in an entry": block(entry(0x112, 3, 1, 6))[:15],
    "cut big TIFF": b"II+\0" + bytes(2),
    "far offset of the directory": block(entry(0x112, 3, 1, 6), at=2**32 - 1),
    "far offset of a value": block(entry(0x10F, 2, 100, 2**32 - 1), entry(0x11A, 5, 1, 2**31)),
    "more entries than there are": block(entry(0x10F, 2, 4, 0), count=65535),
    "unknown types": block(entry(0x10F, 99, 1, 1), entry(0x112, 65535, 1, 6)),
    "orientation 0": block(entry(0x112, 3, 1, 0)),
    "orientation 9": block(entry(0x112, 3, 1, 9)),
    "orientation x": block(entry(0x112, 2, 2, ord("x"))),
    "orientation as a fraction by zero": block(entry(0x112, 5, 1, 26), after=bytes(8)),
    "orientation as a float": block(entry(0x112, 11, 1, 0x3FC00000)),
    "orientation of no number": block(entry(0x112, 3, 0, 6)),
    "directories in a circle": block(entry(0x8769, 4, 1, 8), entry(0x8825, 4, 1, 8)),
}


def with_odd_exif(kind: str, odd: bytes) -> bytes:
    """A sound picture around that block, put in by hand where Pillow would look into it."""
    if kind == "JPEG":
        plain = saved(kind)
        segment = b"Exif\0\0" + odd
        return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]
    if kind != "AVIF":
        return saved(kind, odd)
    filler = Image.Exif()
    filler[0x10F] = "filler" * 40
    whole = saved(kind, filler)
    start, size = whole.index(b"filler") - 60, 0
    start = max(whole.rfind(mark, 0, whole.index(b"filler")) for mark in (b"II*\0", b"MM\0*"))
    size = whole.rindex(b"filler") - start
    return whole[:start] + odd[:size].ljust(size, b"\0") + whole[start + size :]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "TIFF"])
def test_odd_exif_costs_no_picture_and_turns_none(kind, odd):
    loaded = decode_picture(io.BytesIO(with_odd_exif(kind, ODD[odd])), "x")
    assert loaded.size == PICTURE.size
    assert np.abs(np.asarray(loaded).astype(int) - np.asarray(PICTURE)).max() <= 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_turns_as_before(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x112] = orientation
    exif[0x10F] = "maker"
    path = tmp_path / "x"
    path.write_bytes(saved(kind, exif))
    with Image.open(path) as picture:
        expected = ImageOps.exif_transpose(picture)
    assert expected.size == ((24, 40) if orientation > 4 else (40, 24))
    assert np.array_equal(np.asarray(load_picture(path)), np.asarray(expected))


def test_a_block_that_cannot_be_written_anew_is_turned_all_the_same():
    """What field reports are about: a good orientation beside tags of the wrong type."""
    bad = block(entry(0x112, 3, 1, 6), entry(0x11A, 2, 4, 0x41414141), entry(0x8769, 7, 3, 77))
    loaded = decode_picture(io.BytesIO(with_odd_exif("JPEG", bad)), "x")
    assert loaded.size == (24, 40)


@pytest.mark.parametrize("tag", [0x2BC, 0x8769, 0x8825, 0xA005, 0x11A, 0x128, 0x14A])
@pytest.mark.parametrize("form", [(3, 1, 6), (5, 1, 8), (7, 5, 2**31), (12, 1, 8), (3, 2, 7)])
def test_odd_tags_of_a_tiff_cost_no_picture(tag, form):
    plain = saved("TIFF")
    at = struct.unpack("<I", plain[4:8])[0]
    count = struct.unpack("<H", plain[at : at + 2])[0]
    entries = [plain[at + 2 + 12 * i :][:12] for i in range(count)]
    entries = sorted([e for e in entries if e[:2] != struct.pack("<H", tag)] + [entry(tag, *form)],
                     key=lambda e: struct.unpack("<H", e[:2])[0])  # fmt: skip
    odd = plain[:4] + struct.pack("<I", len(plain)) + plain[8:]
    odd += struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    assert np.array_equal(np.asarray(decode_picture(io.BytesIO(odd), "x")), np.asarray(PICTURE))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_random_blocks_cost_no_picture(kind):
    rng = random.Random(0)
    for _ in range(150):
        entries = [entry(rng.choice([0x112, 0x8769, 0x10F, 0x11A, 0x2BC]), rng.randrange(14),
                         rng.choice([0, 1, 2, 2**31]), rng.choice([6, 8, 26, 2**32 - 1]))
                   for _ in range(rng.randrange(1, 5))]  # fmt: skip
        odd = block(*entries, after=rng.randbytes(20))
        odd = odd[: rng.randrange(2, len(odd) + 1)]
        loaded = decode_picture(io.BytesIO(with_odd_exif(kind, odd)), "x")
        assert sorted(loaded.size) == [24, 40]


def test_a_png_whose_exif_has_a_wrong_checksum_is_read():
    exif = Image.Exif()
    exif[0x10F] = "maker"
    whole = saved("PNG", exif)
    at = whole.index(b"maker")
    broken = whole[:at] + b"MAKER" + whole[at + 5 :]
    assert np.array_equal(np.asarray(decode_picture(io.BytesIO(broken), "x")), np.asarray(PICTURE))


@pytest.mark.skipif("WEBP" not in KINDS, reason="this Pillow has no WebP")
@pytest.mark.parametrize("size", [4, 5000, None])
def test_a_webp_whose_exif_is_cut_or_of_a_wrong_length_is_read(size):
    exif = Image.Exif()
    exif[0x10F] = "maker"
    whole = saved("WEBP", exif)
    at = whole.index(b"EXIF")
    broken = (
        whole[: at + 15]
        if size is None
        else (whole[: at + 4] + struct.pack("<I", size) + whole[at + 8 :])
    )
    assert np.array_equal(np.asarray(decode_picture(io.BytesIO(broken), "x")), np.asarray(PICTURE))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_cut_picture_is_still_no_picture(kind):
    exif = Image.Exif()
    exif[0x10F] = "maker"
    whole = saved(kind, exif)
    at = len(whole) // 3
    raises_one_line(lambda: decode_picture(io.BytesIO(whole[:at]), "x"), "x is")


# --- formats ------------------------------------------------------------------------------------

WRITTEN = {".jfif": "JPEG", ".jpe": "JPEG", ".mpo": "MPO", ".jp2": "JPEG2000", ".j2k": "JPEG2000",
           ".avif": "AVIF", ".tga": "TGA", ".pcx": "PCX", ".ico": "ICO", ".dib": "DIB",
           ".qoi": "QOI", ".sgi": "SGI", ".pnm": "PPM", ".apng": "PNG", ".dds": "DDS"}  # fmt: skip


@pytest.mark.parametrize("ending", WRITTEN)
def test_what_pillow_opens_here_is_read(ending, tmp_path):
    Image.init()
    kind = WRITTEN[ending]
    libraries = {"AVIF": "avif", "JPEG2000": "jpg_2000"}
    if kind not in Image.SAVE or (kind in libraries and not features.check(libraries[kind])):
        assert kind in ("AVIF", "JPEG2000", "QOI"), "every Pillow has the others"
        pytest.skip(f"this Pillow has no {kind}")
    path = tmp_path / f"x{ending}"
    more = {"append_images": [PICTURE], "save_all": True} if kind == "MPO" else {}
    PICTURE.save(path, kind, **more)
    assert ending in SUFFIXES
    assert load_picture(path).mode == "RGB"


def test_no_decoder_that_starts_a_program_is_reached(tmp_path):
    assert not SUFFIXES & {".eps", ".ps", ".wmf", ".emf", ".pdf", ".svg"}
    for name, data in (("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
                       ("y.tga", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
                       ("z.bmp", b"\xd7\xcd\xc6\x9a" + bytes(40))):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        raises_one_line(lambda: load_picture(tmp_path / name), name)  # noqa: B023


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    (tmp_path / "l.png").symlink_to("nowhere")
    raises_one_line(lambda: load_picture(tmp_path / "p.png"), "p.png", "a pipe")
    raises_one_line(lambda: load_picture(tmp_path / "l.png"), "l.png", "leads nowhere")
    raises_one_line(lambda: load_picture(Path("/dev/null")), "/dev/null", "a device")


@pytest.mark.slow
def test_an_icon_that_holds_more_than_it_says_is_refused(tmp_path):
    big = io.BytesIO()
    Image.new("L", (10_500, 9_600)).save(big, "PNG")
    data = big.getvalue()
    head = struct.pack("<HHH", 0, 1, 1) + struct.pack(
        "<BBBBHHII", 16, 16, 0, 0, 1, 8, len(data), 22
    )
    (tmp_path / "x.ico").write_bytes(head + data)
    raises_one_line(lambda: load_picture(tmp_path / "x.ico"), "x.ico", "10500 x 9600 pixels")
