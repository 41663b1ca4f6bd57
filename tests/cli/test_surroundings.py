"""What a container is like: no home, no name, nowhere to keep anything; and what we leave there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import _SEVERAL, Result
from PIL import Image

import asvit_deploy

UNKNOWN = 54321  # no user of any system


@pytest.fixture(scope="module")
def stranger() -> list[str]:
    """The start of a command line whose process has a number and no name, and may read only."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user, and with setpriv")
    read = "+dac_read_search"  # the interpreter may lie in a closed home
    prefix = ["setpriv", f"--reuid={UNKNOWN}", f"--regid={UNKNOWN}", "--clear-groups",
              f"--inh-caps={read}", f"--ambient-caps={read}"]  # fmt: skip
    code = "import pathlib, os; os.environ.pop('HOME', 0); pathlib.Path.home()"
    done = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True)
    if "RuntimeError" not in done.stderr:
        pytest.skip("setpriv may not make a user without a name here")
    return prefix


@pytest.fixture
def run(stranger: list[str], tmp_path: Path) -> Callable[..., list[Result]]:
    """Run command lines in a folder that the stranger may write, all in one process."""
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(0o777)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.getuid() and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)

    def started(environment: dict[str, str], *commands: list[object]) -> list[Result]:
        kept = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "TMPDIR")}
        done = subprocess.run(
            [*stranger, sys.executable, "-c", _SEVERAL], cwd=work, capture_output=True, text=True,
            input=json.dumps([list(map(str, args)) for args in commands]),
            env={**kept, "OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [Result(*result) for result in json.loads(done.stdout)]

    return started


@pytest.fixture
def places(tmp_path: Path) -> dict[str, dict[str, str]]:
    """Environments in which nothing can be kept."""
    readonly = tmp_path / "readonly"
    readonly.mkdir(mode=0o555)
    full = tmp_path / "file"
    full.touch()
    return {
        "no home": {},
        "absent": {"HOME": "/nonexistent"},
        "read-only": {"HOME": str(readonly)},
        "cache is a file": {"HOME": "/nonexistent", "XDG_CACHE_HOME": str(full)},
        "cache is read-only": {"HOME": "/nonexistent", "XDG_CACHE_HOME": str(readonly)},
    }


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (80, 60), (200, 30, 90)).save(path)
    return path


WAYS = ["no home", "absent", "read-only", "cache is a file", "cache is read-only"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_models_run_where_nothing_can_be_kept(run, places, way, picture, tmp_path, mini_artifacts):
    model = tmp_path / "model.onnx"
    for ending in ("", ".json"):
        shutil.copyfile(f"{mini_artifacts['1', 'auto']}{ending}", f"{model}{ending}")
    predict, build = run(
        places[way], ["predict", model, picture, "--json"], ["build-plugins", "ort"]
    )
    assert predict.code == 0, predict.err
    assert len(json.loads(predict.out)[0]["top"]) == 5
    lines = [line for line in predict.err.splitlines() if "no library" in line]
    # One line where there can be none; where there might be, there simply is none.
    assert len(lines) == (way == "no home"), predict.err
    # What needs the cache says so.
    assert build.code == 2
    assert build.err.count("Error:") == 1
    assert "XDG_CACHE_HOME" in build.err
    assert "Traceback" not in build.err


@pytest.mark.slow
def test_every_command_goes_on_without_a_home(run, places):
    digits = ["--data", "digits", "--limit", "20"]
    commands: dict[str, list[object]] = {
        "export": ["export", "--ckpt", "default", "-o", "model.onnx"],
        "check": ["check", "model.onnx", "--limit", 2],
        "bench": ["bench", "model.onnx", "--runs", 10, "--warmup", 0, "--limit", 2, "--threads", 1],
        "evaluate": ["evaluate", "model.onnx", *digits],
        "doctor": ["doctor", "--json"],
    }
    results = dict(zip(commands, run(places["no home"], *commands.values())))
    for name, result in results.items():
        assert "Traceback" not in result.err, name
        if name != "doctor":
            assert result.code == 0, (name, result.err)
    rows = {row["name"]: row for row in json.loads(results["doctor"].out)}
    assert rows["op library"]["detail"] == "there is no home folder"
    assert "XDG_CACHE_HOME" in rows["op library"]["remedy"]
    assert rows["TensorRT plugin"]["status"] == "missing"
    assert not [row for row in rows.values() if "could not be looked at" in row["detail"]]


@pytest.mark.parametrize("way", ["no home", "read-only", "cache is a file"])
def test_shards_are_read_without_a_cache(stranger, run, places, way, tmp_path):
    from shard_files import png, write_tar

    members = [(f"{i}.{ending}", data) for i in range(3)
               for ending, data in (("png", png(i)), ("cls", str(i).encode()))]  # fmt: skip
    shard = write_tar(tmp_path / "data" / "0.tar", members)
    code = (
        "import sys, pathlib; from asvit_deploy.data.shards import indexed\n"
        "for _ in range(2): shards = indexed([pathlib.Path(sys.argv[1])])\n"
        "print(shards[0].entries()['label'].tolist(), shards[0].index.parent)"
    )
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "TMPDIR")}
    done = subprocess.run([*stranger, sys.executable, "-c", code, shard], capture_output=True,
                          text=True, env={**kept, **places[way]}, cwd="/")  # fmt: skip
    assert done.returncode == 0, done.stderr
    labels, folder = done.stdout.rsplit(" ", 1)
    assert labels == "[0, 1, 2]"
    assert done.stderr.count("for this run only") == 1
    assert not Path(folder.strip()).exists(), "the temporary index stays behind"


def test_timings_of_a_build_are_optional(monkeypatch, tmp_path, capsys):
    from asvit_deploy.engine import build

    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build._timing_folder() is None
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build._timing_folder() == tmp_path / "cache" / "asvit-deploy"


# What we leave behind


@pytest.mark.slow
def test_a_look_at_a_picture_leaves_no_file_at_home(tmp_path, picture, mini_artifacts):
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        k: v for k, v in os.environ.items()
        if not k.startswith("XDG_") and k != "ORT_DISABLE_TELEMETRY"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "asvit_deploy", "predict", mini_artifacts["1", "auto"], picture],
        env={**environment, "HOME": str(home)}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize("said", ["0", "1", ""])
def test_telemetry_is_as_the_user_set_it(said):
    code = "import asvit_deploy, os; print(repr(os.environ['ORT_DISABLE_TELEMETRY']))"
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": said}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == repr(said)


def test_nothing_loads_onnxruntime_past_the_package():
    """It looks at the variable when it is loaded; importing any part of the package sets it."""
    assert os.environ["ORT_DISABLE_TELEMETRY"]
    scripts = Path(asvit_deploy.__file__).parent.parent / "scripts"
    if not scripts.is_dir():
        pytest.skip("no scripts beside this installation")
    for path in scripts.iterdir():
        lines = path.read_text().splitlines() if path.is_file() else []
        assert not [line for line in lines if line.startswith(("import onnxr", "from onnxr"))]
