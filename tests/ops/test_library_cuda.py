"""The CUDA kernels of the ONNX Runtime library, as far as a machine without a GPU can tell.

Two things are shown: the library with CUDA kernels works where there is no CUDA, and the kernels'
host side, run by ONNX Runtime itself over an emulated device, gives what the oracle gives.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_library import TYPES, one_node, run, session_of

from asvit_deploy.cli.main import main
from asvit_deploy.errors import UserError
from asvit_deploy.ops import library as library_module
from asvit_deploy.ops.cases import CASES
from asvit_deploy.ops.headers import Headers
from asvit_deploy.ops.library import (
    build_ort,
    check_library,
    cuda_targets,
    find_compiler,
    find_library,
)
from asvit_deploy.ops.nvcc import find_nvcc
from asvit_deploy.ops.reference import threshold_compact

ort = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "trt_plugins" / "kernels"
EMULATED = ROOT / "tests" / "cpp" / "trt" / "emulated"


@pytest.fixture(scope="module")
def with_cuda(ort_headers: Headers) -> Path:
    if find_nvcc() is None:
        pytest.skip("no nvcc")
    return build_ort(ort_headers.folder, cuda=True)


@pytest.fixture(scope="module")
def emulated(ort_headers: Headers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels alone, as the CPU provider's, their device emulated."""
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(ROOT / "plugins", folder / "plugins")
    for name, right, other in [
        ("ort_cuda.h", '"CUDAExecutionProvider"', "nullptr"),
        ("ort_ops.cc", "std::apply(add, mCpu);", ""),
    ]:
        file = folder / "plugins" / name
        assert file.read_text().count(right) == 1
        file.write_text(file.read_text().replace(right, other))
    command = [
        *find_compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden",
        "-Wno-unknown-pragmas", "-isystem", ort_headers.folder, "-I", EMULATED, "-I", KERNELS,
        "-I", KERNELS.parent, "-DASVIT_CUDA", "ort_ops.cc", "ort_cuda.cc", "-x", "c++",
        KERNELS / "threshold_compact.cu", "-o", folder / "emulated.so",
    ]  # fmt: skip
    subprocess.run(command, cwd=folder / "plugins", check=True)
    return folder / "emulated.so"


def check(library: Path, kind: str) -> None:
    code, dtype = TYPES[kind]
    session = session_of(one_node(code), library)
    outside = np.float32 if kind == "bfloat16" else dtype
    for case in CASES:
        tokens = case.tokens.astype(dtype).astype(outside)
        wanted = threshold_compact(tokens, case.scores, case.threshold)
        for mine, right in zip(run(session, tokens, case.scores, case.threshold), wanted):
            np.testing.assert_array_equal(mine, right, err_msg=case.name)


# ---------------------------------------------------------------- where there is no CUDA


@pytest.mark.parametrize("kind", TYPES)
def test_cpu_kernels_of_the_library_with_cuda_equal_the_oracle(with_cuda, kind):
    check(with_cuda, kind)


@pytest.mark.parametrize("kind", TYPES)
def test_library_without_cuda_equals_the_oracle(ort_headers, kind):
    library = build_ort(ort_headers.folder, cuda=False)
    assert cuda_targets(library) == ()
    check(library, kind)


def test_library_with_cuda_needs_nothing_of_cuda_to_load(with_cuda):
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    said = subprocess.check_output(["readelf", "-d", with_cuda], text=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", said)
    assert needed
    assert not [name for name in needed if re.search("cuda|nv|onnx", name)]


def test_library_with_cuda_has_the_kernels_of_three_types_and_gives_no_cuda_away(with_cuda):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    everything = subprocess.check_output(["nm", "-C", with_cuda], text=True)
    ops = set(re.findall(r"ThresholdCompactOp<asvit::CudaKernel<\(\w+\)(\d+)>", everything))
    assert ops == {"1", "10", "16"}, "float, half and bfloat16 as ONNX Runtime numbers them"
    assert "asvit::computeOnCuda" in everything
    visible = subprocess.check_output(["nm", "-D", "--defined-only", with_cuda], text=True)
    assert re.search(r" T RegisterCustomOps\b", visible)
    assert not re.search(r" [TDB] (cuda|cu|asvit)", visible)


# ---------------------------------------------------------------- the host side of the kernels


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_cuda_kernels_over_an_emulated_device_equal_the_oracle(emulated, kind):
    check(emulated, kind)


@pytest.mark.slow
def test_cuda_kernels_refuse_more_rows_than_they_can_number(emulated):
    session = session_of(one_node(TYPES["float"][0]), emulated)
    with pytest.raises(Exception, match="at most 4096 rows"):
        run(session, np.zeros((1, 4097, 1), np.float32), np.zeros((1, 4096), np.float32), 0)
    most = run(session, np.zeros((1, 4096, 1), np.float32), np.zeros((1, 4095), np.float32), -1)
    assert most[3] == 4096


# ---------------------------------------------------------------- the build


def test_library_with_cuda_is_preferred_and_either_can_be_asked_for(ort_headers, with_cuda):
    without = build_ort(ort_headers.folder, cuda=False)
    assert find_library() == find_library(cuda=True) == with_cuda
    assert find_library(cuda=False) == without
    assert cuda_targets(with_cuda)
    assert build_ort() == with_cuda


def test_cuda_sources_shape_the_name(ort_headers, with_cuda, monkeypatch):
    before = library_module.library_path(ort_headers.api)
    monkeypatch.setattr(library_module, "CUDA_FLAGS", (*library_module.CUDA_FLAGS, "-g"))
    assert find_library(cuda=True) is None
    assert library_module.library_path(ort_headers.api) == before


@pytest.mark.slow
def test_without_nvcc_the_cpu_kernels_are_built_and_cuda_on_request_is_refused(
    ort_headers, tmp_path, monkeypatch
):
    monkeypatch.setattr(library_module, "find_nvcc", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="no CUDA compiler") as error:
        build_ort(ort_headers.folder, cuda=True)
    assert "\n" not in str(error.value)
    library = build_ort(ort_headers.folder)
    assert cuda_targets(library) == ()
    assert check_library(library) is None


@pytest.mark.slow
def test_nvcc_that_fails_costs_the_cuda_kernels_alone(ort_headers, tmp_path, monkeypatch):
    monkeypatch.setattr(library_module, "find_nvcc", lambda: Path("/bin/false"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    library = build_ort(ort_headers.folder, say=said.append)
    assert cuda_targets(library) == ()
    assert any(line.startswith("no CUDA kernels: /bin/false cannot compile") for line in said)
    with pytest.raises(UserError, match="/bin/false cannot compile"):
        build_ort(ort_headers.folder, cuda=True)


def test_command_says_which_kernels_there_are(ort_headers, with_cuda, capsys):
    for option, words in (("--cuda", "CPU and CUDA"), ("--no-cuda", "built before for CPU;")):
        build_ort(ort_headers.folder, cuda=option == "--cuda")
        with pytest.raises(SystemExit) as end:
            main(["build-plugins", "ort", option])
        assert end.value.code == 0
        captured = capsys.readouterr()
        assert words in captured.err
        assert bool(cuda_targets(Path(captured.out.strip()))) == (option == "--cuda")


@pytest.mark.slow
def test_builds_with_cmake_and_cuda(ort_headers, with_cuda, tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    configure = ["cmake", "-S", ROOT / "plugins", "-B", tmp_path, "-DASVIT_CUDA=ON",
                 f"-DORT_INCLUDE_DIR={ort_headers.folder}",
                 f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    (library,) = tmp_path.glob("*asvit_ort.*")
    check(library, "float")
    assert "CUDAExecutionProvider" in library.read_bytes().decode("latin-1")


def test_a_library_for_other_gpus_is_not_preferred(with_cuda, monkeypatch, tmp_path):
    """As where the GPU suite was prepared for another machine after this one's was built."""
    other = with_cuda.with_name(with_cuda.name.replace("cuda.", "cuda.sm999."))
    monkeypatch.setattr(library_module, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(library_module, "library_path", lambda api, targets: tmp_path / (
        with_cuda.name if targets == cuda_targets(with_cuda) else other.name))  # fmt: skip
    monkeypatch.setattr(library_module, "usable", lambda path, *_: path.is_file())
    for path in (with_cuda, other):
        (tmp_path / path.name).write_bytes(b"")
    assert find_library() == tmp_path / with_cuda.name
    (tmp_path / with_cuda.name).unlink()
    assert find_library() == tmp_path / other.name, "its CPU kernels run here too"
