"""transformers' DINOv2, with registers or without."""

from __future__ import annotations

from typing import Any, ClassVar

from asvit_deploy.checkpoints.formats.base import State, Translated, fused_qkv, rename, without
from asvit_deploy.models.config import Preprocessing

_ROOT = r"(?:dinov2(?:_with_registers)?\.)?"
_LAYER = _ROOT + r"encoder\.layer\.(\d+)\."
_NAMES = (
    (_ROOT + r"embeddings\.cls_token", "cls_token"),
    (_ROOT + r"embeddings\.register_tokens", "reg_token"),
    (_ROOT + r"embeddings\.position_embeddings", "pos_embed"),
    (_ROOT + r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (_LAYER + r"attention\.attention\.([qkv])\w+\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (_LAYER + r"attention\.([qkv])_proj\.(weight|bias)", r"blocks.\1.attn.\2.\3"),
    (_LAYER + r"attention\.(?:output\.dense|o_proj)\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (_LAYER + r"(norm[12]|mlp\.fc[12])\.(\w+)", r"blocks.\1.\2.\3"),
    (_LAYER + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (_ROOT + r"layernorm\.(\w+)", r"norm.\1"),
    (r"classifier\.(weight|bias)", r"head.\1"),
)
# What its processors do: the shorter side becomes 256, of which 224 are cut out.
_PREPROCESSING = Preprocessing(224 / 256, "bicubic")


class HfDinov2:
    """`Dinov2Model`, `Dinov2ForImageClassification` and both with registers.

    The classifier reads the class token beside the mean of the image tokens.
    """

    name: ClassVar[str] = "transformers DINOv2"
    blocks: ClassVar[str] = _ROOT + r"encoder\.layer\.\d+\.layer_scale1\..+"
    others: ClassVar[str] = _ROOT + r"embeddings\..+"
    model_types: ClassVar[tuple[str, ...]] = ("dinov2", "dinov2_with_registers")

    @staticmethod
    def recognises(state: State) -> bool:
        return any(key.endswith(".layer_scale1.lambda1") for key in state)

    @staticmethod
    def translate(state: State) -> Translated:
        whole, left_out = without(dict(state), _ROOT + r"embeddings\.mask_token")
        whole = fused_qkv(rename(whole, _NAMES))
        head = "class_and_mean" if "head.weight" in whole else "none"
        # The class with registers resizes positions as the authors' own code does.
        resize = "bicubic_antialias" if "reg_token" in whole else "bicubic"
        traits: dict[str, Any] = {
            "head": head, "positions_resize": resize, "preprocessing": _PREPROCESSING,
        }  # fmt: skip
        return Translated(whole, traits, left_out, resizes=True)
