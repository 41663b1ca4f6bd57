"""Methods that keep the same number of tokens on every picture, so that all shapes are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asvit_deploy.ops.torch_op import falling_order
from asvit_deploy.reduction.base import Decision, Reduction


class FixedCounts(Reduction):
    """The highest scores stay, as many at each cut as `kept` says.

    Args:
        kept: image rows that stay at each cut, appended ones not counted.

    Raises:
        ValueError: not one number above 0 for each cut.
    """

    def __init__(self, blocks: Sequence[int], kept: Sequence[int], prefix: int = 1) -> None:
        super().__init__(blocks, prefix)
        if len(kept) != len(self.blocks) or not all(type(k) is int and k > 0 for k in kept):
            raise ValueError(f"{list(kept)} tokens do not fit {len(self.blocks)} cuts")
        self.kept = tuple(kept)

    def counts(self, stage: int, tokens: int) -> int:
        return min(self.kept[stage], tokens)

    def mask(self, stage: int, decision: Decision, alive: Tensor, temperature: float) -> Tensor:
        living = alive > 0.5
        # Every image has as many, so that the first one's number is all of theirs.
        tokens = int(living[0].sum())
        count = torch.full_like(living[:, 0], self.counts(stage, tokens), dtype=torch.long)
        return highest(decision.score.detach(), living, count).float()

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "kept": list(self.kept)}

    @classmethod
    def restore(cls, fields: dict[str, Any], prefix: int) -> FixedCounts:
        return cls(fields["blocks"], fields["kept"], prefix)


def highest(scores: Tensor, alive: Tensor, count: Tensor) -> Tensor:
    """The `count` (int64 [B]) highest of the tokens alive, the first of equals; bool [B, N].

    Number > NaN > -inf, as in the op.
    """
    order = falling_order(scores)
    alive_first = (~alive.gather(1, order)).to(torch.uint8).argsort(dim=1, stable=True)
    rank = order.gather(1, alive_first).argsort(1)
    return (rank < count[:, None]) & alive
