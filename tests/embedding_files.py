"""Small networks that give embeddings: as CLIP's projection, and as DINOv2 with registers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from conftest import sharpened

from asvit_deploy.checkpoints.load import save_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.models.archs import arch
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import ViT

_BASE = replace(arch("as_deit_mini"), stem="patch", image_size=28)  # 49 tokens
CONFIGS: dict[str, ArchConfig] = {
    "clip": replace(
        _BASE, name="vit_128x6_patch4_clip", head="projection", num_classes=48, norm_pre=True,
        patch_bias=False, activation="quick_gelu", eps=1e-5,
    ),
    "dinov2": replace(
        _BASE, name="vit_128x6_patch4_reg4", head="none", num_classes=128, prefix=5,
        positions="image", layer_scale=True,
    ),
}  # fmt: skip


def network(kind: str, seed: int = 0) -> ViT:
    """Random and adaptive, with peaked attention, so that pictures keep other tokens."""
    config = CONFIGS[kind]
    return sharpened(config, open_images(None, config, limit=4), seed=seed)


def written(folder: Path, kind: str, dense: bool = False) -> Path:
    """A checkpoint of it."""
    model = network(kind)
    path = folder / f"{kind}{'_dense' if dense else ''}.safetensors"
    save_checkpoint(path, model.with_reduction(None) if dense else model, {})
    return path
