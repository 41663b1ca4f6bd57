"""`scripts/gpu_suite` without a GPU: it compiles, its checks work, and it claims nothing."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from asvit_deploy.engine.flavour import FLAVOURS
from asvit_deploy.errors import UserError
from asvit_deploy.ops import trt_library
from asvit_deploy.ops.library import build_ort, find_compiler
from asvit_deploy.ops.nvcc import find_nvcc
from asvit_deploy.ops.trt_library import build_trt, find_trt_headers

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_suite"


@pytest.fixture(scope="module")
def suite() -> ModuleType:
    before = list(sys.path)
    loader = importlib.machinery.SourceFileLoader("gpu_suite", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_suite", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    yield module
    sys.path[:] = before


@pytest.fixture(scope="module")
def built(compiler, tmp_path_factory) -> dict[str, Path]:
    """The suite's driver over host memory, and the plugin with the host twin."""
    try:
        headers = find_trt_headers()
    except UserError as error:
        pytest.skip(str(error))
    driver = tmp_path_factory.mktemp("driver") / "driver"
    include = ["-I", ROOT / "tests" / "cpp" / "gpu", "-I", trt_library.sources_dir() / "no_cuda"]
    command = [*find_compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", *include, *headers.flags,
               "-x", "c++", ROOT / "scripts" / "gpu_driver.cu", "-o", driver, "-ldl"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"driver": driver, "plugin": build_trt(twin=True)}


def has_gpu() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True)


def test_without_a_gpu_one_line_and_nothing_written(tmp_path):
    if has_gpu():
        pytest.skip("there is a GPU")
    done = run("-o", str(tmp_path / "report.json"))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: no NVIDIA GPU here")
    assert "--compile-only" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_compiles_everything_it_would_run():
    if find_nvcc() is None:
        pytest.skip("no nvcc")
    done = run("--compile-only")
    assert done.returncode == 0, done.stderr
    made = [line for line in done.stderr.splitlines() if line.startswith("compiled: ")]
    assert [line.split(": ")[1] for line in made] == ["plugin", "driver", "kernel", "onnxruntime"]


def test_without_nvcc_one_line(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "find_nvcc", lambda: None)
    with pytest.raises(UserError, match="no nvcc: install the CUDA toolkit"):
        suite.compile_driver(tmp_path)


def test_driver_and_oracle_agree_over_host_memory(suite, built):
    """The first two portions of what runs on a GPU; the graph part needs one."""
    from test_trt_plugin import check

    portions = suite.oracle_calls()
    for _ in range(2):
        check(built["driver"], built["plugin"], next(portions))


def test_oracle_covers_the_ranges_of_the_design(suite):
    images, rows, widths, types, nothing, everything = (set() for _ in range(6))
    for calls in suite.oracle_calls():
        for call in calls:
            b, m, d = call.tokens.shape
            images.add(b), rows.add(m), widths.add(d), types.add(call.tokens.dtype)
            (nothing if call.threshold == 2.0 else everything).add(call.tokens.dtype)
    assert {1, 2, 8, 64, 256} <= images
    assert {2, 197, 577, 4096} <= rows
    assert {64, 192, 384, 768} <= widths
    assert len(types) == len(nothing) == len(everything) == 3


def test_wrong_result_fails_the_part(suite, built, tmp_path):
    from test_trt_plugin import make_library

    (tmp_path / "nothing.cpp").write_text(
        '#include "threshold_compact.h"\n'
        "size_t asvitThresholdCompactWorkspace(int64_t, int64_t) noexcept { return 64; }\n"
        "int32_t asvitThresholdCompact(AsvitThresholdCompact const*, CUstream_st*) noexcept "
        "{ return 0; }\n"
    )
    library = make_library(find_trt_headers(), tmp_path / "no.so", tmp_path / "nothing.cpp")
    outcome = suite.attempt(suite.oracle, {**built, "plugin": library})
    assert outcome["outcome"] == "failed"
    assert "compact of" in outcome["reason"]


def test_speed_is_read_and_judged(suite, built):
    """Time stands still on the emulated device: equal times are a share of 1, and 5 us a call."""
    outcome = suite.attempt(suite.speed, built)
    assert outcome["outcome"] == "passed", outcome
    assert [row["share"] for row in outcome["result"]["bandwidth"]] == [1.0, 1.0]
    assert outcome["result"]["latency"]["in_stream_us"] == pytest.approx(1000 / 200)


@pytest.mark.parametrize(
    ("target", "value", "words"),
    [("COPY_SHARE", 1.01, "of a device copy's bandwidth"), ("LATENCY_US", 4.9, "us a call")],
)
def test_missed_target_fails_and_keeps_what_was_measured(
    suite, built, monkeypatch, target, value, words
):
    monkeypatch.setattr(suite, target, value)
    outcome = suite.attempt(suite.speed, built)
    assert outcome["outcome"] == "failed"
    assert "target missed" in outcome["reason"]
    assert words in outcome["reason"]
    assert outcome["result"]["bandwidth"]


def test_what_is_not_installed_is_skipped_with_a_reason(suite, built):
    import torch

    expected = {
        "bucketed": not torch.cuda.is_available(),
        "tensorrt": not any(flavour.module for flavour in FLAVOURS.values()),
        "memcheck": not has_gpu(),
    }
    for name in [name for name, skipped in expected.items() if skipped]:
        outcome = suite.attempt(suite.PARTS[name], built)
        assert outcome["outcome"] != "passed"
        assert outcome["reason"]


def test_ort_part_runs_the_op_and_sees_where(suite, op_library, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    assert suite.ort_op_calls(ort, op_library, "CPUExecutionProvider", tmp_path) > 90


def test_ort_part_without_the_provider_is_skipped(suite, built):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("there is a CUDA provider")
    outcome = suite.attempt(suite.onnxruntime_cuda, {**built, "onnxruntime": build_ort()})
    assert outcome["outcome"] == "skipped"
    assert "no CUDA provider" in outcome["reason"]


def test_default_model_is_exported_for_the_parts(suite, tmp_path):
    path = suite.default_model(tmp_path)
    assert len(json.loads(Path(f"{path}.json").read_text())["thresholds"]) == 3


def test_command_that_fails_fails_the_part_in_one_line(suite, tmp_path):
    with pytest.raises(suite.FailPart, match="asvit-deploy check ended with 2: Error") as error:
        suite.command(tmp_path, "check", "nothing.onnx")
    assert "\n" not in error.value.args[0]


@pytest.mark.slow
def test_bucketed_part_runs_without_graphs_on_a_cpu(suite):
    """DeiT-S itself: bucketed equals the model, and every number of a row is there."""
    import torch

    torch.backends.cudnn.allow_tf32 = True
    (row,) = suite.bucketed_at(224, "cpu", (1,), 1)
    assert not torch.backends.cudnn.allow_tf32, "the comparison is in float32"
    assert row["pixels"] == 224
    assert row["macs_ratio"] > 1.1
    assert row["bucketed_over_top_k"] > 0
    assert all(2 <= bucket <= 197 for bucket in row["mean_buckets"])


def test_some_parts_replace_no_whole_report(suite, tmp_path):
    assert suite.report_path("90", None, None).name == "gpu_suite_sm90.json"
    assert suite.report_path("90", ["speed"], None) is None
    assert suite.report_path("90", ["speed"], tmp_path / "x.json") == tmp_path / "x.json"


@pytest.mark.slow
def test_a_mode_that_fails_keeps_what_the_others_gave(suite, tmp_path, rtx, monkeypatch):
    """Without a GPU every mode fails, and in its second step: each says so of itself."""
    if has_gpu():
        pytest.skip("there is a GPU")
    build_trt(twin=True)
    outcome = suite.attempt(suite.tensorrt, {"driver": tmp_path / "driver"})
    assert outcome["outcome"] == "failed", outcome
    modes = [f"tensorrt-rtx {mode}" for mode in ("dynamic", "padded", "bucketed")]
    for mode in modes:
        assert "check ended with 2" in outcome["result"][mode]["failed"]
        assert mode in outcome["reason"]
