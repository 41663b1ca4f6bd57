"""The C++ sample compiles against TensorRT's headers; running it takes a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from asvit_deploy.ops.library import find_compiler
from asvit_deploy.ops.nvcc import find_nvcc

SAMPLE = Path(__file__).resolve().parents[2] / "trt_plugins" / "sample"


@pytest.fixture(scope="module")
def cuda() -> Path:
    """The folder of CUDA's headers."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc")
    for home in (nvcc.resolve().parents[1], Path("/usr/local/cuda")):
        if (home / "include" / "cuda_runtime_api.h").is_file():
            return home / "include"
    pytest.skip("nvcc has no headers beside it")


@pytest.mark.slow
def test_compiles_without_a_warning(trt_headers, cuda, tmp_path):
    output = tmp_path / "run_engine.o"
    command = [*find_compiler(), "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror",
               *trt_headers.flags, "-isystem", cuda, "-c", SAMPLE / "run_engine.cpp",
               "-o", output]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("nm"):
        symbols = subprocess.check_output(["nm", output], text=True)
        assert " U createInferRuntime_INTERNAL" in symbols
        assert " T main" in symbols


@pytest.mark.slow
def test_builds_with_cmake_without_tensorrt_libraries(trt_headers, cuda, tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    configure = ["cmake", "-S", SAMPLE, "-B", tmp_path,
                 f"-DTRT_HEADERS={trt_headers.folder}",
                 f"-DCUDAToolkit_ROOT={cuda.parent}"]  # fmt: skip
    done = subprocess.run(configure, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
