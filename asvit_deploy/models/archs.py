"""The table of architectures: every size the package knows, one row each."""

from __future__ import annotations

from typing import Any

from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig, Preprocessing

_DIGITS = Preprocessing(
    crop_pct=1.0, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)

_LVVIT: dict[str, Any] = {
    "stem": "conv", "eps": 1e-5, "qkv_bias": False, "residual": 0.5, "head": "class_and_tokens",
    "counts_elementwise": True,
}  # fmt: skip

ARCHS: dict[str, ArchConfig] = {
    arch.name: arch
    for arch in (
        ArchConfig("as_deit_tiny", 192, 3, 12, 4, (4, 7, 10)),
        ArchConfig("as_deit_small", 384, 6, 12, 4, (4, 7, 10)),
        ArchConfig("as_deit_base", 768, 12, 12, 4, (4, 7, 10)),
        ArchConfig("as_lvvit_s", 384, 6, 16, 3, (5, 9, 13), **_LVVIT),
        ArchConfig("as_lvvit_m", 512, 8, 20, 3, (6, 11, 16), **_LVVIT),
        # Small enough to train on two cores: demos, CI and the default checkpoint. A DeiT but for
        # LV-ViT's stem, with which it learns from ten times fewer pictures.
        ArchConfig(
            "as_deit_mini", 128, 2, 6, 2, (2, 3, 4),
            image_size=56, patch_size=4, stem="conv", num_classes=10, preprocessing=_DIGITS,
        ),
    )
}  # fmt: skip


def arch(name: str) -> ArchConfig:
    """Look an architecture up by name.

    Raises:
        UserError: there is no such architecture.
    """
    try:
        return ARCHS[name]
    except KeyError:
        raise UserError(f"unknown arch {name!r}; known: {', '.join(ARCHS)}") from None
