"""Adaptive ViTs in plain PyTorch; knows nothing of ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asvit_deploy.models.config import ArchConfig
    from asvit_deploy.models.vit import AdaptiveViT


def build(config: ArchConfig, adaptive: bool = True) -> AdaptiveViT:
    """A freshly initialised model of that architecture; dense when `adaptive` is False."""
    from asvit_deploy.models.lvvit import AdaptiveLVViT
    from asvit_deploy.models.vit import AdaptiveViT

    return (AdaptiveLVViT if config.family == "lvvit" else AdaptiveViT)(config, adaptive)
