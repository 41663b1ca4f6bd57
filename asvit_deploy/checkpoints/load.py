"""Checkpoints in and out: every foreign format enters here, and only here.

Whatever comes in leaves as a clean state dict under our own names, float32, complete, finite and
of the right shapes, or as one `UserError` that names the file, what is wrong and the mend. How
files are read, unwrapped and asked for facts stands in `asvit_deploy.checkpoints`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asvit_deploy.artefacts import sidecar as artifact
from asvit_deploy.artefacts.sidecar import provenance
from asvit_deploy.checkpoints import facts, relatives, unwrapping
from asvit_deploy.checkpoints.damage import sealed, unsealed
from asvit_deploy.checkpoints.facts import NOTHING_GIVEN, Given, Told
from asvit_deploy.checkpoints.ours import (
    FORMAT,
    SCHEMA,
    check_schema,
    check_sealed,
    check_told,
    parsed,
    staged,
)
from asvit_deploy.checkpoints.reading import Refuse, listed, quoted, read
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS
from asvit_deploy.models.archs import arch as arch_by_name
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import AdaptiveViT

_FOREIGN_THRESHOLD = re.compile(r"^score_predictor\.(\d+)\.keep_threshold$")
_THRESHOLD = re.compile(r"^thresholds\.(\d+)$")
_HEADS = re.compile(r"^(?:aux_)?head\.(?:weight|bias)$")


@dataclass(frozen=True)
class Checkpoint:
    """What a file held, under our names.

    `state` is complete and finite; its thresholds are float32 scalars `thresholds.0` … in stage
    order, present exactly when `adaptive`. `format` is one of "asvit-deploy", "as-vit", "deit" and
    "lv-vit"; `metadata` is what an asvit-deploy file says of itself, empty for the others. `config`
    carries the preprocessing, heads and epsilon that were found; `told` says where each came from,
    `notes` what was decided or left out besides, a line each. Where `headless`, `state` lacks the
    head, and the number of classes means nothing. `has_average` says that the file has averaged
    weights too, whether they were taken or not.
    """

    config: ArchConfig
    state: dict[str, Tensor]
    adaptive: bool
    path: Path
    format: str
    metadata: dict[str, str]
    told: Told = field(default_factory=Told)
    notes: tuple[str, ...] = ()
    headless: bool = False
    has_average: bool = False

    @property
    def lines(self) -> list[str]:
        """What is to be said of the load, a line each, the facts first."""
        return [f"{self.path}: {line}" for line in (self.told.line, *self.notes) if line]


def load_checkpoint(
    path: Path,
    image_size: int | None = None,
    arch: str | None = None,
    ema: bool = False,
    given: Given = NOTHING_GIVEN,
    recorded: ArchConfig | None = None,
    headless: bool = False,
) -> Checkpoint:
    """Read a checkpoint of any known format; nothing that it holds is ever executed.

    Args:
        path: AS-ViT, DeiT, timm or LV-ViT file of torch.save, or `.safetensors`.
        image_size: pixels; the position embeddings are resized to it. By default, the file's own.
        arch: settles which architecture it is where the shapes fit several.
        ema: take the moving average of the weights where the file has one beside them.
        given: facts that the user gives; they stand above all that is found.
        recorded: facts of an earlier load, from a sidecar; nothing else is then asked.
        headless: take weights without a head, too.

    Raises:
        UserError: the file cannot be read, is damaged where it carries checksums, does not hold
            exactly one known network, or has a sidecar of ours that was edited or belongs to
            another file; what lies beside or in it
            cannot be obeyed, or contradicts the weights or itself.
    """
    path = Path(path)

    def refuse(reason: str) -> NoReturn:
        raise UserError(f"{path} {reason}")

    content, metadata, said = read(path, refuse)
    ours, sidecar = metadata.get("format") == FORMAT, artifact.sidecar_path(path).is_file()
    if sidecar and (ours or artifact.describes(path, "checkpoint")):
        artifact.read(path)  # refuses a sidecar that does not belong to it
    if ours:
        check_schema(metadata, refuse)
    check_sealed(content, metadata, refuse)
    metadata = unsealed(metadata)
    options = unwrapping.options_in(content)
    names = facts.model_names(content, options)
    relatives.refuse_options(options, names.values(), refuse)
    found = unwrapping.select(content, ema, refuse)
    relatives.refuse_keys(found.state, refuse)
    state = _renamed(found.state, refuse)
    bare = not any(map(_HEADS.match, state))
    config = _infer_config(state, metadata.get("arch") if ours else None, arch, bare, refuse)
    if bare and not headless:
        _refuse_headless(found.beside, refuse)
    if ours:
        check_told(metadata, config, refuse)
        config = staged(metadata, config, refuse)
    adaptive = any(map(_THRESHOLD.match, state))
    state = _checked(state, config, adaptive, bare, refuse)
    if recorded is not None:
        config, told, lines = facts.recorded(config, facts.fields_of(recorded)), Told(), list[str]()
    else:
        own = _own_facts(metadata, config, refuse) if ours else None
        within = facts.sources_within(content, options)
        loaded = facts.Loaded(path, config, bare, image_size is not None, arch is not None)
        config, told, lines = facts.settle(loaded, given, own, within, refuse)
    config = _at_size(state, config, image_size, refuse)
    return Checkpoint(
        config=config,
        state=state,
        adaptive=adaptive,
        path=path,
        format=FORMAT if ours else _format_of(config, adaptive),
        metadata=metadata if ours else {},
        told=told,
        notes=(*said, *found.notes, *lines),
        headless=bare,
        has_average=found.average,
    )


def _at_size(
    state: dict[str, Tensor], config: ArchConfig, image_size: int | None, refuse: Refuse
) -> ArchConfig:
    """The architecture for that image size, with the position embeddings resized in place."""
    if image_size is None or image_size == config.image_size:
        return config
    try:
        target = config.at(image_size)
    except UserError as error:
        refuse(f"cannot be loaded at another size: {error}")
    state["pos_embed"] = _resize(state["pos_embed"], config.grid, target.grid)
    return target


def _refuse_headless(beside: tuple[str, ...], refuse: Refuse) -> NoReturn:
    heads = f"; beside it lie {listed(beside)}" if beside else ""
    refuse(
        f"has no head (head.weight, head.bias), so it tells no classes apart{heads}; give it one "
        "with `asvit-deploy finetune --dense --pretrained` first"
    )


def _own_facts(metadata: Mapping[str, str], config: ArchConfig, refuse: Refuse) -> Any:
    try:
        return facts.own_source(metadata, config)
    except (ValueError, RecursionError) as error:
        name = str(error) if str(error) in metadata else "preprocessing, heads or eps"
        told = f" {quoted(metadata[name])}" if name in metadata else ""
        refuse(f"says {name}{told}, which cannot be; write it again with this tool")


def with_head(checkpoint: Checkpoint, num_classes: int, seed: int) -> Checkpoint:
    """Headless weights with a fresh head of so many classes."""
    config = checkpoint.config.at(num_classes=num_classes)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in build(config, False).state_dict().items()}
    generator, state = torch.Generator().manual_seed(seed), dict(checkpoint.state)
    for key in filter(_HEADS.match, shapes):
        state[key] = torch.zeros(shapes[key])
        if key.endswith("weight"):
            nn.init.trunc_normal_(state[key], std=0.02, generator=generator)
    return replace(checkpoint, config=config, state=state, headless=False)


def build_model(checkpoint: Checkpoint, dense: bool = False) -> AdaptiveViT:
    """The network of a checkpoint in eval mode, float32, on the CPU; `dense` drops thresholds."""
    adaptive = checkpoint.adaptive and not dense
    with torch.device("meta"):  # no time spent on an initialisation that is replaced at once
        model = build(checkpoint.config, adaptive)
    model.to_empty(device="cpu")
    wanted = {k: v for k, v in checkpoint.state.items() if adaptive or not _THRESHOLD.match(k)}
    model.load_state_dict(wanted, strict=True)
    return model.eval()


def save_checkpoint(path: Path, model: AdaptiveViT, metadata: dict[str, str]) -> None:
    """Write a model as `.safetensors` and its sidecar, whole or not at all.

    Args:
        metadata: text or JSON, told beside the weights; format, schema, arch, image_size,
            num_classes, preprocessing, heads, eps and, where they are not the arch's own, stages
            are added and cannot be overridden.

    Raises:
        UserError: another suffix than `.safetensors`, a weight or threshold that is not finite, or
            the folder cannot be written.
    """
    path, config = Path(path), model.config
    if path.suffix != ".safetensors":
        raise UserError(f"{path} cannot be written: give the checkpoint a name in .safetensors")
    own = {
        "format": FORMAT,
        "schema": "1",
        "arch": config.name,
        "image_size": str(config.image_size),
        "num_classes": str(config.num_classes),
    }
    row, known = ARCHS[config.name], facts.fields_of(config)
    if config.stages != row.stages:
        own |= {"schema": "2", "stages": json.dumps(config.stages)}
    if known != facts.fields_of(row):
        own["schema"] = str(SCHEMA)
    own |= {name: json.dumps(value) for name, value in known.items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if odd := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(
            f"{path} is not written: {listed(odd)} holds NaN or infinite values; "
            "lower the learning rate, or start from other weights"
        )
    told = unsealed({**metadata, **own})
    fields = {"kind": "checkpoint", **provenance(["torch", "safetensors"])}
    fields |= {key: parsed(value) for key, value in told.items() if key != "schema"}
    fields["thresholds"] = model.threshold_values()
    artifact.write(path, safetensors.torch.save(tensors, sealed(tensors, told)), fields)


# --- objects -> state dict ----------------------------------------------------------------------


def _renamed(raw: Mapping[str, Tensor], refuse: Refuse) -> dict[str, Tensor]:
    """The release's name of a threshold becomes ours."""
    state: dict[str, Tensor] = {}
    for key, value in raw.items():
        ours = _FOREIGN_THRESHOLD.sub(r"thresholds.\1", key)
        if ours != key and ours in raw:
            refuse(f"has both {key} and {ours}, two thresholds of one stage; leave one of them")
        state[ours] = value
    return state


# --- state dict -> architecture -----------------------------------------------------------------


def _infer_config(
    state: Mapping[str, Tensor], told: str | None, wanted: str | None, bare: bool, refuse: Refuse
) -> ArchConfig:
    """Find the row of the table that the shapes fit.

    Args:
        told: arch name in the file's own metadata.
        wanted: arch name the user gave.
        bare: there is no head.
    """
    fits = _fitting_archs(state, bare, refuse)
    if wanted is not None and arch_by_name(wanted).name not in fits:
        refuse(f"holds {' or '.join(fits)}, not {wanted}; drop --arch or name another file")
    if told is not None and told not in fits:
        refuse(
            f"says it is {told[:40]} but holds {' or '.join(fits)}; write it again with this tool"
        )
    name = wanted or told or fits[0]
    if wanted is None and told is None and len(fits) > 1:
        refuse(f"fits several architectures; pass --arch {' or --arch '.join(fits)}")
    row = ARCHS[name]
    tokens = state["pos_embed"].shape[1] - 1
    grid = round(max(tokens, 0) ** 0.5)
    if math.isqrt(tokens + 1) ** 2 == tokens + 1 and tokens > 0:
        refuse("has no position for its class token (no_embed_class); pass a plain DeiT or ViT")
    if grid == 0 or grid * grid != tokens:
        refuse(f"has position embeddings for {tokens} image tokens; only square grids are read")
    return row.at(grid * row.patch_size, None if bare else state["head.weight"].shape[0])


def _fitting_archs(state: Mapping[str, Tensor], bare: bool, refuse: Refuse) -> list[str]:
    """Names of the rows with the state's stem, width, depth, hidden width and patch."""
    needed = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    needed |= {"blocks.0.mlp.fc1.weight": 2, **({} if bare else {"head.weight": 2})}
    missing = [key for key in needed if key not in state]
    if len(missing) == len(needed):
        refuse(f"is no DeiT or LV-ViT checkpoint (keys such as {listed(state)}); name one that is")
    if missing:
        refuse(f"lacks {listed(missing)}; pass a complete DeiT, LV-ViT or AS-ViT checkpoint")
    for key, dims in needed.items():
        if state[key].ndim != dims or 0 in state[key].shape:
            refuse(f"has {key} of shape {list(state[key].shape)}; pass an unmodified checkpoint")
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
        refuse(
            f"has width {dim}, depth {depth}, hidden width {hidden}, {patch}-pixel patches and a "
            f"{stem} stem, which fits no known architecture; known: {', '.join(ARCHS)}"
        )
    return fits


def _format_of(config: ArchConfig, adaptive: bool) -> str:
    if adaptive:
        return "as-vit"
    return "deit" if config.head == "class" else "lv-vit"


# --- the state itself ---------------------------------------------------------------------------


def _checked(
    state: Mapping[str, Tensor], config: ArchConfig, adaptive: bool, bare: bool, refuse: Refuse
) -> dict[str, Tensor]:
    """The state in float32, once its keys, shapes, types and values are right."""
    thresholds = {key for key in state if _THRESHOLD.match(key)}
    expected_thresholds = {f"thresholds.{i}" for i in range(len(config.stages))}
    if adaptive and thresholds != expected_thresholds:
        refuse(
            f"has {len(thresholds)} thresholds ({listed(sorted(thresholds))}); {config.name} "
            f"has {len(config.stages)} stages and needs one for each"
        )
    with torch.device("meta"):
        expected = build(config, adaptive).state_dict()
    if bare:
        expected = {key: like for key, like in expected.items() if not _HEADS.match(key)}
    if extra := [key for key in state if key not in expected]:
        refuse(
            f"has keys that {config.name} does not know: {listed(extra)}; pass a plain checkpoint"
        )
    if missing := [key for key in expected if key not in state]:
        refuse(f"lacks {listed(missing)}; pass a complete checkpoint of {config.name}")
    clean = {}
    for key, like in expected.items():
        value = (
            state[key].reshape(()) if key in thresholds and state[key].numel() == 1 else state[key]
        )
        clean[key] = _converted(key, value, like, refuse)
    for key in sorted(thresholds):
        if not 0 < clean[key].item() < float("inf"):
            refuse(
                f"has threshold {key} = {clean[key].item():g}; thresholds are finite and above 0: "
                "calibrate the dense weights, or train again"
            )
    for key, value in clean.items():
        if not value.isfinite().all():
            refuse(f"has NaN or infinite values in {key}; pass a checkpoint that did not diverge")
        if key.endswith(".running_var") and value.min() < 0:
            refuse(f"has negative variances in {key}; pass an unmodified checkpoint")
    return clean


def _converted(key: str, value: Tensor, like: Tensor, refuse: Refuse) -> Tensor:
    """A weight in the type and shape of the model's own."""
    if value.shape != like.shape:
        refuse(
            f"has {key} of shape {list(value.shape)} where {list(like.shape)} is needed; "
            "pass an unmodified checkpoint"
        )
    if value.is_floating_point() != like.is_floating_point() or value.is_complex():
        refuse(f"has {key} as {value.dtype}; save the weights in plain float32")
    return value.to(like.dtype).contiguous()


def _resize(pos_embed: Tensor, grid: int, target: int) -> Tensor:
    """float32 [1, 1+grid^2, D] -> [1, 1+target^2, D], bicubic; the class token's row is kept."""
    cls_row, rows = pos_embed[:, :1], pos_embed[:, 1:]
    plane = rows.transpose(1, 2).unflatten(2, (grid, grid))  # (1, D, grid, grid)
    plane = F.interpolate(plane, size=(target, target), mode="bicubic", align_corners=False)
    return torch.cat([cls_row, plane.flatten(2).transpose(1, 2)], 1)
