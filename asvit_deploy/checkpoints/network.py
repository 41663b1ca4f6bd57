"""A network's tensors under our own names: which architecture it is, and whether it is whole."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.checkpoints.reading import listed
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS
from asvit_deploy.models.archs import arch as arch_by_name
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.reduction.methods import restored

_FOREIGN_THRESHOLD = re.compile(r"^score_predictor\.(\d+)\.keep_threshold$")
THRESHOLD = re.compile(r"^thresholds\.(\d+)$")
HEAD = re.compile(r"^(?:aux_)?head\.(?:weight|bias)$")


def renamed(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The release's name of a threshold becomes ours."""
    state: dict[str, Tensor] = {}
    for key, value in raw.items():
        ours = _FOREIGN_THRESHOLD.sub(r"thresholds.\1", key)
        if ours != key and ours in raw:
            raise Refused(
                f"has both {key} and {ours}, two thresholds of one stage; leave one of them"
            )
        state[ours] = value
    return state


# --- state dict -> architecture -----------------------------------------------------------------


def infer_config(
    state: Mapping[str, Tensor], stated: str | None, wanted: str | None, bare: bool
) -> ArchConfig:
    """Find the row of the table that the shapes fit.

    Args:
        stated: arch name in the file's own metadata.
        wanted: arch name the user gave.
        bare: there is no head.
    """
    fits = fitting_archs(state, bare)
    if wanted is not None and arch_by_name(wanted).name not in fits:
        raise Refused(f"holds {' or '.join(fits)}, not {wanted}; drop --arch or name another file")
    if stated is not None and stated not in fits:
        raise Refused(
            f"says it is {stated[:40]} but holds {' or '.join(fits)}; write it again with this tool"
        )
    name = wanted or stated or fits[0]
    if wanted is None and stated is None and len(fits) > 1:
        raise Refused(f"fits several architectures; pass --arch {' or --arch '.join(fits)}")
    row = ARCHS[name]
    tokens = state["pos_embed"].shape[1] - 1
    grid = round(max(tokens, 0) ** 0.5)
    if math.isqrt(tokens + 1) ** 2 == tokens + 1 and tokens > 0:
        raise Refused(
            "has no position for its class token (no_embed_class); pass a plain DeiT or ViT"
        )
    if grid == 0 or grid * grid != tokens:
        raise Refused(
            f"has position embeddings for {tokens} image tokens; only square grids are read"
        )
    return row.at(grid * row.patch_size, None if bare else state["head.weight"].shape[0])


def fitting_archs(state: Mapping[str, Tensor], bare: bool) -> list[str]:
    """Names of the rows with the state's stem, width, depth, hidden width and patch."""
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    needed |= {"blocks.0.mlp.fc1.weight": 2, **({} if bare else {"head.weight": 2})}
    missing = [key for key in needed if key not in state]
    if len(missing) == len(needed):
        raise Refused(
            f"is no DeiT or LV-ViT checkpoint (keys such as {listed(state)}); name one that is"
        )
    if missing:
        raise Refused(f"lacks {listed(missing)}; pass a complete DeiT, LV-ViT or AS-ViT checkpoint")
    for key, dims in needed.items():
        if state[key].ndim != dims or 0 in state[key].shape:
            raise Refused(
                f"has {key} of shape {list(state[key].shape)}; pass an unmodified checkpoint"
            )
    stem = "conv" if "patch_embed.conv1.weight" in state else "patch"
    patch = state["patch_embed.proj.weight"].shape[3] * (2 if stem == "conv" else 1)
    dim = state["cls_token"].shape[2]
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    blocks = (re.match(r"blocks\.(\d+)\.", key) for key in state)
    depth = len({match[1] for match in blocks if match})
    found = (stem, dim, depth, hidden, patch)
    rows = ARCHS.values()
    fits = [r.name for r in rows if (r.stem, r.dim, r.depth, r.hidden, r.patch_size) == found]
    if not fits:
        raise Refused(
            f"has width {dim}, depth {depth}, hidden width {hidden}, {patch}-pixel patches and a "
            f"{stem} stem, which fits no known architecture; known: {', '.join(ARCHS)}"
        )
    return fits


# --- the state itself ---------------------------------------------------------------------------


def checked_state(
    state: Mapping[str, Tensor], config: ArchConfig, adaptive: bool, bare: bool,
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
    if bare:
        expected = {key: like for key, like in expected.items() if not HEAD.match(key)}
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
    for key in sorted(thresholds):
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
    state["pos_embed"] = _resize(state["pos_embed"], config.grid, target.grid)
    return target


def _resize(pos_embed: Tensor, grid: int, target: int) -> Tensor:
    """float32 [1, 1+grid^2, D] -> [1, 1+target^2, D], bicubic; the class token's row is kept."""
    cls_row, rows = pos_embed[:, :1], pos_embed[:, 1:]
    plane = rows.transpose(1, 2).unflatten(2, (grid, grid))  # (1, D, grid, grid)
    plane = F.interpolate(plane, size=(target, target), mode="bicubic", align_corners=False)
    return torch.cat([cls_row, plane.flatten(2).transpose(1, 2)], 1)
