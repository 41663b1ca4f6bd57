"""What lies beside a checkpoint: `config.json` of timm or transformers, `preprocessor_config.json`.

Each becomes a `FactSource` in our own words. Nothing here decides which source wins; see `facts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from asvit_deploy.artefacts import sidecar as artifact
from asvit_deploy.bounded import MOST_TEXT, parse_json, read_bounded
from asvit_deploy.checkpoints.fact_source import FactSource
from asvit_deploy.checkpoints.names import timm_name
from asvit_deploy.checkpoints.reading import ENDINGS, quoted
from asvit_deploy.errors import UserError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# What hubs call the one checkpoint of a folder, which these files are about.
_HUB_NAMES = frozenset((
    "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "pytorch_model.safetensors",
))  # fmt: skip
# What trainers leave beside it.
_NO_CHECKPOINTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")

# transformers' numbers are Pillow's.
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# Processors whose `size`, where it is one number, is that of the shorter side.
_SHORTER = ("clip", "bit", "convnext", "levit", "poolformer", "efficientformer", "mobilenet")
_PLAIN_TYPES = ("vit", "deit")
_VISION_TYPES = (
    "dinov2", "dinov2_with_registers", "dinov3_vit", "clip", "clip_vision_model", "siglip",
    "siglip_vision_model", "siglip2", "beit", "data2vec-vision", "vit_mae", "vit_msn", "ijepa",
    "vit_hybrid", "yolos", "swin", "swinv2", "pvt", "convnext", "convnextv2", "resnet", "levit",
    "mobilevit", "cvt", "segformer", "videomae", "eva",
)  # fmt: skip


def sources_beside(path: Path) -> tuple[list[FactSource], list[str]]:
    """What the config files beside a checkpoint say, and lines on those that are passed over.

    Raises:
        UserError: one is unreadable, cut, no JSON or no object.
    """
    there = [path.with_name(name) for name in (CONFIG, PREPROCESSOR)]
    there = [file for file in there if file.is_file() or file.is_symlink()]
    if not there:
        return sources_beside(path.resolve()) if path.is_symlink() else ([], [])
    if path.name not in _HUB_NAMES and (others := _other_checkpoints(path)):
        names = " and ".join(file.name for file in there)
        return [], [
            f"{names} beside it not taken: {others[0]} lies there too, and nothing says whose it "
            "is; give what it says by --mean, --std, --crop-pct, --interpolation and --heads"
        ]
    sources, lines = [], []
    for file in there:
        told = _read(file, path)
        make = _preprocessor if file.name == PREPROCESSOR else _config
        source = make(told)
        if source is None:
            lines.append(f"{file.name} beside it describes no vision model; it is not taken")
        else:
            sources.append(source)
    return sources, lines


def _other_checkpoints(path: Path) -> list[str]:
    """Other checkpoints in the folder that a config there could be about; not those we made."""
    found = []
    try:
        names = sorted(file.name for file in path.parent.iterdir())
    except OSError:  # a file can be read where its folder may not be listed
        return []
    for name in names:
        file = path.with_name(name)
        ours = artifact.sidecar_path(file).name in names
        if name == path.name or ours or not name.endswith(ENDINGS) or not file.is_file():
            continue
        if not name.startswith(_NO_CHECKPOINTS):
            found.append(name)
    return found


def _read(file: Path, path: Path) -> dict[str, Any]:
    mend = f"mend it, or take it away from beside {path.name}"
    try:
        told = parse_json(read_bounded(file, MOST_TEXT, "config"))
    except UserError as error:
        raise UserError(f"{error}; {mend}") from None
    except ValueError:
        raise UserError(f"{file} is cut or no JSON; {mend}") from None
    if not isinstance(told, dict):
        raise UserError(f"{file} holds a JSON {type(told).__name__}, not an object; {mend}")
    return told


# --- config.json --------------------------------------------------------------------------------


def _config(told: Mapping[str, Any]) -> FactSource | None:
    nested = told.get("pretrained_cfg")
    flat = {"mean", "std", "input_size"} <= told.keys()
    if isinstance(nested, Mapping) or isinstance(told.get("architecture"), str) or flat:
        return _timm(told, nested if isinstance(nested, Mapping) else {})
    kind = told.get("model_type")
    shaped = "hidden_size" in told and ("patch_size" in told or "image_size" in told)
    if kind in _PLAIN_TYPES + _VISION_TYPES or shaped or "vision_config" in told:
        return _transformers(told, kind)
    return None


def _timm(told: Mapping[str, Any], nested: Mapping[str, Any]) -> FactSource:
    args = told.get("model_args")
    args = args if isinstance(args, Mapping) else {}
    source = FactSource(CONFIG)

    def said(key: str, *places: Mapping[str, Any]) -> Any:
        return next((p[key] for p in places if p.get(key) is not None), None)

    for key in ("mean", "std", "crop_pct", "interpolation", "crop_mode"):
        source.say(key, said(key, nested, told))
    source.size("input_size", args.get("img_size") or said("input_size", nested, told))
    source.say("heads", args.get("num_heads"), "num_heads")
    source.activation(args.get("act_layer"))
    source.network("width", said("num_features", told), "num_features")
    source.network("width", args.get("embed_dim"), "embed_dim")
    source.network("depth", args.get("depth"), "depth")
    source.network("patch_size", args.get("patch_size"), "patch_size")
    classes = said("num_classes", args, told, nested)
    source.network("num_classes", classes or None, "num_classes")
    pooling = said("global_pool", args, told)
    if pooling not in (None, "", "token"):
        source.cannot["global_pool"] = f"global_pool {quoted(pooling)}, not the class token"
    if args.get("class_token") is False:
        source.cannot["class_token"] = "a network without a class token"
    if args.get("reg_tokens"):
        source.cannot["reg_tokens"] = f"{quoted(args['reg_tokens'])} register tokens"
    norm = args.get("norm_layer")
    if isinstance(norm, str) and norm.rsplit(".", 1)[-1].lower() not in ("layernorm", "ln"):
        source.cannot["norm_layer"] = f"norm_layer {quoted(norm)}, not LayerNorm"
    name = told.get("architecture") or nested.get("architecture")
    if isinstance(name, str):
        source.named(name, timm_name(name), nested.get("tag"))
    return source


def _transformers(told: Mapping[str, Any], kind: Any) -> FactSource:
    source = FactSource(CONFIG)
    if kind is not None and kind not in _PLAIN_TYPES:
        source.cannot["model_type"] = f"model_type {quoted(kind)}, no plain ViT"
    source.say("heads", told.get("num_attention_heads"), "num_attention_heads")
    source.say("eps", told.get("layer_norm_eps"), "layer_norm_eps")
    source.activation(told.get("hidden_act"))
    source.size("image_size", told.get("image_size"))
    for field, key in (("width", "hidden_size"), ("depth", "num_hidden_layers"),
                       ("hidden", "intermediate_size"), ("patch_size", "patch_size")):  # fmt: skip
        source.network(field, told.get(key), key)
    names = told.get("id2label")
    count = len(names) if isinstance(names, Mapping) and names else told.get("num_labels")
    source.network("num_classes", count, "id2label" if names else "num_labels")
    if told.get("num_channels") not in (None, 3):
        source.cannot["num_channels"] = f"{quoted(told['num_channels'])} channels, not 3"
    return source


# --- preprocessor_config.json -------------------------------------------------------------------


def _preprocessor(told: Mapping[str, Any]) -> FactSource | None:
    known = ("image_mean", "image_std", "size", "crop_size", "resample", "do_resize")
    if not any(key in told for key in known):
        return None
    source = FactSource(PREPROCESSOR)
    _normalisation(told, source)
    _resampling(told, source)
    _sizes(told, source)
    return source


def _normalisation(told: Mapping[str, Any], source: FactSource) -> None:
    """Mean and standard deviation, of pixels from 0 to 1 whatever the factor of rescaling."""
    if told.get("do_normalize") is False:
        source.say("mean", [0.0] * 3)
        source.say("std", [1.0] * 3)
    else:
        source.say("mean", told.get("image_mean"), "image_mean")
        source.say("std", told.get("image_std"), "image_std")
    factor = told.get("rescale_factor")
    if told.get("do_rescale") is False or told.get("rescale_offset"):
        key = "rescale_offset" if told.get("rescale_offset") else "do_rescale"
        for field in ("mean", "std"):
            source.cannot[field] = f"{key} {quoted(told[key])}, so its mean and std are of other "
            source.cannot[field] += "pixels than 0 to 1"
    elif factor is not None and not _same(factor, 1 / 255):
        usable = isinstance(factor, (int, float)) and 0 < factor < math.inf
        for field in ("mean", "std"):
            value = source.says.get(field)
            if usable and value is not None:
                source.says[field] = tuple(v / (255 * factor) for v in value)
            elif not usable:
                source.cannot[field] = f"rescale_factor {quoted(factor)}, which scales nothing"


def _same(a: Any, b: float) -> bool:
    return isinstance(a, (int, float)) and math.isclose(a, b, rel_tol=1e-6)


def _resampling(told: Mapping[str, Any], source: FactSource) -> None:
    code = told.get("resample")
    if code is None:
        return
    if type(code) is int and 0 <= code < len(_RESAMPLE):
        source.say("interpolation", _RESAMPLE[code])
    else:
        source.cannot["interpolation"] = f"resample {quoted(code)}, which is none of Pillow's codes"


def _sides(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from (value.get("height"), value.get("width"))
    elif isinstance(value, (list, tuple)):
        yield from value
    else:
        yield from (value, value)


def _square(value: Any) -> int | None:
    """One side of a square in any of its spellings, else None."""
    sides = list(_sides(value))
    whole = all(type(side) is int and side > 0 for side in sides)
    return sides[0] if whole and len(sides) == 2 and sides[0] == sides[1] else None


def _sizes(told: Mapping[str, Any], source: FactSource) -> None:
    """How large the picture becomes, what is cut out, and so crop_pct and crop_mode."""
    size, crop = told.get("size"), told.get("crop_size")
    cut = bool(told.get("do_center_crop")) if "do_center_crop" in told else False
    if told.get("do_resize") is False:
        source.cannot["crop_pct"] = "do_resize false, so pictures would come in any size"
        return
    if size is None:
        return
    kind = str(told.get("image_processor_type") or told.get("feature_extractor_type") or "")
    if isinstance(size, Mapping) and "shortest_edge" in size:
        edge, mode = _square(size["shortest_edge"]), "center"
    elif type(size) is int and kind.lower().startswith(_SHORTER):
        edge, mode = _square(size), "center"
    else:
        edge, mode = _square(size), "squash"
    window = _square(crop) if cut else edge
    if edge is None or window is None or window > edge or (mode == "center" and not cut):
        told_crop = f" and crop_size {quoted(crop)}" if cut else ""
        source.cannot["crop_pct"] = f"size {quoted(size)}{told_crop}, which makes no square input"
        return
    source.size("crop_size" if cut else "size", window)
    source.say("crop_mode", mode)
    source.say("crop_pct", _share(window, edge))


def _share(window: int, edge: int) -> float:
    """crop_pct with which `int(window / crop_pct)` is the edge, whatever rounding does."""
    share = window / edge
    while int(window / share) < edge:
        share = math.nextafter(share, 0)
    return share
