"""What a method must beat: chance, and its own score turned round."""

from __future__ import annotations

from typing import ClassVar

import torch

from asvit_deploy.reduction.base import Decision, Seen
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.topk import TopK

# Cubes of numbers below it stay far inside int64, and no two are equal: it is 2 modulo 3.
_PRIME = 65519


class Random(TopK):
    """Chance picks the places that stay: drawn once, the same on every picture and in every run."""

    name: ClassVar[str] = "random"
    adapts: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        # A cube modulo a prime scatters as a generator does, and is exact in every runtime.
        count = rows.batched.shape[1] - self.prefix
        place = torch.arange(1, count + 1, device=rows.tokens.device)
        if rows.keep is not None:
            place = rows.living(self.prefix).long().cumsum(1)
        mixed = place + 7919 * (stage + 1)
        mixed = (mixed * mixed % _PRIME * mixed + 12345) % _PRIME
        score = (mixed.float() + 1) / _PRIME
        return Decision(score.expand(rows.batched.shape[0], count))


class MinK(TopK):
    """The lowest of AS-ViT's scores stay: 1 / S ranks."""

    name: ClassVar[str] = "min-k"
    trains: ClassVar[bool] = False

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        return Decision(1 / super().rank(stage, rows, seen).score.clamp_min(1e-9))
