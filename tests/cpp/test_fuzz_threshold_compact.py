"""The C++ kernel under sanitizers: 100,000 random cases against the numpy oracle, or as many as
`--op-calls` says where that is more."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np
import pytest

from asvit_deploy.errors import UserError
from asvit_deploy.ops.library import find_compiler
from asvit_deploy.ops.reference import Compacted, threshold_compact

PROGRAM = Path(__file__).with_name("fuzz_threshold_compact.cc")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
CASES, SEED = 100_000, 20261121


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    try:
        compiler = [*find_compiler(), "-std=c++17", "-O2", "-g", *SANITIZE]
    except UserError as error:
        pytest.skip(str(error))
    (folder / "empty.cc").write_text("int main() { return 0; }\n")
    empty = [*compiler, str(folder / "empty.cc"), "-o", str(folder / "empty")]
    if (
        subprocess.run(empty, capture_output=True).returncode
        or subprocess.run(empty[-1]).returncode
    ):
        pytest.skip(f"{compiler[0]} has no working sanitizers")
    subprocess.run(
        [*compiler, "-Wall", "-Wextra", str(PROGRAM), "-o", str(folder / "fuzz")], check=True
    )
    return folder / "fuzz"


def read(stream: IO[bytes], dtype: type, *shape: int) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = stream.read(size)
    assert len(data) == size, "the program stopped in the middle of a record"
    return np.frombuffer(data, dtype).reshape(shape)


def records(stream: IO[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray, float, Compacted]]:
    while head := stream.read(6 * 8):
        images, rows, prefix, width, kind, size = map(int, np.frombuffer(head, np.int64))
        threshold = read(stream, np.float32, 1)[0]
        tokens = read(stream, TYPES[kind], images, rows, width)
        scores = read(stream, np.float32, images, rows - prefix)
        compact = read(stream, TYPES[kind], images, size, width)
        index = read(stream, np.int64, images, size)
        length = read(stream, np.int64, images)
        yield tokens, scores, threshold, Compacted(compact, index, length, np.asarray(size))


def bits(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, array.tobytes()


@pytest.mark.slow
def test_kernel_equals_the_oracle_bit_for_bit(fuzz: Path, pytestconfig: pytest.Config):
    """Nothing is rounded in this op, so equal means equal bits, NaN payloads included."""
    cases = max(CASES, pytestconfig.getoption("op_calls"))
    command = [fuzz, str(cases), str(SEED), "write"]
    kinds = "NaN", "inf", "K = 1", "K = N", "tail", "P = 1", "P = 2", "P = 5", "P > 8"
    seen = dict.fromkeys(kinds, 0) | dict.fromkeys(TYPES, 0)
    widest = count = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for tokens, scores, threshold, result in records(process.stdout):
            for name, mine, wanted in zip(
                result._fields, result, threshold_compact(tokens, scores, threshold), strict=True
            ):
                assert bits(mine) == bits(wanted), (
                    f"case {count}, {name}: tokens {tokens.shape} {tokens.dtype}, θ {threshold}"
                )
            count += 1
            widest = max(widest, tokens.size)
            seen[tokens.dtype.type] += 1
            seen["NaN"] += bool(np.isnan(scores).any())
            seen["inf"] += bool(np.isinf(scores).any())
            prefix = tokens.shape[1] - scores.shape[1]
            for value in (1, 2, 5):
                seen[f"P = {value}"] += prefix == value
            seen["P > 8"] += prefix > 8
            seen["K = 1"] += int(result.size) == prefix + 1
            seen["K = N"] += int(result.size) == tokens.shape[1]
            seen["tail"] += bool((result.index < 0).any())
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    assert count == cases
    assert widest == 8 * 577 * 768, "the largest size was not drawn"
    assert min(seen.values()) > cases // 50, f"a kind of case is hardly drawn: {seen}"
