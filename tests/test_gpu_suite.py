"""`scripts/gpu_suite` without a GPU: what it prepares, runs alone, in a bare environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from asvit_deploy.files import sha256
from asvit_deploy.ops.library import find_compiler
from asvit_deploy.ops.nvcc import find_nvcc
from gpu_parts import prepared as prepared_folder
from gpu_parts.prepare import MAX_BYTES, size_of
from gpu_parts.table import PARTS, SUMMARY

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_suite"

NEEDED = ("torch", "numpy", "onnx")
ABSENT = ("asvit_deploy", "click", "tqdm", "PIL", "safetensors", "skimage", "onnxruntime", "pytest")


def suite(*words: object, python: str = sys.executable, script: Path = SCRIPT, **more: str):
    command = [python, script, *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True,
                          env=os.environ | more)  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 2 and one line."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def folder(compiler, trt_headers, tmp_path_factory) -> Path:
    """A prepared folder; with device code where there is a compiler for it."""
    path = tmp_path_factory.mktemp("suite") / "prepared"
    done = suite("prepare", path, "--rehearse", *(["--sm", "90"] if find_nvcc() else []))
    assert done.returncode == 0, done.stderr
    return path


def closure(names: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """These distributions and all that they require."""
    found: dict[str, metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
        needs = [text for text in found[name].requires or [] if "extra ==" not in text]
        todo += [re.match(r"[\w.-]+", text)[0] for text in needs]  # type: ignore[index]
    return found


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A new environment with torch, numpy and onnx, without any package's metadata."""
    place = tmp_path_factory.mktemp("bare") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    (site,) = (place / "lib").glob("python*/site-packages")
    for distribution in closure(NEEDED).values():
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            source = Path(str(distribution.locate_file(top)))
            if not top.endswith(".dist-info") and source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    python = place / "bin" / "python"
    ask = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    there = subprocess.check_output([python, "-I", "-c", ask, *NEEDED, *ABSENT], text=True)
    assert there.strip() == str(list(NEEDED))
    return python


def without_network() -> list[str]:
    """The start of a command whose process has no network but a loopback that is down."""
    command = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") and not subprocess.run([*command, "true"]).returncode:
        return command
    dead = "http://127.0.0.1:9"
    return ["env", f"http_proxy={dead}", f"https_proxy={dead}", f"all_proxy={dead}"]


def files_of(place: Path) -> dict[str, str]:
    return {str(path.relative_to(place)): sha256(path)
            for path in place.rglob("*") if path.is_file()}  # fmt: skip


@pytest.mark.slow
def test_every_part_ends_by_itself_in_a_bare_environment(folder, bare_python, tmp_path):
    """No package of ours, no network, no home, no metadata; nothing is lost, nothing written."""
    before, output = files_of(folder), tmp_path / "out"
    alone = ["env", "-i", "PATH=/usr/bin:/bin", "HOME=/nonexistent", "OMP_NUM_THREADS=1"]
    done = subprocess.run(
        [*without_network(), *alone, bare_python, "-I", folder / "gpu_suite", "run", "--rehearse",
         "-o", output], capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert files_of(folder) == before
    assert len(list(output.iterdir())) <= 8
    summary = json.loads((output / SUMMARY).read_text())
    assert json.loads(done.stdout) == summary
    assert list(summary["parts"]) == list(PARTS)
    skipped = {"onnxruntime_cuda": "onnxruntime is not installed",
               "training": "not installed: click",
               "methods_agreement": "safetensors is not installed",
               "methods_bucketed": "safetensors is not installed",
               "tensorrt": "neither TensorRT nor TensorRT-RTX is installed"}  # fmt: skip
    for name, part in summary["parts"].items():
        if "compute-sanitizer" in part.get("reason", "") or name in skipped:
            assert part["outcome"] == "skipped"
            assert skipped.get(name, "") in part["reason"]
        else:
            assert part["outcome"] == "passed", (name, part)
            report = json.loads((output / part["file"]).read_text())[name]
            assert report["result"]
    assert summary["parts"]["speed"]["targets"]["us_a_call"]["met"] is True
    assert {"torch", "numpy", "onnx", "python"} <= set(summary["versions"])


@pytest.mark.slow
def test_parts_with_other_runtimes_end_too(folder, tmp_path):
    """Where ONNX Runtime is: every case of the op, and the default model."""
    pytest.importorskip("onnxruntime")
    output = tmp_path / "out"
    done = suite("run", "--prepared", folder, "-o", output, "--rehearse", "--only",
                 "onnxruntime_cuda")  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "07_runtimes.json").read_text())["onnxruntime_cuda"]
    assert report["outcome"] == "passed"
    assert report["result"]["calls"] > 90
    assert report["result"]["images"] == 24


@pytest.mark.slow
def test_training_ends_too_where_its_packages_are(folder, tmp_path):
    """`evaluate` and `finetune` as commands, and steps of each kind."""
    for name in ("accelerate", "mlxtend"):
        pytest.importorskip(name)
    output = tmp_path / "out"
    done = suite("run", "--prepared", folder, "-o", output, "--rehearse", "--only", "training")
    assert done.returncode == 0, done.stderr
    result = json.loads((output / "06_training.json").read_text())["training"]["result"]
    assert result["evaluate"]["cpu"]["top1"] > 0.8
    assert result["finetune"]["no"]["top1"] > 0.7
    assert set(result["steps"][0]["ms"]) == {"dense", "adaptive", "adaptive_with_teacher"}


@pytest.mark.slow
def test_folder_is_small_whole_and_holds_device_code(folder):
    manifest = prepared_folder.check(folder)
    assert size_of(folder) * 2**20 <= MAX_BYTES
    assert set(manifest["host"]) == {"plugin", "kernel", "driver", "onnxruntime"}
    assert set(manifest["data"]) == {"model", "model_pictures", "checkpoint"}
    assert manifest["missing"] == {}
    if manifest["sms"]:
        wanted = {"plugin", "autoreg", "kernel", "driver", "onnxruntime", "switch"}
        assert set(manifest["device"]) == wanted
        for path in manifest["device"].values():
            assert b".nv_fatbin" in (folder / path).read_bytes(), path


@pytest.fixture
def links(folder, tmp_path) -> Path:
    """The folder again: its files are links, to be replaced one by one."""
    place = tmp_path / "links"
    for name in files_of(folder):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).symlink_to(folder / name)
    return place


def replace(place: Path, name: str, text: str) -> None:
    (place / name).unlink(missing_ok=True)
    (place / name).write_text(text)


@pytest.mark.slow
def test_program_that_lost_its_permission_runs(links, tmp_path):
    """As after a copy that keeps contents alone."""
    (links / "host" / "gpu_driver").unlink()
    shutil.copyfile((links / "host" / "libasvit_trt_host.so").resolve().with_name("gpu_driver"),
                    links / "host" / "gpu_driver")  # fmt: skip
    assert not os.access(links / "host" / "gpu_driver", os.X_OK)
    done = suite(
        "run", "--prepared", links, "-o", tmp_path / "out", "--rehearse", "--only", "speed"
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- what cannot be run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu_parts/table.py", "data/deit_s.npz", "gpu_suite"])
def test_damaged_folder_is_refused(links, tmp_path, name):
    replace(links, name, "nothing")
    refused(suite("run", "--prepared", links, "-o", tmp_path / "out", "--rehearse"),
            str(links), f"{name} has changed")  # fmt: skip
    (links / name).unlink()
    refused(suite("run", "--prepared", links, "-o", tmp_path / "out"), f"{name} is missing")
    assert not (tmp_path / "out").exists()


_LISTS = json.dumps({"schema": 1, "sms": [], **{key: [] for key in prepared_folder.TABLES}})


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}', '{"schema": 99}', _LISTS])
def test_manifest_that_is_none_is_refused(links, tmp_path, text):
    replace(links, "manifest.json", text)
    refused(suite("run", "--prepared", links, "-o", tmp_path / "out"), "manifest.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "-o", "{out}"], "--prepared DIR"),
        (["run", "--prepared", "{out}", "-o", "{out}"], "does not exist"),
        (["run", "--prepared", "/usr", "-o", "{out}"], "holds no manifest.json"),
        (
            ["run", "--prepared", "{dir}", "-o", "/proc/x", "--rehearse"],
            "/proc/x cannot be written",
        ),
        (["run", "--prepared", "{dir}", "-o", "{file}", "--rehearse"], "cannot be written"),
        (["run", "--prepared", "{dir}", "-o", "{out}", "--rehearse", "--only", "x"], "called x"),
        (["run", "--prepared", "{dir}", "-o", "{out}", "--minutes", "0"], "more than 0"),
        (["prepare", "{out}"], "--sm 90"),
        (["prepare", "{out}", "--sm", "91"], "--sm 91"),
        (["prepare", "/usr", "--rehearse"], "holds something else"),
        (["prepare", "{file}", "--rehearse"], "holds something else"),
        (["prepare", "/no/such/place", "--rehearse"], "/no/such does not exist"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, words, said):
    (tmp_path / "file").touch()
    names = {"{out}": tmp_path / "out", "{dir}": folder, "{file}": tmp_path / "file"}
    refused(suite(*(names.get(word, word) for word in words)), said)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "text", "said"),
    [
        ("torch", "__version__ = '2.7.1+cu126'", "torch 2.7.1+cu126 is too old"),
        ("torch", "raise OSError('libcudart is missing')", "torch cannot be imported"),
        ("onnx", "raise ImportError('no onnx')", "onnx cannot be imported"),
    ],
)
def test_library_that_does_not_do_is_named(folder, tmp_path, module, text, said):
    (tmp_path / f"{module}.py").write_text(text)
    done = suite("run", "--prepared", folder, "-o", tmp_path / "out", "--rehearse",
                 PYTHONPATH=str(tmp_path))  # fmt: skip
    refused(done, said)


# ---------------------------------------------------------------- a GPU that is not there


def fake_driver(place: Path, sm: int) -> dict[str, str]:
    """An environment with a driver that names a GPU and can do nothing with it."""
    place.mkdir()
    (place / "cuda.c").write_text(
        "#include <string.h>\nint cuInit(int f) { return 0; }\n"
        "int cuDeviceGetCount(int* n) { *n = 1; return 0; }\n"
        "int cuDeviceGet(int* d, int i) { *d = 0; return 0; }\n"
        'int cuDeviceGetName(char* n, int l, int d) { strcpy(n, "Drawn GPU"); return 0; }\n'
        "int cuDeviceGetAttribute(int* v, int a, int d) "
        f"{{ *v = a == 75 ? {sm // 10} : {sm % 10}; return 0; }}\n"
        "int cuDriverGetVersion(int* v) { *v = 13000; return 0; }\n"
    )
    compiler = find_compiler()
    command = [*compiler, "-x", "c", "-shared", "-fPIC", "cuda.c", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=place, check=True)
    return {"LD_LIBRARY_PATH": str(place)}


def has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


@pytest.mark.slow
def test_without_a_gpu_one_line_and_nothing_written(folder, tmp_path):
    if has_gpu():
        pytest.skip("there is a GPU")
    done = suite("run", "--prepared", folder, "-o", tmp_path / "out")
    refused(done, "no NVIDIA GPU here", "--rehearse")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_folder_for_another_gpu_is_refused(folder, tmp_path):
    done = suite("run", "--prepared", folder, "-o", tmp_path / "out",
                 **fake_driver(tmp_path / "driver", 89))  # fmt: skip
    made = "SM 90" if find_nvcc() else "rehearsals alone"
    refused(done, f"was prepared for {made}, and Drawn GPU is SM 89", "--sm 89")


@pytest.mark.slow
def test_gpu_that_does_nothing_leaves_a_reason_for_every_part(folder, tmp_path):
    """The way of a real run: whatever fails is reported, in its place, and costs no other part."""
    if find_nvcc() is None or has_gpu():
        pytest.skip("no device code was prepared, or there is a GPU")
    output = tmp_path / "out"
    done = suite("run", "--prepared", folder, "-o", output, "--only", "oracle", "packed", "speed",
                 "switch", **fake_driver(tmp_path / "driver", 90))  # fmt: skip
    assert done.returncode == 1, done.stderr
    parts = json.loads(done.stdout)["parts"]
    assert {name: part["outcome"] for name, part in parts.items()} == {
        "oracle": "failed", "packed": "skipped", "speed": "failed", "switch": "skipped",
    }  # fmt: skip
    assert "gpu_driver" in parts["oracle"]["reason"]
    assert "has no CUDA" in parts["packed"]["reason"]


# ---------------------------------------------------------------- parts that misbehave

_TABLE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Part:
    name: str
    code: str
    group: str
    limit: float
    least: float = 1

PARTS = {part.name: part for part in (
    Part("hangs", "odd:hangs", "01_odd", 4), Part("dies", "odd:dies", "01_odd", 60),
    Part("raises", "odd:raises", "01_odd", 60), Part("gone", "odd:gone", "01_odd", 60),
    Part("fine", "odd:fine", "02_fine", 60), Part("late", "odd:fine", "02_fine", 9000, 9000),
)}
SUMMARY = "summary.json"
"""
_ODD = """
import os, subprocess, time
from pathlib import Path

def hangs(kit):
    kit.save({"so_far": float("nan")})
    child = subprocess.Popen(["sleep", "1000"])
    Path(os.environ["ODD"]).write_text(str(child.pid))
    time.sleep(1000)

def dies(kit):
    os.abort()

def raises(kit):
    kit.save({"rows": [1, 2]})
    raise KeyError("a name")

def fine(kit):
    return {"figure": {"value": 3.0, "target": 2.0, "better": "lower", "met": False}}
"""


@pytest.fixture
def odd(links, tmp_path, monkeypatch) -> Path:
    """A folder whose parts hang, die and raise."""
    manifest = json.loads((links / "manifest.json").read_text())
    for name, text in (("gpu_parts/table.py", _TABLE), ("gpu_parts/odd.py", _ODD)):
        replace(links, name, text)
        manifest["sha256"][name] = sha256(links / name)
    replace(links, "manifest.json", json.dumps(manifest))
    # Links would lead Python to the files' own folder.
    replace(links, "gpu_suite", SCRIPT.read_text())
    monkeypatch.setenv("ODD", str(tmp_path / "pid"))
    return links


def ended(pid_file: Path) -> bool:
    pid = int(pid_file.read_text())
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_one_part_costs_no_other(odd, tmp_path):
    output = tmp_path / "out"
    done = suite("run", "-o", output, "--rehearse", script=odd / "gpu_suite")
    assert done.returncode == 1, done.stderr
    parts = json.loads(done.stdout)["parts"]
    assert {name: part["outcome"] for name, part in parts.items()} == {
        "hangs": "ended", "dies": "ended", "raises": "failed", "gone": "failed", "fine": "passed",
        "late": "not run",
    }  # fmt: skip
    assert "over its 4 seconds" in parts["hangs"]["reason"]
    assert "ended with -6" in parts["dies"]["reason"]
    assert parts["raises"]["reason"].startswith("KeyError: 'a name' (odd.py:")
    assert "has no attribute 'gone'" in parts["gone"]["reason"]
    assert parts["late"]["reason"] == "out of time"
    assert parts["fine"]["targets"]["figure"]["met"] is False
    kept = json.loads((output / "01_odd.json").read_text())
    assert kept["hangs"]["result"] == {"so_far": "nan"}
    assert kept["raises"]["result"] == {"rows": [1, 2]}
    assert ended(tmp_path / "pid"), "what a part started ends with it"
    assert sorted(path.name for path in output.iterdir()) == [
        "01_odd.json", "02_fine.json", "summary.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_that_is_ended_keeps_what_it_has(odd, tmp_path):
    output = tmp_path / "out"
    command = [sys.executable, odd / "gpu_suite", "run", "-o", output, "--rehearse"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    assert "ended from outside" in json.loads((output / SUMMARY).read_text())["reason"]
    assert json.loads((output / "01_odd.json").read_text())["hangs"]["result"]
    assert ended(tmp_path / "pid")
