"""The names of OpenAI's CLIP and of OpenCLIP: the image tower, alone or beside the text's."""

from __future__ import annotations

import re
from typing import ClassVar

from asvit_deploy.checkpoints.formats.base import State, Translated, rename, without
from asvit_deploy.checkpoints.names import CLIP_RULES

_ROOT = r"(?:visual\.)?"
_BLOCK = _ROOT + r"transformer\.resblocks\.(\d+)\."
_NAMES = (
    (_ROOT + r"class_embedding", "cls_token"),
    (_ROOT + r"positional_embedding", "pos_embed"),
    (_ROOT + r"conv1\.(\w+)", r"patch_embed.proj.\1"),
    (_ROOT + r"ln_pre\.(\w+)", r"norm_pre.\1"),
    (_BLOCK + r"attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (_BLOCK + r"attn\.out_proj\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
    (_BLOCK + r"mlp\.c_fc\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"mlp\.c_proj\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
    (_BLOCK + r"ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
    (_ROOT + r"ln_post\.(\w+)", r"norm.\1"),
    (_ROOT + r"proj", "head.weight"),
)
# The text tower, and what OpenAI's files keep of its sizes.
_TEXT = (
    r"(?:text\..+|transformer\..+|token_embedding\.weight|positional_embedding|ln_final\.\w+"
    r"|text_projection(?:\..+)?|logit_scale|logit_bias|attn_mask"
    r"|input_resolution|context_length|vocab_size)"
)


class OpenClip:
    """OpenCLIP's and OpenAI's CLIP with a ViT for its image tower."""

    name: ClassVar[str] = "OpenCLIP"
    blocks: ClassVar[str] = _ROOT + r"transformer\.resblocks\.\d+\.ln_1\..+"
    others: ClassVar[str] = _ROOT + r"(?:class_embedding|conv1\.weight)"
    model_types: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def recognises(state: State) -> bool:
        tower = [key for key in state if re.fullmatch(_ROOT + r"class_embedding", key)]
        return bool(tower) and any(".resblocks." in key for key in state)

    @staticmethod
    def translate(state: State) -> Translated:
        whole, left_out = dict(state), tuple[str, ...]()
        if any(key.startswith("visual.") for key in state):
            whole, left_out = without(whole, _TEXT)
        whole = rename(whole, _NAMES)
        for key in ("cls_token", "pos_embed"):
            if key in whole:
                whole[key] = whole[key].reshape(1, -1, whole[key].shape[-1])
        traits = {"head": "none", "eps": 1e-5, "preprocessing": CLIP_RULES,
                  "positions_resize": "bicubic_antialias"}  # fmt: skip
        if "head.weight" in whole:  # tokens @ proj there
            whole["head.weight"] = whole["head.weight"].mT
            traits["head"] = "projection"
        if "input_resolution" in left_out:  # OpenAI's own file, whose networks all have it
            traits["activation"] = "quick_gelu"
        return Translated(whole, traits, left_out)
