"""Engines of candidates: which there are of one, and how each is built for this machine's GPU.

What an engine computes is its own: kernels differ from one mode to the next, and in float32 too no
engine is as well known as ONNX Runtime. So precisions of engines have names of their own here,
are judged on the judging pictures by themselves, and what was judged are the very plans that are
timed and shipped.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.engine.bucketed import build_bucketed
from asvit_deploy.engine.build import Options, build_engine
from asvit_deploy.engine.compactions import Wanted, worthwhile
from asvit_deploy.engine.plugin import with_plugin
from asvit_deploy.engine.source import open_source
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.precision import FLOAT32, Half, of_option
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.runners.trt_flavour import Flavour, find_flavour
from asvit_deploy.status import Say

_ENGINE = " engine"


def as_engine(option: str) -> str:
    """A precision as engines have it: `fp16` -> `fp16 engine`."""
    return option + _ENGINE


def is_engine(precision: str) -> bool:
    return precision.endswith(_ENGINE)


def option_of(precision: str) -> str:
    """The opposite of `as_engine`."""
    return precision.removesuffix(_ENGINE)


EXACT = as_engine(FLOAT32.name)


def modes_of(leaves: Reduction | None) -> tuple[str, ...]:
    """The modes of a network's engines; where counts are its pictures' own, each keeps the same
    tokens."""
    if leaves is None:
        return ("dense",)
    if not leaves.boundaries():
        return ("static",)
    # Buckets hold what stays, and not what a method adds to that.
    return ("dynamic", "padded") + (() if leaves.appends else ("bucketed",))


def graphs_of(mode: str) -> tuple[bool, ...]:
    """With and without CUDA graphs, which hold nothing whose shape depends on the data."""
    return (False,) if mode == "dynamic" else (False, True)


def source_size(leaves: Reduction | None, mode: str, batch: int, config: ArchConfig) -> str:
    """The batch of the ONNX file that an engine is built from, as `to_onnx` names it."""
    assert leaves is not None or mode == "dense"
    if mode in ("padded", "bucketed") and leaves is not None and (
        leaves.hands_on() or leaves.carries_sizes or leaves.compares
    ):  # fmt: skip
        return "dynamic"  # a graph of one picture looks at rows that only fill
    if mode == "bucketed":  # one picture at a time
        return "1"
    if mode == "dynamic" and leaves is not None and len(leaves.blocks) > len(config.stages):
        return "dynamic"  # of which rows can be hidden at some cuts, see `compact_at`
    return "1" if batch == 1 else "dynamic"


def compact_at(leaves: Reduction, kept: Sequence[float], config: ArchConfig) -> Wanted:
    """Where rows really leave a dynamic engine, as `build-engine` chooses it.

    Args:
        kept: image tokens behind each cut, means.
    """
    if len(leaves.blocks) <= len(config.stages):
        return "all"
    rows = [config.prefix + tokens for tokens in kept]
    stages = worthwhile(config, leaves.cuts, rows)
    return "all" if len(stages) == len(rows) else tuple(leaves.blocks[stage] for stage in stages)


def options_for(
    mode: str, precision: str, size: str, batch: int, targets: tuple[str, ...], compact: Wanted
) -> Options:
    """What is asked of the builder; the judging pictures judge, in place of the graph's check.

    Args:
        precision: an engine's, of `as_engine`.
        size: as `source_size`.
        batch: pictures at a time at most; the best choice of kernels is for so many.
        compact: as `compact_at`, of dynamic engines.
    """
    half: Half | None = of_option(option_of(precision)).rewritten
    whole = mode != "bucketed" and size != "1"
    return Options(
        half, "dynamic" if mode in ("dense", "static") else mode,
        batch=(1, batch, batch) if whole else None, target_sms=targets, checked=False,
        compact_at=compact if mode == "dynamic" else None,
    )  # fmt: skip


class Engines:
    """The builder.

    Args:
        flavour: None: TensorRT where it is, else TensorRT-RTX.
        targets: GPU generations, of RTX alone; None: the one that PyTorch sees.
        say: gets a line on each engine, on the plugin, and on what TensorRT warns of.

    Attributes:
        count, seconds: how many were built, and how long that took in all.
    """

    def __init__(
        self, say: Say, flavour: Flavour | None = None, targets: tuple[str, ...] | None = None
    ) -> None:
        self.flavour = flavour or find_flavour()
        self.targets = _targets(self.flavour) if targets is None else targets
        self.say, self.count, self.seconds = say, 0, 0.0

    def build(self, onnx: Path, output: Path, options: Options, name: str) -> Path:
        """An engine, or a folder of them, from an ONNX artefact.

        Args:
            name: how lines call it.

        Raises:
            UserError: it cannot be built.
        """
        start, source = time.perf_counter(), open_source(onnx)
        if source.needs_plugin and options.mode == "dynamic":
            options = with_plugin(options, self.flavour, self.say)
        build = build_bucketed if options.mode == "bucketed" else build_engine
        built = build(source, output, self.flavour, options)
        for warning in built.warnings:
            self.say(f"TensorRT warns: {warning}")
        seconds = time.perf_counter() - start
        self.say(f"built {name}, {seconds:.0f} s")
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        return output

    def cost(self, count: int) -> float:
        """Seconds that so many more take, going by those that were built."""
        return count * self.seconds / max(self.count, 1)


def _targets(flavour: Flavour) -> tuple[str, ...]:
    if flavour.enterprise or not torch.cuda.is_available():
        return ()  # the GPU that it finds, or those of its own list
    major, minor = torch.cuda.get_device_capability()
    return (f"{major}{minor}",)


@functools.cache
def plans_of(path: Path) -> object:
    """What tells an engine from another of the same network: the sha256 of every plan, JSON-ready.

    No two builds need make the same kernels, so what is measured is kept by the plan.
    """
    fields = open_artefact(path).fields
    return fields.get("files") or fields["sha256"]
