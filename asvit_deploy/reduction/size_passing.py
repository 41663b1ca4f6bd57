"""Size-passing: rows leave, nothing is averaged, and the size of each goes to a similar row.

Of the image tokens at even places some leave; the most similar one at an odd place takes over how
many input tokens the leaving one stood for, which later attentions see as a bias of their logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.reduction.base import Decision, Place, Seen
from asvit_deploy.reduction.fixed import FixedCounts
from asvit_deploy.reduction.rows import Rows, filled, moved
from asvit_deploy.reduction.scoring import token_scores

_LEAST = 1e-4  # of 1 - cosine: equal tokens still differ by their score


class SizePassing(FixedCounts):
    """score = S max(1 - cos(k_i, k_j), 1e-4) at even places, j the most similar at odd ones.

    S is AS-ViT's score of the same attention, k a token's key, mean over heads. Places are ranks
    among the rows that are there, so that masked and compacted form agree. Tokens at odd places
    score +inf: they may not leave, so that at least every second stays at each cut.
    """

    name: ClassVar[str] = "size-passing"
    place: ClassVar[Place] = "inside"

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        """Every block but the last."""
        return tuple(range(depth - 1))

    def counts(self, stage: int, tokens: int) -> int:
        # With one token there is none to pass a size on to.
        least = tokens // 2 if tokens > 1 else tokens
        return max(super().counts(stage, tokens), least)

    def decide(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        score = token_scores(seen.class_row(), seen.context, self.prefix)
        likeness = F.normalize(seen.key[:, :, self.prefix :].float().mean(1), dim=2)  # (B, N, Dh)
        return Decision(*self._by_rank(rows, score, likeness))

    def _by_rank(self, rows: Rows, score: Tensor, likeness: Tensor) -> tuple[Tensor, None, Tensor]:
        """Score, no boundary, and the row that takes over."""
        tokens = score.shape[1]
        own = torch.arange(tokens + self.prefix, device=score.device).expand(score.shape[0], -1)
        if rows.keep is None and rows.alive is None:
            even = torch.arange(tokens, device=score.device) % 2 == 0
            even, odd = even.expand_as(score), ~even.expand_as(score)
        else:
            living = rows.living(self.prefix)
            rank = living.long().cumsum(1)
            even, odd = living & (rank % 2 == 1), living & (rank % 2 == 0)
        cosine = likeness @ likeness.transpose(1, 2)  # (B, N, N)
        best, into = cosine.masked_fill(~odd[:, None, :], -2.0).max(2)
        may_leave = even & (best > -1.5)
        value = torch.where(may_leave, score * (1 - best).clamp_min(_LEAST), torch.inf)
        into = torch.where(may_leave, into + self.prefix, own[:, self.prefix :])
        return value, None, torch.cat([own[:, : self.prefix], into], 1)

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        assert decision.into is not None
        first = rows.living(self.prefix)
        leaving = (1 - stay[:, self.prefix :]) * first
        stays = filled(0.0, leaving.shape[0], self.prefix, leaving.device)
        size = moved(rows.sizes, decision.into, torch.cat([stays, leaving], 1))
        return replace(rows, size=size)
