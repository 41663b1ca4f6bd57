"""What a checkpoint holds of its training and of its model's name, as sources of facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asvit_deploy.checkpoints.fact_source import FactSource
from asvit_deploy.checkpoints.names import moco_name, timm_name


def model_names(content: Any, options: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What a file calls its model, by the place that does."""
    found = {}
    if isinstance(content, dict) and isinstance(content.get("arch"), str):
        found["arch"] = content["arch"]
    for place, values in options.items():
        for key in ("model", "arch", "model_name", "architecture"):
            if isinstance(values.get(key), str):
                found[f"{place}.{key}"] = values[key]
                break
    return found


def sources_within(content: Any, options: Mapping[str, Mapping[str, Any]]) -> list[FactSource]:
    """What `args` and their like, and the model's name, say."""
    sources = [_of_options(place, values) for place, values in options.items()]
    keys = content.keys() if isinstance(content, dict) else ()
    moco = "student" not in keys and "teacher" not in keys
    for place, name in model_names(content, options).items():
        source = FactSource(f"{place} {name}")
        by_moco = place == "arch" or any(key.startswith("moco") for key in _all(options))
        implied = moco_name(name) if moco and by_moco else None
        if implied:  # these heads are none that the shapes suggest: they count as said
            source.say("heads", implied.pop("heads"))
        else:
            implied = timm_name(name)
            cropped = place == "arch" or "crop_pct" in options.get(place.split(".")[0], {})
            if implied and not cropped:  # DeiT's own scripts crop otherwise than timm's
                implied.pop("crop_pct", None)
        if implied:
            source.named(name, implied)
            sources.append(source)
    return sources


def _all(options: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [key for values in options.values() for key in values]


def _of_options(place: str, values: Mapping[str, Any]) -> FactSource:
    source = FactSource(place)
    for name in ("mean", "std", "interpolation"):
        source.say(name, values.get(name))
    for name, keys in (("crop_pct", ("crop_pct", "eval_crop_ratio")),
                       ("heads", ("num_heads", "num_attention_heads", "heads"))):  # fmt: skip
        for key in reversed([key for key in keys if values.get(key) is not None]):
            source.say(name, values[key], key)
    source.say("eps", values.get("layer_norm_eps"), "layer_norm_eps")
    named = (values.get(key) for key in ("act_layer", "hidden_act"))
    source.activation(next((name for name in named if name is not None), None))
    for key in ("input_size", "img_size", "image_size"):
        if values.get(key) is not None:
            source.size(key, values[key])
            break
    pooling = values.get("gp", values.get("global_pool"))
    if pooling is not None and not (isinstance(pooling, str) and pooling == ""):
        source.pooling(pooling)
    return source
