"""Methods that rank tokens: a fixed number stays at each cut, or what ranks above a threshold."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from asvit_deploy.ops.torch_op import falling_order
from asvit_deploy.reduction.base import Decision, Learning, Reduction, Seen
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.threshold import learnt_as_logarithms, soft_keep_mask


class Ranked(Reduction):
    """The highest scores stay: as many at each cut as `kept` says, or those above a threshold.

    Fixed counts make every shape known; thresholds, one a cut, are parameters named 0, 1, ... and
    let each picture keep what it needs.

    Args:
        kept: image rows that stay at each cut, appended ones not counted; None: by thresholds.
        most: with thresholds, image rows that any picture keeps at each cut at most; None: all. As
            with counts, a method keeps its `least` in any case.

    Raises:
        ValueError: not one number above 0 for each cut, or thresholds where `adapts` is false.
    """

    adapts: ClassVar[bool] = True

    def __init__(
        self, blocks: Sequence[int], kept: Sequence[int] | None = None, prefix: int = 1,
        most: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(blocks, prefix)
        self.kept = None if kept is None else self._counted(kept)
        self.most = None if most is None else self._counted(most)
        if self.kept is not None and self.most is not None:
            raise ValueError("fixed counts need no other bound")
        if self.kept is None and not self.adapts:
            raise ValueError(f"{self.name} has no thresholds")
        if self.kept is None:
            for stage in range(len(self.blocks)):
                self.register_parameter(str(stage), nn.Parameter(torch.ones(())))

    def _counted(self, counts: Sequence[int]) -> tuple[int, ...]:
        if len(counts) != len(self.blocks) or not all(type(k) is int and k > 0 for k in counts):
            raise ValueError(f"{list(counts)} tokens do not fit {len(self.blocks)} cuts")
        return tuple(counts)

    @classmethod
    def planned(
        cls, dim: int, prefix: int, blocks: Sequence[int], kept: Sequence[int] | None,
        most: Sequence[int] | None = None,
    ) -> Ranked:  # fmt: skip
        """The method for a network of that width and prefix, with what it learns as it begins."""
        return cls(blocks, kept, prefix, most)

    @abstractmethod
    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        """Scores, and where what leaves goes; the boundary is not its to say."""

    def decide(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        ranked = self.rank(stage, rows, seen)
        if self.kept is not None:
            return ranked
        score = ranked.score
        if self.most is not None:
            score = score.masked_fill(~rows.living(self.prefix), -torch.inf)
            score = _best(score, self.most[stage])
        return replace(ranked, score=score, boundary=self._parameters[str(stage)])

    def boundaries(self) -> list[Tensor]:
        return [*self._thresholds()]

    def _thresholds(self) -> list[nn.Parameter]:
        if self.kept is not None:
            return []
        return [self._parameters[str(stage)] for stage in range(len(self.blocks))]  # type: ignore[misc]

    @property
    def compacts(self) -> bool:
        return self.kept is not None

    def learning(self) -> list[Learning]:
        return learnt_as_logarithms(self._thresholds())

    def least(self, tokens: int) -> int:
        """How many of so many image rows stay at a cut whatever is asked for."""
        return 1

    def counts(self, stage: int, tokens: int) -> int | None:
        if self.kept is None:
            return None
        return max(min(self.kept[stage], tokens), min(self.least(tokens), tokens))

    def mask(self, stage: int, decision: Decision, alive: Tensor, temperature: float) -> Tensor:
        if decision.boundary is not None:
            return soft_keep_mask(decision.score, decision.boundary, alive, temperature)
        living = alive > 0.5
        # Every image has as many, so that the first one's number is all of theirs.
        tokens = int(living[0].sum())
        count = torch.full_like(living[:, 0], self.counts(stage, tokens) or 0, dtype=torch.long)
        return highest(decision.score.detach(), living, count).float()

    def fields(self) -> dict[str, Any]:
        bound = {} if self.most is None else {"most": list(self.most)}
        return {**super().fields(), "kept": self.kept and list(self.kept), **bound}

    @classmethod
    def restore(cls, fields: dict[str, Any], prefix: int) -> Ranked:
        return cls(fields["blocks"], fields["kept"], prefix, fields.get("most"))


def highest(scores: Tensor, alive: Tensor, count: Tensor) -> Tensor:
    """The `count` (int64 [B]) highest of the tokens alive, the first of equals; bool [B, N].

    Number > NaN > -inf, as in the op.
    """
    order = falling_order(scores)
    alive_first = (~alive.gather(1, order)).to(torch.uint8).argsort(dim=1, stable=True)
    rank = order.gather(1, alive_first).argsort(1)
    return (rank < count[:, None]) & alive


def _best(score: Tensor, most: int) -> Tensor:
    """Scores [B, N], -inf but for the `most` highest, the first of equals, and for +inf: those rows
    may not leave.

    By counting what ranks higher and not by a top-k, whose k a graph of any N would have to bound.
    """
    place = torch.arange(score.shape[1], device=score.device)
    ours, others = score[:, :, None], score[:, None, :]
    earlier = (others == ours) & (place < place[:, None])
    ahead = ((others > ours) | earlier).to(torch.float32).sum(2)
    return torch.where((ahead < most) | (score == torch.inf), score, -torch.inf)
