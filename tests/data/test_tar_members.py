"""Tar headers that point backwards, redirect sizes or nest: the walk goes forward, or ends."""

from __future__ import annotations

import io
import struct
import tarfile
from pathlib import Path

import pytest
from shard_files import png, samples, write_tar

from asvit_deploy.data.tar_members import Members

SCAN = (
    "import os; os.environ['XDG_CACHE_HOME'] = str(path.parent / 'cache')\n"
    "    from asvit_deploy.data.shards import ShardPictures; ShardPictures(path.parent)"
)


def header(name: str = "a.bin", size: bytes = b"0" * 11 + b"\0", kind: bytes = b"0") -> bytes:
    """A header with this field for its size, and a checksum that fits."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def below_zero(count: int) -> bytes:
    """A size in base 256."""
    return b"\xff" * 4 + struct.pack(">q", count)


def octal(count: int) -> bytes:
    return b"%011o\0" % count


def extra(kind: bytes, data: bytes) -> bytes:
    """A header whose data stands for what follows."""
    return header("extra", octal(len(data)), kind) + data + bytes(-len(data) % 512)


def record(key: str, value: str) -> bytes:
    """A pax record, with its own length in front."""
    rest, length = f" {key}={value}\n".encode(), 0
    while length != len(str(length)) + len(rest):
        length = len(str(length)) + len(rest)
    return b"%d%b" % (length, rest)


def shard(tmp_path: Path, *parts: bytes) -> Path:
    """A shard of one sample, then these blocks, then an end."""
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    path = write_tar(tmp_path / "0.tar", samples([("k", png(1), 1)]))
    body = path.read_bytes().rstrip(b"\0")
    path.write_bytes(body + bytes(-len(body) % 512) + b"".join(parts) + bytes(1024))
    return path


BAD = {
    "back to itself": [header(size=below_zero(-512))],
    "back to the start": [header(size=below_zero(-3000))],
    "back by an octal size": [header(size=b"-0000001000\0")],
    "as far as numbers go": [header(size=b"\x80" + b"\xff" * 11)],
    "beyond the end": [header(size=octal(8**11 - 1))],
    "a size of eight exbibytes": [header(size=b"\x80" + bytes(3) + struct.pack(">Q", 1 << 63))],
    "pax: below zero": [extra(b"x", record("size", "-512")), header()],
    "pax: no number": [extra(b"x", record("size", "1e3")), header()],
    "pax: too large a number": [extra(b"x", record("size", "9" * 400)), header()],
    "pax: below zero for all": [extra(b"g", record("size", "-512")), header()],
    "pax: header below zero": [header(size=below_zero(-512), kind=b"x")],
    "pax: header beyond the end": [header(size=octal(10**6), kind=b"x")],
    "pax: larger than any": [extra(b"x", record("comment", "a" * (2 << 20))), header()],
    "pax: digits": [extra(b"x", b"1" * 1_000_000), header()],
    "pax: record of no length": [extra(b"x", b"0 a=b\n"), header()],
    "pax: record beyond its header": [extra(b"x", b"999 a=b\n"), header()],
    "long name: below zero": [header(size=below_zero(-512), kind=b"L")],
    "long name: larger than any": [extra(b"L", b"a" * (2 << 20)), header()],
    "sparse: a map that never ends": [header(kind=b"S")[:482] + b"\1" + bytes(29)],
    "nothing after its header": [extra(b"x", record("path", "b"))],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_a_walk_through_a_shard_ends(ends, tmp_path, kind):
    parts = list(BAD[kind])
    if kind.startswith("sparse"):
        block = bytearray(parts[0])
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        parts = [bytes(block), b"\1" * 512 * 20]
    path = shard(tmp_path, *parts)
    if kind.startswith("sparse"):
        path.write_bytes(path.read_bytes()[:-1024])
    said = ends(SCAN, path, 128)
    assert said.startswith(f"the shard {path} is damaged or no tar file ("), said


FINE = {
    "digits in a record": [extra(b"x", record("comment", "1" * 900_000)), header()] * 5,
    "200,000 headers of headers": [extra(b"x", record("comment", "a"))] * 200_000 + [header()],
    "200,000 long names": [extra(b"L", b"name\0")] * 200_000 + [header()],
    "200,000 headers for all": [extra(b"g", record("comment", "a"))] * 200_000 + [header()],
    "a sparse map in its data": [
        extra(b"x", record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")
              + record("GNU.sparse.realsize", "9" * 12)),
        header(size=octal(512)), b"9" * 512,
    ],
    "an old sparse member": [header(kind=b"S", size=octal(512)), bytes(512)],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", FINE)
def test_a_shard_with_long_headers_is_read(ends, tmp_path, kind):
    assert ends(SCAN, shard(tmp_path, *FINE[kind]), 256) == "fine"


def test_a_pipe_or_a_device_in_place_of_a_shard(ends, tmp_path):
    path = shard(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "it is a device, a pipe or a socket" in ends(SCAN, path)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_those_that_tarfile_finds(tmp_path, form):
    path = tmp_path / "a.tar"
    long = "folder/" * (12 if form == tarfile.USTAR_FORMAT else 60)
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "for all"}) as tar:
        for name, size in (("a", 0), (f"{long}b.png", 700), ("ü\udcff.cls", 1), ("c", 512)):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = size, 1.5 if form == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(bytes(size)))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{long}{kind.decode()}")
            info.type, info.linkname = kind, f"{long}target"
            tar.addfile(info)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.isreg(), m.isdir(), m.offset_data, m.size) for m in tar]
    with open(path, "rb") as file:
        found = [(m.name, m.plain, m.folder, m.offset, m.size) for m in Members(file)]
    assert found == expected
    assert len(found) == 8
