"""Bucketed mode: stage models of a few fixed sizes, and a compaction between two of them.

What a stage keeps is padded with zero rows to the smallest bucket that holds it, so every shape
comes from a short list while the work still shrinks with the picture. The stage models mask the
padding (`exporting.split`); the order of events is the same on every backend and stands here once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from asvit_deploy.ops.reference import threshold_compact
from asvit_deploy.precision import of_tensor_type
from asvit_deploy.runners.base import Prediction, RunnerBase, decode, require_images, stack
from asvit_deploy.runners.onnx_runtime import import_onnxruntime, session_options

if TYPE_CHECKING:
    from asvit_deploy.reduction.base import Reduction

# An array where the backend computes: NumPy's on a CPU, a CUDA tensor of PyTorch on a GPU.
Array = Any

# What stage models call what they put out of each row beside its token and score: its size, which
# moves on with it, and the row that takes what it carries where it leaves; and how inputs begin.
SIZES, INTO, KEPT = "sizes", "into", "kept_"
# What of a row moves on with its token: arrays [B, M] that a compaction gathers as it does tokens.
SIDE_ROWS = (SIZES,)


class Cut(NamedTuple):
    """What a stage puts out in front of a compaction, in the backend's own memory.

    Attributes:
        tokens: T [1, M, D].
        scores: float32 [1, M-P].
        side: of `SIDE_ROWS`, by name, those that the stage behind takes: sizes float32 [1, M].
        into: int64 [1, M], of methods that have it.
    """

    tokens: Array
    scores: Array
    side: Mapping[str, Array] = {}
    into: Array | None = None

    @classmethod
    def of(cls, found: Mapping[str, Array]) -> Cut:
        """From a stage model's outputs by name."""
        side = {name: found[name] for name in SIDE_ROWS if name in found}
        return cls(found["tokens"], found["scores"], side, found.get(INTO))


def side_rows_of(method: type[Reduction] | None) -> tuple[str, ...]:
    """Which of `SIDE_ROWS` rows of that method have; None is AS-ViT's own, which has none."""
    return (SIZES,) if method is not None and method.carries_sizes else ()


@dataclass(frozen=True)
class Kept:
    """What a compaction leaves, in the backend's own memory.

    Attributes:
        tokens: T [1, M, D], M the most rows that there ever are: the first `rows` are kept, all
            others zero, so that its first b rows are the input of bucket b, without a copy.
        index: int64 [1, at least rows], each kept row's place in the input.
        length: int64 [1], the same number as `rows`, where a stage can read it.
        rows: rows in use, class token included, known to the host.
        side: `Cut.side` of the kept rows; zero behind them, as tokens are.
    """

    tokens: Array
    index: Array
    length: Array
    rows: int
    side: Mapping[str, Array] = field(default_factory=dict)


class StageBackend(Protocol):
    """The stage models of one network and the compaction between them, for one image at a time.

    What a call returns may be overwritten by the next image's calls.
    """

    def start(self, images: NDArray[np.float32]) -> Cut:
        """Stage 0: images [1, 3, H, W] -> tokens T [1, M, D], scores float32 [1, M-P]."""
        ...

    def compact(self, stage: int, cut: Cut, rows: int) -> Kept:
        """Keep what passes the threshold of stage `stage` (0-based) among the first `rows` rows.

        The one place where the host waits for the device: to read how many rows stay.

        Args:
            cut: of b rows; scores are -inf from `rows` - P on.
        """
        ...

    def run(self, stage: int, bucket: int, kept: Kept) -> Cut | tuple[Array, ...]:
        """Stage `stage` (1-based, after the compaction of stage - 1) on the first `bucket` rows.

        Returns:
            of `bucket` rows; of the last stage the network's output, float32 [1, C].
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


# At a compaction: length, index, scores and into, as `decode` takes them.
Traced = tuple[NDArray, NDArray, NDArray, NDArray | None]


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
        require_images(images)
        return stack([self._predict(image[None]) for image in images])

    def _predict(self, image: NDArray[np.float32]) -> Prediction:
        trace: list[Traced] = []
        result = self._run(image, trace)
        lengths, index, scores, into = zip(*trace)
        # At a cut behind which nothing asks for sizes a graph does not say where rows go.
        goes = () if any(stage is None for stage in into) else into
        return decode(result, lengths, index, scores, prefix=self.prefix, into=goes)

    def _run(self, image: NDArray[np.float32], trace: list[Traced] | None) -> NDArray:
        host = self.backend.host
        self.executed = []
        output: Cut | tuple[Array, ...] = self.backend.start(image)
        rows = output[0].shape[1]
        for stage in range(self.stages):
            cut = Cut(*output)
            self.prefix = cut.tokens.shape[1] - cut.scores.shape[1]
            kept = self.backend.compact(stage, cut, rows)
            rows = kept.rows
            if trace is not None:
                into = None if cut.into is None else host(cut.into)
                trace.append((host(kept.length), host(kept.index), host(cut.scores), into))
            bucket = smallest(self.buckets, rows)
            self.executed.append((kept.tokens.shape[0], bucket, kept.tokens.shape[2]))
            output = self.backend.run(stage + 1, bucket, kept)
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

    def _named(self, stage: int, feeds: dict[str, NDArray]) -> dict[str, NDArray]:
        session = self.sessions[stage]
        names = [value.name for value in session.get_outputs()]
        given = {value.name: feeds[value.name] for value in session.get_inputs()}
        return dict(zip(names, session.run(names, given)))

    def start(self, images: NDArray[np.float32]) -> Cut:
        return Cut.of(self._named(0, {"images": images}))

    def compact(self, stage: int, cut: Cut, rows: int) -> Kept:
        tokens, scores = cut.tokens, cut.scores
        threshold, prefix = self.thresholds[stage], tokens.shape[1] - scores.shape[1]
        compacted = threshold_compact(tokens[:, :rows], scores[:, : rows - prefix], threshold)
        kept = int(compacted.length[0])
        most = self.sessions[0].get_outputs()[0].shape[1]

        def padded(values: NDArray) -> NDArray:
            whole = np.zeros((1, most, *values.shape[2:]), values.dtype)
            whole[:, :kept] = values
            return whole

        side = {name: padded(rows[:, compacted.index[0]]) for name, rows in cut.side.items()}
        return Kept(padded(compacted.compact), compacted.index, compacted.length, kept, side)

    def run(self, stage: int, bucket: int, kept: Kept) -> Cut | tuple[NDArray, ...]:
        side = {KEPT + name: values[:, :bucket] for name, values in kept.side.items()}
        given = {"kept": kept.tokens[:, :bucket], "length": kept.length, **side}
        found = self._named(stage, given)
        return Cut.of(found) if "scores" in found else tuple(found.values())

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
