"""transformers' `config.json`: what it says of a network and of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asvit_deploy.checkpoints.fact_source import FactSource
from asvit_deploy.checkpoints.model_types import PLAIN
from asvit_deploy.checkpoints.reading import quoted

CONFIG = "config.json"
_USUAL_HEADS = 12  # in transformers, where a config does not say
_DEFAULT_LABELS = 2  # and then transformers does not write them
_MULTI_LABEL = "multi_label_classification"
# How many registers a model type has where its config has no word for them.
_REGISTERS = {"vit": 0, "dinov2": 0, "clip": 0, "clip_vision_model": 0}


def transformers_source(content: Mapping[str, Any]) -> FactSource:
    """What the config says, in our own words; of a pair of towers that of the images."""
    nested = content.get("vision_config")
    tower = nested if isinstance(nested, Mapping) else content
    source = FactSource(CONFIG)
    usual = _USUAL_HEADS if tower.get("model_type", content.get("model_type")) in PLAIN else None
    source.say("heads", tower.get("num_attention_heads", usual), "num_attention_heads")
    source.say("eps", tower.get("layer_norm_eps"), "layer_norm_eps")
    source.activation(tower.get("hidden_act"))
    source.size("image_size", tower.get("image_size"))
    for field, key in (("width", "hidden_size"), ("depth", "num_hidden_layers"),
                       ("hidden", "intermediate_size"), ("patch_size", "patch_size")):  # fmt: skip
        source.network(field, tower.get(key), key)
    if tower.get("num_channels") not in (None, 3):
        source.cannot["num_channels"] = f"{quoted(tower['num_channels'])} channels, not 3"
    _mlp(tower, source)
    _registers(tower, source)
    if "clip" in str(content.get("model_type")):
        source.network("projection", content.get("projection_dim"), "projection_dim")
    _labels(content, source)
    if content.get("auto_map"):
        source.notes.append(f"{CONFIG} names code of its own (auto_map), which is not run")
    return source


def _mlp(tower: Mapping[str, Any], source: FactSource) -> None:
    if tower.get("use_swiglu_ffn"):
        source.cannot["use_swiglu_ffn"] = (
            "use_swiglu_ffn true, a gated MLP; pass a network without one, such as DINOv2's small, "
            "base or large"
        )
    elif "intermediate_size" not in tower:  # or both would say it
        ratio = tower.get("mlp_ratio")
        whole = isinstance(ratio, float) and ratio.is_integer()
        source.network("mlp_ratio", int(ratio) if whole else ratio, "mlp_ratio")  # type: ignore[arg-type]


def _registers(tower: Mapping[str, Any], source: FactSource) -> None:
    kind = tower.get("model_type")
    if kind == "dinov2_with_registers":
        source.network("registers", tower.get("num_register_tokens"), "num_register_tokens")
    elif isinstance(kind, str) and kind in _REGISTERS:
        source.network("registers", _REGISTERS[kind], f"model_type {kind}, so registers")


def _labels(content: Mapping[str, Any], source: FactSource) -> None:
    names, count = content.get("id2label"), content.get("num_labels")
    classes = content.get("architectures")
    if isinstance(names, Mapping) and names:
        source.network("num_classes", len(names), "id2label")
    elif count is not None:
        source.network("num_classes", count, "num_labels")
    elif isinstance(classes, list) and any("ForImageClassification" in str(c) for c in classes):
        source.network("num_classes", _DEFAULT_LABELS, "no labels, so num_labels")
    if content.get("problem_type") == _MULTI_LABEL:
        source.notes.append(
            f"{CONFIG} says problem_type {_MULTI_LABEL}: each output is a yes or no of its own, "
            "and shares over all of them or a top-1 say little"
        )
