"""The table of architectures, and those that are no row of it, which their traits describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from asvit_deploy.errors import UserError, shortened
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

# What a row says of a network: its shapes and traits. The rest are facts of a checkpoint, or of
# what became of it, and are kept beside it under names of their own.
_FACTS = ("name", "heads", "stages", "image_size", "num_classes", "preprocessing", "eps",
          "last_block")  # fmt: skip
DESCRIBED = tuple(field.name for field in fields(ArchConfig) if field.name not in _FACTS)
_LARGEST = {"dim": 8192, "depth": 256, "mlp_ratio": 64, "patch_size": 256, "prefix": 1024,
            "residual": 16}  # fmt: skip


def arch(name: str) -> ArchConfig:
    """Look an architecture up by name.

    Raises:
        UserError: there is no such architecture.
    """
    try:
        return ARCHS[name]
    except KeyError:
        raise UserError(f"unknown arch {name!r}; known: {', '.join(ARCHS)}") from None


def usual_stages(depth: int) -> tuple[int, ...]:
    """Blocks at which tokens leave a network of no row: 4, 7, 10 of 12, as AS-DeiT has them."""
    places = (max(1, round(depth * share)) for share in (4 / 12, 7 / 12, 10 / 12))
    return tuple(sorted({place for place in places if place < depth}))


def description(config: ArchConfig) -> dict[str, Any] | None:
    """The traits of an architecture, as files keep them; None where its row says them all."""
    own = {name: getattr(config, name) for name in DESCRIBED}
    row = ARCHS.get(config.name)
    return None if row and own == {name: getattr(row, name) for name in DESCRIBED} else own


def described(name: str, traits: Mapping[str, Any] | None) -> ArchConfig:
    """The inverse of `description`, with the usual heads and stages.

    Raises:
        ValueError: no such row, or a trait is missing, unknown or not what it must be.
    """
    if traits is None:
        if name not in ARCHS:
            raise ValueError(f"arch {shortened(repr(name), 80)}")
        return ARCHS[name]
    if set(traits) != set(DESCRIBED):
        raise ValueError("architecture")
    for trait, hint in get_type_hints(ArchConfig).items():
        if trait in DESCRIBED and not _fits(trait, traits[trait], hint):
            raise ValueError(f"architecture: {trait}")
    dim, depth = traits["dim"], traits["depth"]
    return ArchConfig(name=name, heads=usual_heads(dim), stages=usual_stages(depth), **dict(traits))


def usual_heads(dim: int) -> int:
    """One head for 64 channels, as nearly all have them, or 16 of the wide ones."""
    if dim in _SIXTEEN:
        return 16
    return dim // 64 if dim % 64 == 0 else 1


_SIXTEEN = (1152, 1280, 1408, 1664)  # ViT-So400m, -H, -g and -G


def _fits(trait: str, value: Any, hint: Any) -> bool:
    if allowed := get_args(hint):  # a Literal
        return value in allowed and isinstance(value, str)
    if hint is bool:
        return isinstance(value, bool)
    number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= _LARGEST[trait]
