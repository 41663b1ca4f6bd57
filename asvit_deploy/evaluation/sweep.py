"""Latency over batch, budget and image size: where adaptive wins, in each runtime.

Each point runs dense, adaptive and static rows of all runtimes in turn, as the main table of
`bench` does, on the same pictures. Times and MACs are per picture. A batch can also be run one
picture after the other, so each kind of row is timed both ways and the faster one counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from asvit_deploy.artefacts.onnx_file import RUNTIMES, OnnxArtefact
from asvit_deploy.artefacts.reference import reference_model
from asvit_deploy.budget import carried_out, macs_of
from asvit_deploy.data.images import ImageSet
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.arguments import bar
from asvit_deploy.evaluation.machine import machine
from asvit_deploy.evaluation.model_bench import as_precise
from asvit_deploy.evaluation.sweep_points import Plan, Point, at_size
from asvit_deploy.evaluation.sweep_types import Kind, Sweep, SweepPoint, SweepRow
from asvit_deploy.evaluation.sweep_verdict import verdicts
from asvit_deploy.evaluation.timing import (
    Core,
    Variant,
    busy,
    interleave,
    interval_of,
    share_of_macs_ratio,
)
from asvit_deploy.exporting.int8 import smoothed, to_int8
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import dense_macs
from asvit_deploy.models.vit import BatchRule, ViT
from asvit_deploy.precision import FLOAT32
from asvit_deploy.processor import torch_threads
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.runners.base import Prediction, Runner, RunnerBase, stack
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner
from asvit_deploy.runtimes import ONNXRUNTIME, TORCH

FEWEST = 10  # rounds
_QUANTISING = 8  # pictures
_GRAPHS = 6  # in memory: all that a sweep over batches runs
Images = Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class Rounds:
    """As `bench` has them for its main table; a sweep runs a quarter of those pictures."""

    warmup: int
    runs: int

    def of(self, batch: int) -> tuple[int, int]:
        """Warm-up and timed rounds of so many pictures each."""
        warmup = math.ceil(self.warmup / 4 / batch)
        return max(1, warmup), max(FEWEST, math.ceil(self.runs / 4 / batch))


class OneAtATime(RunnerBase):
    """A batch, one picture after the other."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    def infer(self, images: NDArray[np.float32]) -> None:
        for i in range(len(images)):
            self.runner.infer(images[i : i + 1])

    def __call__(self, images: NDArray[np.float32]) -> Prediction:
        return stack([self.runner(images[i : i + 1]) for i in range(len(images))])

    def describe(self) -> dict[str, str]:
        return self.runner.describe()


@dataclass(frozen=True)
class _Entry:
    """A row to time; `macs` are means over each batch's pictures, float64 [batches]."""

    variant: Variant
    kind: Kind
    singly: bool
    packed: bool
    macs: NDArray[np.float64]


def run_sweep(
    artefact: OnnxArtefact, pictures: ImageSet, plan: Plan, threads: int, rounds: Rounds,
    runtimes: Sequence[str], say: Callable[[str], None],
) -> Sweep:  # fmt: skip
    """Time every point of a plan.

    Args:
        pictures: those that the plan was made on.
        threads: 0 takes every core.
        runtimes: as `bench_model`. What one of them cannot run costs a note.
    """
    count = threads or machine()["cores"]
    ran = _runtimes(artefact, threads, runtimes)
    points, notes = [], list(plan.notes)
    if TORCH in ran and artefact.fields["precision"] != FLOAT32.name:
        notes.append("torch computes in float32, beside dense torch in float32")
    with torch_threads(count):
        made: _Exports | None = None
        for point in plan.points:
            if made is None or made.network.config.image_size != point.config.image_size:
                made = _Exports(artefact, pictures, point)
            say(f"{artefact.path}: sweep over {plan.over}, {point.at:g}")
            points.append(_timed(made, point, plan.over, ran, threads, rounds, say))
    return {"over": plan.over, "points": points, "notes": notes,
            "verdict": verdicts(plan.over, points)}  # fmt: skip


def _runtimes(artefact: OnnxArtefact, threads: int, runtimes: Sequence[str]) -> list[str]:
    """What the main table has rows of."""
    own = dict.fromkeys(artefact.ways(threads, record=False, runtimes=runtimes).runtimes.values())
    first = [TORCH] if not runtimes or TORCH in runtimes else []
    return [*first, *(name for name in own if name != TORCH)]


class _Exports:
    """One network's graphs, in the artefact's precision."""

    def __init__(self, artefact: OnnxArtefact, pictures: ImageSet, point: Point) -> None:
        self.artefact = artefact
        if point.config.image_size == artefact.config.image_size:
            self.network, shown = artefact.dense_reference, pictures
        else:
            fields = {**artefact.checkpoint_fields, "image_size": point.config.image_size}
            self.network = reference_model(artefact.path, fields, dense=True)
            shown = at_size(pictures, self.network.config)
        self.images = [shown[i] for i in range(len(shown))]
        self._graphs: dict[tuple[Reduction | None, str], onnx.ModelProto] = {}

    def with_reduction(self, reduction: Reduction | None) -> ViT:
        return self.network.with_reduction(reduction)

    def graph(self, reduction: Reduction | None, batch: str) -> onnx.ModelProto:
        """The network with a method, or dense, for batches as `to_onnx` names them."""
        key = reduction, batch
        if key not in self._graphs:
            if len(self._graphs) == _GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = self._exported(reduction, batch)
        return self._graphs[key]

    def _exported(self, reduction: Reduction | None, batch: str) -> onnx.ModelProto:
        model = to_onnx(self.with_reduction(reduction), batch)
        made = self.artefact.fields.get("quantisation")
        if made is None or reduction is None or not reduction.boundaries():
            return as_precise(self.artefact.fields, model)
        # Scores decide what leaves, so that the ranges are those of pictures.
        some = self.images[:_QUANTISING]
        return to_int8(smoothed(model, some), made["kind"], made["float32_layers"], some)

    def runner(
        self, runtime: str, reduction: Reduction | None, batch: str, threads: int
    ) -> Runner:  # fmt: skip
        if runtime == TORCH:
            rule: BatchRule = "packed" if batch == "packed" else "exact"
            return TorchRunner(self.with_reduction(reduction), rule)
        model, library = self.graph(reduction, batch), self.artefact.library
        able = "library" in self.artefact.libraries()
        if runtime == ONNXRUNTIME and library is not None and reduction is not None and able:
            return OrtRunner(model, library, threads, record=False)
        return RUNTIMES[runtime].model(model, threads)


def batches_of(images: Images, size: int) -> list[NDArray[np.float32]]:
    """All pictures in batches float32 [size, 3, H, W] of different ones; the last is filled up
    with the first."""
    starts = range(0, len(images), size)
    return [np.stack([images[(s + j) % len(images)] for j in range(size)]) for s in starts]


def _timed(
    made: _Exports, point: Point, over: str, runtimes: Sequence[str], threads: int, rounds: Rounds,
    say: Callable[[str], None],
) -> SweepPoint:  # fmt: skip
    """The rows of one point."""
    batches, notes = batches_of(made.images, point.batch), list(point.notes)
    entries: list[_Entry] = []
    for runtime in runtimes:
        try:
            entries += _entries(made, point, runtime, threads, batches)
        except (UserError, RuntimeError, MemoryError) as error:  # such as PyTorch without memory
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            notes.append(f"no rows of {runtime}: {reason}")
    warmup, runs = rounds.of(point.batch)
    with (
        bar(say, total=warmup + runs, desc=f"sweep, {over} {point.at:g}") as progress,
        Core() as core,
    ):
        seconds = interleave(
            [entry.variant for entry in entries], batches, warmup, runs,
            progress=lambda: progress.update() and None,
        )  # fmt: skip
    dense = dense_macs(point.config)
    return {
        "at": point.at, "batch": point.batch, "image_size": point.config.image_size,
        "warmup": warmup, "runs": runs,
        "macs": {
            "dense_gmacs": dense / 1e9, "adaptive_gmacs": float(point.macs.mean()) / 1e9,
            "ratio": dense / float(point.macs.mean()), "mean_kept": point.kept,
            "image_tokens": point.config.image_tokens, "share": point.share, "asked": point.asked,
        },
        "rows": _rows(entries, seconds, dense, point.batch), "notes": notes,
        "busy": busy([entry.variant for entry in entries], seconds, core),
    }  # fmt: skip


def _entries(
    made: _Exports, point: Point, runtime: str, threads: int, batches: Images
) -> list[_Entry]:
    """One runtime's rows, each of which has seen every picture where their counts differ."""
    kinds: list[tuple[Kind, Reduction | None]] = [("dense", None), ("adaptive", point.adaptive)]
    if point.static is not None:
        kinds.append(("static", point.static))
    precision = FLOAT32.name if runtime == TORCH else made.artefact.fields["precision"]
    found = []
    for kind, reduction in kinds:
        for batch in ("dynamic", "1", "packed") if point.batch > 1 else ("1",):
            runner = made.runner(runtime, reduction, batch, threads)
            singly, packed = batch == "1" and point.batch > 1, batch == "packed"
            runner = OneAtATime(runner) if singly else runner
            runner.infer(batches[0])  # what cannot run says so here
            name = f"{'torch eager' if runtime == TORCH else runtime}, {kind}"
            name += ", one at a time" * singly + ", packed" * packed
            name += f", {precision}" if precision != FLOAT32.name else ""
            variant = Variant(name, runtime, kind != "dense", runner, precision)
            macs = _macs(point.config, reduction, runner, batches)
            found.append(_Entry(variant, kind, singly, packed, macs))
    return found


def _macs(
    config: ArchConfig, reduction: Reduction | None, runner: Runner, batches: Images
) -> NDArray[np.float64]:
    """What a runner itself keeps, in MACs per picture of each batch: float64 [batches].

    This is also where it first sees the counts of every picture.
    """
    if reduction is None:
        return np.full(len(batches), float(dense_macs(config)))
    if not reduction.boundaries():
        return np.full(len(batches), carried_out(config, reduction))
    lengths = [np.stack(runner(batch).lengths, axis=1) for batch in batches]
    return np.array([macs_of(config, reduction, one).mean() for one in lengths])


def _rows(
    entries: Sequence[_Entry], seconds: dict[str, NDArray[np.float64]], dense: float, batch: int
) -> list[SweepRow]:
    """Times per picture, and the ratios to the fastest rows of the runtime."""
    times = {name: spent / batch for name, spent in seconds.items()}
    fastest: dict[tuple[str, Kind], str] = {}
    for entry in entries:
        name, key = entry.variant.name, (entry.variant.runtime, entry.kind)
        if key not in fastest or np.median(times[name]) < np.median(times[fastest[key]]):
            fastest[key] = name
    return [_row(entry, times, fastest, dense) for entry in entries]


def _row(
    entry: _Entry, times: dict[str, NDArray[np.float64]], fastest: dict[tuple[str, Kind], str],
    dense: float,
) -> SweepRow:  # fmt: skip
    variant = entry.variant
    own = times[variant.name]
    macs = entry.macs[np.arange(len(own)) % len(entry.macs)]
    p50, p90, p99 = np.percentile(own * 1e3, [50, 90, 99])
    row: SweepRow = {
        "name": variant.name, "runtime": variant.runtime, "kind": entry.kind,
        "singly": entry.singly, "packed": entry.packed, "precision": variant.precision,
        "runner": variant.runner.describe(), "gmacs": float(macs.mean()) / 1e9,
        "p50_ms": float(p50), "p90_ms": float(p90), "p99_ms": float(p99),
        "min_ms": float(own.min() * 1e3),
    }  # fmt: skip
    if entry.kind != "dense":
        beside = times[fastest[variant.runtime, "dense"]]
        row["speedup"] = interval_of(beside, own)
        row["share_of_macs_ratio"] = share_of_macs_ratio(beside, own, dense / macs)
    if entry.kind == "adaptive" and (variant.runtime, "static") in fastest:
        row["over_static"] = interval_of(times[fastest[variant.runtime, "static"]], own)
    return row
