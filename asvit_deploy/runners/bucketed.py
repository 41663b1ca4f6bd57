"""Bucketed mode: stage models of a few fixed sizes, and a compaction between two of them.

What a stage keeps is padded with zero rows to the smallest bucket that holds it, so every shape
comes from a short list while the work still shrinks with the picture. The stage models mask the
padding (`exporting.split`); the order of events is the same on every backend and stands here once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from asvit_deploy.ops.reference import threshold_compact
from asvit_deploy.precision import of_tensor_type
from asvit_deploy.runners.base import Prediction, RunnerBase, decode, stack
from asvit_deploy.runners.onnx_runtime import import_onnxruntime, session_options

# An array where the backend computes: NumPy's on a CPU, a CUDA tensor of PyTorch on a GPU.
Array = Any


@dataclass(frozen=True)
class Kept:
    """What a compaction leaves, in the backend's own memory.

    Attributes:
        tokens: T [1, M, D], M the most rows that there ever are: the first `rows` are kept, all
            others zero, so that its first b rows are the input of bucket b, without a copy.
        index: int64 [1, at least rows], each kept row's place in the input.
        length: int64 [1], the same number as `rows`, where a stage can read it.
        rows: rows in use, class token included, known to the host.
    """

    tokens: Array
    index: Array
    length: Array
    rows: int


class StageBackend(Protocol):
    """The stage models of one network and the compaction between them, for one image at a time.

    What a call returns may be overwritten by the next image's calls.
    """

    def start(self, images: NDArray[np.float32]) -> tuple[Array, Array]:
        """Stage 0: images [1, 3, H, W] -> tokens T [1, M, D], scores float32 [1, M-P]."""
        ...

    def compact(self, stage: int, tokens: Array, scores: Array, rows: int) -> Kept:
        """Keep what passes the threshold of stage `stage` (0-based) among the first `rows` rows.

        The one place where the host waits for the device: to read how many rows stay.

        Args:
            tokens: T [1, b, D].
            scores: float32 [1, b-P], -inf from `rows` - P on.
        """
        ...

    def run(self, stage: int, tokens: Array, length: Array) -> tuple[Array, ...]:
        """Stage `stage` (1-based, after the compaction of stage - 1) on one bucket.

        Args:
            tokens: T [1, b, D], b a bucket; zero from `length` on.
            length: `Kept.length`.

        Returns:
            tokens T [1, b, D] and scores float32 [1, b-P]; of the last stage the network's output,
            float32 [1, C].
        """
        ...

    def host(self, array: Array) -> NDArray:
        """A NumPy copy, once everything before it is done."""
        ...

    def describe(self) -> dict[str, str]:
        """As `Runner.describe`."""
        ...


def smallest(buckets: Sequence[int], rows: int) -> int:
    """The smallest of the rising `buckets` that holds `rows`.

    Raises:
        ValueError: none does.
    """
    for bucket in buckets:
        if bucket >= rows:
            return bucket
    raise ValueError(f"no bucket of {list(buckets)} holds {rows} rows")


class BucketedRunner(RunnerBase):
    """Stage models in buckets as one model, one image at a time.

    Args:
        backend: the stage models.
        stages: compactions between them; one less than stage models.
        buckets: rising; the last holds every row of the input.

    Attributes:
        executed: of the last image, the shape of the tokens that each stage after the first ran on.
    """

    def __init__(self, backend: StageBackend, stages: int, buckets: Sequence[int]) -> None:
        self.backend, self.stages, self.buckets = backend, stages, tuple(buckets)
        self.executed: list[tuple[int, ...]] = []
        self.prefix = 1  # P, as the first stage has it

    def infer(self, images: NDArray[np.float32]) -> NDArray:
        """images float32 [1, 3, H, W] -> logits or embedding, float32 [1, C]."""
        return self._run(images, None)

    def __call__(self, images: NDArray[np.float32]) -> Prediction:
        """images float32 [B, 3, H, W], run one by one -> everything, scores included."""
        return stack([self._predict(image[None]) for image in images])

    def _predict(self, image: NDArray[np.float32]) -> Prediction:
        trace: list[tuple[NDArray, NDArray, NDArray]] = []
        result = self._run(image, trace)
        lengths, index, scores = zip(*trace)
        return decode(result, lengths, index, scores, prefix=self.prefix)

    def _run(
        self, image: NDArray[np.float32], trace: list[tuple[NDArray, NDArray, NDArray]] | None
    ) -> NDArray:
        host = self.backend.host
        self.executed = []
        output: tuple[Array, ...] = self.backend.start(image)
        rows = output[0].shape[1]
        self.prefix = rows - output[1].shape[1]
        for stage in range(self.stages):
            tokens, scores = output
            kept = self.backend.compact(stage, tokens, scores, rows)
            rows = kept.rows
            if trace is not None:
                trace.append((np.array([rows]), host(kept.index), host(scores)))
            bucket = kept.tokens[:, : smallest(self.buckets, rows)]
            self.executed.append(tuple(bucket.shape))
            output = self.backend.run(stage + 1, bucket, kept.length)
        return host(output[0])

    def describe(self) -> dict[str, str]:
        return {**self.backend.describe(), "buckets": ",".join(map(str, self.buckets))}


class OrtStages:
    """Stage models in ONNX Runtime on a CPU; compaction by the op's oracle.

    Args:
        stages: from `exporting.split.split_segments`, float32 or float16.
        thresholds: one per compaction.
        threads: as `OrtRunner`.
    """

    def __init__(
        self, stages: Sequence[onnx.ModelProto], thresholds: Sequence[float], threads: int = 1
    ) -> None:
        ort = import_onnxruntime()
        self.thresholds = [float(threshold) for threshold in thresholds]
        self.sessions = [
            ort.InferenceSession(
                stage.SerializeToString(),
                session_options(threads),
                providers=["CPUExecutionProvider"],
            )
            for stage in stages
        ]

    def start(self, images: NDArray[np.float32]) -> tuple[NDArray, NDArray]:
        tokens, scores = self.sessions[0].run(["tokens", "scores"], {"images": images})
        return tokens, scores

    def compact(self, stage: int, tokens: NDArray, scores: NDArray, rows: int) -> Kept:
        threshold, prefix = self.thresholds[stage], tokens.shape[1] - scores.shape[1]
        compacted = threshold_compact(tokens[:, :rows], scores[:, : rows - prefix], threshold)
        kept = int(compacted.length[0])
        most = self.sessions[0].get_outputs()[0].shape[1]
        padded = np.zeros((1, most, tokens.shape[2]), tokens.dtype)
        padded[:, :kept] = compacted.compact
        return Kept(padded, compacted.index, compacted.length, kept)

    def run(self, stage: int, tokens: NDArray, length: NDArray) -> tuple[NDArray, ...]:
        return tuple(self.sessions[stage].run(None, {"kept": tokens, "length": length}))

    def host(self, array: NDArray) -> NDArray:
        return np.array(array)

    def describe(self) -> dict[str, str]:
        ort = import_onnxruntime()
        kind = self.sessions[0].get_outputs()[0].type
        return {
            "backend": f"onnxruntime {ort.__version__}, bucketed",
            "provider": self.sessions[0].get_providers()[0],
            "precision": of_tensor_type(kind).name,
            "device": ort.get_device(),
        }
