"""Networks that share most names with ours, yet are others: recognised by their options and names.

What a row of these tables names would load as a plain DeiT, or fail with a word about keys, and
compute something else than it was trained for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from asvit_deploy.checkpoints.learned import method_named
from asvit_deploy.checkpoints.reading import quoted
from asvit_deploy.checkpoints.refused import Refused


def _said(value: Any) -> bool:
    return value is not None and value is not False and value != "" and value != ()


def _on(value: Any) -> bool:
    return bool(value) if isinstance(value, (bool, int, float, str, list, tuple)) else False


def _below_one(value: Any) -> bool:
    # One level: a list may hold itself, or others so often that to walk them takes for ever.
    parts = value if isinstance(value, (list, tuple)) else [value]
    return any(map(_number_below_one, parts))


def _number_below_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value < 1


# (options of the training script, which values show it, whose they are). The release declares the
# first two and never passes them on: a file with them set came from other code.
_OPTIONS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("accu", "ema_accu"), _on, "accumulated scores"),
    (("gate_scale", "gate_center", "act_mode", "ponder_token_scale"), _said, "A-ViT"),
    (("base_keep_rate",), _below_one, "EViT"),
    (("base_rate",), _below_one, "DynamicViT"),
    (("keep_rate",), _below_one, "BAT or EViT"),
    (("tome_r", "tome", "use_tome"), _on, "ToMe"),
    (("ats_blocks", "ats", "use_ats"), _on, "ATS"),
    (("mask_ratio",), _on, "MAE"),
)
# EViT's further options count where its keep rate does not say that all are kept.
_EVIT_TOO = ("fuse_token", "drop_loc")

# Names of models, as training scripts register them.
_MODELS: tuple[tuple[str, str], ...] = (
    (r"avit_", "A-ViT"),
    (r".*_shrink", "EViT"),
    (r"evo_", "Evo-ViT"),
    (r"dyvit|dynamic_?vit|.*_dyvit", "DynamicViT"),
    (r"mae_vit", "MAE"),
    (r".*(?:^|_)tome(?:_|$)", "ToMe"),
    (r".*(?:^|_)ats(?:_|$)", "ATS"),
)

_LATER = "this version does not load it; pass a ViT, DeiT, DINOv2, CLIP, LV-ViT or AS-ViT"
_HF = "has transformers' names"
# (a key of the state dict, what that means, what to do); the first that fits is named.
_KEYS: tuple[tuple[str, str, str], ...] = (
    (r"(?:.*\.)?lora_(?:[AB]|embedding_[AB]|magnitude_vector)(?:\.|$)",
     "is a PEFT adapter, or holds one ({key})",
     "merge it first (model.merge_and_unload()) and save the result"),
    (r"(?:.*\.)?layers\.\d+\.blocks\.\d+\.", "is a Swin ({key})",
     "pass a ViT, DeiT or DINOv2"),
    # timm's and transformers' names, the release's, torchvision's.
    (r"(?:.*\.)?stages\.\d+\.(?:(?:blocks|layers)\.)?\d+\.(?:conv_dw|dwconv|depthwise_conv)\."
     r"|features\.\d+\.\d+\.layer_scale$",
     "is a ConvNeXt, or has its blocks ({key})", "pass a ViT, DeiT or DINOv2"),
    (r"(?:.*\.)?mlp\.dwconv\.",
     "has convolutions in its blocks, as PVT v2 and SegFormer do ({key})",
     "pass a ViT, DeiT or DINOv2"),
    (r"(?:.*\.)?layer[1-4]\.\d+\.conv1\.|(?:.*\.)?encoder\.stages\.\d+\.layers\.\d+\.layer\.",
     "is a ResNet ({key})", "pass a ViT, DeiT or DINOv2"),
    (r"(?:model\.)?layer\.\d+\.attention\.o_proj\.|(?:.*\.)?rope_embed(?:dings)?\.",
     "has rotary position embeddings, as DINOv3 does ({key})", _LATER),
    (r"(?:.*\.)?mlp\.weights_(?:in|out)\.", "has a gated MLP ({key})", _LATER),
    (r"blocks\.\d+\.(?:merge|prune)_ddp\.", "is a DiffRate network ({key})",
     "pass its dense weights to `calibrate --method schedule`"),
    (r"decoder_(?:blocks\.|embed\.|pos_embed)", "is an MAE with its decoder ({key})",
     "pass the encoder alone to `finetune`"),
    (r"(?:.*\.)?vision_model\.head\.", f"is a SigLIP and {_HF} ({{key}})", _LATER),
    (r"(?:.*\.)?encoder\.layers\.encoder_layer_\d+\.", "is a torchvision ViT ({key})", _LATER),
    (r"blocks_token_only\.", "is a CaiT ({key})", _LATER),
    (r"(?:.*\.)?attn_pool\.", "pools its tokens by attention, as SigLIP does ({key})", _LATER),
    (r"blocks\.\d+\.attn\.[qkv]_proj\.", "is an EVA-02 ({key})", _LATER),
    (r"blocks\.\d+\.attn\.(?:relative_position_bias|[qv]_bias$)|rel_pos_bias\.",
     "is a BEiT, EVA or DINOv3 ({key})", _LATER),
    (r"(?:.*\.)?(?:rope|rope_embed|pos_embed_rope)\.", "has rotary positions ({key})", _LATER),
    (r"patch_embed\.backbone\.", "has a convolutional network before its blocks ({key})", _LATER),
    (r"blocks\.\d+\.(?:attns|ffns)\.\d+\.", "has parallel branches in its blocks ({key})", _LATER),
    (r"blocks\.\d+\.attn\.[qk]_norm\.", "normalises queries and keys ({key})", _LATER),
    (r"blocks\.\d+\.mlp\.(?:w12|w1|fc1_g)\.", "has a gated MLP ({key})", _LATER),
)  # fmt: skip


def refuse_options(
    sources: Mapping[str, Mapping[str, Any]], names: Iterable[str], held: str | None = None
) -> None:
    """Refuse a file whose own options, or whose model's name, belong to another method.

    Args:
        sources: options by the key of the file that holds them.
        names: what the file calls its model.
        held: the method whose parameters it holds, which is none of the others.
    """
    for options in sources.values():
        for flags, shows, method in _OPTIONS:
            for flag in flags:
                if method != held and flag in options and shows(options[flag]):
                    _refuse_method(method, f"--{flag} {quoted(options[flag])}")
        if "base_keep_rate" not in options:
            for flag in _EVIT_TOO:
                if _on(options.get(flag)):
                    _refuse_method("EViT", f"--{flag} {quoted(options[flag])}")
    for name in names:
        for pattern, method in _MODELS:
            if method != held and re.match(pattern, name):
                _refuse_method(method, f"the model {quoted(name)}")


def _refuse_method(method: str, evidence: str) -> None:
    raise Refused(
        f"was trained with {evidence} ({method}), which is another method; pass a file trained "
        "without it"
    )


def refuse_keys(state: Mapping[str, Any]) -> None:
    """Refuse a state dict that holds what only another network has, by that network's name."""
    if "cls_token" not in state and (name := method_named(state)):
        raise Refused(
            f"holds what {name} learned ({next(iter(state))}) and not its network; pass a "
            "checkpoint with both"
        )
    for pattern, what, advice in _KEYS:
        if key := next((key for key in state if re.match(pattern, key)), None):
            raise Refused(f"{what.format(key=quoted(key)[1:-1])}; {advice}")
