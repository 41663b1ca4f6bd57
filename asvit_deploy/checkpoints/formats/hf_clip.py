"""transformers' CLIP: the image tower, alone or beside the text's."""

from __future__ import annotations

from typing import Any, ClassVar

from asvit_deploy.checkpoints.formats.base import State, Translated, fused_qkv, rename, without
from asvit_deploy.checkpoints.names import CLIP_RULES
from asvit_deploy.checkpoints.refused import Refused

_ROOT = r"(?:vision_model\.)?"
_LAYER = _ROOT + r"encoder\.layers\.(\d+)\."
_NAMES = (
    (_ROOT + r"embeddings\.class_embedding", "cls_token"),
    (_ROOT + r"embeddings\.position_embedding\.weight", "pos_embed"),
    (_ROOT + r"embeddings\.patch_embedding\.(\w+)", r"patch_embed.proj.\1"),
    (_ROOT + r"pre_layrnorm\.(\w+)", r"norm_pre.\1"),
    (_LAYER + r"self_attn\.([qkv])_proj\.(\w+)", r"blocks.\1.attn.\2.\3"),
    (_LAYER + r"self_attn\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"layer_norm([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (_LAYER + r"(mlp\.fc[12])\.(\w+)", r"blocks.\1.\2.\3"),
    (_ROOT + r"post_layernorm\.(\w+)", r"norm.\1"),
    (r"visual_projection\.weight", "head.weight"),
)
# The text tower; and numbers that old versions kept beside the weights.
_OTHERS = (
    r"(?:text_model\..+|text_projection\.weight|logit_scale" + rf"|{_ROOT}embeddings\.position_ids)"
)
# What its processor does: the shorter side becomes 224, of which the middle is cut out.


class HfClip:
    """`CLIPVisionModel[WithProjection]` and the image tower of `CLIPModel`."""

    name: ClassVar[str] = "transformers CLIP"
    blocks: ClassVar[str] = _ROOT + r"encoder\.layers\.\d+\.self_attn\..+"
    others: ClassVar[str] = _ROOT + r"embeddings\.(?:class|patch)_embedding.*"
    model_types: ClassVar[tuple[str, ...]] = ("clip_vision_model", "clip")

    @staticmethod
    def recognises(state: State) -> bool:
        return any(key.endswith("embeddings.class_embedding") for key in state)

    @staticmethod
    def translate(state: State) -> Translated:
        if "classifier.weight" in state:
            raise Refused(
                "has a classifier on the mean of a CLIP's tokens (CLIPForImageClassification), "
                "which is not computed; pass the CLIP itself"
            )
        whole, left_out = without(dict(state), _OTHERS)
        whole = fused_qkv(rename(whole, _NAMES))
        # A vector and a table there; a row of tokens each here.
        for key in ("cls_token", "pos_embed"):
            if key in whole:
                whole[key] = whole[key].reshape(1, -1, whole[key].shape[-1])
        head = "projection" if "head.weight" in whole else "none"
        traits: dict[str, Any] = {
            "head": head, "eps": 1e-5, "activation": "quick_gelu",
            "preprocessing": CLIP_RULES,
        }  # fmt: skip
        return Translated(whole, traits, left_out)
