"""Adaptive ViTs in plain PyTorch; knows nothing of ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asvit_deploy.models.config import ArchConfig
    from asvit_deploy.models.vit import ViT
    from asvit_deploy.reduction.base import Reduction


def build(config: ArchConfig, adaptive: bool = True, reduction: Reduction | None = None) -> ViT:
    """A freshly initialised model of that architecture.

    Args:
        adaptive: False: dense, without a reduction.
        reduction: the method; by default learned thresholds at the architecture's stages.
    """
    from asvit_deploy.models.vit import ViT
    from asvit_deploy.reduction.threshold import Threshold

    if adaptive and reduction is None:
        reduction = Threshold(config.stages, config.prefix)
    return ViT(config, reduction if adaptive else None)
