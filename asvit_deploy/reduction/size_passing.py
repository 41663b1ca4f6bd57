"""Size-passing: rows leave, nothing is averaged, and the size of each goes to a similar row.

Of the image tokens at even places some leave; the most similar one at an odd place takes over how
many input tokens the leaving one stood for, which later attentions see as a bias of their logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from asvit_deploy.reduction.base import Decision, Place, Seen
from asvit_deploy.reduction.matching import likeness, pairs
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.rows import Rows, moved
from asvit_deploy.reduction.scoring import token_scores

_LEAST = 1e-4  # of 1 - cosine: equal tokens still differ by their score


class EverySecond(Ranked):
    """In every block but the last, behind which nothing is left to save, tokens at even places may
    leave; a lone one has no partner. Sizes travel."""

    carries_sizes: ClassVar[bool] = True
    place: ClassVar[Place] = "inside"

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        return every_block(depth)

    def least(self, tokens: int) -> int:
        return every_second(tokens)


class SizePassing(EverySecond):
    """score = S max(1 - cos(k_i, k_j), 1e-4) at even places, j the most similar at odd ones.

    S is AS-ViT's score of the same attention, k a token's key, mean over heads. Tokens at odd
    places score +inf: they may not leave, so that at least every second stays at each cut.
    """

    name: ClassVar[str] = "size-passing"

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        score = token_scores(seen.class_row(), seen.context, self.prefix)
        found = pairs(rows, likeness(seen, self.prefix), self.prefix)
        value = score * (1 - found.cosine).clamp_min(_LEAST)
        score = torch.where(found.paired, value, torch.inf)
        return Decision(score, into=found.into, into_margin=found.margin)

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        return with_sizes_passed(rows, stay, decision, self.prefix)


def with_sizes_passed(rows: Rows, stay: Tensor, decision: Decision, prefix: int) -> Rows:
    """Rows of which those that stay stand for what leaves into them too; tokens are as before."""
    assert decision.into is not None
    leaving = rows.leaving(stay, prefix)
    return replace(rows, size=moved(rows.sizes, decision.into, leaving))


def every_block(depth: int) -> tuple[int, ...]:
    """Every block but the last, behind which nothing is left to save."""
    return tuple(range(depth - 1))


def every_second(tokens: int) -> int:
    """What at least stays where only tokens at even places leave; a lone one has no partner."""
    return tokens // 2 if tokens > 1 else tokens
