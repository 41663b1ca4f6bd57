"""Thresholds brought onto the budget after training, on training pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from asvit_deploy.budget import TOLERANCE, network_macs
from asvit_deploy.models.vit import Trace, ViT
from asvit_deploy.reduction.base import Decision
from asvit_deploy.reduction.removal import remove
from asvit_deploy.reduction.rows import Rows

BATCH = 64
_HALVINGS = 24  # of the factor's interval, in logarithms
MOST_PASSES = _HALVINGS + 2  # over the pictures: before and after too
_RANGE = (1e-4, 1e3)
_KEPT_BYTES = 1 << 30  # of rows in front of the first cut, and how they rank

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Fit:
    """The factor that all thresholds took, and mean MACs / teacher of the pictures it was fitted
    on, before and after."""

    budget: float
    pictures: int
    factor: float
    before: float
    after: float

    @property
    def off(self) -> float:
        """How far the MACs ended from the budget, as a fraction of it."""
        return self.after / self.budget - 1

    @property
    def missed(self) -> bool:
        """Whether that is over one per cent; no factor can tell equal scores apart."""
        return abs(self.off) > TOLERANCE


@dataclass(frozen=True)
class Shares:
    """Whole batches of a fit's pictures, dealt out to processes in turn.

    Whoever works a batch out has the same pictures beside one another, so that the processes find
    what one would, to the last bit where they compute alike.

    Attributes:
        pictures: of all processes.
        rank, world: this process's number, and how many there are.
        summed: a float64 tensor's sum over all processes, which must all ask.
    """

    pictures: int
    rank: int = 0
    world: int = 1
    summed: Callable[[Tensor], Tensor] = lambda own: own

    @property
    def batches(self) -> list[range]:
        """Numbers of the pictures of each of this process's batches."""
        starts = range(self.rank * BATCH, self.pictures, self.world * BATCH)
        return [range(start, min(start + BATCH, self.pictures)) for start in starts]


# What thresholds do not change: rows in front of the first cut, and what they are ranked by.
_Start = tuple[Rows, Decision]


def _bytes(value: Any) -> int:
    """Of all tensors of a dataclass."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(_bytes(getattr(value, f.name)) for f in fields(value)) if is_dataclass(value) else 0


class _Passes:
    """Passes over pictures under one set of thresholds after another.

    The blocks in front of the first cut are worked out once, as far as `_KEPT_BYTES` go, and those
    behind the last never: MACs do not depend on them.

    Args:
        images: float32 [B, 3, H, W], one of each of `shares.batches`.
    """

    def __init__(
        self, model: ViT, images: Iterable[Tensor], shares: Shares, progress: Progress
    ) -> None:
        self._model, self._shares, self._progress = model, shares, progress
        self._kept: list[Tensor | _Start] = []
        room = _KEPT_BYTES
        for batch in images:
            kept: Tensor | _Start = batch
            if room > 0:
                start = self._start(batch)
                room -= sum(map(_bytes, start))
                kept = start if room >= 0 else batch
            self._kept.append(kept)

    def _start(self, images: Tensor) -> _Start:
        rows = Rows(self._model.embed(images.to(self._model.pos_embed.device)))
        return self._model.scored(0, rows)

    def _trace(self, kept: Tensor | _Start) -> Trace:
        """Scores and lengths alone."""
        model, trace = self._model, Trace()
        assert model.reduction is not None
        rows, decision = self._start(kept) if isinstance(kept, Tensor) else kept
        decision = model.reduction.decided_again(0, decision)
        for stage in range(len(model.cuts)):
            if stage:
                rows, decision = model.scored(stage, rows)
            rows, done = remove(model.reduction, stage, rows, decision, padded=True)
            trace.scores.append(decision.score)
            trace.length.append(done.length)
        return trace

    def run(self) -> tuple[float, list[Trace]]:
        """Mean MACs / teacher of the pictures of all processes, and what happened to one's own."""
        traces, shares = [], self._shares
        macs = torch.zeros(shares.pictures, dtype=torch.float64)
        for numbers, kept in zip(shares.batches, self._kept):
            traces.append(self._trace(kept))
            macs[numbers.start : numbers.stop] = network_macs(self._model, traces[-1]).cpu()
            self._progress(len(numbers))
        # Each picture's from the one process that has it: zeros change no sum.
        return shares.summed(macs).mean().item(), traces

    def neighbours(self, traces: list[Trace]) -> list[tuple[float, float]]:
        """For each stage the largest score at or under its threshold, and the smallest over it."""
        values, shares = self._model.threshold_values(), self._shares
        found = torch.zeros(shares.world, len(values), 2, dtype=torch.float64)
        for stage, threshold in enumerate(values):
            found[shares.rank, stage, 1] = torch.inf
            for trace in traces:
                scores = trace.scores[stage]
                scores = scores[scores.isfinite()].double().cpu()
                under, over = scores[scores <= threshold], scores[scores > threshold]
                low, high = found[shares.rank, stage]
                low.copy_(torch.cat([low[None], under]).max())
                high.copy_(torch.cat([high[None], over]).min())
        found = shares.summed(found)
        low, high = found[:, :, 0].amax(0).tolist(), found[:, :, 1].amin(0).tolist()
        return [
            (under, over if over < torch.inf else 2 * threshold - under)
            for threshold, under, over in zip(values, low, high)
        ]


@torch.inference_mode()
def fit_thresholds(
    model: ViT, images: Iterable[Tensor], budget: float, shares: Shares,
    progress: Progress = lambda passed: None,
) -> Fit:  # fmt: skip
    """Scale all thresholds by one factor, so that the mean MACs of these images meet the budget.

    Training only pulls towards the budget; this lands on it. The shape that training gave the
    stages stays. Each threshold ends in the middle between the two scores around it, far from
    any rounding.

    Args:
        images: pictures of the training split, float32 [B, 3, H, W] for each of `shares.batches`;
            asked for once.
        progress: called with how many more of them have passed, of at most `MOST_PASSES` times all.
    """
    assert model.reduction is not None
    modes = [(module, module.training) for module in model.modules()]
    thresholds = model.reduction.boundaries()
    model.eval()
    start = model.threshold_values()
    passes = _Passes(model, images, shares, progress)

    def scaled(factor: float) -> tuple[float, list[Trace]]:
        for threshold, value in zip(thresholds, start):
            threshold.data.fill_(value * factor)
        return passes.run()

    before, _ = scaled(1.0)
    low, high = _RANGE
    for _ in range(_HALVINGS):
        factor = (low * high) ** 0.5
        after, traces = scaled(factor)
        if abs(after - budget) < 2e-4 * budget:
            break
        low, high = (factor, high) if after > budget else (low, factor)
    for threshold, (under, over) in zip(thresholds, passes.neighbours(traces)):
        threshold.data.fill_((under + over) / 2)
    after, _ = passes.run()
    for module, mode in modes:
        module.training = mode
    return Fit(budget, shares.pictures, factor, before, after)
