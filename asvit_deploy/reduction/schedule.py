"""A schedule: how many tokens leave is settled block by block, on pictures, and then for all.

The idea is DiffRate's (Chen et al., ICCV 2023): tokens are ranked by class attention; of those that
leave a block the better ones merge into similar tokens and the worst are lost, and both numbers are
chosen for each block. It learns them by gradients; here they are searched for, see
`asvit_deploy.scheduling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.ops.torch_op import best_places
from asvit_deploy.reduction.base import Decision, Place, Seen, Settled
from asvit_deploy.reduction.matching import nearest_staying
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.rows import Rows, averaged, chosen, moved
from asvit_deploy.reduction.size_passing import every_block

_LEAST = 1e-9  # of a class attention


class Schedule(Ranked):
    """a = mean over heads of the class token's attention ranks, between attention and MLP.

    Of what leaves, the highest `merged` join the most similar token that stays (cosine of x) as a
    mean weighted by sizes, which later attentions see as log(size); the rest is lost.

    Args:
        merged: how many at each cut; None: all that leave.
    """

    name: ClassVar[str] = "schedule"
    place: ClassVar[Place] = "inside"
    carries_sizes: ClassVar[bool] = True
    settled: ClassVar[Settled] = "pictures"
    adapts: ClassVar[bool] = False

    def __init__(
        self, blocks: Sequence[int], kept: Sequence[int] | None = None, prefix: int = 1,
        most: Sequence[int] | None = None, merged: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(blocks, kept, prefix, most)
        if merged is not None and (
            len(merged) != len(self.blocks) or not all(type(m) is int and m >= 0 for m in merged)
        ):
            raise ValueError(f"{list(merged)} merging tokens do not fit {len(self.blocks)} cuts")
        self.merged = None if merged is None else tuple(merged)

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        return every_block(depth)

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        prefix = self.prefix
        a = seen.class_row().mean(1)[:, prefix:]
        x = F.normalize(rows.batched[:, prefix:].float(), dim=2)
        alike = x @ x.transpose(1, 2)
        living = rows.living(prefix)
        tokens = int(living[0].sum()) if rows.keep is not None else a.shape[1]
        count = self.counts(stage, tokens)
        assert count is not None
        reach = tokens if self.merged is None else min(count + self.merged[stage], tokens)
        own = torch.arange(rows.batched.shape[1], device=a.device).expand(a.shape[0], -1)
        if reach == tokens:
            return Decision(a, into=own, nearness=alike)
        ranked = torch.where(living, a, -1.0)
        merges = chosen(ranked, reach)
        at_edge = best_places(ranked, reach + 1)[:, reach - 1 :]
        edge = ranked.gather(1, at_edge).mean(1, keepdim=True)
        # A token that merges, by a hair, or is lost.
        hair = (a / edge.clamp_min(_LEAST) - 1).abs()
        near = alike.masked_fill(~merges[:, :, None], -torch.inf)
        return Decision(a, into=own, into_margin=hair, nearness=near, onward_margin=hair)

    def destined(self, rows: Rows, stay: Tensor, decision: Decision) -> Decision:
        found = nearest_staying(decision, stay, self.prefix)
        if decision.onward_margin is None:
            return found
        assert found.into_margin is not None
        return replace(
            found, into_margin=torch.minimum(found.into_margin, decision.onward_margin)
        )  # fmt: skip

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        assert decision.into is not None
        leaving = rows.leaving(stay, self.prefix)
        mixed = averaged(rows, decision.into, leaving, rows.sizes)
        return replace(mixed, size=moved(rows.sizes, decision.into, leaving))

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "merged": self.merged and list(self.merged)}

    @classmethod
    def restore(cls, fields: dict[str, Any], prefix: int) -> Schedule:
        return cls(fields["blocks"], fields["kept"], prefix, fields.get("most"),
                   fields.get("merged"))  # fmt: skip
