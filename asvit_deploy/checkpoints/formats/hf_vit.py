"""transformers' ViT and DeiT, distilled or not."""

from __future__ import annotations

from typing import Any, ClassVar

from asvit_deploy.checkpoints.formats.base import (
    State,
    Translated,
    fused_qkv,
    rename,
    without,
)
from asvit_deploy.checkpoints.names import HALF
from asvit_deploy.models.config import Preprocessing

_ROOT = r"(?:(?:vit|deit)\.)?"
# As files have it; and as the modules of transformers 5 do, which a torch.save of one keeps.
_LAYER = _ROOT + r"(?:encoder\.layer|layers)\.(\d+)\."
_NAMES = (
    (_ROOT + r"embeddings\.cls_token", "cls_token"),
    (_ROOT + r"embeddings\.distillation_token", "reg_token"),
    (_ROOT + r"embeddings\.position_embeddings", "pos_embed"),
    (_ROOT + r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (_LAYER + r"attention\.attention\.([qkv])\w+\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (_LAYER + r"attention\.([qkv])_proj\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (_LAYER + r"attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (_LAYER + r"layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (_LAYER + r"(?:intermediate\.dense|mlp\.fc1)\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"(?:output\.dense|mlp\.fc2)\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (_ROOT + r"layernorm\.(\w+)", r"norm.\1"),
    (r"(?:cls_)?classifier\.(weight|bias)", r"head.\1"),
    (r"distillation_classifier\.(weight|bias)", r"head_dist.\1"),
)
# What their processors do: pictures become squares, of which DeiT's cuts the middle out.
_VIT = Preprocessing(1.0, "bilinear", HALF, HALF, "squash")
_DEIT = Preprocessing(224 / 256, "bicubic", crop_mode="squash")


class HfVit:
    """`ViTForImageClassification`, `DeiTForImageClassification[WithTeacher]` and their models."""

    name: ClassVar[str] = "transformers ViT"
    blocks: ClassVar[str] = _ROOT + r"(?:encoder\.layer|layers)\.\d+\.layernorm_before\..+"
    others: ClassVar[str] = _ROOT + r"embeddings\..+"
    model_types: ClassVar[tuple[str, ...]] = ("vit", "deit")

    @staticmethod
    def recognises(state: State) -> bool:
        return any(".layernorm_before." in key for key in state)

    @staticmethod
    def translate(state: State) -> Translated:
        pooled = _ROOT + r"(?:pooler\.dense\.\w+|embeddings\.mask_token)"
        whole, left_out = without(dict(state), pooled)
        whole = fused_qkv(rename(whole, _NAMES))
        rules = _DEIT if "reg_token" in whole else _VIT  # a ViT never has a second token
        traits: dict[str, Any] = {"eps": 1e-12, "head": "class", "preprocessing": rules}
        if "head_dist.weight" in whole:
            traits["head"] = "two_classes"
        elif "head.weight" not in whole:
            traits["head"] = "none"
        return Translated(whole, traits, left_out)
