"""LTMP: learned thresholds merge and prune in every block (Bonnaerens and Dambre, TMLR 2023).

Written from what is published of it; two thresholds a block are all that it learns.

    (1) m = attention that a token receives, mean over heads and queries, log(size) added to keys
    (2) of image tokens at even places i and the most similar one at an odd place j, by the mean of
        their keys: i joins j, as a mean weighted by sizes, where 1 - cos(k_i, k_j) < merge
    (3) j's m becomes the highest of those that joined
    (4) of what is left, tokens with m <= prune are lost

Both are one cut: a score above `prune` says that a token neither merges nor is lost. It is
continuous in all that decides, so that a score near its boundary is a near tie:

    even i:  prune * min(m_i / prune, d_i),  d_i = (1 - cos_i) / merge
    odd j:   prune * max(m_j / prune, max over i of min(m_i / prune, 1 / d_i))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from asvit_deploy.ops.torch_op import keep_mask
from asvit_deploy.reduction.base import (
    Decision,
    Learning,
    Passed,
    Place,
    Reduction,
    Seen,
    Settled,
)
from asvit_deploy.reduction.matching import Pairs, likeness, pairs
from asvit_deploy.reduction.rows import Rows, averaged, moved
from asvit_deploy.reduction.size_passing import every_block
from asvit_deploy.reduction.threshold import learnt_as_logarithms

# Where training begins: pairs that are all but equal merge, and nothing is lost.
LEAST = 1e-6  # of 1 - cosine and of what a token receives
NEVER = LEAST / 2  # a threshold that nothing lies under
INITIAL_MERGE, INITIAL_PRUNE = 0.1, NEVER
_ROUNDING = 1e-6
_STEEPNESS = 10.0  # of the relaxation, in logarithms of score over boundary


@dataclass(frozen=True)
class Evidence:
    """What the thresholds of a cut are compared with: (1), float32 [B, M-P], and (2)."""

    received: Tensor
    found: Pairs

    def apart(self) -> Tensor:
        """1 - cosine of each pair, float32 [B, M-P]."""
        return (1 - self.found.cosine).clamp_min(LEAST)


class LTMP(Reduction):
    """Its parameters are `merge.N` and `prune.N` of each cut; the first is one of 1 - cosine."""

    name: ClassVar[str] = "ltmp"
    place: ClassVar[Place] = "inside"
    carries_sizes: ClassVar[bool] = True
    settled: ClassVar[Settled] = "pictures"
    compares: ClassVar[bool] = True

    def __init__(self, blocks: Sequence[int], prefix: int = 1) -> None:
        super().__init__(blocks, prefix)
        self.merge, self.prune = (
            nn.ParameterList(nn.Parameter(torch.tensor(value)) for _ in self.blocks)
            for value in (INITIAL_MERGE, INITIAL_PRUNE)
        )

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        return every_block(depth)

    def boundaries(self) -> list[Tensor]:
        return list(self.prune)

    @property
    def steers(self) -> bool:
        return True

    def learning(self) -> list[Learning]:
        """All thresholds as logarithms, from a start on the budget: the published rates, 5e-3 and
        5e-6, are for an epoch of 10,000 steps from thresholds that do nothing."""
        return learnt_as_logarithms([*self.merge, *self.prune])

    def own_loss(self, passed: Passed) -> dict[str, Tensor]:
        """10 (MACs - f)^2, in place of Eq. 10."""
        return {"flops": 10 * (passed.macs - passed.budget) ** 2}

    def evidence(self, rows: Rows, seen: Seen) -> Evidence:
        received = seen.column_mean()[:, self.prefix :]
        return Evidence(received, pairs(rows, likeness(seen, self.prefix), self.prefix))

    def judged(self, evidence: Evidence, merge: Tensor, prune: Tensor) -> Decision:
        """(2) to (4) by these thresholds, float32 scalars above 0."""
        found, gap = evidence.found, evidence.apart()
        share = evidence.received.clamp_min(LEAST) / prune
        apart = gap / merge
        handed = torch.where(found.paired, torch.minimum(share, 1 / apart), 0.0)
        whole, prefix = found.into, self.prefix
        places = torch.arange(whole.shape[1], device=whole.device)[prefix:]
        # (B, from, to) of image rows: the highest that each would be handed.
        goes = whole[:, prefix:, None] == places
        taken = torch.where(goes & found.paired[:, :, None], handed[:, :, None], 0.0).amax(1)
        alone = torch.where(found.paired, apart, torch.inf)
        ratio = torch.minimum(torch.maximum(share, taken), alone)
        # By a hair more than merges: a row that goes, whatever a product rounds to, goes somewhere.
        joins = found.paired & (apart < 1 + _ROUNDING)
        own = torch.arange(whole.shape[1], device=whole.device).expand_as(whole)
        into = torch.where(joins, whole[:, prefix:], own[:, prefix:])
        edge = torch.where(found.paired, (gap - merge).abs(), torch.inf)
        return Decision(
            prune * ratio, prune, into=torch.cat([own[:, :prefix], into], 1),
            into_margin=torch.minimum(found.margin, edge), evidence=evidence,
        )  # fmt: skip

    def decide(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        return self.judged(self.evidence(rows, seen), self.merge[stage], self.prune[stage])

    def decided_again(self, stage: int, decision: Decision) -> Decision:
        return self.judged(decision.evidence, self.merge[stage], self.prune[stage])

    def mask(self, stage: int, decision: Decision, alive: Tensor, temperature: float) -> Tensor:
        """0 or 1 forward; backward sigmoid(10 log(score / boundary)), through which both thresholds
        learn, whatever their units: `temperature` is not used.
        """
        assert decision.boundary is not None
        score, boundary = decision.score, decision.boundary
        masked = score.detach().masked_fill(alive.detach() < 0.5, -torch.inf)
        hard = keep_mask(masked, boundary.detach()).float()
        soft = torch.sigmoid(_STEEPNESS * (score.clamp_min(1e-12) / boundary).log())
        return alive * (hard - soft.detach() + soft)

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        assert decision.into is not None
        leaving = rows.leaving(stay, self.prefix)
        mixed = averaged(rows, decision.into, leaving, rows.sizes)
        return replace(mixed, size=moved(rows.sizes, decision.into, leaving))
