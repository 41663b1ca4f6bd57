"""ToMe: similar tokens merge, and their sizes weigh them (Bolya et al., ICLR 2023).

Written from the paper's description: a bipartite match on the keys of the block's attention, the
most similar pairs become their size-weighted mean, and attention adds log(size) to its logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.reduction.base import Decision, Seen
from asvit_deploy.reduction.matching import likeness, pairs
from asvit_deploy.reduction.rows import Rows, averaged, chosen, filled, moved
from asvit_deploy.reduction.size_passing import EverySecond, every_second

_LEAST = 1e-6  # scores are above 0


class ToMe(EverySecond):
    """score = 1 - cos(k_i, k_j) at even places, j the most similar at odd ones, which score +inf.

    With fixed counts the r most similar pairs of a block merge, r = what leaves; with thresholds
    every pair whose similarity is at least 1 - threshold.
    """

    name: ClassVar[str] = "tome"
    temperature: ClassVar[float] = 200.0  # its scores are of another unit, near 0.1

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        found = pairs(rows, likeness(seen, self.prefix), self.prefix)
        value = (1 - found.cosine).clamp_min(_LEAST)
        score = torch.where(found.paired, value, torch.inf)
        return Decision(score, into=found.into, into_margin=found.margin)

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        assert decision.into is not None
        leaving = rows.leaving(stay, self.prefix)
        tokens = averaged(rows, decision.into, leaving, rows.sizes)
        return replace(tokens, size=moved(rows.sizes, decision.into, leaving))


class ToMeStages(ToMe):
    """ToMe at few cuts, where more than half of the tokens may have to leave at once.

    A cut is as many rounds of ToMe as that takes, at one place: a merged token goes into the next
    round with the size-weighted mean of its tokens' keys. Only the last round merges fewer than all
    tokens at even places.
    """

    name: ClassVar[str] = "tome-stages"
    adapts: ClassVar[bool] = False

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        return tuple(stage - 1 for stage in stages)

    def least(self, tokens: int) -> int:
        return 1

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        prefix = self.prefix
        own = torch.arange(rows.batched.shape[1], device=rows.tokens.device)
        own = own.expand(rows.batched.shape[0], -1)
        keys = replace(rows, tokens=seen.key.float().mean(1), size=rows.sizes)
        left = None if rows.keep is None and rows.alive is None else rows.living(prefix)
        tokens = own.shape[1] - prefix if left is None else int(left[0].sum())
        kept = self.counts(stage, tokens)
        assert kept is not None
        into, doubt = own, filled(torch.inf, own.shape[0], own.shape[1], own.device)
        while True:
            likeness = F.normalize(keys.tokens[:, prefix:], dim=2)
            found = pairs(rows, likeness, prefix, among=left)
            value = torch.where(found.paired, (1 - found.cosine).clamp_min(_LEAST), torch.inf)
            if left is not None:  # below every score of the last round
                value = torch.where(left, value, _LEAST / 2)
            tokens = max(kept, every_second(tokens))
            if tokens == kept:
                return Decision(value, into=into, into_margin=doubt[:, prefix:],
                                onward=found.into, onward_margin=found.margin)  # fmt: skip
            stays = chosen(value, tokens)
            goes = torch.where(stays, own[:, prefix:], found.into[:, prefix:])
            goes = torch.cat([own[:, :prefix], goes], 1)
            certain = _whole(torch.where(stays, torch.inf, found.margin), prefix)
            doubt = torch.minimum(doubt, certain.gather(1, into))  # of each step on the way
            into = goes.gather(1, into)
            leaving = (goes != own).float()
            keys = averaged(keys, goes, leaving, keys.sizes)
            keys = replace(keys, size=moved(keys.sizes, goes, leaving))
            left = stays

    def destined(self, rows: Rows, stay: Tensor, decision: Decision) -> Decision:
        """The last round: who took a row is known, and whether that one stays."""
        if decision.onward is None:
            return decision
        assert decision.into is not None
        assert decision.into_margin is not None
        assert decision.onward_margin is not None
        into, prefix = decision.into, self.prefix
        there = stay.gather(1, into) > 0.5
        last = _whole(decision.onward_margin, prefix).gather(1, into)
        last = torch.where(there, torch.inf, last)[:, prefix:]
        return replace(
            decision, into=torch.where(there, into, decision.onward.gather(1, into)),
            into_margin=torch.minimum(decision.into_margin, last),
        )  # fmt: skip


def _whole(margin: Tensor, prefix: int) -> Tensor:
    """A margin [B, M-P] for all rows [B, M]; those in front go nowhere."""
    return torch.cat([filled(torch.inf, margin.shape[0], prefix, margin.device), margin], 1)
