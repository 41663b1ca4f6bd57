"""What lies beside a checkpoint: `config.json` of timm or transformers, and processors' files.

Each becomes a `FactSource` in our own words. Nothing here decides which source wins; see `facts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asvit_deploy import sidecar
from asvit_deploy.bounded import MOST_TEXT, parse_json, read_bounded
from asvit_deploy.checkpoints import model_types
from asvit_deploy.checkpoints.fact_source import FactSource
from asvit_deploy.checkpoints.hf_config import CONFIG, transformers_source
from asvit_deploy.checkpoints.model_types import KNOWN
from asvit_deploy.checkpoints.names import timm_name
from asvit_deploy.checkpoints.openclip_config import (
    OPENCLIP_CONFIG,
    OPENCLIP_WEIGHTS,
    openclip_source,
)
from asvit_deploy.checkpoints.places import WEIGHTS, is_weights
from asvit_deploy.checkpoints.reading import quoted
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError

PREPROCESSOR = "preprocessor_config.json"
# Where transformers 5 puts the same, under "image_processor", beside a tokenizer's.
PROCESSOR = "processor_config.json"

# transformers' numbers are Pillow's.
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_LARGEST = 10**6  # of a processor's numbers, far over any picture
# Processors whose `size`, where it is one number, is that of the shorter side.
_SHORTER = ("clip", "bit", "convnext", "levit", "poolformer", "efficientformer", "mobilenet")


@dataclass(frozen=True)
class Beside:
    """What the config files of a checkpoint say.

    Attributes:
        lines: on those that are passed over, and on what they say that is not obeyed.
        model_type, architectures: as transformers' config has them.
    """

    sources: tuple[FactSource, ...] = ()
    lines: tuple[str, ...] = ()
    model_type: str | None = None
    architectures: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[int, str] | None:
        """The side of the pictures that a processor makes, in pixels, and what says it."""
        said = [(s.pictures, s.name) for s in self.sources if s.pictures is not None]
        return said[0] if said else None

    @property
    def classes(self) -> list[str]:
        """A line on each that tells of classes, for weights without a head."""
        return [
            f"{source.name} says {word} {quoted(value)}, for which the weights have no head: the "
            "output is the embedding"
            for source in self.sources
            for name, word, value in source.weights
            if name == "num_classes"
        ]


def sources_beside(path: Path) -> Beside:
    """What the config files beside a checkpoint say.

    Raises:
        UserError: one is unreadable, cut, no JSON or no object.
    """
    there = [path.with_name(name) for name in _configs_of(path)]
    there = [file for file in there if file.is_file() or file.is_symlink()]
    if not there:
        return sources_beside(path.resolve()) if path.is_symlink() else Beside()
    if path.name not in WEIGHTS and (others := _other_checkpoints(path)):
        names = " and ".join(file.name for file in there)
        line = (
            f"{names} beside it not taken: {others[0]} lies there too, and nothing says whose it "
            "is; give what it says by --mean, --std, --crop-pct, --interpolation and --heads"
        )
        return Beside(lines=(line,))
    return sources_of({file.name: _read(file, path) for file in there}, " beside it")


def refuse_others(beside: Beside) -> None:
    """Refuse what configs alone tell to be another network, or one of oblong pictures.

    Raises:
        Refused: it is one.
    """
    model_types.refuse(beside.model_type, beside.architectures, CONFIG)
    for source in beside.sources:
        if source.calls is not None:
            word, name = source.calls
            model_types.refuse_name(name, f"{source.name} says {word}")
        if oblong := source.cannot.get("image_size"):
            raise Refused(f"cannot be loaded: {source.name} says {oblong}")


def sources_of(contents: Mapping[str, Mapping[str, Any]], where: str = "") -> Beside:
    """What config files say, by their names, from their JSON."""
    sources, lines = list[FactSource](), list[str]()
    config = contents.get(CONFIG, {})
    for name, content in contents.items():
        source = _MAKE[name](content) if name in _MAKE else _processor(name, content)
        if source is not None:
            sources.append(source)
            lines += source.notes
        elif name != PROCESSOR:  # which may be of texts alone
            lines.append(f"{name}{where} describes no vision model; it is not taken")
    kind, classes = config.get("model_type"), config.get("architectures")
    classes = classes if isinstance(classes, (list, tuple)) else ()
    return Beside(
        tuple(sources), tuple(lines), kind if isinstance(kind, str) else None,
        tuple(name for name in classes if isinstance(name, str)),
    )  # fmt: skip


def _configs_of(path: Path) -> tuple[str, ...]:
    """Names of the config files that can be about a checkpoint: folders of OpenCLIP hold its
    weights under transformers' names, too, and both configs."""
    if path.name in OPENCLIP_WEIGHTS:
        return (OPENCLIP_CONFIG,)
    if path.name in WEIGHTS:
        return (CONFIG, PREPROCESSOR, PROCESSOR)
    return (CONFIG, PREPROCESSOR, PROCESSOR, OPENCLIP_CONFIG)


def _other_checkpoints(path: Path) -> list[str]:
    """Other checkpoints in the folder that a config there could be about; not those we made."""
    found = []
    try:
        names = sorted(file.name for file in path.parent.iterdir())
    except OSError:  # a file can be read where its folder may not be listed
        return []
    for name in names:
        file = path.with_name(name)
        ours = sidecar.sidecar_path(file).name in names
        if name != path.name and not ours and is_weights(name) and file.is_file():
            found.append(name)
    return found


def _read(file: Path, path: Path) -> dict[str, Any]:
    advice = f"correct it, or move it away from {path.name}"
    try:
        content = parse_json(read_bounded(file, MOST_TEXT, "config"))
    except UserError as error:
        raise UserError(f"{error}; {advice}") from None
    except ValueError:
        raise UserError(f"{file} is cut or no JSON; {advice}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a JSON {type(content).__name__}, not an object; {advice}")
    return content


# --- config.json --------------------------------------------------------------------------------


def _config(content: Mapping[str, Any]) -> FactSource | None:
    nested = content.get("pretrained_cfg")
    flat = {"mean", "std", "input_size"} <= content.keys()
    if isinstance(nested, Mapping) or isinstance(content.get("architecture"), str) or flat:
        return _timm(content, nested if isinstance(nested, Mapping) else {})
    kind = content.get("model_type")
    shaped = "hidden_size" in content and ("patch_size" in content or "image_size" in content)
    known = isinstance(kind, str) and kind in KNOWN
    if known or shaped or "vision_config" in content:
        return transformers_source(content)
    return None


def _timm(content: Mapping[str, Any], nested: Mapping[str, Any]) -> FactSource:
    args = content.get("model_args")
    args = args if isinstance(args, Mapping) else {}
    source = FactSource(CONFIG)

    def said(key: str, *places: Mapping[str, Any]) -> Any:
        return next((p[key] for p in places if p.get(key) is not None), None)

    for key in ("mean", "std", "crop_pct", "interpolation", "crop_mode"):
        source.say(key, said(key, nested, content))
    word = "img_size" if args.get("img_size") else "input_size"
    source.size(word, args.get("img_size") or said("input_size", nested, content))
    source.say("heads", args.get("num_heads"), "num_heads")
    source.activation(args.get("act_layer"))
    source.network("width", said("num_features", content), "num_features")
    source.network("width", args.get("embed_dim"), "embed_dim")
    source.network("depth", args.get("depth"), "depth")
    source.network("patch_size", args.get("patch_size"), "patch_size")
    classes = said("num_classes", args, content, nested)
    source.network("num_classes", classes or None, "num_classes")
    pooling = said("global_pool", args, content)
    if pooling is not None:
        source.pooling(pooling)
    if args.get("class_token") is False:
        source.cannot["class_token"] = "a network without a class token"
    source.network("registers", args.get("reg_tokens"), "reg_tokens")
    source.say("positions_resize", "bicubic_antialias")
    norm = args.get("norm_layer")
    if isinstance(norm, str) and norm.rsplit(".", 1)[-1].lower() not in ("layernorm", "ln"):
        source.cannot["norm_layer"] = f"norm_layer {quoted(norm)}, not LayerNorm"
    name = content.get("architecture") or nested.get("architecture")
    if isinstance(name, str):
        source.named(name, timm_name(name), nested.get("tag"))
    return source


# --- preprocessor_config.json -------------------------------------------------------------------


def _processor(name: str, content: Mapping[str, Any]) -> FactSource | None:
    if name == PROCESSOR:
        nested = content.get("image_processor")
        content = nested if isinstance(nested, Mapping) else {}
    known = ("image_mean", "image_std", "size", "crop_size", "resample", "do_resize")
    if not any(key in content for key in known):
        return None
    source = FactSource(name)
    _normalisation(content, source)
    _resampling(content, source)
    _sizes(content, source)
    return source


def _normalisation(content: Mapping[str, Any], source: FactSource) -> None:
    """Mean and standard deviation, of pixels from 0 to 1 whatever the factor of rescaling."""
    if content.get("do_normalize") is False:
        source.say("mean", [0.0] * 3)
        source.say("std", [1.0] * 3)
    else:
        source.say("mean", content.get("image_mean"), "image_mean")
        source.say("std", content.get("image_std"), "image_std")
    factor = content.get("rescale_factor")
    if content.get("do_rescale") is False or content.get("rescale_offset"):
        key = "rescale_offset" if content.get("rescale_offset") else "do_rescale"
        for field in ("mean", "std"):
            source.cannot[field] = (
                f"{key} {quoted(content[key])}, so its mean and std are of other "
            )
            source.cannot[field] += "pixels than 0 to 1"
    elif factor is not None and not _same(factor, 1 / 255):
        usable = isinstance(factor, (int, float)) and 0 < factor < _LARGEST
        for field in ("mean", "std"):
            value = source.says.get(field)
            if usable and value is not None:
                source.says[field] = tuple(v / (255 * factor) for v in value)
            elif not usable:
                source.cannot[field] = f"rescale_factor {quoted(factor)}, which scales nothing"


def _same(a: Any, b: float) -> bool:
    return isinstance(a, (int, float)) and abs(a) < _LARGEST and math.isclose(a, b, rel_tol=1e-6)


def _resampling(content: Mapping[str, Any], source: FactSource) -> None:
    code = content.get("resample")
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
    whole = all(type(side) is int and 0 < side < _LARGEST for side in sides)
    return sides[0] if whole and len(sides) == 2 and sides[0] == sides[1] else None


def _sizes(content: Mapping[str, Any], source: FactSource) -> None:
    """How large the picture becomes, what is cut out, and so crop_pct and crop_mode."""
    size, crop = content.get("size"), content.get("crop_size")
    cut = bool(content.get("do_center_crop")) if "do_center_crop" in content else False
    if content.get("do_resize") is False:
        source.cannot["crop_pct"] = "do_resize false, so pictures would come in any size"
        return
    if size is None:
        return
    kind = str(content.get("image_processor_type") or content.get("feature_extractor_type") or "")
    if isinstance(size, Mapping) and "shortest_edge" in size:
        edge, mode = _square(size["shortest_edge"]), "center"
    elif type(size) is int and kind.lower().startswith(_SHORTER):
        edge, mode = _square(size), "center"
    else:
        edge, mode = _square(size), "squash"
    window = _square(crop) if cut else edge
    if edge is None or window is None or window > edge or (mode == "center" and not cut):
        cropped = f" and crop_size {quoted(crop)}" if cut else ""
        source.cannot["crop_pct"] = f"size {quoted(size)}{cropped}, which makes no square input"
        return
    source.size("crop_size" if cut else "size", window)
    source.pictures = window
    source.say("crop_mode", mode)
    source.say("crop_pct", _share(window, edge))


def _share(window: int, edge: int) -> float:
    """crop_pct with which `int(window / crop_pct)` is the edge, whatever rounding does."""
    share = window / edge
    while int(window / share) < edge:
        share = math.nextafter(share, 0)
    return share


_MAKE = {CONFIG: _config, OPENCLIP_CONFIG: openclip_source}
