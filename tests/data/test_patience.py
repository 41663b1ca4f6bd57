"""Pictures that take for ever: markers, chunks, scans and numbers without end."""

from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asvit_deploy.data import patience
from asvit_deploy.data.decode import PictureError, decode_picture, load_picture

READ = (
    "from asvit_deploy.data import decode, patience; patience.SECONDS = 2; "
    "decode.load_picture(path)"
)


def saved(kind: str, size=(16, 16), mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*more: bytes) -> bytes:
    whole = saved("PNG")
    return whole[:33] + b"".join(more) + whole[33:]


@functools.cache
def bomb(mebibytes: int = 1000) -> bytes:
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(mebibytes)) + packer.flush()


@functools.cache
def scanned() -> bytes:
    whole = saved("JPEG", (7000, 7000), "L", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2][:40]
    return whole[:-2] + last * 20_000 + b"\xff\xd9"


FRAME = b",\0\0\0\0\1\0\1\0\0\2\2D\1\0"
GIF = b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff"
JPEG = saved("JPEG")
FILES = {
    "text.png": lambda: png(chunk(b"zTXt", b"x\0\0" + bomb())),
    "profile.png": lambda: png(chunk(b"iCCP", b"x\0\0" + bomb())),
    "chunks.png": lambda: png(chunk(b"tEXt", b"a\0b") * 500_000),
    "frames.gif": lambda: GIF + FRAME * 1_000_000 + b";",
    "screen.gif": lambda: b"GIF89a\xff\xff\xff\xff" + GIF[10:] + FRAME + b";",
    "comments.gif": lambda: GIF + b"!\xfe\1a\0" * 500_000 + FRAME + b";",
    "scans.jpg": scanned,
    "markers.jpg": lambda: JPEG[:2] + b"\xff" * 60_000_000 + JPEG[2:],
    "ones.jpg": lambda: b"\xff" * 20_000_000,
    "started.jpg": lambda: b"\xff\xd8" + b"\xff" * 20_000_000,
    "values.ppm": lambda: b"P3 5000 5000 255\n" + b"0 " * 75_000_000,
    "comments.ppm": lambda: b"P3 1000 1000 255\n" + b"#a\n" * 20_000_000 + b"0 " * 3_000_000,
    "short comments.ppm": lambda: b"P6 " + b"#a\n" * 6_000_000 + b"9 9 255\n" + bytes(243),
    "one comment.ppm": lambda: b"P6 #" + b"a" * 60_000_000 + b"\n9 9 255\n" + bytes(243),
    "spaces.ppm": lambda: b"P6" + b" " * 60_000_000 + b"9 9 255\n" + bytes(243),
    "chunks behind odd exif.png": lambda: png(
        chunk(b"eXIf", b"MM")[:-1] + b"x", chunk(b"tEXt", b"a\0b") * 500_000
    ),
    "boxes.jp2": lambda: (
        b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 " + b"\0\0\0\x08free" * 1_000_000
    ),
    "itself.jp2": lambda: (
        b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 \0\0\0\0jp2 " + b"\0\0\0\x01free" + bytes(8)
    ),
}


def test_no_picture_is_read_for_longer_than_its_decoding_takes():
    assert 2 < patience.SECONDS <= 8


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_picture_without_end_ends(ends, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name]())
    said = ends(READ, path, 600, seconds=9)  # two of patience, and what decoding takes
    assert said == "fine" or said.startswith(str(path))


def test_scans_are_counted(tmp_path):
    path = tmp_path / "scans.jpg"
    path.write_bytes(scanned())
    with pytest.raises(PictureError, match=r"goes through its 7000 x 7000 pixels 2\d{4} times"):
        load_picture(path)
    path.write_bytes(saved("JPEG", (3000, 3000), progressive=True))
    assert load_picture(path).size == (3000, 3000)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.ppm"])
def test_parsing_is_given_up_when_its_time_is_over(tmp_path, monkeypatch, name):
    monkeypatch.setattr(patience, "SECONDS", -1)
    data = {"a.jpg": JPEG, "a.png": png(), "a.ppm": saved("PPM")}[name]
    (tmp_path / name).write_bytes(data)
    for read in (lambda: load_picture(tmp_path / name),
                 lambda: decode_picture(io.BytesIO(data), name, Path(name).suffix)):  # fmt: skip
        with pytest.raises(PictureError, match="s to read; save it again") as caught:
            read()
        assert caught.value.reason == "too long"


def test_a_pipe_that_takes_a_pictures_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(Exception, match="no regular file"):
        decode_picture(tmp_path / "a.png", "a.png", ".png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_strips_on_white_are_the_whole_on_white(mode):
    rng = np.random.default_rng(0)
    whole = Image.fromarray(rng.integers(0, 256, (700, 90, 4), np.uint8), "RGBA").convert(mode)
    file = io.BytesIO()
    whole.save(file, "PNG", **({"transparency": 7} if mode == "P" else {}))
    layer = Image.open(file).convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    expected = np.asarray(Image.alpha_composite(white, layer).convert("RGB"))
    assert np.array_equal(np.asarray(decode_picture(file, "a", ".png")), expected)
