"""timm's names, which are DeiT's, DINOv2's, augreg's, MAE's and ours.

In the releases of AS-ViT, LV-ViT, DeiT-III and DINOv2 a few names differ; these are here too.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from asvit_deploy.checkpoints import learned
from asvit_deploy.checkpoints.formats.base import State, Translated, rename, without
from asvit_deploy.checkpoints.names import CLIP_RULES
from asvit_deploy.checkpoints.refused import Refused

_NAMES = (
    (r"score_predictor\.(\d+)\.keep_threshold", r"thresholds.\1"),  # AS-ViT's release
    *learned.NAMES,
    (r"(blocks\.\d+)\.gamma_([12])", r"\1.ls\2.gamma"),  # DeiT-III's release
    (r"register_tokens", "reg_token"),  # DINOv2's release
    (r"blocks\.\d+\.(\d+\..+)", r"blocks.\1"),  # the same, its blocks in chunks
    (r"dist_token", "reg_token"),  # a distillation token is a second prefix row
    (r"fc_norm\.(weight|bias)", r"norm.\1"),
)
_MLP = ("fc1", "fc2")


class Timm:
    """timm and the releases that share its names."""

    name: ClassVar[str] = "timm"
    blocks: ClassVar[str] = r"blocks\.(?:\d+\.)?\d+\.(?:norm1|norm2|attn|mlp)\..+"
    others: ClassVar[str] = r"(?:patch_embed\.proj\.weight|cls_token|pos_embed)"
    model_types: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def recognises(state: State) -> bool:
        return any(key.startswith("blocks.") for key in state)

    @staticmethod
    def translate(state: State) -> Translated:
        if "dist_token" in state and ("reg_token" in state or "register_tokens" in state):
            raise Refused("has a distillation token and registers; pass a network with one of them")
        whole, left_out = without(rename(state, _NAMES), r"mask_token")
        _refuse_others(whole)
        traits: dict[str, Any] = {"head": _head(state)}
        notes: tuple[str, ...] = ()
        if "norm_pre.weight" in whole:  # a CLIP
            traits |= {"eps": 1e-5, "preprocessing": CLIP_RULES}
            if traits["head"] == "class" and _no_bias(whole):
                del whole["head.bias"]
                traits["head"] = "projection"
                notes = ("its head's bias is zero throughout, as timm fills it in for the "
                         "projection of a CLIP: its output is an embedding",)  # fmt: skip
        if "register_tokens" in state:
            traits["positions_resize"] = "bicubic_antialias"
        elif "mask_token" in state and "blocks.0.ls1.gamma" in whole:
            traits["positions_resize"] = "bicubic_offset"
        return Translated(whole, traits, left_out, notes)


def _refuse_others(whole: State) -> None:
    """Refuse what has these names and lacks what every network here has."""
    if "cls_token" not in whole:
        raise Refused(
            "lacks cls_token: networks without a class token, which average their tokens or pool "
            "them by attention, are not computed here; pass a ViT, DeiT, DINOv2 or CLIP with one"
        )
    if "pos_embed" not in whole:
        raise Refused(
            "lacks pos_embed: networks with rotary or relative positions, such as DINOv3, are not "
            "computed here; pass a ViT, DeiT, DINOv2 or CLIP with position embeddings"
        )
    widths = [whole.get(f"blocks.0.mlp.{name}.weight", torch.zeros(0)).shape for name in _MLP]
    if all(len(shape) == 2 for shape in widths) and widths[0][0] == 2 * widths[1][1]:
        raise Refused(
            "has a gated MLP (blocks.0.mlp.fc1 gives twice what fc2 takes), which is not computed "
            "here; pass a ViT, DeiT, DINOv2 or CLIP without it"
        )


def _head(state: State) -> str:
    """What reads the last tokens, by which layers there are."""
    if not any(key in state for key in ("head.weight", "head.bias")):
        if "fc_norm.weight" in state and "norm.weight" not in state:
            raise Refused(
                "averages its tokens (fc_norm) and has no head for that average; pass such a "
                "network with its classes, or one that reads the class token"
            )
        return "none"
    if "fc_norm.weight" in state:
        return "mean_norm"
    if "aux_head.weight" in state:
        return "class_and_tokens"
    if "head_dist.weight" in state:
        return "two_classes"
    return "class"


def _no_bias(whole: State) -> bool:
    """Whether the head's bias is there, fits, and is zero throughout."""
    weight, bias = whole.get("head.weight"), whole.get("head.bias")
    if weight is None or bias is None or bias.shape != weight.shape[:1]:
        return False
    return bias.is_floating_point() and not bias.any()
