"""Folders with a manifest: whole, ours and unchanged, or refused in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asvit_deploy.artefacts import bundle
from asvit_deploy.errors import UserError

FILES = {"a.bin": b"one", "b.bin": b"two"}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "m.bucketed"
    bundle.write(path, FILES, {"kind": "bucketed", "buckets": [2, 5]})
    return path


def refused(words, call, *args):
    with pytest.raises(UserError, match=words) as error:
        call(*args)
    assert "\n" not in str(error.value)


def test_write_and_read(folder):
    fields = bundle.read(folder)
    assert (fields["kind"], fields["buckets"]) == ("bucketed", [2, 5])
    assert set(fields["files"]) == set(FILES)
    assert {p.name for p in folder.iterdir()} == {*FILES, "manifest.json"}
    assert [p.name for p in folder.parent.iterdir()] == ["m.bucketed"]


def test_replaces_the_whole_folder(folder):
    bundle.write(folder, {"c.bin": b"three"}, {"kind": "bucketed"})
    assert {p.name for p in folder.iterdir()} == {"c.bin", "manifest.json"}
    assert [p.name for p in folder.parent.iterdir()] == ["m.bucketed"]
    assert list(bundle.read(folder)["files"]) == ["c.bin"]


def test_reading_refuses(folder, tmp_path):
    refused("gone does not exist", bundle.read, tmp_path / "gone")
    refused("holds no manifest.json", bundle.read, tmp_path)
    (folder / "a.bin").write_bytes(b"other")
    refused(r"a\.bin was changed.*make m\.bucketed again", bundle.read, folder)
    (folder / "a.bin").unlink()
    refused(r"a\.bin is missing.*make m\.bucketed again", bundle.read, folder)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace("2,", "3,"))
    refused(r"manifest\.json was edited", bundle.read, folder)
    manifest.write_text(text.replace('"schema": 1', '"schema": 2'))
    refused("has schema 2", bundle.read, folder)
    for content in ("", "[]", "{", "{}"):
        manifest.write_text(content)
        refused("is not a manifest of this tool", bundle.read, folder)


def test_target(folder, tmp_path):
    bundle.check_target(tmp_path / "free.bucketed", "bucketed", False)
    bundle.check_target(folder, "bucketed", True)
    refused(r"exists already; pass --force", bundle.check_target, folder, "bucketed", False)
    refused(r"a name in \.bucketed", bundle.check_target, tmp_path / "x.engine", "bucketed", True)
    refused(r"no/such/x\.bucketed: the folder .*no/such does not exist", bundle.check_target,
            tmp_path / "no/such" / "x.bucketed", "bucketed", True)  # fmt: skip
    file = tmp_path / "file.bucketed"
    file.touch()
    refused("is a file", bundle.check_target, file, "bucketed", True)


def test_force_spares_what_is_not_ours(folder, tmp_path):
    foreign = tmp_path / "photos.bucketed"
    foreign.mkdir()
    (foreign / "holiday.jpg").touch()
    refused("not a folder that this tool made", bundle.check_target, foreign, "bucketed", True)
    (folder / "notes.txt").touch()
    refused(r"holds notes\.txt", bundle.check_target, folder, "bucketed", True)
    assert (folder / "notes.txt").exists()


def test_a_failure_leaves_the_old_folder(folder, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    refused("No space left", bundle.write, folder, FILES, {"kind": "bucketed"})
    assert set(bundle.read(folder)["files"]) == set(FILES)
    assert [p.name for p in folder.parent.iterdir()] == ["m.bucketed"]


HALF_WRITER = """
import sys, time
from pathlib import Path
from asvit_deploy.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as temporary:
    (temporary / "a.bin").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(60)
"""


def test_the_next_run_sweeps_what_a_killed_one_left_and_no_living_one_s(tmp_path):
    folder = tmp_path / "m.bucketed"
    writers = [
        subprocess.Popen([sys.executable, "-c", HALF_WRITER, folder], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"half\n"
        before = {path.name for path in tmp_path.iterdir()}
        assert len(before) == 2
        writers[0].kill()
        writers[0].wait()
        bundle.write(folder, FILES, {"kind": "bucketed"})
        left = {path.name for path in tmp_path.iterdir()} - {"m.bucketed"}
        assert len(left) == 1
        assert left < before
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    bundle.write(folder, FILES, {"kind": "bucketed"})
    assert [path.name for path in tmp_path.iterdir()] == ["m.bucketed"]


@pytest.mark.parametrize("renamed", [False, True])
def test_ctrl_c_between_the_two_renames_leaves_the_old_folder(folder, monkeypatch, renamed):
    """Before the new folder took its place, or in the moment after the old one left."""
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(target)
        if len(calls) == 2 - renamed:
            if renamed:
                real(self, target)
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        bundle.write(folder, {"c.bin": b"three"}, {"kind": "bucketed"})
    assert set(bundle.read(folder)["files"]) == set(FILES)
    assert [p.name for p in folder.parent.iterdir()] == ["m.bucketed"]


@pytest.mark.parametrize("hours", [0, 2])
def test_what_a_killed_run_of_an_earlier_version_left(folder, hours):
    """It is named by process number and has no lock, so that only its age shows it."""
    left = {f".m.bucketed.{os.getpid()}.{ending}" for ending in ("tmp", "old.tmp")}
    for name in left:
        old = folder.with_name(name)
        old.mkdir()
        (old / "a.bin").touch()
        for path in (old / "a.bin", old):
            os.utime(path, (time.time() - 3600 * hours,) * 2)
    bundle.write(folder, {"c.bin": b"three"}, {"kind": "bucketed"})
    assert list(bundle.read(folder)["files"]) == ["c.bin"]
    rest = set() if hours else left
    assert {p.name for p in folder.parent.iterdir()} == {"m.bucketed", *rest}
