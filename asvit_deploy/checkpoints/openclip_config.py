"""`open_clip_config.json`: what OpenCLIP says of a CLIP beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asvit_deploy.checkpoints.fact_source import FactSource
from asvit_deploy.checkpoints.names import CLIP_MEAN, CLIP_STD
from asvit_deploy.checkpoints.reading import quoted

OPENCLIP_CONFIG = "open_clip_config.json"
OPENCLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def openclip_source(content: Mapping[str, Any]) -> FactSource | None:
    """What it says of the image tower; None where it describes none."""
    model, rules = content.get("model_cfg"), content.get("preprocess_cfg")
    tower = model.get("vision_cfg") if isinstance(model, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(tower, Mapping):
        return None
    source = FactSource(OPENCLIP_CONFIG)
    _tower(model, tower, source)
    _preprocessing(rules if isinstance(rules, Mapping) else {}, source)
    return source


def _tower(model: Mapping[str, Any], tower: Mapping[str, Any], source: FactSource) -> None:
    if isinstance(tower.get("timm_model_name"), str):
        source.calls = "timm_model_name", tower["timm_model_name"]
    for key in ("timm_model_name", "attentional_pool", "input_patchnorm"):
        if tower.get(key):
            source.cannot[key] = f"{key} {quoted(tower[key])}"
    layers = tower.get("layers", 12)
    if isinstance(layers, (list, tuple)):
        source.cannot["layers"] = f"layers {quoted(layers)}, a ResNet"
        return
    width, of_a_head = tower.get("width", 768), tower.get("head_width", 64)
    source.network("width", width, "width")
    source.network("depth", layers, "layers")
    source.network("patch_size", tower.get("patch_size", 16), "patch_size")
    source.size("image_size", tower.get("image_size", 224))
    source.network("projection", model.get("embed_dim"), "embed_dim")
    if type(width) is int and type(of_a_head) is int and 0 < of_a_head <= width:
        source.say("heads", width // of_a_head, "head_width")
    elif of_a_head is not None:
        source.cannot["heads"] = f"head_width {quoted(of_a_head)}, which makes no whole heads"
    _activation(model, tower, source)
    norm = tower.get("norm_kwargs")
    if isinstance(norm, Mapping):
        source.say("eps", norm.get("eps"), "norm_kwargs: eps")
    pooling = "avg" if tower.get("global_average_pool") else tower.get("pool_type", "tok")
    source.pooling({"tok": "token"}.get(pooling, pooling) if isinstance(pooling, str) else pooling)
    source.say("positions_resize", "bicubic_antialias")


def _activation(model: Mapping[str, Any], tower: Mapping[str, Any], source: FactSource) -> None:
    options = tower.get("act_kwargs")
    tanh = isinstance(options, Mapping) and options.get("approximate") == "tanh"
    if model.get("quick_gelu") is True:
        source.activation("quick_gelu")
    else:
        source.activation("gelu_tanh" if tanh else "gelu")


def _preprocessing(rules: Mapping[str, Any], source: FactSource) -> None:
    """What is not said is OpenCLIP's default: OpenAI's numbers, and the shorter side."""
    source.say("mean", rules.get("mean", CLIP_MEAN))
    source.say("std", rules.get("std", CLIP_STD))
    source.say("interpolation", rules.get("interpolation", "bicubic"))
    mode = rules.get("resize_mode", "shortest")
    if mode in ("shortest", "squash"):
        source.say("crop_mode", "squash" if mode == "squash" else "center")
        source.say("crop_pct", 1.0)
    else:
        source.cannot["crop_pct"] = f"resize_mode {quoted(mode)}, not shortest or squash"
