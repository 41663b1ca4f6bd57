"""The table of architectures: every size the package knows, one row each."""

from __future__ import annotations

from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig, Preprocessing

_DIGITS = Preprocessing(
    crop_pct=1.0, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)

ARCHS: dict[str, ArchConfig] = {
    arch.name: arch
    for arch in (
        ArchConfig("as_deit_tiny", "deit", 192, 3, 12, 4, (4, 7, 10)),
        ArchConfig("as_deit_small", "deit", 384, 6, 12, 4, (4, 7, 10)),
        ArchConfig("as_deit_base", "deit", 768, 12, 12, 4, (4, 7, 10)),
        ArchConfig("as_lvvit_s", "lvvit", 384, 6, 16, 3, (5, 9, 13), stem="conv", eps=1e-5),
        ArchConfig("as_lvvit_m", "lvvit", 512, 8, 20, 3, (6, 11, 16), stem="conv", eps=1e-5),
        # Small enough to train on two cores: demos, CI and the default checkpoint. A DeiT but for
        # LV-ViT's stem, with which it learns from ten times fewer pictures.
        ArchConfig(
            "as_deit_mini", "deit", 128, 2, 6, 2, (2, 3, 4),
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
