"""What a model's name alone says: the conventions of timm, DeiT and MoCo v3."""

from __future__ import annotations

import re
from typing import Any

from asvit_deploy.models.config import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
# How every CLIP of OpenAI's and most others see a picture.
CLIP_RULES = Preprocessing(crop_pct=1.0, mean=CLIP_MEAN, std=CLIP_STD)

_NAME = re.compile(
    r"(?P<family>vit|deit)_(?P<size>tiny|small|base|large|huge)(?:_distilled)?"
    r"_patch(?P<patch>\d+)(?P<rest>.*)$"
)
_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16),
          "huge": (1280, 16)}  # fmt: skip
# MoCo v3 has twelve heads in the small one too.
_MOCO = {"vit_small": (384, 12), "vit_base": (768, 12)}


def timm_name(name: str) -> dict[str, Any] | None:
    """What a timm name stands for, or None where it is no plain ViT or DeiT.

    `vit_*` is augreg's preprocessing unless the rest of the name names other weights.
    """
    match = _NAME.match(name)
    if match is None:
        return None
    width, heads = _SIZES[match["size"]]
    rest = match["rest"]
    says: dict[str, Any] = {"heads": heads, "width": width, "patch_size": int(match["patch"])}
    says["crop_pct"] = 1.0 if re.match(r"(?:_\w+)?_384", rest) else 0.9
    says["interpolation"] = "bicubic"
    if "quickgelu" in rest:
        says["activation"] = "quick_gelu"
    if "clip" in rest:
        return says | {"mean": CLIP_MEAN, "std": CLIP_STD}
    if "miil" in rest:
        plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        return says | plain | {"crop_pct": 0.875, "interpolation": "bilinear"}
    if match["family"] == "deit" or "dino" in rest or re.search(r"[._]mae", rest):
        return says | {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return says | {"mean": HALF, "std": HALF}


def moco_name(name: str) -> dict[str, Any] | None:
    """What `arch` says in a file of MoCo v3's, or None for another name."""
    if name not in _MOCO:
        return None
    width, heads = _MOCO[name]
    return {
        "heads": heads, "width": width, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
        "crop_pct": 0.875, "interpolation": "bilinear",
    }  # fmt: skip
