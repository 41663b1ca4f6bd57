"""A schedule for a network: how many tokens leave each block, searched for on pictures.

What starts is one ratio for every block, with all, half or none of what leaves merging. From there
blocks take turns, a group of neighbours at a time, at losing more or less than their share, and
then the parts of what leaves that merge do; whatever brings the outputs closer to the dense
network's on average stays. Every schedule that is tried meets the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from asvit_deploy.budget import carried_out, fitting, fixed_counts
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.schedule import Schedule

_GROUPS = 6  # of neighbouring cuts, which move together
_FACTORS = (2.0, 0.5, 1.4, 1 / 1.4)
_PARTS = (1.0, 0.5, 0.0)  # of what leaves, those that merge
_MOST_PICTURES, _BATCH = 32, 16
MOST_TRIED = 2 + 3 + _GROUPS * len(_FACTORS) + 2 * len(_PARTS)  # passes of each picture
_TOLERANCE = 0.005  # of the budget

Distance = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass(frozen=True)
class _Shares:
    """Of each cut, its weight in what leaves, above 0, and the part of that which merges."""

    weights: tuple[float, ...]
    merging: tuple[float, ...]


def search(
    model: ViT, images: Sequence[np.ndarray], budget: float, apart: Distance,
    blocks: Sequence[int] | None = None, tick: Callable[[], object] = lambda: None,
) -> Schedule:  # fmt: skip
    """The schedule on a budget whose outputs lie closest to the dense network's.

    Args:
        images: float32 [3, H, W] each, normalised; at most 32 of them, evenly taken, are looked at.
        budget: f, as `budget.fixed_counts` has it.
        apart: mean distance of outputs [P, C] from the dense ones.
        blocks: where it cuts; by default in every block but the last.
        tick: called once for each pass of a picture, of at most `MOST_TRIED` each.

    Raises:
        UserError: as `budget.fixed_counts`; a dense output that nothing can be compared with.
    """
    config = model.config
    fixed_counts(config, Schedule, budget, blocks)  # refuses what no schedule can meet
    blocks = fitting(config, Schedule, blocks)
    count = min(len(images), _MOST_PICTURES)
    some = [images[i * len(images) // count] for i in range(count)]
    return _Search(model, np.stack(some), budget, apart, blocks, tick).run()


class _Search:
    def __init__(
        self, model: ViT, images: np.ndarray, budget: float, apart: Distance,
        blocks: tuple[int, ...], tick: Callable[[], object],
    ) -> None:  # fmt: skip
        self.model, self.config, self.blocks = model, model.config, blocks
        self.images, self.budget, self.apart, self.tick = images, budget, apart, tick
        self.dense = self._outputs(model.with_reduction(None))
        self.tried: dict[tuple, float] = {}

    def run(self) -> Schedule:
        self.apart(self.dense, self.dense)  # refuses what no schedule can be compared with
        cuts = len(self.blocks)
        even = (1.0,) * cuts
        best = min((_Shares(even, (part,) * cuts) for part in _PARTS), key=self._distance)
        groups = [list(part) for part in np.array_split(range(cuts), min(_GROUPS, cuts))]
        for factor in _FACTORS:
            for group in groups:
                moved = (w * factor if i in group else w for i, w in enumerate(best.weights))
                best = self._closer(best, replace(best, weights=tuple(moved)))
        for half in np.array_split(range(cuts), 2):
            for part in _PARTS:
                moved = (part if i in half else m for i, m in enumerate(best.merging))
                best = self._closer(best, replace(best, merging=tuple(moved)))
        made = self._made(best)
        assert made is not None
        return made

    def _closer(self, best: _Shares, other: _Shares) -> _Shares:
        return other if self._distance(other) < self._distance(best) else best

    def _distance(self, shares: _Shares) -> float:
        made = self._made(shares)
        if made is None:
            return math.inf
        key = made.kept, made.merged
        if key not in self.tried:
            outputs = self._outputs(self.model.with_reduction(made))
            try:
                found = self.apart(self.dense, outputs)
            except UserError:  # an embedding without a direction
                found = math.inf
            self.tried[key] = found if math.isfinite(found) else math.inf
        return self.tried[key]

    @torch.inference_mode()
    def _outputs(self, network: ViT) -> torch.Tensor:
        made = []
        for start in range(0, len(self.images), _BATCH):
            some = torch.from_numpy(self.images[start : start + _BATCH])
            made.append(network(some, padded=False)[0])
            for _ in some:
                self.tick()
        return torch.cat(made)

    def _made(self, shares: _Shares) -> Schedule | None:
        """The schedule of these shares that is nearest to the budget, if it is on it."""
        target = self.budget * teacher_macs(self.config)
        low, high = 0.0, 100.0
        for _ in range(40):
            middle = (low + high) / 2
            over = carried_out(self.config, scheduled(self.config, self.blocks, shares, middle))
            low, high = (middle, high) if over > target else (low, middle)
        ends = [scheduled(self.config, self.blocks, shares, end) for end in (low, high)]
        best = min(ends, key=lambda one: abs(carried_out(self.config, one) - target))
        off = abs(carried_out(self.config, best) / target - 1)
        one_ratio = len(set(shares.weights)) == 1  # where tokens are few, counts are coarse
        return best if off <= _TOLERANCE or one_ratio else None


def scheduled(
    config: ArchConfig, blocks: tuple[int, ...], shares: _Shares, strength: float
) -> Schedule:
    """Cut s keeps exp(-strength w_s / sum w) of what comes to it, at least one token."""
    whole, tokens, gone = sum(shares.weights), config.image_tokens, 0.0
    kept, merged = [], []
    for weight, part in zip(shares.weights, shares.merging):
        gone += weight / whole
        stay = max(1, min(tokens, round(config.image_tokens * math.exp(-strength * gone))))
        kept.append(stay)
        merged.append(round((tokens - stay) * part))
        tokens = stay
    return Schedule(blocks, kept, config.prefix, None, merged)
