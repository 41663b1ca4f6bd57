"""Calls of the plugin: made here, run by the driver, compared with the oracle bit for bit.

Half and bfloat16 are 16-bit numbers that nobody adds up: the op copies them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.ops.reference import threshold_compact
from gpu_parts.kit import FailPart

TYPES = ("float32", "float16", "bfloat16")  # in the driver's order
BITS = (np.uint32, np.uint16, np.uint16)
POISON = 0xA5
INF, NAN = float("inf"), float("nan")
CASES = "data/cases.npz"


@dataclass
class Call:
    """One enqueue.

    Attributes:
        tokens: the bits of T [B, M, D], see `BITS`.
        kind: T, a place in `TYPES`.
        offset: bytes behind an aligned place at which the payload begins.
        name: for messages.
    """

    tokens: NDArray
    scores: NDArray[np.float32]
    threshold: float
    kind: int
    offset: int = 0
    name: str = ""

    @property
    def prefix(self) -> int:
        """P."""
        return self.tokens.shape[1] - self.scores.shape[1]

    def record(self) -> bytes:
        head = np.array([*self.tokens.shape, self.kind, self.offset, self.prefix], np.int64)
        values = head, self.tokens, self.scores, np.float32(self.threshold)
        return b"".join(value.tobytes() for value in values)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.tokens.shape))
        what = f"{self.name} [{shape}] {TYPES[self.kind]}, P {self.prefix}"
        return f"{what}, θ {self.threshold}, +{self.offset}"


def any_bits(shape: Sequence[int], kind: int, seed: int) -> NDArray:
    """Random bits as T: signalling NaNs are data."""
    rng = np.random.default_rng([seed, *shape])
    return rng.integers(0, np.iinfo(BITS[kind]).max, tuple(shape), BITS[kind], endpoint=True)


def stored_calls(root: Path, kind: int) -> list[Call]:
    """The cases of the contract, in one type."""
    with np.load(root / CASES, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    calls, first = [], 0
    columns = ("names", "shapes", "prefixes", "thresholds")
    for name, shape, prefix, threshold in zip(*(data[column] for column in columns)):
        images, rows, _ = map(int, shape)
        end = first + images * (rows - int(prefix))
        scores = data["scores"][first:end].reshape(images, rows - int(prefix))
        tokens = any_bits(tuple(map(int, shape)), kind, 0)
        calls.append(Call(tokens, scores, float(threshold), kind, name=str(name)))
        first = end
    return calls


def plain(shape: tuple[int, int, int], kind: int, threshold: float, prefix: int = 1) -> Call:
    """Uniform scores."""
    scores = np.random.default_rng(shape).random((shape[0], shape[1] - prefix), np.float32)
    return Call(any_bits(shape, kind, 1), scores, threshold, kind, name="plain")


def random_calls(count: int, seed: int) -> list[Call]:
    """Small shapes, all special values, payloads that begin anywhere, prefixes of every length."""
    rng = np.random.default_rng(seed)
    calls = []
    for i in range(count):
        shape, kind = tuple(map(int, rng.integers((1, 2, 1), (9, 60, 97)))), i % 3
        prefix = [1, 2, 5, int(rng.integers(1, shape[1]))][i // 2 % 4]
        scores = rng.random((shape[0], max(shape[1] - prefix, 1)), np.float32)
        if i % 4 == 1:
            scores = np.round(scores * 4) / np.float32(4)
        for value in (NAN, INF, -INF)[: i % 5]:
            scores[rng.random(scores.shape) < 0.3] = value
        threshold = [0.5, 0.25, 2.0, -1.0, float(rng.random()), NAN, INF, -INF][i % 8]
        step = np.dtype(BITS[kind]).itemsize
        offset = int(rng.choice([0, 0, 2, 4, 8]) // step * step)
        calls.append(Call(any_bits(shape, kind, seed), scores, threshold, kind, offset, "random"))
    return calls


def drive(driver: Path, plugin: Path, mode: str, given: bytes, bits: int = 0) -> BytesIO:
    """What the driver writes.

    Raises:
        FailPart: it ends with an error.
    """
    command = [str(driver), str(plugin), mode, *([str(bits)] if bits else [])]
    try:
        done = subprocess.run(command, input=given, capture_output=True)
    except OSError as error:
        raise FailPart(f"the driver cannot be run: {error}") from None
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise FailPart(f"the driver ends with {done.returncode} in {mode}: {said}")
    return BytesIO(done.stdout)


def check(
    driver: Path, plugin: Path, calls: Sequence[Call], mode: str = "run", bits: int = 0
) -> None:
    """Every call succeeds, fills what the oracle says, and touches nothing behind it.

    Args:
        mode: of the driver: run, graph, reshape or streams.
        bits: of the engine's size tensor; 0 leaves them to the plugin.

    Raises:
        FailPart: one does not.
    """
    stream = drive(driver, plugin, mode, b"".join(call.record() for call in calls), bits)
    for call in calls:
        compare(stream, call, bits, mode)
    if stream.read(1):
        raise FailPart(f"the driver writes too much in {mode}")


def compare(stream: BytesIO, call: Call, bits: int, mode: str) -> NDArray[np.int64]:
    """Judge the next result of a stream; the lengths [B] that it should have."""
    images, rows, _ = call.tokens.shape
    head = np.frombuffer(stream.read(16), np.int64)
    if len(head) != 2:
        raise FailPart(f"the driver writes too little in {mode}")
    status, width = int(head[0]), int(head[1])
    if status != 0 or (bits and width * 8 != bits):
        raise FailPart(f"status {status}, size of {width} bytes in {mode}, of {call}")
    wanted = threshold_compact(call.tokens, call.scores, call.threshold)
    size = wanted.size.astype({4: np.int32, 8: np.int64}[width])
    space = call.tokens.nbytes, images * rows * 8, images * 8, width
    right: tuple[NDArray[Any], ...] = wanted.compact, wanted.index, wanted.length, size
    for name, room, value in zip(wanted._fields, space, right):
        mine, theirs = stream.read(room), value.tobytes()
        if mine[: len(theirs)] != theirs:
            raise FailPart(f"{name} differs in {mode}, of {call}")
        if mine[len(theirs) :].strip(bytes([POISON])):
            raise FailPart(f"written behind {name} in {mode}, of {call}")
    return wanted.length


def chains(root: Path, kind: int, steps: int = 3) -> Iterator[list[Call]]:
    """Calls of which each takes what the one before it leaves; rows that pad score -inf."""
    rng = np.random.default_rng(3)
    shapes = (1, 197, 384), (8, 197, 64), (2, 9, 64), (3, 577, 192), (1, 2, 64)
    given = [*((shape, 1) for shape in shapes), ((8, 198, 64), 2), ((3, 261, 192), 5)]
    for shape, prefix in given:
        tokens, length = any_bits(shape, kind, 2), None
        calls = []
        for step in range(steps):
            scores = rng.random((shape[0], tokens.shape[1] - prefix), np.float32)
            if length is not None:
                pads = np.arange(prefix, tokens.shape[1]) >= length[:, None]
                scores[pads] = -INF
            threshold = (0.3, 0.4, 2.0)[step % 3]
            calls.append(Call(tokens, scores, threshold, kind, name=f"chain {step}"))
            wanted = threshold_compact(tokens, scores, threshold)
            tokens, length = wanted.compact, wanted.length
        yield calls


def check_chain(driver: Path, plugin: Path, calls: list[Call], bits: int) -> None:
    """`calls` of `chains`, each on the device buffers of the one before it."""
    given = calls[0].record() + np.int64(len(calls) - 1).tobytes()
    for call in calls[1:]:
        given += np.float32(call.threshold).tobytes() + np.int64(call.scores.size).tobytes()
        given += call.scores.tobytes()
    stream = drive(driver, plugin, "chain", given, bits)
    for call in calls:
        compare(stream, call, bits, "chain")
