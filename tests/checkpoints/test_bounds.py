"""Checkpoint files that claim, repeat or nest: one line, soon, and without the memory asked for."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

LOAD = "from asvit_deploy.checkpoints.load import load_checkpoint; load_checkpoint(path)"
START = b"\x80\x02"
LARGE = "holds too many objects"


def archive(path: Path, pickle: bytes, *more: tuple[str, bytes]) -> Path:
    """A zip file as torch.save writes it."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in (("data.pkl", pickle), ("byteorder", b"little"), ("version", b"3\n")):
            file.writestr(f"a/{name}", data)
        for name, data in more:
            file.writestr(f"a/{name}", data)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def doubled(start: bytes, pair: bytes, levels: int = 40) -> bytes:
    """Each level holds the one below twice; `pair` makes one of two on the stack."""
    return start + b"".join(
        b"q%ch%c%b" % (level, level, pair) for level in range(levels)
    )  # fmt: skip


TUPLES = doubled(b")", b"\x86")
LISTS = b"]" + b"".join(b"q%c](h%ch%ce" % (level, level, level) for level in range(40))
# All empty at first, then each put twice into the one before.
FILLED_LATER = (
    b"".join(text(f"k{i:02}") + b"]q%c" % i for i in range(40)) + b"u"
    + b"".join(text("z") + b"h%c(h%ch%ces" % (i, i - 1, i - 1) for i in range(39, 0, -1))
)  # fmt: skip
PICKLES = {
    "a tuple of tuples as a key": (b"}" + TUPLES + b"K\x01s", LARGE),
    "a set of tuples": (b"c__builtin__\nset\n]" + TUPLES + b"a\x85R", LARGE),
    "a list of lists": (b"}" + text("args") + b"}" + text("base_keep_rate") + LISTS + b"ss", LARGE),
    "the same filled later": (
        b"}" + text("args") + b"}(" + FILLED_LATER + text("base_keep_rate") + b"h\x27ss", "",
    ),
    "the same as a number": (
        b"}" + text("args") + b"}(" + FILLED_LATER + text("layer_norm_eps") + b"h\x27ss", "",
    ),
    "a list in itself": (
        b"}" + text("args") + b"}" + text("base_keep_rate") + b"]q\0h\0ass", "is no state dict",
    ),
    "an array of 47 GB": (
        b"}" + text("a") + b"c__builtin__\nbytearray\n\x8a\5\0\0\0\0\x0b\x85Rs", "bytearray",
    ),
    "a storage of 47 GB": (
        b"}" + text("a") + b"ctorch.storage\nUntypedStorage\n\x8a\5\0\0\0\0\x0b\x85Rs", "memory",
    ),
    "paths that double": (
        b"]" + doubled(b"cpathlib\nPosixPath\n" + text("a" * 10) + b"\x85R", b"", 0)
        + b"q\0a" + b"".join(
            b"cpathlib\nPosixPath\nh%ch%c\x86Rq%ca" % (i, i, i + 1) for i in range(40)
        ), LARGE,
    ),
    "a text encoded again and again": (
        b"](" + text("a" * 1_000_000) + b"q\0" + text("latin1") + b"q\1c_codecs\nencode\nq\2"
        + b"h\0h\1\x86q\3" + b"h\2h\3R" * 100_000 + b"e", LARGE,
    ),
    "10^6 keys": (b"}(" + b"".join(text(f"{i:06}") + b"K\1" for i in range(10**6)) + b"u", LARGE),
    "10^6 objects": (b"](" + b"\x8f" * 10**6 + b"e", LARGE),
    "a text of 50 MB": (text("a" * 50_000_000), LARGE),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_that_stands_for_more_than_it_holds(ends, tmp_path, kind):
    pickle, words = PICKLES[kind]
    said = ends(LOAD, archive(tmp_path / "x.pt", START + pickle + b"."))
    assert said.startswith(str(tmp_path / "x.pt")), said
    assert words in said


def test_a_pickle_of_the_old_format_is_weighed_too(ends, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    at = whole.index(b"ctorch._utils")
    path.write_bytes(whole[:at] + b"}" + TUPLES + b"K\x01s0" + whole[at:])
    assert LARGE in ends(LOAD, path)
    path.write_bytes(whole)
    assert "is no ViT" in ends(LOAD, path)


def test_names_without_end_and_too_many_networks(ends, tmp_path):
    value, path = torch.zeros(1), tmp_path / "x.pt"
    long = "module." * 200_000
    torch.save({f"{long}cls_token": value, f"{long}blocks.0.norm1.weight": value}, path)
    assert "has a name of 1,4" in ends(LOAD, path)
    many = {f"r{i}.{name}": value for i in range(5000)
            for name in ("cls_token", "blocks.0.norm1.weight")}  # fmt: skip
    torch.save(many, path)
    assert "holds 5000 networks" in ends(LOAD, path)


@pytest.mark.slow
def test_an_archive_that_claims_more_than_its_size(ends, tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", START + b"}.")
        file.writestr("a/data/0", bytes(1 << 28))
    assert "claims to hold more than its size" in ends(LOAD, path)


def test_a_tar_file_that_points_backwards_is_no_checkpoint(ends, tmp_path):
    header = bytearray(tarfile.TarInfo("sys_info").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + struct.pack(">h", -512)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.pth.tar").write_bytes(header + bytes(10_240))
    assert "is a tar file" in ends(LOAD, tmp_path / "x.pth.tar")


@pytest.mark.slow
@pytest.mark.parametrize("names", [99_000, 150_000, 1_000_000])
def test_a_safetensors_file_of_names_alone(ends, tmp_path, names):
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"k{i}": entry for i in range(names)}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert (LARGE if names > 100_000 else "is no ViT") in ends(LOAD, path)


def test_a_state_is_weighed_as_a_checkpoint_is(ends, tmp_path):
    code = "from asvit_deploy.training.state import load_state; load_state(path, None, {})"
    path = archive(tmp_path / "x.unfinished.pt", START + b"}" + TUPLES + b"K\x01s.")
    assert LARGE in ends(code, path)


@pytest.mark.slow
def test_the_largest_training_checkpoint_is_read(tmp_path):
    """A ViT-G's count of tensors, with an optimiser's two for each."""
    from asvit_deploy.checkpoints import bounds

    names = [f"module.blocks.{i}.mlp.fc1.{j}.weight" for i in range(40) for j in range(16)]
    state = {name: torch.zeros(4) for name in names}
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(4),
                   "exp_avg_sq": torch.zeros(4)} for i in range(len(names))}  # fmt: skip
    content = {"model": state, "model_ema": state, "optimizer": {"state": moments},
               "losses": [0.5 + i for i in range(100_000)]}  # fmt: skip
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        (tmp_path / "g.pt").write_bytes(file.getvalue())
        bounds.check(tmp_path / "g.pt")
