"""A network's tensors under our own names: which architecture it is, and whether it is whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.checkpoints.formats.base import Translated
from asvit_deploy.checkpoints.reading import listed
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS, DESCRIBED, arch, described
from asvit_deploy.models.config import MAX_IMAGE_SIZE, ArchConfig
from asvit_deploy.reduction.methods import restored

THRESHOLD = re.compile(r"^thresholds\.(\d+)$")
LEARNED = re.compile(r"^(?:thresholds|method)\.")  # what a reduction learned, and not the network
# Each is needed by every network; what else there is, shapes and traits tell.
_NEEDED = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4,
           "blocks.0.norm1.weight": 1, "blocks.0.mlp.fc1.weight": 2}  # fmt: skip
_SIZES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large",
          (1280, 32): "huge", (1536, 40): "giant"}  # fmt: skip


# --- state dict -> architecture -----------------------------------------------------------------


def infer_config(
    found: Translated, stated: ArchConfig | None, wanted: str | None
) -> tuple[ArchConfig, dict[str, Tensor]]:
    """The architecture that a state dict is of, and the state as that architecture has it.

    Args:
        stated: what the file's own metadata says, where it is ours.
        wanted: arch name the user gave.
    """
    _check_needed(found.state)
    shaped = {**_traits(found.state), **found.traits}
    state, tokens = _placed(dict(found.state), shaped)
    grid = math.isqrt(max(tokens, 0))
    if grid == 0 or grid * grid != tokens:
        raise Refused(
            f"has position embeddings for {tokens} image tokens; only square grids are read"
        )
    row = _row(shaped, stated, wanted)
    size = grid * row.patch_size
    if size > MAX_IMAGE_SIZE:
        raise Refused(f"has {tokens:,} position embeddings, more than can be used; pass another")
    return replace(row, image_size=size, num_classes=_outputs(state, row)), state


def _check_needed(state: Mapping[str, Tensor]) -> None:
    if missing := [key for key in _NEEDED if key not in state]:
        raise Refused(f"lacks {listed(missing)}; pass a complete checkpoint")
    known = {key: value for key, value in state.items() if key in (*_NEEDED, "reg_token")}
    for key, value in known.items():
        if value.ndim != _NEEDED.get(key, 3) or 0 in value.shape:
            raise Refused(f"has {key} of shape {list(value.shape)}; pass an unmodified checkpoint")


def _traits(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the names and shapes of a state dict say of its architecture."""
    stem = "conv" if "patch_embed.conv1.weight" in state else "patch"
    dim = state["cls_token"].shape[2]
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    blocks = (re.match(r"blocks\.(\d+)\.", key) for key in state)
    return {
        "dim": dim,
        "depth": len({match[1] for match in blocks if match}),
        "mlp_ratio": hidden // dim if hidden % dim == 0 else hidden / dim,
        "patch_size": state["patch_embed.proj.weight"].shape[3] * (2 if stem == "conv" else 1),
        "stem": stem,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "patch_bias": "patch_embed.proj.bias" in state,
        "layer_scale": "blocks.0.ls1.gamma" in state,
        "norm_pre": "norm_pre.weight" in state,
        "prefix": 1 + (state["reg_token"].shape[1] if "reg_token" in state else 0),
    }


def _placed(state: dict[str, Tensor], shaped: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The state with positions for all rows or for the image tokens alone, and how many tokens
    there are; `shaped` learns which.

    Where the class token has a position and registers have none, its position joins the token.
    """
    count, prefix = state["pos_embed"].shape[1], shaped["prefix"]
    for placed in sorted({prefix, 1, 0}, reverse=True):
        if math.isqrt(max(count - placed, 0)) ** 2 == count - placed > 0:
            break
    else:
        placed = prefix
    if placed == 1 < prefix:
        if state["cls_token"].shape[1:] != state["pos_embed"][:, :1].shape[1:]:
            raise Refused("has a class token and positions of other widths; pass an unmodified one")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    shaped["positions"] = "all" if placed == prefix else "image"
    return state, count - placed


def _row(shaped: dict[str, Any], stated: ArchConfig | None, wanted: str | None) -> ArchConfig:
    """The architecture with these traits: a row of the table, what our own file says, or a
    description of its own."""
    alike = {name: shaped[name] for name in shaped if name in DESCRIBED and name not in _FREE}
    rows = [stated] if stated else list(ARCHS.values())
    fits = [row for row in rows if all(getattr(row, name) == v for name, v in alike.items())]
    if wanted is not None and arch(wanted).name not in [row.name for row in fits]:
        has = " or ".join(row.name for row in fits) or _name(shaped)
        raise Refused(f"holds {has}, not {wanted}; drop --arch or name another file")
    if wanted is not None:
        fits = [row for row in fits if row.name == wanted]
    if len(fits) > 1:
        names = " or --arch ".join(row.name for row in fits)
        raise Refused(f"fits several architectures; pass --arch {names}")
    if stated is not None and not fits:
        raise Refused(
            f"says it is {stated.name[:40]} but holds {_row(shaped, None, None).name}; write it "
            "again with this tool"
        )
    if fits:
        return replace(fits[0], **{name: shaped[name] for name in _FREE if name in shaped})
    return _new_row(shaped)


def _new_row(shaped: dict[str, Any]) -> ArchConfig:
    if shaped["stem"] == "conv":
        raise Refused(
            f"has a convolutional stem with width {shaped['dim']} and depth {shaped['depth']}, "
            f"which fits no known architecture; known: {', '.join(ARCHS)}"
        )
    try:
        traits = {name: value for name, value in shaped.items() if name in DESCRIBED}
        row = described(_name(shaped), {**_PLAIN, **traits})
    except ValueError as error:
        raise Refused(f"holds no network that can be built ({error}); pass another") from None
    facts = {name: shaped[name] for name in ("eps", "preprocessing") if name in shaped}
    return replace(row, **facts)


def _name(shaped: dict[str, Any]) -> str:
    """As timm would call it, such as `vit_small_patch14_reg4`."""
    dim, depth = shaped["dim"], shaped["depth"]
    name = f"vit_{_SIZES.get((dim, depth), f'{dim}x{depth}')}_patch{shaped['patch_size']}"
    name += "_clip" if shaped["norm_pre"] else ""
    if shaped.get("head") == "two_classes":
        return f"{name}_distilled"
    return name + (f"_reg{shaped['prefix'] - 1}" if shaped["prefix"] > 1 else "")


# A format may settle these without that it is another row; facts may, too.
_FREE = ("head", "eps", "activation", "positions_resize", "preprocessing")
_PLAIN = {name: getattr(ARCHS["as_deit_small"], name) for name in DESCRIBED}


def _outputs(state: Mapping[str, Tensor], row: ArchConfig) -> int:
    """How wide its output is."""
    if row.head == "none":
        return row.dim
    if "head.weight" not in state:
        raise Refused("lacks head.weight; pass a complete checkpoint")
    if state["head.weight"].ndim != 2 or 0 in state["head.weight"].shape:
        shape = list(state["head.weight"].shape)
        raise Refused(f"has head.weight of shape {shape}; pass an unmodified checkpoint")
    return state["head.weight"].shape[0]


# --- the state itself ---------------------------------------------------------------------------


def checked_state(
    state: Mapping[str, Tensor], config: ArchConfig, adaptive: bool,
    method: dict[str, Any] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The state in float32, once its keys, shapes, types and values are right.

    Args:
        method: fields of another method than thresholds.
    """
    thresholds = {key for key in state if THRESHOLD.match(key)}
    expected_thresholds = {f"thresholds.{i}" for i in range(len(config.stages))}
    if adaptive and method is None and thresholds != expected_thresholds:
        raise Refused(
            f"has {len(thresholds)} thresholds ({listed(sorted(thresholds))}); {config.name} "
            f"has {len(config.stages)} stages and needs one for each"
        )
    with torch.device("meta"):
        reduction = None if method is None else restored(method, config.prefix)
        expected = build(config, adaptive, reduction).state_dict()
    if extra := [key for key in state if key not in expected]:
        raise Refused(
            f"has keys that {config.name} does not know: {listed(extra)}; pass a plain checkpoint"
        )
    if missing := [key for key in expected if key not in state]:
        raise Refused(f"lacks {listed(missing)}; pass a complete checkpoint of {config.name}")
    clean = {}
    for key, like in expected.items():
        value = (
            state[key].reshape(()) if key in thresholds and state[key].numel() == 1 else state[key]
        )
        clean[key] = _converted(key, value, like)
    for key in filter(LEARNED.match, sorted(clean)):
        if clean[key].ndim:  # no threshold
            continue
        if not 0 < clean[key].item() < float("inf"):
            raise Refused(
                f"has threshold {key} = {clean[key].item():g}; thresholds are finite and above 0: "
                "calibrate the dense weights, or train again"
            )
    for key, value in clean.items():
        if not value.isfinite().all():
            raise Refused(
                f"has NaN or infinite values in {key}; pass a checkpoint that did not diverge"
            )
        if key.endswith(".running_var") and value.min() < 0:
            raise Refused(f"has negative variances in {key}; pass an unmodified checkpoint")
    return clean


def _converted(key: str, value: Tensor, like: Tensor) -> Tensor:
    """A weight in the type and shape of the model's own."""
    if value.shape != like.shape:
        raise Refused(
            f"has {key} of shape {list(value.shape)} where {list(like.shape)} is needed; "
            "pass an unmodified checkpoint"
        )
    if value.is_floating_point() != like.is_floating_point() or value.is_complex():
        raise Refused(f"has {key} as {value.dtype}; save the weights in plain float32")
    return value.to(like.dtype).contiguous()


def at_size(state: dict[str, Tensor], config: ArchConfig, image_size: int | None) -> ArchConfig:
    """The architecture for that image size, with the position embeddings resized in place."""
    if image_size is None or image_size == config.image_size:
        return config
    try:
        target = config.at(image_size)
    except UserError as error:
        raise Refused(f"cannot be loaded at another size: {error}") from error
    state["pos_embed"] = _resize(state["pos_embed"], config, target.grid)
    return target


def _resize(pos_embed: Tensor, config: ArchConfig, target: int) -> Tensor:
    """float32 [1, placed+grid^2, D] -> [1, placed+target^2, D], bicubic; the first rows stay."""
    grid, how = config.grid, config.positions_resize
    placed = config.prefix if config.positions == "all" else 0
    first, rows = pos_embed[:, :placed], pos_embed[:, placed:]
    plane = rows.transpose(1, 2).unflatten(2, (grid, grid))  # (1, D, grid, grid)
    if how == "bicubic_offset":  # which shifts the new places by as little
        plane = F.interpolate(plane, scale_factor=(target + 0.1) / grid, mode="bicubic")
    else:
        plane = F.interpolate(
            plane, size=(target, target), mode="bicubic", antialias=how == "bicubic_antialias"
        )
    return torch.cat([first, plane.flatten(2).transpose(1, 2)], 1)


def resized_line(before: ArchConfig, after: ArchConfig) -> list[str]:
    """A line on how the position embeddings were resized, where they were."""
    if before.grid == after.grid:
        return []
    how = _RESIZED[before.positions_resize]
    grids = f"{before.grid}x{before.grid} to {after.grid}x{after.grid}"
    return [f"position embeddings resized from {grids} patches, {how}"]


_RESIZED = {
    "bicubic": "bicubic without antialias",
    "bicubic_antialias": "bicubic with antialias",
    "bicubic_offset": "bicubic with an offset of 0.1, as DINOv2's release does",
}
