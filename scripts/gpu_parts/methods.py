"""What whole networks take under each method, in PyTorch."""

from __future__ import annotations

import contextlib
import gc
import time
from typing import Any

import torch
from torch import Tensor

from asvit_deploy.budget import fixed_counts
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import dense_macs, teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.bat import BAT
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.tome import ToMe
from asvit_deploy.reduction.topk import EViT, TopK, TopKNearest
from asvit_deploy.runners.torch_stages import Captured
from gpu_parts import scale
from gpu_parts.kit import Kit, Report, torch_for
from gpu_parts.timing import on_device

TIMED: tuple[type[Ranked], ...] = (SizePassing, ToMe, TopKNearest, TopK, EViT, BAT)
BUDGETS = (0.65, 0.5)
FEW = 3  # every third block, in place of each
# Shapes of `scale`, their batches; the most important first.
_RUNS = (
    ("vit_b16_224", (1, 8, 32)), ("vit_s16_224", (1, 8, 32)), ("vit_b16_384", (1, 8, 32)),
    ("vit_l16_384", (8,)), ("vit_l14_518", (1, 8)),
)  # fmt: skip
_COMPILED = (("vit_b16_384", 8),)
_COMPILED_METHODS: tuple[type[Ranked], ...] = (SizePassing, TopK)


def _shapes(kit: Kit) -> dict[str, ArchConfig]:
    """By name; a rehearsal's has tokens enough for every method to reach its budget."""
    found = [scale.shape("vit_xs8_64", 64, 2, 4, 8, 64)] if kit.rehearse else scale.shapes(kit)
    return {config.name: config for config in found}


def _variants(
    config: ArchConfig, methods: tuple[type[Ranked], ...], budgets: tuple[float, ...]
) -> dict[str, Ranked | None]:
    """Dense, and each method at each budget that it reaches."""
    found: dict[str, Ranked | None] = {"dense": None}
    for budget in budgets:
        for method in methods:
            try:
                found[f"{method.name} {budget:g}"] = fixed_counts(config, method, budget)
            except UserError:  # no counts of this method come as low
                continue
        if SizePassing in methods:
            with contextlib.suppress(UserError):
                few = range(0, config.depth - 1, FEW)
                made = fixed_counts(config, SizePassing, budget, few)
                found[f"{SizePassing.name}, few cuts {budget:g}"] = made
    return found


def methods(kit: Kit) -> Report:
    """Half precision, one graph a variant; the dense network has the same exact savings."""
    torch_for(kit)
    result: Report = {"unit": "ms of one replay, GPU time between events", "runs": []}
    known = _shapes(kit)
    runs = [(name, (2,)) for name in known] if kit.rehearse else _RUNS
    for name, batches in runs:
        model = _model(kit, known[name])
        for batch in batches:
            result["runs"].append(_measure(kit, model, batch))
            kit.save(result)
        del model
        gc.collect()
    return result


def _model(kit: Kit, config: ArchConfig) -> ViT:
    """A dense network of random weights, which does no work that its output does not need."""
    torch.manual_seed(0)
    with torch.device(kit.device):
        model = build(config.saving())
    return model.with_reduction(None).to(getattr(torch, kit.half)).eval()


class _Whole:
    """The forward pass as a function of tensors alone."""

    def __init__(self, model: ViT, reduction: Ranked | None) -> None:
        self.model = model.with_reduction(reduction)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.model(images)[0].float(),)


@torch.no_grad()
def _measure(kit: Kit, model: ViT, batch: int) -> Report:
    config = model.config
    images = scale.noise_images(kit, config, batch)
    calls: dict[str, Any] = {}
    notes: dict[str, str] = {}
    variants = _variants(config, TIMED, BUDGETS)
    for name, reduction in variants.items():
        try:
            calls[name] = Captured(_Whole(model, reduction), (images,), None)
        except RuntimeError as error:  # what cannot be captured is said and not timed
            notes[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    times = on_device(calls, kit.device, rounds=2 if kit.rehearse else 25)
    found = _row(kit, config, batch, variants, times) | {"notes": notes}
    if not kit.rehearse:
        found["kernels"] = {name: _kernels(call.function, images) for name, call in calls.items()}
    return found


def _kernels(function: Any, images: Tensor) -> int:
    """Kernels that one run launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function(images)
        torch.cuda.synchronize()
    events = profile.events() or []
    return sum(event.device_type.name == "CUDA" for event in events)


def _row(
    kit: Kit, config: ArchConfig, batch: int, variants: dict[str, Ranked | None], times: Report
) -> Report:
    """Speed-ups over dense, and beside each the MACs' own."""
    dense = times["dense"]["p50"]
    share = float(dense_macs(config)) / teacher_macs(config)
    methods = {}
    for name, value in times.items():
        reduction = variants[name]
        if reduction is not None:
            budget = float(name.split()[-1])
            methods[name] = {"speedup": round(dense / value["p50"], 4),
                             "macs_ratio": round(share / budget, 4),
                             "cuts": len(reduction.blocks)}  # fmt: skip
    return {
        "network": config.name, "pixels": config.image_size, "batch": batch,
        "precision": kit.half, "rows": config.rows, "ms": times, "methods": methods,
    }  # fmt: skip


@torch.no_grad()
def methods_compiled(kit: Kit) -> Report:
    """Whole networks through torch.compile, which fuses the many small kernels of a cut."""
    torch_for(kit)
    result: Report = {"unit": "ms of one replay, GPU time between events", "runs": []}
    known = _shapes(kit)
    for name, batch in [(name, 2) for name in known] if kit.rehearse else _COMPILED:
        model = _model(kit, known[name])
        config, images = model.config, scale.noise_images(kit, model.config, batch)
        variants = _variants(config, _COMPILED_METHODS, BUDGETS[:1])
        calls: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        for variant, reduction in variants.items():
            start = time.perf_counter()
            whole = _Whole(model, reduction)
            made: Any = whole if kit.rehearse else torch.compile(whole.__call__, dynamic=False)
            calls[variant] = Captured(made, (images,), None)
            seconds[variant] = round(time.perf_counter() - start, 1)
            torch._dynamo.reset()
            # All so far in turns again: compiling takes minutes, and what is there counts.
            times = on_device(calls, kit.device, rounds=2 if kit.rehearse else 25)
            row = _row(kit, config, batch, variants, times) | {"compile_s": dict(seconds)}
            kit.save({**result, "runs": [*result["runs"], row]})
        result["runs"].append(row)
    return result
