"""Random weights that choose: peaked attention, and thresholds in gaps between real scores."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from asvit_deploy.models import build
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import ViT
from asvit_deploy.ops.torch_op import threshold_compact
from gpu_parts.networks import run_stage

SHARP = 4  # what queries and keys are multiplied with: random attention is all but uniform
KEEP = 0.7  # of the image tokens at every stage


def sharpened(config: ArchConfig, seed: int = 0) -> ViT:
    """Random weights with peaked attention; thresholds are still those of a fresh model."""
    torch.manual_seed(seed)
    model = build(config).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(SHARP)  # type: ignore[operator, union-attr]
    return model


@torch.no_grad()
def set_thresholds(
    model: ViT, pictures: NDArray[np.float32], keep: float = KEEP
) -> list[list[int]]:
    """Set each threshold mid-gap so that a share of these pictures' tokens passes.

    Args:
        pictures: float32 [n, 3, H, W].

    Returns:
        rows that stay, per stage and picture, class token included.
    """
    tokens = [model.embed(torch.from_numpy(picture[None])) for picture in pictures]
    kept: list[list[int]] = []
    for stage in range(len(model.config.stages)):
        pairs = [run_stage(model, stage, x, None) for x in tokens]
        scores = [pair[1] for pair in pairs if pair[1] is not None]
        ordered = torch.cat([score[0] for score in scores]).sort().values
        cut = int(len(ordered) * (1 - keep))
        middle = (ordered[cut - 1].double() + ordered[cut].double()) / 2
        model.thresholds[stage].fill_(middle.item())
        done = [threshold_compact(x, score, model.thresholds[stage])
                for (x, _), score in zip(pairs, scores, strict=True)]  # fmt: skip
        tokens = [compact for compact, *_ in done]
        kept.append([int(length) for _, _, length, _ in done])
    return kept
