"""ToMe: similar tokens merge, and their sizes weigh them (Bolya et al., ICLR 2023).

Written from the paper's description: a bipartite match on the keys of the block's attention, the
most similar pairs become their size-weighted mean, and attention adds log(size) to its logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from asvit_deploy.reduction.base import Decision, Place, Seen
from asvit_deploy.reduction.matching import likeness, pairs
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.rows import Rows, averaged, moved
from asvit_deploy.reduction.size_passing import every_block, every_second

_LEAST = 1e-6  # scores are above 0


class ToMe(Ranked):
    """score = 1 - cos(k_i, k_j) at even places, j the most similar at odd ones, which score +inf.

    With fixed counts the r most similar pairs of a block merge, r = what leaves; with thresholds
    every pair whose similarity is at least 1 - threshold.
    """

    name: ClassVar[str] = "tome"
    carries_sizes: ClassVar[bool] = True
    place: ClassVar[Place] = "inside"

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        return every_block(depth)

    def least(self, tokens: int) -> int:
        return every_second(tokens)

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
