"""Two commands and one output without --force: one succeeds, the other says why not."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

from asvit_deploy import sidecar as artifact
from asvit_deploy.checkpoints.load import load_checkpoint

EXPORT = ("export", "--ckpt", "default", "-o", "x.onnx")
CALIBRATE = ("calibrate", "--ckpt", "default", "--limit", "8", "-o", "x.safetensors")


@pytest.mark.parametrize("options", [EXPORT, CALIBRATE])
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_another_run_is_making(cli, options, force):
    output = options[-1]
    with open(f".{output}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = cli(*options, *["--force"] * force)
    conftest.refused(result, f"another run is making {output}; wait for it, or name another")
    assert not Path(output).exists()


def test_a_report_that_another_run_is_making(cli):
    path = "m.onnx"
    with open(".x.json.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        conftest.refused(cli("bench", path, "-o", "x.json"), "another run is making x.json")
        evaluate = ("evaluate", path, "--data", "digits", "-o", "x.json")
        conftest.refused(cli(*evaluate), "another run is making x.json")
    assert not Path("x.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [EXPORT, CALIBRATE])
@pytest.mark.parametrize("late", ["", ".json"])
def test_what_comes_during_the_run_stays(cli, options, late, monkeypatch):
    real, mine = artifact.write, Path(options[-1] + late)

    def write(*args) -> None:
        mine.write_text("mine")
        real(*args)

    monkeypatch.setattr(artifact, "write", write)
    conftest.refused(cli(*options), f"{mine} exists already; pass --force")
    assert mine.read_text() == "mine"
    assert [path.name for path in Path().iterdir()] == [mine.name]


@pytest.mark.slow
@pytest.mark.parametrize("options", [EXPORT, CALIBRATE])
@pytest.mark.parametrize("force", [False, True])
def test_two_at_once(options, force, tmp_path):
    command = [sys.executable, "-m", "asvit_deploy", *options, *["--force"] * force]
    runs = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for _ in range(2)
    ]  # fmt: skip
    said = [run.communicate(timeout=200)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 2] or (force and codes == [0, 0]), said
    for code, text in zip(codes, said):
        errors = [line for line in text.splitlines() if line.startswith("Error:")]
        assert len(errors) == (code == 2)
        assert "Traceback" not in text
        assert all("another run" in line or "exists already" in line for line in errors)
    output = tmp_path / options[-1]
    assert artifact.read(output)["kind"] in ("onnx", "checkpoint")
    assert {path.name for path in tmp_path.iterdir()} == {output.name, f"{output.name}.json"}
    if options is CALIBRATE:
        assert load_checkpoint(output).adaptive
