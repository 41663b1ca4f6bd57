"""The TensorRT plugin, driven without TensorRT: getCreators, createPlugin, enqueue on host buffers.

It runs with two kernels: the host twin, and the CUDA kernel's own source, whose threads an emulator
runs on the CPU. Payload is copied and nothing rounded, so equal means equal bits.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from asvit_deploy.ops import nvcc, trt_library
from asvit_deploy.ops.cases import CASES, Case
from asvit_deploy.ops.library import find_compiler
from asvit_deploy.ops.reference import threshold_compact
from asvit_deploy.ops.trt_library import TrtHeaders, build_trt, compile_command

HERE = Path(__file__).resolve().parents[1] / "cpp" / "trt"
SOURCES = trt_library.sources_dir()
TYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
SANITIZE = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
POISON = 0xA5
INF, NAN = float("inf"), float("nan")


def compiled(*command: str | Path) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr


def make_driver(trt_headers: TrtHeaders, output: Path, *flags: str) -> Path:
    warn = ["-std=c++17", "-O1", "-Wall", "-Wextra"]
    shared = [*trt_headers.flags, "-isystem", SOURCES / "no_cuda", HERE / "driver.cpp", "-ldl"]
    compiled(*find_compiler(), *warn, *flags, *shared, "-o", output)
    return output


def make_library(
    trt_headers: TrtHeaders, output: Path, kernel: Path | None = None, *flags: str
) -> Path:
    """The plugin with another kernel than the twin: a C++ file, or CUDA's on the emulator."""
    command = compile_command(trt_headers, "library.cpp", ("host",), None)
    if kernel is not None:
        command[-1:] = ["-I", str(SOURCES / "kernels"), "-I", str(HERE / "emulated"),
                        "-Wno-unknown-pragmas", "-x", "c++", str(kernel)]  # fmt: skip
    compiled(*command, *flags, "-o", output)
    return output


@pytest.fixture(scope="module")
def driver(trt_headers, tmp_path_factory) -> Path:
    return make_driver(trt_headers, tmp_path_factory.mktemp("driver") / "driver")


@pytest.fixture(scope="module")
def libraries(trt_headers, tmp_path_factory) -> dict[str, Path]:
    emulated = tmp_path_factory.mktemp("emulated") / "libasvit_trt_emulated.so"
    make_library(trt_headers, emulated, SOURCES / "kernels" / "threshold_compact.cu")
    return {"twin": build_trt(twin=True), "cuda, emulated": emulated}


KERNELS = ["twin", "cuda, emulated"]


# ---------------------------------------------------------------- running and comparing


@dataclass
class Call:
    """One enqueue. `offset` is how many bytes behind an aligned place the payload begins."""

    tokens: np.ndarray
    scores: np.ndarray
    threshold: float
    offset: int = 0

    @property
    def prefix(self) -> int:
        return self.tokens.shape[1] - self.scores.shape[1]

    def record(self) -> bytes:
        images, rows, width = self.tokens.shape
        kind = TYPES.index(self.tokens.dtype.type)
        head = [images, rows, self.prefix, width, kind, self.offset]
        values = np.array(head, np.int64), self.tokens, self.scores, np.float32(self.threshold)
        return b"".join(value.tobytes() for value in values)

    def __str__(self) -> str:
        shape = f"{self.tokens.shape} {self.tokens.dtype}, P {self.prefix}"
        return f"{shape}, θ {self.threshold}, +{self.offset}"


def call_of(case: Case, dtype: type, offset: int = 0) -> Call:
    return Call(case.tokens.astype(dtype), case.scores, case.threshold, offset)


def enqueue(driver: Path, library: Path, calls: list[Call], order: int = 0, command: str = "run"):
    """Status, and what each whole output buffer holds, per call."""
    done = subprocess.run(
        [driver, library, command], input=b"".join(call.record() for call in calls),
        capture_output=True, env=os.environ | {"ASVIT_ORDER": str(order)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    stream = BytesIO(done.stdout)
    for call in calls:
        images, rows, _ = call.tokens.shape
        status, size_bytes = np.frombuffer(stream.read(16), np.int64)
        lengths = call.tokens.nbytes, images * rows * 8, images * 8, int(size_bytes)
        yield int(status), [stream.read(length) for length in lengths]
    assert not stream.read()


def check(
    driver: Path, library: Path, calls: list[Call], order: int = 0, command: str = "run"
) -> None:
    """Every call succeeds, fills what the oracle says, and touches nothing behind it."""
    results = enqueue(driver, library, calls, order, command)
    for call, (status, outputs) in zip(calls, results, strict=True):
        assert status == 0, str(call)
        wanted = threshold_compact(call.tokens, call.scores, call.threshold)
        size = wanted.size.astype({4: np.int32, 8: np.int64}[len(outputs[3])])
        right = [wanted.compact.tobytes(), wanted.index.tobytes(), wanted.length.tobytes()]
        for name, mine, theirs in zip(wanted._fields, outputs, [*right, size.tobytes()]):
            # Compared outside the assert: pytest would spell out how megabytes differ, for hours.
            same, untouched = mine[: len(theirs)] == theirs, set(mine[len(theirs) :]) <= {POISON}
            assert same, f"{name} of {call}"
            assert untouched, f"behind {name} of {call}"


def random_calls(count: int, seed: int) -> list[Call]:
    rng = np.random.default_rng(seed)
    calls = []
    for i in range(count):
        shape = rng.integers((1, 2, 1), (9, 60, 97))
        dtype = TYPES[i % 3]
        size = np.dtype(dtype).itemsize
        tokens = rng.integers(0, 256, (*shape[:2], shape[2] * size), np.uint8).view(dtype)
        prefix = [1, 2, 5, int(rng.integers(1, shape[1]))][i % 4]
        scores = rng.random((shape[0], max(shape[1] - prefix, 1)), np.float32)
        if i % 4 == 1:
            scores = np.round(scores * 4) / 4
        for value in (NAN, INF, -INF)[: i % 5]:
            scores[rng.random(scores.shape) < 0.3] = value
        threshold = [0.5, 0.25, 2.0, -1.0, float(rng.random()), NAN, INF, -INF][i % 8]
        calls.append(
            Call(tokens, scores, threshold, int(rng.choice([0, 0, 2, 4, 8]) // size * size))
        )
    return calls


def plain(
    shape: tuple[int, int, int], dtype: type, threshold: float, offset: int = 0, prefix: int = 1
) -> Call:
    rng = np.random.default_rng(shape)
    tokens = rng.standard_normal(shape, np.float32).astype(dtype)
    return Call(tokens, rng.random((shape[0], shape[1] - prefix), np.float32), threshold, offset)


# ---------------------------------------------------------------- the plugin


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_answers_to_the_name_and_gives_the_shapes_of_the_contract(driver, libraries, kernel):
    done = subprocess.run([driver, libraries[kernel], "contract"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_oracle_bit_for_bit(driver, libraries, kernel, dtype):
    check(driver, libraries[kernel], [call_of(case, dtype) for case in CASES])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_random_bits_and_places(driver, libraries, kernel):
    """Signalling NaNs are data; rows that begin anywhere are copied in narrower words."""
    check(driver, libraries[kernel], random_calls(200, 1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_ends_of_the_range(driver, libraries, kernel, dtype):
    step = np.dtype(dtype).itemsize
    calls = [
        plain((1, 4096, 8), dtype, 0.5), plain((1, 4096, 8), dtype, -1.0),
        plain((1, 4096, 8), dtype, 2.0), plain((2, 4095, 8), dtype, 0.9),
        plain((300, 2, 8), dtype, 0.5), plain((70, 9, 24), dtype, 0.7),
        plain((3, 33, 0), dtype, 0.5), plain((2, 9, 1), dtype, 0.5),
        plain((2, 9, 65), dtype, 0.5), plain((2, 9, 66), dtype, 0.5),
        plain((2, 40, 768), dtype, 0.5, step), plain((2, 40, 768), dtype, 0.5, 2 * step),
        plain((1, 4096, 8), dtype, 0.5, prefix=5), plain((1, 4096, 8), dtype, 2.0, prefix=4095),
        plain((2, 4096, 8), dtype, -1.0, prefix=2048), plain((300, 3, 8), dtype, 0.5, prefix=2),
    ]  # fmt: skip
    check(driver, libraries[kernel], calls)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_size_has_the_type_that_the_engine_was_built_with(driver, libraries, kernel, bits):
    """Whichever headers this library knows: TensorRT's buffer is as wide as the engine says."""
    calls = [call_of(case, np.float16) for case in CASES]
    check(driver, libraries[kernel], calls, command=f"run{bits}")
    widths = {len(outputs[3]) for _, outputs in
              enqueue(driver, libraries[kernel], calls, command=f"run{bits}")}  # fmt: skip
    assert widths == {bits // 8}


@dataclass
class Chain:
    """Three calls in a row in one execution context, each on what the one before left."""

    tokens: np.ndarray
    scores: list[np.ndarray]  # of each stage [B, M-P], of which the first `size` - P columns count
    thresholds: list[float]

    def record(self) -> bytes:
        parts = [self.tokens]
        for scores, threshold in zip(self.scores, self.thresholds):
            parts += [scores, np.float32(threshold)]
        return b"".join(part.tobytes() for part in parts)

    def wanted(self) -> list:
        """What the oracle says of every stage."""
        tokens, index, stages = self.tokens, None, []
        prefix = tokens.shape[1] - self.scores[0].shape[1]
        for scores, threshold in zip(self.scores, self.thresholds):
            mine = scores[:, : tokens.shape[1] - prefix].copy()
            if index is not None:
                mine[index[:, prefix:] < 0] = -INF
            stages.append(threshold_compact(tokens, mine, threshold))
            tokens, index = stages[-1].compact, stages[-1].index
        return stages


def chains(dtype: type, seed: int) -> list[tuple[Chain, Chain]]:
    """Records of two contexts' chains, of one shape and other contents."""
    rng = np.random.default_rng(seed)

    def chain(shape: tuple[int, ...], prefix: int, thresholds: list[float]) -> Chain:
        scores = [rng.random((shape[0], shape[1] - prefix), np.float32) for _ in range(3)]
        for values in scores[1:]:
            values[rng.random(values.shape) < 0.2] = NAN
        scores[2][0] = NAN  # of one image nothing is a number, and its padding must not come back
        return Chain(rng.standard_normal(shape, np.float32).astype(dtype), scores, thresholds)

    kinds = [0.3, 0.4, 0.5], [2.0, 0.5, 0.1], [-1.0, -1.0, NAN], [0.6, INF, -INF]
    shapes = (1, 197, 64), (4, 50, 33), (2, 2, 8), (3, 9, 1)
    given = [(shape, 1) for shape in shapes]
    given += [((1, 198, 64), 2), ((4, 54, 33), 5), ((2, 6, 8), 5), ((3, 40, 1), 33)]
    return [(chain(*one, a), chain(*one, b)) for one in given for a, b in pairwise(kinds)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("kernel", KERNELS)
def test_three_calls_in_a_row_in_two_contexts_that_take_turns(
    driver, libraries, kernel, bits, dtype
):
    """Clones share nothing, and a call's shape is what the `size` of the one before says."""
    check_chains(driver, libraries[kernel], dtype, bits)


def check_chains(driver: Path, library: Path, dtype: type, bits: int) -> None:
    records = chains(dtype, bits)
    given = b""
    for pair in records:
        images, rows, width = pair[0].tokens.shape
        prefix = rows - pair[0].scores[0].shape[1]
        head = np.array([images, rows, prefix, width, TYPES.index(dtype)], np.int64)
        given += b"".join([head.tobytes(), *(chain.record() for chain in pair)])
    done = subprocess.run([driver, library, f"chain{bits}"], input=given, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    stream = BytesIO(done.stdout)
    for chain in (chain for pair in records for chain in pair):
        images, rows, _ = chain.tokens.shape
        for right in chain.wanted():
            buffers = [stream.read(n) for n in
                       (chain.tokens.nbytes, images * rows * 8, images * 8, bits // 8)]  # fmt: skip
            values = [*right[:3], right.size.astype(f"int{bits}")]
            for name, mine, theirs in zip(right._fields, buffers, values, strict=True):
                same = mine[: theirs.nbytes] == theirs.tobytes()
                assert same, f"{name} of {chain.tokens.shape}, θ {chain.thresholds}"
                assert set(mine[theirs.nbytes :]) <= {POISON}
    assert not stream.read()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "prefix"),
    [((1, 1, 64), 1), ((1, 4097, 4), 1), ((2, 1, 0), 1), ((1, 4097, 4), 5), ((2, 9, 4), 0),
     ((2, 9, 4), -1), ((2, 9, 4), 9)],
)  # fmt: skip
@pytest.mark.parametrize("kernel", KERNELS)
def test_refuses_what_it_cannot_do_and_writes_nothing(driver, libraries, kernel, shape, prefix):
    call = plain(shape, np.float32, 0.5, prefix=prefix)
    ((status, outputs),) = enqueue(driver, libraries[kernel], [call])
    assert status == -1
    assert set(b"".join(outputs)) == {POISON}


@pytest.mark.parametrize("order", range(3))
def test_kernel_gives_the_same_in_any_order_of_its_threads(driver, libraries, order):
    calls = [*random_calls(40, 2), plain((3, 577, 64), np.float16, 0.5)]
    check(driver, libraries["cuda, emulated"], calls, order)


# ---------------------------------------------------------------- what the tests above can see


@pytest.mark.slow
def test_enqueue_that_does_nothing_fails(driver, trt_headers, tmp_path):
    (tmp_path / "nothing.cpp").write_text(
        '#include "threshold_compact.h"\n'
        "size_t asvitThresholdCompactWorkspace(int64_t, int64_t) noexcept { return 64; }\n"
        "int32_t asvitThresholdCompact(AsvitThresholdCompact const*, CUstream_st*) noexcept "
        "{ return 0; }\n"
    )
    library = make_library(trt_headers, tmp_path / "nothing.so", tmp_path / "nothing.cpp")
    for case in CASES:
        with pytest.raises(AssertionError, match="compact of"):
            check(driver, library, [call_of(case, np.float32)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("__syncthreads();", ""),
        ("raiseTo(size, mine);", "*size = static_cast<Size>(mine);"),
        ("row >= stride", "row > stride"),
        ("kept ? rows[image * rowsOfImage + row] : -1", "rows[image * rowsOfImage + row]"),
        ("(1U << lane) - 1U", "(2U << lane) - 1U"),
        ("total == 0", "false"),
        ("row < prefix;", "row < 1;"),
        ("row += kCOUNT_WARPS * kWARP", "row += prefix"),
        ("rows += prefix;", "rows += 1;"),
        ("prefix + token", "1 + token"),
        ("static_cast<uint32_t>(prefix) + asvit::tokenOf", "1 + asvit::tokenOf"),
    ],
)
def test_wrong_kernel_fails(driver, trt_headers, tmp_path, right, wrong):
    text = (SOURCES / "kernels" / "threshold_compact.cu").read_text()
    assert right in text
    (tmp_path / "wrong.cu").write_text(text.replace(right, wrong))
    library = make_library(trt_headers, tmp_path / "wrong.so", tmp_path / "wrong.cu", "-w")
    calls = [call_of(case, np.float32) for case in CASES] * 3
    with pytest.raises(AssertionError):
        check(driver, library, calls)


# ---------------------------------------------------------------- sanitizers


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [None, SOURCES / "kernels" / "threshold_compact.cu"],
                         ids=KERNELS)  # fmt: skip
def test_sanitizers_find_nothing(trt_headers, tmp_path, kernel, pytestconfig):
    """Every buffer ends where its memory ends, so a byte too far is seen.

    `pytest --op-calls 1000000` makes as many as that.
    """
    (tmp_path / "empty.cpp").write_text("int main() {}")
    empty = [*find_compiler(), *SANITIZE, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "e")]
    if subprocess.run(empty, capture_output=True).returncode:
        pytest.skip("no sanitizers with this compiler")
    driver = make_driver(trt_headers, tmp_path / "driver", *SANITIZE)
    library = make_library(trt_headers, tmp_path / "library.so", kernel, *SANITIZE)
    calls = [call_of(case, TYPES[i % 3]) for i, case in enumerate(CASES)]
    check(driver, library, calls)
    left, seed = pytestconfig.getoption("op_calls"), 3
    while left > 0:  # a part at a time: the calls of all would not fit into memory
        check(driver, library, random_calls(min(left, 5000), seed))
        left, seed = left - 5000, seed + 1
    for bits in (32, 64):
        check_chains(driver, library, np.float16, bits)
    done = subprocess.run([driver, library, "contract"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- CUDA's compiler


@pytest.mark.slow
def test_cuda_kernel_compiles_for_every_gpu_without_a_warning(tmp_path):
    found = nvcc.find_nvcc()
    if found is None:
        pytest.skip("no nvcc")
    gencode = nvcc.gencode(nvcc.targets_of(["all"]))
    compiled(found, "-std=c++17", "-O3", *gencode, "-Werror", "all-warnings", "-Xcompiler",
             "-Wall,-Wextra", "--keep", "--keep-dir", tmp_path, "-c",
             SOURCES / "kernels" / "threshold_compact.cu", "-o", tmp_path / "kernel.o")  # fmt: skip
    made = {path.suffixes[-2].rpartition("_")[2] for path in tmp_path.glob("*.cubin")}
    assert made == set(nvcc.ALL_SMS)
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in tmp_path.glob("*.cubin"))
