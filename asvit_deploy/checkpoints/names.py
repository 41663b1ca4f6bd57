"""What a model's name alone says: the conventions of timm, DeiT and MoCo v3."""

from __future__ import annotations

import re
from typing import Any

from asvit_deploy.checkpoints.model_types import named_other
from asvit_deploy.models.config import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
# How every CLIP of OpenAI's and most others see a picture.
CLIP_RULES = Preprocessing(crop_pct=1.0, mean=CLIP_MEAN, std=CLIP_STD)

_NAME = re.compile(
    r"(?P<kind>vit|deit3?)_(?P<size>[a-z]+)(?:_distilled)?_patch(?P<patch>\d+)(?P<rest>.*)$"
)
_SIZES = {"tiny": (192, 3), "small": (384, 6), "medium": (512, 8), "base": (768, 12),
          "large": (1024, 16), "huge": (1280, 16), "giant": (1408, 16), "gigantic": (1664, 16),
          "xsmall": (256, 4), "betwixt": (640, 10)}  # fmt: skip
# A giant that DINOv2 made, and bases a little wider.
_DINOV2_GIANT, _PLUS = (1536, 24), (896, 14)
# Tags of CLIPs that were trained with QuickGELU, which timm computes with GELU all the same unless
# the name has it.
_QUICK = re.compile(r"(?:openai|dfn\w+|metaclip\w*|laion400m_e32)$")
# MoCo v3 has twelve heads in the small one too.
_MOCO = {"vit_small": (384, 12), "vit_base": (768, 12)}


def trained_with_quick_gelu(name: str, tag: str) -> bool:
    """Whether a CLIP of timm's is computed there with GELU, but was trained with QuickGELU."""
    return "_clip_" in name and "quickgelu" not in name and _QUICK.match(tag) is not None


def timm_name(name: str) -> dict[str, Any] | None:
    """What a timm name stands for, or None where it is no plain ViT or DeiT.

    `vit_*` is augreg's preprocessing unless the rest of the name names other weights.
    """
    match = _NAME.match(name)
    if match is None or match["size"] not in _SIZES or named_other(name):
        return None
    rest = match["rest"]
    width, heads = _SIZES[match["size"]]
    if rest.startswith("_plus"):
        width, heads = _PLUS
    elif match["size"] == "giant" and "dinov2" in rest:
        width, heads = _DINOV2_GIANT
    says: dict[str, Any] = {"heads": heads, "width": width, "patch_size": int(match["patch"])}
    registers = re.search(r"_reg(\d+)", rest)
    if registers:
        says["registers"] = int(registers[1])
    if "clip" in rest:
        return says | _clip(match["size"], rest)
    return says | _prepared(match["kind"], rest)


def _prepared(kind: str, rest: str) -> dict[str, Any]:
    """How pictures are prepared for what is no CLIP."""
    if "bamboo" in rest:
        return {"mean": CLIP_MEAN, "std": CLIP_STD, "crop_pct": 1.0, "interpolation": "bicubic"}
    if "miil" in rest:
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 0.875,
                "interpolation": "bilinear"}  # fmt: skip
    whole = re.match(r"(?:_\w+)?_384", rest) or "dinov2" in rest
    whole = whole or (kind == "deit3" and "in22k" in rest)
    rules = {"crop_pct": 1.0 if whole else 0.9, "interpolation": "bicubic"}
    if kind != "vit" or "dino" in rest or re.search(r"[._]mae", rest):
        return rules | {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return rules | {"mean": HALF, "std": HALF}


def _clip(size: str, rest: str) -> dict[str, Any]:
    """A CLIP in timm's names; of the smaller ones, only their tags tell the crop."""
    says: dict[str, Any] = {"interpolation": "bicubic"}
    says["activation"] = "quick_gelu" if "quickgelu" in rest else "gelu"
    if size in ("large", "huge", "giant", "gigantic"):
        says["crop_pct"] = 1.0
    half = size == "large" and ".laion2b" in rest
    return says | {"mean": HALF if half else CLIP_MEAN, "std": HALF if half else CLIP_STD}


def moco_name(name: str) -> dict[str, Any] | None:
    """What `arch` says in a file of MoCo v3's, or None for another name."""
    if name not in _MOCO:
        return None
    width, heads = _MOCO[name]
    return {
        "heads": heads, "width": width, "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
        "crop_pct": 0.875, "interpolation": "bilinear",
    }  # fmt: skip
