"""Other rules of which tokens stay, at given counts: what the learned thresholds are held against.

Rules see the scores and which tokens are still there, and return which of these stay. None of them
revives a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import model_macs, teacher_macs
from asvit_deploy.models.vit import Rule, Selector, ViT
from asvit_deploy.reduction.ranked import highest

_SLACK = 2


def top_k(counts: Sequence[Tensor]) -> Rule:
    """The highest scores; counts int64 [B] for each stage."""
    return lambda stage, scores, alive: highest(scores, alive, counts[stage])


def min_k(counts: Sequence[Tensor]) -> Rule:
    """The lowest scores (Table 8)."""
    return lambda stage, scores, alive: highest(-scores, alive, counts[stage])


def random_k(counts: Sequence[Tensor], generator: torch.Generator) -> Rule:
    """Chance picks (Table 8); `generator` is the CPU's."""

    def rule(stage: int, scores: Tensor, alive: Tensor) -> Tensor:
        chance = torch.rand(scores.shape, generator=generator).to(scores.device)
        return highest(chance, alive, counts[stage])

    return rule


@torch.inference_mode()
def forward_selected(model: ViT, images: Tensor, rule: Rule) -> Tensor:
    """Inference form of an adaptive network with another rule; logits [B, C].

    Args:
        images: float32 [B, 3, H, W], normalised.
    """
    return model(images, padded=True, rule=rule)[0]


def ratio_counts(config: ArchConfig, budget: float) -> list[int]:
    """Image tokens after each stage when every stage keeps the same share, at that budget.

    Whole tokens fit a budget only roughly, so each count may differ by a few from the share's.
    """
    tokens, stages = config.image_tokens, range(1, len(config.stages) + 1)

    def miss(counts: Sequence[int]) -> float:
        macs = model_macs(config, [config.prefix + count for count in counts])
        return abs(float(macs) / teacher_macs(config) - budget)

    shares = (i / 2000 for i in range(1, 2001))
    start = min(([max(1, round(tokens * s**stage)) for stage in stages] for s in shares), key=miss)
    around = product(*(range(max(1, count - _SLACK), count + _SLACK + 1) for count in start))
    falling = (list(counts) for counts in around if sorted(counts, reverse=True) == list(counts))
    return min((counts for counts in falling if counts[0] <= tokens), key=miss)


def static_top_k(counts: Sequence[int]) -> Selector:
    """`top_k` with the same counts for every image, in the training form (Table 2)."""

    def select(stage: int, scores: Tensor, alive: Tensor) -> Tensor:
        count = torch.full((len(scores),), counts[stage], device=scores.device)
        return highest(scores.detach(), alive > 0.5, count).float()

    return select
