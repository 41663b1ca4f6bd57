"""Engines against each other on a GPU: adaptive, dense, and static top-k of the same MACs.

All of one flavour and precision; dense and top-k are built in the run. One image at a time,
variants interleaved in random order, with and without CUDA graphs where a mode allows both.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from asvit_deploy import sidecar
from asvit_deploy.artefacts.engine_file import EngineArtefact
from asvit_deploy.calibration import agreement_of
from asvit_deploy.data.images import ImageSet
from asvit_deploy.evaluation.arguments import bar
from asvit_deploy.evaluation.machine import machine
from asvit_deploy.evaluation.report import Report
from asvit_deploy.evaluation.timing import (
    Macs,
    judged,
    macs_summary,
    ratio_of_medians,
    run_once,
)
from asvit_deploy.files import scratch
from asvit_deploy.precision import of_option
from asvit_deploy.runners.onnx_runtime import arithmetic_of
from asvit_deploy.runners.pytorch import TorchRunner

if TYPE_CHECKING:
    from asvit_deploy.engine.build import Options
    from asvit_deploy.runners.tensorrt import Times

CLOCKS = ("gpu", "enqueue", "wall")
_NOT_OF_THE_MODEL = ("schema", "sha256", "digest")


@dataclass(frozen=True)
class EngineBench(Report):
    """One engine or bundle, beside its peers.

    Attributes:
        model: its path.
        arch: of its network.
        flavour, version: of its TensorRT.
        precision, mode: as its sidecar says.
        gpu: what it ran on.
        warmup, runs: untimed and timed rounds.
        images: where the pictures come from.
        image_count: how many there are.
        account: how many were skipped and passed over, by reason and ending.
        macs: of the network and its dense twin; None for a dense one.
        agreement: of the network's outputs with the dense twin's, both in PyTorch, as
            `calibration.agreement_of`; None for a dense one.
        rows: one for each variant, as `summarise` makes them.
        against_kept: as `against_kept` makes it.
        verdict: one sentence on which is the faster.
        machine: the host.
        sha256: of the engine, or None of a bundle.
    """

    kind: ClassVar[str] = "engine"

    model: str
    arch: str
    flavour: str
    version: str
    precision: str
    mode: str
    gpu: str
    warmup: int
    runs: int
    images: str
    image_count: int
    account: dict[str, Any]
    macs: Macs | None
    agreement: dict[str, Any] | None
    rows: list[dict[str, Any]]
    against_kept: dict[str, list[dict[str, Any]]]
    verdict: str
    machine: dict[str, Any]
    sha256: str | None = None


@dataclass(frozen=True)
class EngineVariant:
    """One row: what it is called, "adaptive", "dense" or "top-k", and how one image is timed.

    Attributes:
        clocks: those of `Times` that mean for it what they mean for the others.
    """

    name: str
    kind: str
    timed: Callable[[NDArray[np.float32]], Times]
    clocks: tuple[str, ...] = CLOCKS


def bench_engine(
    artefact: EngineArtefact, pictures: ImageSet, warmup: int, runs: int,
    say: Callable[[str], None],
) -> EngineBench:  # fmt: skip
    """Time an engine and its peers, which are built first.

    Args:
        pictures: all of them readable.

    Raises:
        UserError: no GPU, a source is gone, or a build fails.
    """
    fields, config = artefact.fields, artefact.config
    loaded = [pictures[i] for i in range(len(pictures))]
    # The reference's counts: what `check` proves the engine to keep.
    outputs, lengths = run_once(TorchRunner(artefact.reference), loaded)
    agreed = None
    if artefact.adaptive:
        dense, _ = run_once(TorchRunner(artefact.dense_reference), loaded)
        agreed = agreement_of(config, torch.from_numpy(dense), torch.from_numpy(outputs))
    with scratch("bench") as folder:
        variants = variants_of(artefact, pictures, lengths, folder)
        with bar(say, total=warmup + runs, desc="bench") as progress:
            times = measure(
                variants, loaded, warmup, runs, progress=lambda: progress.update() and None
            )
    rows = summarise(variants, times)
    return EngineBench(
        str(artefact.path), fields["arch"], fields["flavour"], fields["flavour_version"],
        fields["precision"], fields["mode"], torch.cuda.get_device_name(), warmup, runs,
        pictures.source, len(loaded), pictures.account,
        macs_summary(config, lengths, runs, artefact.method) if artefact.adaptive else None,
        agreed, rows, against_kept(variants, times, lengths - config.prefix), verdict(rows),
        machine(), fields.get("sha256"),
    )  # fmt: skip


def bucketed_times(runner: Any) -> Callable[[NDArray[np.float32]], Times]:
    """A bucketed runner with a clock, of which only the wall's counts.

    Between the stages the host reads how many rows stay, so there is no time of the GPU alone, and
    the host is free again only at the end.
    """
    from asvit_deploy.runners.tensorrt import timed

    return lambda image: timed(lambda: None, lambda: runner.infer(image), lambda: None)


def variants_of(
    artefact: EngineArtefact, pictures: ImageSet, lengths: NDArray[np.int64], folder: Path
) -> list[EngineVariant]:
    """The engine, and its dense and top-k peers built into `folder`.

    Args:
        lengths: int64 [images, stages], rows in use after each stage, prefix included.

    Raises:
        UserError: no GPU, a source is gone, or a build fails.
    """
    from asvit_deploy.runners.tensorrt import TensorRTRunner

    variants = []
    mode = artefact.fields["mode"]
    kind = "adaptive" if artefact.adaptive else "dense"
    for graph in (False, True) if artefact.graphs else (False,):
        runner, name = artefact.runner(graph), f"{mode}{_graph(graph)}"
        if isinstance(runner, TensorRTRunner):
            variants.append(EngineVariant(name, kind, runner.timed))
        else:
            variants.append(EngineVariant(name, kind, bucketed_times(runner), ("wall",)))
    if not artefact.adaptive:
        return variants
    kept = [max(1, round(float(n) - artefact.config.prefix)) for n in lengths.mean(axis=0)]
    peers = {"dense": dense_peer(artefact, pictures, folder)}
    if artefact.fields["batch"] == "1":  # static top-k has one fixed shape
        peers["top-k"] = topk_peer(artefact, kept, folder)
    for kind, path in peers.items():
        fields = {**sidecar.read(path), "precision": artefact.fields["precision"]}
        for graph in (False, True):
            peer = TensorRTRunner(path, fields, graph, allowed=artefact.allowed)
            variants.append(EngineVariant(f"{kind}{_graph(graph)}", kind, peer.timed))
    return variants


def _graph(graph: bool) -> str:
    return ", CUDA graph" if graph else ""


def dense_peer(artefact: EngineArtefact, pictures: ImageSet, folder: Path) -> Path:
    """The dense twin of the engine's checkpoint as an engine for the same batches."""
    from asvit_deploy.artefacts.reference import reference_checkpoint
    from asvit_deploy.exporting.export import export

    checkpoint = reference_checkpoint(artefact.onnx, artefact.checkpoint_fields)
    onnx = folder / "dense.onnx"
    export(checkpoint, onnx, pictures[:2], artefact.fields["batch"], dense=True)
    return _build(artefact, onnx, artefact.parity)


def topk_peer(artefact: EngineArtefact, kept: Sequence[int], folder: Path) -> Path:
    """The engine's own ONNX with `kept` image tokens after each stage, as an engine."""
    from asvit_deploy.engine.graphs import make_graph
    from asvit_deploy.engine.source import open_source
    from asvit_deploy.exporting.static_topk import to_static_topk

    source = open_source(artefact.onnx)
    graph = make_graph(source, "bucketed", artefact.precision.rewritten)
    fields = {k: v for k, v in source.fields.items() if k not in _NOT_OF_THE_MODEL}
    onnx = folder / "top_k.onnx"
    proto = to_static_topk(graph, kept, str(source.path))
    fields |= {"adaptive": False, "precision": of_option(arithmetic_of(proto)).name}
    sidecar.write(onnx, proto.SerializeToString(), fields)
    return _build(artefact, onnx, "float32")  # the graph holds the precision already


def _build(artefact: EngineArtefact, onnx: Path, precision: str) -> Path:
    from asvit_deploy.engine.build import build_engine
    from asvit_deploy.engine.source import open_source
    from asvit_deploy.runners.trt_flavour import FLAVOURS

    options = peer_options(artefact.fields, precision)
    output = onnx.with_suffix(".engine")
    build_engine(open_source(onnx), output, FLAVOURS[artefact.fields["flavour"]], options)
    return output


def peer_options(fields: dict[str, Any], precision: str) -> Options:
    """What an engine was built with, as its sidecar says, less what belongs to its own mode."""
    from asvit_deploy.engine.build import Options

    profile = (fields.get("profile") or {}).get("images")
    return Options(
        of_option(precision).rewritten,
        batch=tuple(shape[0] for shape in profile) if profile else None,  # type: ignore[arg-type]
        target_sms=tuple(fields["target_sms"]),
        workspace=fields.get("workspace"),
        level=fields.get("level"),
        version_compatible=fields.get("version_compatible", False),
        hardware_compatible=fields.get("hardware_compatible", False),
        checked=False,
    )


def measure(
    variants: Sequence[EngineVariant], images: Sequence[NDArray[np.float32]], warmup: int,
    runs: int, seed: int = 0, progress: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, NDArray[np.float64]]]:  # fmt: skip
    """Milliseconds [runs] by variant and clock; round r takes image r modulo their number."""
    order, rng = list(variants), random.Random(seed)
    times = {v.name: {clock: np.zeros(runs) for clock in v.clocks} for v in variants}
    for r in range(-warmup, runs):
        image = images[r % len(images)][None]
        rng.shuffle(order)
        for variant in order:
            took = asdict(variant.timed(image))
            if r >= 0:
                for clock in variant.clocks:
                    times[variant.name][clock][r] = took[clock]
        progress()
    return times


def summarise(
    variants: Sequence[EngineVariant], times: dict[str, dict[str, NDArray[np.float64]]]
) -> list[dict[str, Any]]:
    """One row per variant: percentiles of every clock, and the wall time's ratio to dense.

    Compared is the fastest dense row, by the median of its wall time.
    """
    dense = min(
        (times[v.name]["wall"] for v in variants if v.kind == "dense"), key=np.median, default=None
    )
    rows = []
    for variant in variants:
        row: dict[str, Any] = {"name": variant.name, "kind": variant.kind}
        for clock, values in times[variant.name].items():
            p50, p90, p99 = np.percentile(values, [50, 90, 99])
            row[f"{clock}_ms"] = {"p50": float(p50), "p90": float(p90), "p99": float(p99)}
        if dense is not None and variant.kind != "dense":
            value, low, high = ratio_of_medians(dense, times[variant.name]["wall"])
            row["speedup"] = {"value": value, "low": low, "high": high}
        rows.append(row)
    return rows


def against_kept(
    variants: Sequence[EngineVariant], times: dict[str, dict[str, NDArray[np.float64]]],
    kept: NDArray[np.int64],
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Latency against kept tokens: for each adaptive variant, one point per image.

    Args:
        kept: image tokens after each stage, int64 [images, stages].
    """
    points: dict[str, list[dict[str, Any]]] = {}
    for variant in (v for v in variants if v.kind == "adaptive"):
        values = times[variant.name]
        image = np.arange(len(values["wall"])) % len(kept)
        points[variant.name] = [
            {"kept": kept[i].tolist(),
             **{f"{c}_ms": float(np.median(values[c][image == i]))
                for c in ("gpu", "wall") if c in values}}
            for i in range(len(kept)) if (image == i).any()
        ]  # fmt: skip
    return points


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """One sentence on which of adaptive and dense is the faster, by wall time."""
    adaptive = [row for row in rows if row["kind"] == "adaptive"]
    if not adaptive or "speedup" not in adaptive[0]:
        return "no dense engine beside an adaptive one: nothing to compare"
    best = min(adaptive, key=lambda row: row["wall_ms"]["p50"])
    return judged(
        best["speedup"],
        f"{best['name']} wins over the fastest dense engine: <span>",
        f"dense wins: the best adaptive engine, {best['name']}, runs at <span> of its speed",
        f"a draw: {best['name']} against the fastest dense engine is <span>",
    )
