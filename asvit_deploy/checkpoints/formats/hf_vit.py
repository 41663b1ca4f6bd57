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

_LAYER = r"(?:(?:vit|deit)\.)?encoder\.layer\.(\d+)\."
_NAMES = (
    (r"(?:(?:vit|deit)\.)?embeddings\.cls_token", "cls_token"),
    (r"(?:(?:vit|deit)\.)?embeddings\.distillation_token", "reg_token"),
    (r"(?:(?:vit|deit)\.)?embeddings\.position_embeddings", "pos_embed"),
    (r"(?:(?:vit|deit)\.)?embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (_LAYER + r"attention\.attention\.([qkv])\w+\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (_LAYER + r"attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"layernorm_before\.(\w+)", r"blocks.\1.norm1.\2"),
    (_LAYER + r"layernorm_after\.(\w+)", r"blocks.\1.norm2.\2"),
    (_LAYER + r"intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (_LAYER + r"output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (r"(?:(?:vit|deit)\.)?layernorm\.(\w+)", r"norm.\1"),
    (r"(?:cls_)?classifier\.(weight|bias)", r"head.\1"),
    (r"distillation_classifier\.(weight|bias)", r"head_dist.\1"),
)


class HfVit:
    """`ViTForImageClassification`, `DeiTForImageClassification[WithTeacher]` and their models."""

    name: ClassVar[str] = "transformers ViT"
    blocks: ClassVar[str] = r"(?:(?:vit|deit)\.)?encoder\.layer\.\d+\.layernorm_before\..+"
    others: ClassVar[str] = r"(?:(?:vit|deit)\.)?embeddings\..+"
    model_types: ClassVar[tuple[str, ...]] = ("vit", "deit")

    @staticmethod
    def recognises(state: State) -> bool:
        return any(".layernorm_before." in key for key in state)

    @staticmethod
    def translate(state: State) -> Translated:
        pooled = r"(?:(?:vit|deit)\.)?(?:pooler\.dense\.\w+|embeddings\.mask_token)"
        whole, left_out = without(dict(state), pooled)
        whole = fused_qkv(rename(whole, _NAMES))
        traits: dict[str, Any] = {"eps": 1e-12, "head": "class"}
        if "head_dist.weight" in whole:
            traits["head"] = "two_classes"
        elif "head.weight" not in whole:
            traits["head"] = "none"
        return Translated(whole, traits, left_out)
