"""The bare kernel through ctypes: its two steps, and a wider stride than the kept rows need."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from asvit_deploy.errors import UserError
from asvit_deploy.ops import kernel as kernel_module
from asvit_deploy.ops.cases import CASES, Case
from asvit_deploy.ops.kernel import Counted, Kernel, build_kernel
from asvit_deploy.ops.library import find_compiler
from asvit_deploy.ops.reference import threshold_compact


@pytest.fixture(scope="module")
def twin(compiler: str) -> Kernel:
    return Kernel(build_kernel(cuda=False))


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def steps(kernel: Kernel, case: Case, wider: int) -> list[np.ndarray]:
    """compact, index, length and size, the first two `wider` rows longer than needed, up to M."""
    tokens, scores = case.tokens, np.ascontiguousarray(case.scores)
    images, rows, width = tokens.shape
    threshold, length = np.array(case.threshold, np.float32), np.full(images, -7, np.int64)
    size, workspace = np.array(-7), np.zeros(images * rows, np.int16)
    buffers = map(address, (scores, threshold, length, size, workspace))
    given = Counted(images, rows, *buffers, prefix=case.prefix)
    kernel.count(given)
    stride = np.array(min(int(size) + wider, rows))
    compact = np.full((images, int(stride), width), np.nan, np.float32)
    index = np.full((images, int(stride)), -7)
    kernel.gather(
        given, address(tokens), width, 4, address(compact), address(index), address(stride)
    )
    return [compact, index, length, size]


@pytest.mark.parametrize("wider", [0, 1, 16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_steps_equal_the_oracle_and_pad_with_zeros(twin, case, wider):
    compact, index, length, size = steps(twin, case, wider)
    wanted = threshold_compact(case.tokens, case.scores, case.threshold)
    kept = int(wanted.size)
    assert size == kept
    np.testing.assert_array_equal(length, wanted.length)
    np.testing.assert_array_equal(compact[:, :kept], wanted.compact)
    np.testing.assert_array_equal(index[:, :kept], wanted.index)
    assert (compact[:, kept:] == 0).all()
    assert (index[:, kept:] == -1).all()


@pytest.mark.parametrize(
    ("rows", "prefix"), [(4097, 1), (9, 0), (9, -1), (9, 9), (9, 10), (1, 1), (2, 2)]
)
def test_shapes_beyond_the_contract_are_refused(twin, rows, prefix):
    memory = np.full(16, -7)
    given = Counted(1, rows, *[address(memory)] * 5, prefix=prefix)
    for step in (
        lambda: twin.count(given),
        lambda: twin.gather(given, address(memory), 1, 4, address(memory), address(memory)),
    ):
        with pytest.raises(RuntimeError, match=f"M={rows}, P={prefix}$"):
            step()
    assert (memory == -7).all()


def test_class_token_alone_is_the_prefix_of_a_caller_that_names_none(twin):
    assert Counted(1, 2, *range(5)).prefix == 1


@pytest.mark.parametrize("said", ["", "extern \"C\" int asvitThresholdCompactCallBytes() "
                                  "{ return 96; }"], ids=["none", "shorter"])  # fmt: skip
def test_library_of_another_version_is_refused(compiler, tmp_path, said):
    """It would take P for something else, or for nothing."""
    (tmp_path / "old.cpp").write_text(f"{said}\n")
    command = [*find_compiler(), "-shared", "-fPIC", "old.cpp", "-o", "old.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"old\.so is no kernel of this version.*ASVIT_KERNEL$"):
        Kernel(tmp_path / "old.so")


def test_file_that_is_no_library_is_named_so(tmp_path):
    (tmp_path / "some.so").write_text("nothing")
    with pytest.raises(UserError, match=r"some\.so cannot be loaded"):
        Kernel(tmp_path / "some.so")


def test_cuda_without_nvcc_is_refused(monkeypatch):
    monkeypatch.setattr(kernel_module, "find_nvcc", lambda: None)
    with pytest.raises(UserError, match="no CUDA compiler"):
        build_kernel(cuda=True)


def test_cuda_kernel_loads_without_a_driver():
    if kernel_module.find_nvcc() is None:
        pytest.skip("no nvcc")
    Kernel(build_kernel(cuda=True))


def test_library_built_elsewhere_stands_in_for_a_compiler(tmp_path, monkeypatch):
    built = build_kernel(cuda=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ASVIT_KERNEL", str(built))
    assert build_kernel(cuda=True) == build_kernel(cuda=False) == built
    monkeypatch.setenv("ASVIT_KERNEL", str(tmp_path / "none.so"))
    with pytest.raises(UserError, match=r"ASVIT_KERNEL=.*none\.so is no file"):
        build_kernel(cuda=False)
