"""EViT: the highest class attention stays, and the rest goes on as one fused token.

Liang et al., "Not All Patches are What You Need", ICLR 2022.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from asvit_deploy.reduction.base import Decision, Place, Seen
from asvit_deploy.reduction.fixed import FixedCounts
from asvit_deploy.reduction.rows import Rows, with_row


class TopK(FixedCounts):
    """a = mean over heads of the class token's attention; fused = sum of a_j x_j over the rest."""

    name: ClassVar[str] = "topk"
    place: ClassVar[Place] = "inside"
    appends: ClassVar[int] = 1

    def decide(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        return Decision(seen.class_row().mean(1)[:, self.prefix :])

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        leaving = (1 - stay[:, self.prefix :]) * rows.living(self.prefix)
        weight = (leaving * decision.score).to(rows.tokens.dtype)  # (B, N)
        fused = (weight[:, :, None] * rows.batched[:, self.prefix :]).sum(1)
        return with_row(rows, fused)
