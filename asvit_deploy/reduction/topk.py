"""The highest scores stay; methods differ in the score and in what becomes of the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from asvit_deploy.reduction.base import Decision, Place, Seen
from asvit_deploy.reduction.matching import likeness, nearest_staying
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.rows import Rows, with_row
from asvit_deploy.reduction.scoring import token_scores
from asvit_deploy.reduction.size_passing import every_block, with_sizes_passed


class TopK(Ranked):
    """AS-ViT's score, Eq. 5-7, at its stages; what leaves is lost."""

    name: ClassVar[str] = "topk"
    place: ClassVar[Place] = "inside"
    by: ClassVar[Literal["score", "attention"]] = "score"

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        return tuple(stage - 1 for stage in stages)

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        row = seen.class_row()
        if self.by == "attention":
            return Decision(row.mean(1)[:, self.prefix :])
        return Decision(token_scores(row, seen.context, self.prefix))


class TopKAttention(TopK):
    """a = mean over heads of the class token's attention; what leaves is lost."""

    name: ClassVar[str] = "topk-attention"
    by: ClassVar[Literal["score", "attention"]] = "attention"


class EViT(TopKAttention):
    """a as above; what leaves goes on as one fused token, the sum of a_j x_j.

    Liang et al., "Not All Patches are What You Need", ICLR 2022.
    """

    name: ClassVar[str] = "evit"
    appends: ClassVar[int] = 1

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        found = super().rank(stage, rows, seen)
        return replace(found, weight=found.score)

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        assert decision.weight is not None
        weight = rows.leaving(stay, self.prefix)[:, self.prefix :] * decision.weight
        fused = weight.to(rows.tokens.dtype)[:, :, None] * rows.batched[:, self.prefix :]
        return with_row(rows, fused.sum(1))


class TopKNearest(TopK):
    """AS-ViT's score in every block; the most similar token that stays takes each leaving size."""

    name: ClassVar[str] = "topk-nearest"
    carries_sizes: ClassVar[bool] = True

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        return every_block(depth)

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        alike = likeness(seen, self.prefix)
        return replace(super().rank(stage, rows, seen), nearness=alike @ alike.transpose(1, 2))

    def destined(self, rows: Rows, stay: Tensor, decision: Decision) -> Decision:
        return nearest_staying(decision, stay, self.prefix)

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        return with_sizes_passed(rows, stay, decision, self.prefix)


class TopKScalar(TopK):
    """AS-ViT's score in every block; each that stays stands for N/n tokens, alike."""

    name: ClassVar[str] = "topk-scalar"
    carries_sizes: ClassVar[bool] = True

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        return every_block(depth)

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        sizes, stays = rows.sizes, stay[:, self.prefix :].detach()
        tokens = (sizes[:, self.prefix :] * rows.living(self.prefix)).sum(1, keepdim=True)
        each = (tokens / stays.sum(1, keepdim=True)).expand_as(stays)
        return replace(rows, size=torch.cat([sizes[:, : self.prefix], each], 1))
