"""An artefact and its sidecar go together, and neither replaces a file of somebody else."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asvit_deploy import sidecar
from asvit_deploy.errors import UserError

KINDS = [("x.onnx", "onnx"), ("x.engine", "engine"), ("x.safetensors", "checkpoint")]


def refusal(path: Path, kind: str, force: bool, source: Path | None = None) -> str:
    """What `check_target` says, in one line."""
    with pytest.raises(UserError) as error:
        sidecar.check_target(path, kind, force, source)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_target_that_is_free(tmp_path: Path, name: str, kind: str) -> None:
    sidecar.check_target(tmp_path / name, kind, force=False)
    assert list(tmp_path.iterdir()) == []  # it only looks


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_either_file_in_the_way_needs_force(tmp_path: Path, name: str, kind: str) -> None:
    target = tmp_path / name
    for file in (target, sidecar.sidecar_path(target)):
        file.write_text("mine")
        said = refusal(target, kind, force=False)
        assert said == f"{file} exists already; pass --force to replace it"
        sidecar.check_target(target, kind, force=True)
        file.unlink()


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_another_ending_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    """`find` would not see the artefact again."""
    for other, _ in (*KINDS, ("x", ""), (f"{name}.tmp", "")):
        if other != name:
            said = refusal(tmp_path / other, kind, force=True)
            assert str(tmp_path / other) in said
            assert said.endswith(f"a name in {Path(name).suffix}")


def test_neither_file_replaces_the_input(tmp_path: Path) -> None:
    target = tmp_path / "x.onnx"
    for source in (target, sidecar.sidecar_path(target)):
        source.write_text("weights")
        assert "is the input itself" in refusal(target, "onnx", True, source)
        source.unlink()


def test_folder_in_the_sidecars_place(tmp_path: Path) -> None:
    (tmp_path / "x.onnx.json").mkdir()
    assert "x.onnx.json: it is a folder" in refusal(tmp_path / "x.onnx", "onnx", force=True)


KILLED = """
import os, signal, sys
from pathlib import Path
from asvit_deploy import sidecar
real, left = os.replace, [int(sys.argv[2])]
def replace(*paths):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(*paths)
os.replace = replace
sidecar.write(Path(sys.argv[1]), b"new", {"kind": "onnx", "text": "new"})
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_before_each_rename(tmp_path: Path, renames: int) -> None:
    path = tmp_path / "x.onnx"
    sidecar.write(path, b"old", {"kind": "onnx", "text": "old"})
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(renames)])
    assert done.returncode == -signal.SIGKILL
    if renames == 0:
        assert sidecar.read(path)["text"] == "old"
        assert path.read_bytes() == b"old"
    else:
        with pytest.raises(UserError, match=r"does not belong to .*make it again") as error:
            sidecar.read(path)
        assert "\n" not in str(error.value)
    sidecar.write(path, b"newer", {"kind": "onnx", "text": "newer"})  # and the next one mends it
    assert sidecar.read(path)["text"] == "newer"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.onnx", "x.onnx.json"]


def test_disk_full_at_the_last_moment_leaves_the_old_pair(tmp_path, monkeypatch) -> None:
    """Some file systems find out only when a file is synced: here the second of the two."""
    path = tmp_path / "x.onnx"
    sidecar.write(path, b"old", {"kind": "onnx", "text": "old"})
    real, synced = os.fsync, []

    def fsync(file: int) -> None:
        synced.append(file)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="No space left"):
        sidecar.write(path, b"new", {"kind": "onnx", "text": "new"})
    assert sidecar.read(path)["text"] == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.onnx", "x.onnx.json"]
