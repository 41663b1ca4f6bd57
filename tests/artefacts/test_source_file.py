"""The way back from an artefact to the checkpoint it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import raises_one_line, signed_copy

from asvit_deploy import sidecar
from asvit_deploy.artefacts.reference import source_file
from asvit_deploy.checkpoints import default_checkpoint


@pytest.fixture
def hub(tmp_path):
    """A hub's cache: the name is a link to a file that is called by its digest."""
    blob = tmp_path / "hub" / "blobs" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"weights" * 1000)
    link = tmp_path / "hub" / "snapshots" / "1" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    work = tmp_path / "work"
    work.mkdir()
    return blob, link, work / "model.onnx"


def found(made: Path, record) -> Path:
    return source_file(made, record, "checkpoint", "export")


def test_a_link_and_its_blob_are_both_recorded(hub):
    blob, link, made = hub
    record = sidecar.source_of(link)
    assert (record["path"], record["given"]) == (str(blob), str(link))
    assert record["size"] == 7000
    assert found(made, record) == link  # what lies beside it, such as a config, is found there
    link.unlink()
    assert found(made, record) == blob


def test_a_link_that_became_a_file_is_found(hub):
    blob, link, made = hub
    record = sidecar.source_of(link)
    data = blob.read_bytes()
    link.unlink()
    blob.unlink()
    link.write_bytes(data)
    assert found(made, record) == link


@pytest.mark.parametrize("name", ["model.safetensors", "ab" * 32, "renamed.bin"])
def test_a_copy_beside_the_artefact_is_found_under_any_name(hub, tmp_path, name):
    _, link, made = hub
    record = sidecar.source_of(link)
    copy = made.with_name(name)
    shutil.copyfile(link, copy)
    shutil.rmtree(tmp_path / "hub")
    assert found(made, record) == copy
    moved = made.parent.rename(tmp_path / "moved")  # and with its folder
    assert found(moved / made.name, record) == moved / name


def test_another_file_of_the_same_size_is_none(hub, tmp_path):
    _, link, made = hub
    record = sidecar.source_of(link)
    made.with_name("other.bin").write_bytes(b"WEIGHTS" * 1000)
    shutil.rmtree(tmp_path / "hub")
    raises_one_line(lambda: found(made, record), "model.safetensors", "is gone")
    made.with_name("model.safetensors").write_bytes(b"trained on")
    raises_one_line(lambda: found(made, record), "changed since")


def test_only_files_of_the_recorded_size_are_read(hub, tmp_path, monkeypatch):
    from asvit_deploy.artefacts import reference

    _, link, made = hub
    record = sidecar.source_of(link)
    shutil.copyfile(link, made.with_name("renamed.bin"))
    for i in range(5):
        made.with_name(f"other{i}.bin").write_bytes(bytes(8000 + i))
    shutil.rmtree(tmp_path / "hub")
    read = []
    monkeypatch.setattr(reference, "sha256", lambda path: read.append(path) or record["sha256"])
    assert found(made, record).name == "renamed.bin"
    assert [path.name for path in read] == ["renamed.bin"]


def test_the_packaged_checkpoint_is_found_in_another_installation(tmp_path):
    record = sidecar.source_of(default_checkpoint())
    elsewhere = "/another/site-packages/" + default_checkpoint().name
    record |= {"path": elsewhere, "given": elsewhere}
    assert found(tmp_path / "a.onnx", record) == default_checkpoint()


def test_an_older_sidecar_names_path_and_digest_alone(hub):
    blob, link, made = hub
    record = {key: sidecar.source_of(link)[key] for key in ("path", "sha256")}
    assert found(made, record) == blob
    blob.rename(made.with_name(blob.name))
    assert found(made, record) == made.with_name(blob.name)


def test_check_finds_a_checkpoint_that_was_a_link(cli, tmp_path, mini_artifacts, mini_checkpoint):
    store = tmp_path / "blobs" / "digest"
    store.parent.mkdir()
    shutil.copyfile(mini_checkpoint, store)
    link = tmp_path / "mini.pt"
    link.symlink_to(store)
    source = {**sidecar.source_of(link), "format": "as-vit", "ema": False}
    made = signed_copy(mini_artifacts["1", "auto"], tmp_path / "mini.onnx", source=source)
    link.unlink()
    store.rename(tmp_path / "mine.pt")
    result = cli("check", made, "--limit", 2, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)[0]["parity"]["images"] == 2
