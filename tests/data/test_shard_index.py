"""An index that is not what this module wrote, signed or not, is one line."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from conftest import raises_one_line
from shard_files import png, write_tar

from asvit_deploy.data import shards
from asvit_deploy.sealed import SEAL

ENTRY = [("offset", "<i8"), ("size", "<i8"), ("label", "<u2")]
TAIL = b"[{}, {}, {}]"
PICTURE = png(1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "x" / "a.tar", [("a.png", PICTURE), ("a.cls", b"1")])
    (tmp_path / "x" / "classes.txt").write_text("cat\ndog\n")
    return tmp_path / "x"


def used(folder):
    found = shards.ShardPictures(folder)
    return [(found.load(i).size, found.label(i), found.name(i)) for i in range(len(found))]


def replaced(folder, records, tail=TAIL):
    """The folder with another index, signed as ours is."""
    (shard,) = shards.ShardPictures(folder)._shards
    file = io.BytesIO()
    np.save(file, records, allow_pickle=True)
    data = file.getvalue() + tail
    shard.index.write_bytes(data + hashlib.sha256(data).digest())
    shards._mapped.cache_clear()
    shards._noted.cache_clear()
    return folder


def good():
    return np.array([(512 * 2, len(PICTURE), 1)], ENTRY)


def entry(offset, size, label=1):
    return np.array([(offset, size, label)], ENTRY)


RECORDS = {
    "numbers": np.zeros(3, np.int64), "none at all": np.zeros((), ENTRY),
    "two ranks": np.zeros((1, 1), ENTRY), "by columns": np.asfortranarray(np.zeros((2, 2), ENTRY)),
    "objects": np.array([1, "a"], object), "before": entry(-5, 10), "no header": entry(0, 10),
    "beyond": entry(10**15, 10), "a size below zero": entry(512, -10),
    "a size of 2^62": entry(512, 2**62), "both": entry(2**63 - 1, 2**63 - 1),
    "narrow": np.zeros(1, [("offset", "<i4"), ("size", "<i8"), ("label", "<u2")]),
    "floats": np.zeros(1, [("offset", "<f8"), ("size", "<i8"), ("label", "<u2")]),
    "other names": np.zeros(1, [("place", "<i8"), ("size", "<i8"), ("label", "<u2")]),
    "big endian": np.zeros(1, [("offset", ">i8"), ("size", ">i8"), ("label", ">u2")]),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_another_kind(folder, name):
    replaced(folder, RECORDS[name])
    raises_one_line(lambda: used(folder), "index", "gone or damaged; delete it")


@pytest.mark.parametrize(
    "tail",
    [b"", b"[]", b"null", b"[" * 100_000, b'["a","b",{}]', b"[{},{}]", b"[{},{},{},{}]",
     b'[{"a":"x"},{},{}]', b'[{"a":' + b"9" * 5000 + b"},{},{}]", b'[{"a":NaN},{},{}]',
     b'[{"a":1.5},{},{}]', b'[{"a":-5},{},{}]', b'[{"a":true},{},{}]', b'[{},{},{"1024":1}]',
     b"[{},{},[]]", b"\xff\xfe"],
)  # fmt: skip
def test_accounts_of_another_kind(folder, tail):
    replaced(folder, good(), tail)
    raises_one_line(lambda: used(folder), "index", "gone or damaged; delete it")


def test_a_place_without_a_header_is_named_all_the_same(folder):
    """The index lies within bounds and says another place: the picture cannot be read."""
    replaced(folder, entry(700, 100))
    raises_one_line(lambda: used(folder), "a.tar:a member without a header")


def test_every_changed_byte_is_noticed(folder):
    (shard,) = shards.ShardPictures(folder)._shards
    data = shard.index.read_bytes()
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        shard.index.write_bytes(changed)
        shards._mapped.cache_clear()
        shards._noted.cache_clear()
        raises_one_line(lambda: used(folder), "gone or damaged; delete it")
    assert len(data) > SEAL
