"""DynamicViT: small networks say which tokens to keep (Rao et al., NeurIPS 2021, arXiv 2106.02034).

Before each of three blocks a predictor looks at every image token, and at the mean of those that
are there; what it finds worthless is lost.

    (1) z = GELU(W LN(x))                 of each image token, [N, C]
    (2) z = [first half of z, mean over tokens of its second half]
    (3) p = softmax(MLP(z)), C -> C/2 -> C/4 -> 2 with GELU between; p_keep is its first

At test the published form keeps the int(N r^s) tokens of the highest p_keep at cut s = 1, 2, 3; by
a threshold every picture keeps its own number.

Training with counts draws (Gumbel) which tokens stay, with p_keep, and adds

    (4) 2 mean over pictures and cuts of (kept share of the picture - r^s)^2
    (5) 0.5 mean over kept tokens of (token - the dense network's)^2, number by number, behind the
        last norm

beside the classes' divergence from the dense network, which every run has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from asvit_deploy.ops.torch_op import keep_mask
from asvit_deploy.reduction.base import Decision, Learning, Passed, Place, Seen, Settled
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.rows import Rows

KEEP_RATE = 0.7  # r of the published checkpoints, but for one
_STEEPEST = 30.0  # of a logit: its exponential stays a number


class Predictor(nn.Module):
    """(1) to (3), less the softmax. Names of parameters are those of the release."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(),
            nn.Linear(dim // 4, 2),
        )  # fmt: skip

    def forward(self, tokens: Tensor, there: Tensor | None) -> Tensor:
        """float32 [B, N, C] -> logits [B, N, 2]: keep, drop.

        Args:
            there: bool [B, N], the tokens that the mean is over; None: all.
        """
        z = self.in_conv(tokens)
        half = z.shape[2] // 2
        own, others = z[:, :, :half], z[:, :, half:]
        if there is None:
            mean = others.mean(1, keepdim=True)
        else:
            weight = there.float()[:, None, :]
            mean = weight @ others / weight.sum(2, keepdim=True)
        return self.out_conv(torch.cat([own, mean.expand_as(others)], 2))


class DynamicViT(Ranked):
    """score = p_keep / (1 - p_keep), which orders as p_keep does and never saturates.

    A threshold t on it is one of t / (1 + t) on p_keep.

    Args:
        dim: C.
    """

    name: ClassVar[str] = "dynamicvit"
    place: ClassVar[Place] = "before"
    settled: ClassVar[Settled] = "training"
    compares: ClassVar[bool] = True

    def __init__(
        self, blocks: Sequence[int], kept: Sequence[int] | None = None, prefix: int = 1,
        most: Sequence[int] | None = None, *, dim: int,
    ) -> None:  # fmt: skip
        super().__init__(blocks, kept, prefix, most)
        if type(dim) is not int or dim < 4:
            raise ValueError(f"{dim!r} is no width of a predictor")
        self.dim = dim
        self.predictors = nn.ModuleList(Predictor(dim) for _ in self.blocks)
        self._seed, self._first = 0, 0

    @classmethod
    def planned(
        cls, dim: int, prefix: int, blocks: Sequence[int], kept: Sequence[int] | None,
        most: Sequence[int] | None = None,
    ) -> DynamicViT:  # fmt: skip
        return cls(blocks, kept, prefix, most, dim=dim)

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        """Every quarter of the network: 3, 6, 9 of twelve blocks."""
        return tuple(dict.fromkeys(max(1, depth * part // 4) for part in (1, 2, 3)))

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        tokens = rows.batched[:, self.prefix :].float()
        all_there = rows.keep is None and rows.alive is None
        logits = self.predictors[stage](tokens, None if all_there else rows.living(self.prefix))
        odds = (logits[:, :, 0] - logits[:, :, 1]).clamp(-_STEEPEST, _STEEPEST).exp()
        return Decision(odds)

    def mask(self, stage: int, decision: Decision, alive: Tensor, temperature: float) -> Tensor:
        """0 or 1 forward; backward as p_keep itself, or, with a threshold t, as
        score / (score + t): what p_keep would be if it were to be above a half. In training mode,
        with counts, drawn.

        `temperature` is not used: the relaxation is the predictor's own.
        """
        if self.training and decision.boundary is None:
            return _drawn(decision.score, alive, self._chances(stage, decision.score))
        hard = super().mask(stage, decision, alive, temperature).detach()
        bound = 1.0 if decision.boundary is None else decision.boundary
        # Of tokens that may not stay for a bound on their number the score is -inf.
        score = decision.score.masked_fill(decision.score == -torch.inf, 0)
        soft = score / (score + bound)
        return alive * (hard - soft.detach() + soft)

    def before_pass(self, seed: int, first: int) -> None:
        self._seed, self._first = seed, first

    def _chances(self, stage: int, like: Tensor) -> Tensor:
        """Numbers from 0 to 1 for each token, float32 [B, N]: they follow from the run's seed, the
        cut and the picture's number in the run."""
        made = [np.random.default_rng((self._seed, self._first + i, stage)).random(like.shape[1])
                for i in range(like.shape[0])]  # fmt: skip
        return torch.from_numpy(np.stack(made)).to(like.device, torch.float32)

    @property
    def compacts(self) -> bool:
        return False

    @property
    def steers(self) -> bool:
        return self.kept is not None

    def learning(self) -> list[Learning]:
        predictors = Learning(tuple(self.predictors.parameters()), decayed=True)
        return [*super().learning(), predictors]

    def own_loss(self, passed: Passed) -> dict[str, Tensor]:
        """(4), with counts, and (5), with a teacher."""
        terms = {}
        if self.kept is not None:
            tokens = passed.masks[0].shape[1]
            off = [mask.sum(1) - kept for mask, kept in zip(passed.masks, self.kept)]
            terms["ratio"] = 2 * (torch.stack(off) / tokens).square().mean()
        if passed.target is not None:
            stays = passed.masks[-1].detach() > 0.5
            mine, other = (x[:, self.prefix :][stays] for x in (passed.tokens, passed.target))
            # Every token weighs the same, in whatever process it is.
            share = stays.sum() / passed.mean(stays.sum().float())
            terms["tokens"] = 0.5 * (mine.float() - other.float()).square().mean() * share
        return terms

    def macs(self, stage: int, rows: Any) -> Any:
        c = self.dim
        return (rows - self.prefix) * (c * c + c * (c // 2) + (c // 2) * (c // 4) + (c // 4) * 2)

    def fits(self, dim: int) -> bool:
        return self.dim == dim

    def fields(self) -> dict[str, Any]:
        return {**super().fields(), "dim": self.dim}

    @classmethod
    def restore(cls, fields: dict[str, Any], prefix: int) -> DynamicViT:
        return cls(fields["blocks"], fields["kept"], prefix, fields.get("most"), dim=fields["dim"])


def _drawn(odds: Tensor, alive: Tensor, chances: Tensor) -> Tensor:
    """Of two outcomes with these odds, float32 [B, N], one by the Gumbel trick: 0 or 1 forward, the
    relaxation's gradient backward; the likeliest stays in any case.

    Args:
        chances: drawn evenly from 0 to 1.
    """
    draw = chances.clamp(1e-6, 1 - 1e-6)
    logit = odds.log() + (draw / (1 - draw)).log()  # the difference of two Gumbel variables
    there = logit.detach().masked_fill(alive.detach() < 0.5, -torch.inf)
    hard, soft = keep_mask(there, 0.0).float(), torch.sigmoid(logit)
    return alive * (hard - soft.detach() + soft)


def published_counts(tokens: int, cuts: int, rate: float = KEEP_RATE) -> list[int]:
    """int(N r^s) at each cut s from 1 on, at least 1."""
    return [max(1, int(tokens * rate**s)) for s in range(1, cuts + 1)]
