"""An ONNX artefact on the CPU: every way to run it, beside PyTorch and its dense twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from asvit_deploy.artefacts.artefact import Ways
from asvit_deploy.artefacts.onnx_file import RUNTIMES, OnnxArtefact
from asvit_deploy.budget import carried_out, fixed_counts
from asvit_deploy.calibration import agreement_of
from asvit_deploy.data.images import ImageSet
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation import profile
from asvit_deploy.evaluation.arguments import bar
from asvit_deploy.evaluation.costs import histogram_kept
from asvit_deploy.evaluation.machine import machine
from asvit_deploy.evaluation.memory_use import memory_use
from asvit_deploy.evaluation.report import Report
from asvit_deploy.evaluation.sweep_types import Sweep
from asvit_deploy.evaluation.timing import (
    Core,
    Macs,
    Row,
    Variant,
    busy,
    interleave,
    line_over_kept,
    macs_by_round,
    macs_summary,
    run_once,
    summarise,
    tokens_by_image,
    verdict,
)
from asvit_deploy.exporting.int8 import to_int8
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models.macs import dense_macs, teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.ops import onnx_op
from asvit_deploy.precision import FLOAT32
from asvit_deploy.processor import torch_threads
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.runners.pytorch import TorchRunner
from asvit_deploy.runtimes import ONNXRUNTIME, OPENVINO_BF16, TORCH


@dataclass(frozen=True)
class ModelBench(Report):
    """One ONNX artefact with so many threads.

    Attributes:
        model: its path.
        arch: of its network.
        threads: on the CPU.
        warmup, runs: untimed and timed rounds.
        images: where the pictures come from.
        image_count: how many there are.
        account: how many were skipped and passed over, by reason and ending.
        macs: of the network and its dense twin.
        rows: one for each variant.
        agreement: of an adaptive network's outputs with the dense twin's on those pictures, as
            `calibration.agreement_of`; None where there is no twin to ask.
        methods: of each other method that was timed, its `macs_share` and its `agreement`.
        profile: per way what scoring and compaction took; one thread and adaptive only.
        notes: which rows there are not, and why.
        busy: that others had the core too, or equal work took unequal time, where it was so.
        verdict: one sentence on which is the faster.
        machine: what it ran on.
        sweeps: over batch, budget and image size, those that were asked for.
        histogram_kept: as `costs.histogram_kept`, of the pictures; none of a dense network.
        sha256: of the file.
    """

    kind: ClassVar[str] = "model"

    model: str
    arch: str
    threads: int
    warmup: int
    runs: int
    images: str
    image_count: int
    account: dict[str, Any]
    macs: Macs
    rows: list[Row]
    agreement: dict[str, Any] | None
    methods: dict[str, Any]
    profile: list[dict[str, Any]]
    notes: list[str]
    busy: str | None
    verdict: str
    machine: dict[str, Any]
    sweeps: list[Sweep] = field(default_factory=list)
    histogram_kept: list[list[int]] = field(default_factory=list)
    sha256: str | None = None


def bench_model(
    artefact: OnnxArtefact, pictures: ImageSet, threads: int, warmup: int, runs: int,
    methods: Sequence[str], say: Callable[[str], None], runtimes: Sequence[str] = (),
    memory: bool = False,
) -> ModelBench:  # fmt: skip
    """Time every variant of an artefact.

    Args:
        pictures: all of them readable.
        methods: others to time beside it at its mean MACs, names in `RANKED`.
        threads: 0 takes every core.
        runtimes: only their rows, names in `runtimes.NAMES`; none stands for all that are usual.
        memory: also measure what each row's model takes, where it can be had, see `memory_use`.

    Raises:
        UserError: it cannot be run here, or a method does not reach its MACs.
    """
    count = threads or machine()["cores"]
    loaded = [pictures[i] for i in range(len(pictures))]
    config, cuts = artefact.config, artefact.method if artefact.adaptive else None
    with torch_threads(count):
        variants, notes = _variants(artefact, threads, runtimes)
        outputs, lengths = _kept(artefact, loaded, runtimes)
        share = float(macs_by_round(config, lengths, runs, cuts).mean()) / teacher_macs(config)
        beside = _beside(artefact, methods, share)
        for name, network in beside.items():
            ran = [v.runtime for v in variants if v.runtime in RUNTIMES]
            runtime = next((n for n in (*runtimes, *ran) if n in RUNTIMES), TORCH)
            variants.append(_with_method(artefact, name, network, threads, runtime))
        warmup = _warmup(variants, len(loaded), warmup, notes)
        label, first = f"{count} thread{'s' * (count > 1)}", dict[str, NDArray[np.float64]]()
        with bar(say, total=warmup + runs, desc=f"bench, {label}") as progress, Core() as core:
            seconds = interleave(
                variants, loaded, warmup, runs, progress=lambda: progress.update() and None,
                first=first,
            )  # fmt: skip
        agreed, shown = _agreements(artefact, outputs, beside, loaded, notes)
    ratios = dense_macs(config) / macs_by_round(config, lengths, runs, cuts)
    rows = summarise(variants, seconds, ratios)
    _add_first(rows, variants, first, len(loaded))
    _add_lines(rows, seconds, tokens_by_image(config, lengths, cuts))
    if memory:
        _add_memory(artefact, rows, variants, loaded, threads, notes, say)
    profiles = []
    profiled = any(variant.runtime == ONNXRUNTIME for variant in variants)
    if threads == 1 and profiled and artefact.adaptive and artefact.fields["mode"] != "static":
        libraries = artefact.libraries().values()
        profiles = [profile.shares(artefact.path, loaded, library) for library in libraries]
    return ModelBench(
        str(artefact.path), artefact.fields["arch"], count, warmup, runs, pictures.source,
        len(loaded), pictures.account, macs_summary(config, lengths, runs, cuts), rows, agreed,
        shown, profiles, notes, busy(variants, seconds, core),
        verdict(rows[: len(rows) - len(beside)]), machine(),
        histogram_kept=histogram_kept(lengths - config.prefix, config) if artefact.adaptive else [],
        sha256=artefact.fields.get("sha256"),
    )  # fmt: skip


def _with_method(
    artefact: OnnxArtefact, name: str, network: ViT, threads: int, runtime: str
) -> Variant:
    """Another method's row."""
    if runtime == TORCH:
        return Variant(f"torch eager, {name}", TORCH, True, TorchRunner(network))
    model = as_precise(artefact.fields, to_onnx(network))
    runner, precision = RUNTIMES[runtime].model(model, threads), artefact.fields["precision"]
    name = f"{runtime}, {name}" + f", {precision}" * (precision != FLOAT32.name)
    return Variant(name, runtime, True, runner, precision, model)


def as_precise(fields: Mapping[str, Any], model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 model in an artefact's precision, quantised as its sidecar says that it was.

    Its ranges are those of a picture of noise: they change what it computes, not how long.
    """
    made = fields.get("quantisation")
    if made is None:
        return model
    shape = [side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    noise = np.random.default_rng(0).standard_normal(shape)
    return to_int8(model, made["kind"], made["float32_layers"], [noise.astype(np.float32)])


def _warmup(variants: Sequence[Variant], images: int, warmup: int, notes: list[str]) -> int:
    """Rounds that do not count: each picture has one where a runtime compiles for new counts."""
    learning = [v.name for v in variants if getattr(v.runner, "learns_shapes", False)]
    if learning and warmup < images:
        notes.append(
            f"{images} warm-up rounds, one for each image: kernels for counts that it has not seen "
            f"are compiled by {', '.join(learning)}"
        )
        return images
    return warmup


def _add_first(
    rows: Sequence[Row], variants: Sequence[Variant], first: dict[str, NDArray[np.float64]],
    images: int,
) -> None:  # fmt: skip
    """To rows of a runtime that compiles for new counts, what pictures take that it first sees.

    Warm-up began with as many images as it had rounds; the first round of all does more than that.
    """
    for row, variant in zip(rows, variants):
        if getattr(variant.runner, "learns_shapes", False):
            new = first[variant.name][1:images]
            if len(new):
                row["first_ms"] = float(np.median(new) * 1e3)


def _add_lines(
    rows: Sequence[Row], seconds: dict[str, NDArray[np.float64]], tokens: NDArray[np.float64]
) -> None:
    """To the artefact's own rows, latency as a line over its kept tokens, where those vary.

    Not where other tokens may stay: in bfloat16, and of other methods.
    """
    for row in rows:
        own = row["adaptive"] and "way" in row and row["runtime"] != OPENVINO_BF16
        if own and (line := line_over_kept(seconds[row["name"]], tokens)):
            row["over_kept"] = line


def _add_memory(
    artefact: OnnxArtefact, rows: Sequence[Row], variants: Sequence[Variant],
    images: list[NDArray[np.float32]], threads: int, notes: list[str], say: Callable[[str], None],
) -> None:  # fmt: skip
    """To rows that run an ONNX model, what it takes in a process of its own."""
    for row, variant in zip(rows, variants):
        if variant.model is None:
            continue
        say(f"memory of {variant.name}")
        library = artefact.library if row["runner"].get("op") == "library" else None
        found = memory_use(variant.runtime, variant.model, library, images, threads)
        if isinstance(found, str):
            notes.append(f"no memory of {variant.name}: {found}")
        else:
            row["memory_mib"] = found
    if without := [v.name for v in variants if v.model is None]:
        notes.append(f"memory is not measured of {', '.join(without)}")


def _kept(
    artefact: OnnxArtefact, images: list[NDArray[np.float32]], runtimes: Sequence[str]
) -> tuple[NDArray[np.float32] | None, NDArray[np.int64]]:
    """Outputs [images, C], of an adaptive artefact, and rows after each stage, prefix included:
    int64 [images, stages]."""
    config = artefact.config
    if not artefact.adaptive:
        return None, np.full((len(images), len(config.stages)), config.rows)
    return run_once(next(iter(artefact.ways(runtimes=runtimes).values())), images)


def _beside(artefact: OnnxArtefact, methods: Sequence[str], share: float) -> dict[str, ViT]:
    """The artefact's network with other methods, by their names, at its share of the MACs."""
    if not methods:
        return {}
    dense = artefact.dense_reference
    return {
        name: dense.with_reduction(fixed_counts(artefact.config, RANKED[name], share))
        for name in methods
    }


def _agreements(
    artefact: OnnxArtefact, outputs: NDArray[np.float32] | None, beside: dict[str, ViT],
    images: list[NDArray[np.float32]], notes: list[str],
) -> tuple[dict[str, Any] | None, dict[str, Any]]:  # fmt: skip
    """How outputs agree with the dense twin's: the artefact's own, and those of other methods."""
    config = artefact.config
    if outputs is None and not beside:
        return None, {}
    try:
        dense = torch.from_numpy(run_once(TorchRunner(artefact.dense_reference), images)[0])
        own = None
        if outputs is not None:
            own = agreement_of(config, dense, torch.from_numpy(outputs))
        shown = {}
        for name, network in beside.items():
            made = torch.from_numpy(run_once(TorchRunner(network), images)[0])
            assert network.reduction is not None
            share = carried_out(config, network.reduction) / teacher_macs(config)
            shown[name] = {"macs_share": share, "agreement": agreement_of(config, dense, made)}
        return own, shown
    except UserError as error:
        notes.append(f"no agreement with the dense network: {error}")
        return None, {}


def _variants(
    artefact: OnnxArtefact, threads: int, runtimes: Sequence[str]
) -> tuple[list[Variant], list[str]]:
    """The rows that can be run here, and why the others cannot."""
    notes: list[str] = []
    ways = artefact.ways(threads, record=False, runtimes=runtimes)
    try:
        variants = _references(artefact, ways, threads, runtimes)
    except UserError as error:
        if runtimes == (TORCH,):
            raise
        variants = []
        notes.append(f"no torch and no dense rows: {error}")
    for way, runtime in ways.runtimes.items():
        if runtime == TORCH:  # among the references
            continue
        name = f"{runtime}, {'adaptive' if artefact.adaptive else 'dense'}"
        if way not in ("dense", runtime):
            name += f" ({way})"
        precision = artefact.fields["precision"]
        name += f", {precision}" if precision != FLOAT32.name else ""
        variants.append(
            Variant(name, runtime, artefact.adaptive, ways[way], precision, artefact.model, way)
        )
    if not runtimes:
        notes += [f"no {name} rows: {line}" for name, line in artefact.lacking().items()]
    ran = ONNXRUNTIME in ways.runtimes.values()
    if ran and artefact.library is None and onnx_op.nodes_of(artefact.model.graph):
        notes.append("no row with the op's library: `asvit-deploy build-plugins ort` makes it")
    return variants, notes


def _references(
    artefact: OnnxArtefact, ways: Ways, threads: int, runtimes: Sequence[str]
) -> list[Variant]:
    """PyTorch, and the dense twin in each runtime, in float32 and in the artefact's precision."""
    dense, variants = artefact.dense_reference, list[Variant]()
    if not runtimes or TORCH in runtimes:
        # Of a file in another precision it runs the checkpoint, and not what the file computes.
        way = TORCH if artefact.fields["precision"] == FLOAT32.name else None
        eager, own = TorchRunner(dense), None if artefact.adaptive else way
        variants.append(Variant("torch eager, dense", TORCH, False, eager, way=own))
        if artefact.adaptive:
            eager = TorchRunner(artefact.reference)
            variants.append(Variant("torch eager, adaptive", TORCH, True, eager, way=way))
    if not artefact.adaptive:
        return variants
    twin = to_onnx(dense)
    for runtime in dict.fromkeys(ways.runtimes.values()):
        if runtime != TORCH:
            runner = RUNTIMES[runtime].model(twin, threads)
            variants.append(Variant(f"{runtime}, dense", runtime, False, runner, model=twin))
            if (precision := artefact.fields["precision"]) != FLOAT32.name:
                model = as_precise(artefact.fields, twin)
                runner = RUNTIMES[runtime].model(model, threads)
                name = f"{runtime}, dense, {precision}"
                variants.append(Variant(name, runtime, False, runner, precision, model))
    return variants
