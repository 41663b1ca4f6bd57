"""Every flipped byte is refused in one line or changes nothing."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import conftest
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from asvit_deploy import sidecar as artifact
from asvit_deploy.artefacts import bundle
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.damage import check_archive, digest
from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.checkpoints.reading import read
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError

MASKS = (0xFF, 0x01, 0x10, 0x20, 0x80)  # all bits, and those that turn names and flags into others


@contextlib.contextmanager
def flipped(path: Path, offset: int, mask: int) -> Iterator[None]:
    """One byte of a file is another one meanwhile."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        (byte,) = file.read(1)
        for value in (byte ^ mask, byte):
            file.seek(offset)
            file.write(bytes([value]))
            if value != byte:
                try:
                    yield
                except BaseException:
                    file.seek(offset)
                    file.write(bytes([byte]))
                    raise


def flips(path: Path, load: Callable[[Path], str], offsets: list[int]) -> Counter:
    """How often a flipped byte was refused, and how often it changed nothing; else it fails.

    Args:
        load: makes one text of all that a load yields.
    """
    before, counts = load(path), Counter()
    masks = random.Random(0)
    for offset in offsets:
        mask = masks.choice(MASKS)
        with flipped(path, offset, mask):
            try:
                after = load(path)
            except UserError as error:
                assert "\n" not in str(error)  # noqa: PT017
                counts["refused"] += 1
                continue
        assert after == before, f"byte {offset} ^ {mask:#x} changed what was loaded"
        counts["nothing"] += 1
    assert load(path) == before
    return counts


def loaded(path: Path) -> str:
    """All that a checkpoint yields: weights, architecture, facts and metadata."""
    found = load_checkpoint(path)
    metadata = sorted(found.metadata.items())
    rest = [found.config, found.adaptive, found.format, metadata, found.notes, found.lines]
    return digest(found.state) + repr(rest)


def content_of(path: Path) -> str:
    try:
        return digest(list(read(path)))
    except Refused as refused:  # which a load says behind the file's name
        raise UserError(str(refused)) from refused


def structure(path: Path) -> list[int]:
    """Offsets of all that is no member's content in a zip file, and of its small members."""
    size, spans = path.stat().st_size, []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if member.file_size > 1000:
                spans.append((start, start + member.file_size))
    inside = {offset for start, end in spans for offset in range(start, end)}
    return [offset for offset in range(size) if offset not in inside]


def sample(offsets: list[int], count: int) -> list[int]:
    return sorted(random.Random(count).sample(offsets, min(count, len(offsets))))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A torch.save file of every kind of member, in a few KB."""
    path = tmp_path / "small.pt"
    tensors = {"a": torch.arange(40.0), "b": torch.ones(3, dtype=torch.int64)}
    torch.save({"model": tensors, "epoch": 3, "args": {"lr": 1e-3, "names": ["x", "y"]}}, path)
    return path


@pytest.fixture
def released(mini_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "as_mini.pt"
    path.write_bytes(mini_checkpoint.read_bytes())
    return path


@pytest.fixture
def own(mini, tmp_path: Path) -> Path:
    path = tmp_path / "own.safetensors"
    save_checkpoint(path, mini, {"budget": "0.65", "classes": json.dumps(list("abcdefghij"))})
    return path


# --- torch.save ---------------------------------------------------------------------------------


def test_payload_of_a_released_checkpoint(released):
    counts = flips(released, loaded, sample(list(range(released.stat().st_size)), 60))
    assert counts["refused"] > 50


@pytest.mark.slow
def test_structure_of_a_released_checkpoint(released):
    places = structure(released)
    counts = flips(released, loaded, [*sample(places, 60), *places[-60:]])
    assert counts["refused"] > 30


def test_bytes_of_a_small_file(small):
    counts = flips(small, content_of, sample(list(range(small.stat().st_size)), 500))
    assert counts["refused"] > 200


@pytest.mark.slow
def test_every_byte_of_a_small_file(small):
    flips(small, content_of, [*range(small.stat().st_size)] * 3)


def test_a_member_that_is_taken_for_a_folder(small):
    """Torch reads none of it, and hands out whatever lay in memory."""
    data = small.read_bytes()
    entry = data.index(b"PK\x01\x02")
    while entry >= 0:
        with flipped(small, entry + 38, 0x10):
            conftest.raises_one_line(lambda: content_of(small), "damaged")
        entry = data.find(b"PK\x01\x02", entry + 1)


def rezipped(path: Path, compression: int = zipfile.ZIP_STORED, twice: str = "") -> Path:
    """The same members, written by another program."""
    target = path.with_name("rezipped.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
            if name.endswith(twice or "\0"):
                with pytest.warns(UserWarning, match="Duplicate"):
                    new.writestr(name, bytes(len(old.read(name))))
    return target


def test_archives_that_torch_would_not_write(small):
    assert content_of(rezipped(small)) == content_of(small)
    packed = rezipped(small, zipfile.ZIP_DEFLATED)
    conftest.raises_one_line(lambda: content_of(packed), "compressed", "save it again")
    double = rezipped(small, twice="/data/0")
    conftest.raises_one_line(lambda: content_of(double), "two members of one name")


def test_other_cuts_and_additions(small):
    data = small.read_bytes()
    for damaged in (data + b"\0", data + b"PK", data[:-1], b"\0" + data, data[:2000] + data[2064:],
                    data[:1024] + bytes(512) + data[1536:]):  # fmt: skip
        small.write_bytes(damaged)
        conftest.raises_one_line(lambda: content_of(small))


@pytest.mark.slow
def test_a_compressed_bomb_is_not_unpacked(small, tmp_path):
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(small) as old, zipfile.ZipFile(bomb, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("small/data/9", bytes(1 << 28), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1 << 20
    conftest.raises_one_line(lambda: content_of(bomb), "claims to hold more than its size")


@pytest.mark.parametrize("how", ["old", "unsummed"])
def test_files_without_checksums_load_and_say_so(released, tmp_path, how):
    content = torch.load(released, weights_only=False)
    path = tmp_path / "plain.pt"
    if how == "old":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(content, path)
        finally:
            torch.serialization.set_crc32_options(True)
    found = load_checkpoint(path)
    assert digest(found.state) == digest(load_checkpoint(released).state)
    (line,) = [line for line in found.lines if "has no checksums" in line]
    assert str(path) in line
    assert not any("has no checksums" in line for line in load_checkpoint(released).lines)


def test_what_is_no_zip_file_is_left_to_torch(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"anything")
    with open(path, "rb") as file:
        assert check_archive(file) is False
        assert file.tell() == 0


# --- our own .safetensors -----------------------------------------------------------------------


def header(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.slow
@pytest.mark.parametrize("sidecar", [True, False])
def test_our_own_safetensors(own, sidecar):
    if not sidecar:
        artifact.sidecar_path(own).unlink()
    size, end = own.stat().st_size, header(own)
    counts = flips(own, loaded, [*sample(list(range(end)), 120), *sample([*range(end, size)], 40)])
    assert counts["refused"] > 155


@pytest.mark.slow
def test_every_byte_of_its_header(own):
    artifact.sidecar_path(own).unlink()
    flips(own, loaded, list(range(header(own))))


def test_what_the_file_says_of_itself(own):
    """The names and values by which it is known as ours, each byte."""
    artifact.sidecar_path(own).unlink()
    data = own.read_bytes()
    for words in (b'"format":"asvit-deploy"', b'"content_sha256":"', b'"content_sha256_covers":"',
                  b'"schema":"1"', b'"__metadata__"'):  # fmt: skip
        start = data.index(words)
        flips(own, loaded, list(range(start, start + len(words))))


def test_weights_that_another_program_changed(own):
    artifact.sidecar_path(own).unlink()
    with safe_open(own, "pt") as file:
        metadata = file.metadata()
    tensors = {key: value.clone() for key, value in safetensors.torch.load_file(own).items()}
    tensors["head.bias"] += 1
    safetensors.torch.save_file(tensors, own, metadata)
    conftest.raises_one_line(lambda: load_checkpoint(own), str(own), "its digest differs")


def test_files_of_earlier_versions_have_no_digest(own, tmp_path):
    with safe_open(own, "pt") as file:
        metadata = {k: v for k, v in file.metadata().items() if "sha256" not in k}
    before = tmp_path / "before.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(own), before, metadata)
    old, new = load_checkpoint(before), load_checkpoint(own)
    assert digest(old.state) == digest(new.state)
    assert old.metadata == new.metadata == metadata


@pytest.mark.slow
def test_the_packaged_checkpoint_has_its_sidecar(tmp_path):
    path = tmp_path / "digits.safetensors"
    source, sidecar = default_checkpoint(), artifact.sidecar_path
    path.write_bytes(source.read_bytes())
    sidecar(path).write_bytes(sidecar(source).read_bytes())
    end = header(path)
    start = path.read_bytes().index(b'"format":"asvit-deploy"')
    counts = flips(path, loaded, [*sample(list(range(end)), 60), *range(start, start + 23)])
    assert counts["refused"] == 83


# --- sidecars and manifests ---------------------------------------------------------------------


def fields_of(path: Path) -> str:
    return repr(artifact.read(path))


@pytest.mark.slow
def test_an_artefact_and_its_sidecar(tmp_path):
    path = tmp_path / "x.onnx"
    artifact.write(path, bytes(range(256)), {"kind": "onnx", "thresholds": [0.5], "name": "ü"})
    assert flips(path, fields_of, list(range(0, 256, 10))) == {"refused": 26}
    sidecar = artifact.sidecar_path(path)
    flips(sidecar, lambda _: fields_of(path), list(range(sidecar.stat().st_size)))


def test_a_bundle(tmp_path):
    folder = tmp_path / "m.bucketed"
    bundle.write(folder, {"a.bin": b"one"}, {"kind": "bucketed", "buckets": [2, 5]})
    for file in folder.iterdir():
        flips(file, lambda _: repr(bundle.read(folder)), list(range(file.stat().st_size)))


@pytest.mark.parametrize("files", [{"../x": "00"}, {"/etc/passwd": "00"}, {"": "00"}, [], 3])
def test_a_manifest_names_plain_files(tmp_path, files):
    folder = tmp_path / "m.bucketed"
    folder.mkdir()
    text = artifact.signed({"kind": "bucketed", "files": files})
    (folder / bundle.MANIFEST).write_text(text)
    conftest.raises_one_line(lambda: bundle.read(folder), "manifest", "make m.bucketed again")
    conftest.raises_one_line(lambda: bundle.check_target(folder, "bucketed", True))


def test_a_sidecar_of_endless_brackets(tmp_path):
    path = tmp_path / "x.onnx"
    artifact.write(path, b"x", {"kind": "onnx"})
    artifact.sidecar_path(path).write_text("[" * 100_000)
    conftest.raises_one_line(lambda: artifact.read(path), "not a sidecar")
