"""Checkpoints in and out: every foreign format enters here, and only here.

Whatever comes in leaves as a clean state dict under our own names, float32, complete, finite and
of the right shapes, or as one `UserError` that names the file, what is wrong and what to do. How
files are read, unwrapped and asked for facts stands in `asvit_deploy.checkpoints`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from asvit_deploy import sidecar
from asvit_deploy.checkpoints import (
    facts,
    formats,
    learned,
    model_types,
    relatives,
    unwrapping,
    within,
)
from asvit_deploy.checkpoints.configs import CONFIG, Beside, refuse_others, sources_beside
from asvit_deploy.checkpoints.damage import sealed, unsealed
from asvit_deploy.checkpoints.facts import NOTHING_GIVEN, Given, Origins
from asvit_deploy.checkpoints.formats.base import Translated
from asvit_deploy.checkpoints.network import (
    LEARNED,
    THRESHOLD,
    at_size,
    checked_state,
    infer_config,
    resized_line,
)
from asvit_deploy.checkpoints.ours import (
    BESIDE,
    FORMAT,
    METHOD,
    check_metadata,
    check_schema,
    check_sealed,
    method_of,
    parsed,
    staged,
    stated,
    stated_config,
)
from asvit_deploy.checkpoints.places import content_at, weights_at
from asvit_deploy.checkpoints.reading import listed, quoted
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError, shortened
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS
from asvit_deploy.models.config import ArchConfig, HeadName
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.methods import restored
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.sidecar import provenance


@dataclass(frozen=True)
class Checkpoint:
    """What a file held, under our names.

    `state` is complete and finite; its thresholds are float32 scalars `thresholds.0` … in stage
    order, present exactly when `adaptive`. `format` is one of "asvit-deploy", "as-vit", "deit",
    "lv-vit" and the names of `formats.FORMATS`; `metadata` is what an asvit-deploy file says of
    itself, empty for the others. `config` carries the preprocessing, heads and epsilon that were
    found; `origins` says where each came from, `notes` what was decided or left out besides, a line
    each. `has_average` says that the file has averaged weights too, whether they were taken or not.
    `reduction` are the fields of another method than thresholds (`Reduction.fields`); then it is
    `adaptive` without any.
    """

    config: ArchConfig
    state: dict[str, Tensor]
    adaptive: bool
    path: Path
    format: str
    metadata: dict[str, str]
    origins: Origins = field(default_factory=Origins)
    notes: tuple[str, ...] = ()
    has_average: bool = False
    reduction: dict[str, Any] | None = None

    @property
    def headless(self) -> bool:
        """Whether it tells no classes apart: its output is an embedding."""
        return self.config.output == "embedding"

    @property
    def lines(self) -> list[str]:
        """What a load should report, a line each, the facts first."""
        return [f"{self.path}: {line}" for line in (self.origins.line, *self.notes) if line]


def load_checkpoint(
    path: Path,
    image_size: int | None = None,
    arch: str | None = None,
    ema: bool = False,
    given: Given = NOTHING_GIVEN,
    recorded: ArchConfig | None = None,
) -> Checkpoint:
    """Read a checkpoint of any known format; nothing that it holds is ever executed.

    Args:
        path: file of torch.save, or `.safetensors`, of any format in `checkpoints.formats`; a
            hub's or trainer's folder; or the index of several such files.
        image_size: pixels; the position embeddings are resized to it. By default, the file's own.
        arch: settles which architecture it is where the shapes fit several.
        ema: take the moving average of the weights where the file has one beside them.
        given: facts that the user gives; they stand above all that is found.
        recorded: facts of an earlier load, from a sidecar; nothing else is then asked.

    Raises:
        UserError: the file cannot be read, is damaged where it carries checksums, does not hold
            exactly one known network, or has a sidecar of ours that was edited or belongs to
            another file; what lies beside or in it
            cannot be obeyed, or contradicts the weights or itself.
    """
    path = Path(path)
    asked = _Asked(image_size, arch, ema, given, recorded)
    try:
        path, lines = weights_at(path)
        content, metadata, notes = content_at(path)
        metadata, ours = _own_metadata(path, content, metadata)
        if ours and learned.BACKBONE in metadata:
            return _on_backbone(path, content, metadata, asked)
        beside = Beside() if ours or recorded else sources_beside(path)
        return _loaded(_Held(path, content, metadata, (*lines, *notes), ours, beside), asked)
    except Refused as refused:
        raise UserError(f"{shortened(path)} {refused}") from refused


def load_state(
    state: Mapping[str, Tensor], name: str, beside: Beside, image_size: int | None = None,
    arch: str | None = None, ema: bool = False, given: Given = NOTHING_GIVEN,
) -> Checkpoint:  # fmt: skip
    """As `load_checkpoint`, of a state dict in memory.

    Args:
        name: what messages call it; it becomes the checkpoint's `path`.
        beside: what its configs say, as `configs.sources_of` makes it.

    Raises:
        UserError: as `load_checkpoint`.
    """
    held = _Held(Path(name), dict(state), {}, (), False, beside)
    try:
        return _loaded(held, _Asked(image_size, arch, ema, given, None))
    except Refused as refused:
        raise UserError(f"{name} {refused}") from refused


@dataclass(frozen=True)
class _Held:
    """What was read, before anything is known of it; `ours` says that this tool wrote it."""

    path: Path
    content: Any
    metadata: dict[str, str]
    notes: tuple[str, ...]
    ours: bool
    beside: Beside


@dataclass(frozen=True)
class _Asked:
    """What the caller asks for; see `load_checkpoint`."""

    image_size: int | None
    arch: str | None
    ema: bool
    given: Given
    recorded: ArchConfig | None


def _loaded(held: _Held, asked: _Asked) -> Checkpoint:
    content, metadata, ours = held.content, held.metadata, held.ours
    refuse_others(held.beside)
    options = unwrapping.options_in(content)
    names = within.model_names(content, options)
    found = unwrapping.select(content, asked.ema)
    relatives.refuse_options(options, names.values(), learned.method_named(found.state))
    for place, name in names.items():
        model_types.refuse_name(name, f"{place} is", unlike=False)
    relatives.refuse_keys(found.state)
    if ours:
        stated, form = stated_config(metadata), None
        translated = Translated(dict(found.state), {"head": stated.head})
    else:
        stated = None
        translated, form = formats.translate(found.state)
        # Beside names that are not of transformers, the config of no vision model is passed over.
        if form.model_types or any(source.name == CONFIG for source in held.beside.sources):
            model_types.refuse_unlike(held.beside.model_type, form.model_types, form.name, CONFIG)
    config, state = infer_config(translated, stated, asked.arch)
    model_types.refuse_headless(config.head == "none", held.beside.architectures, CONFIG)
    if ours:
        check_metadata(metadata, config)
        config = staged(metadata, config)
    method = method_of(metadata, config) if ours else None
    theirs = None if ours else learned.learned_in(state, config, options)
    if theirs is not None:
        state, method = theirs.state, theirs.fields
    adaptive = method is not None or any(map(THRESHOLD.match, state))
    state = checked_state(state, config, adaptive, method)
    image_size, origins, lines = asked.image_size, Origins(), list[str]()
    if asked.recorded is not None:
        config = facts.as_recorded(config, asked.recorded)
    else:
        own = _own_facts(metadata, config) if ours else None
        inside = within.sources_within(content, options)
        image_size, lines = _pictures(translated, config, held.beside, image_size)
        loaded = facts.Loaded(
            config, asked.image_size is not None, asked.arch is not None, held.beside.sources,
            form.name if form and form.model_types else config.name, translated.resizes,
        )  # fmt: skip
        config, origins = facts.settle(loaded, asked.given, own, inside)
        lines += held.beside.classes if config.head == "none" else ()
        lines += [*held.beside.lines, *(note for source in inside for note in source.notes)]
    own_size, config = config, at_size(state, config, image_size)
    lines += resized_line(own_size, config)
    if theirs is not None:
        lines += theirs.notes
    # What was made earlier is compared with as it was carried out then.
    config = config if asked.recorded is not None else config.saving()
    return Checkpoint(
        config=config,
        state=state,
        adaptive=adaptive,
        path=held.path,
        format=FORMAT if form is None else _format_of(form.name, config, adaptive, method),
        metadata=metadata if ours else {},
        origins=origins,
        notes=(*held.notes, *found.notes, *_notes(translated, config, found.beside), *lines),
        has_average=found.average,
        reduction=method,
    )


def _on_backbone(
    path: Path, content: Any, metadata: dict[str, str], asked: _Asked
) -> Checkpoint:  # fmt: skip
    """What a method learned, on the network that lies beside it."""
    place = learned.backbone_of(path, metadata)
    backbone = load_checkpoint(place)
    learned.check_same(stated(backbone.config), metadata)
    options = asked.image_size, asked.arch, asked.ema, asked.given, asked.recorded
    if asked != _Asked(None, None, False, NOTHING_GIVEN, None):
        backbone = load_checkpoint(place, *options)

    def check(
        state: dict[str, Tensor], config: ArchConfig
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        fields = method_of(metadata, config)
        if fields is None:
            raise Refused("does not say its reduction; write it again with this tool")
        return fields, checked_state(state, config, True, fields)

    whole = learned.joined(content, metadata, backbone, check)
    return replace(whole, path=path, format=FORMAT)


def _pictures(
    found: Translated, config: ArchConfig, beside: Beside, image_size: int | None
) -> tuple[int | None, list[str]]:
    """The size to load at, and a line where a processor settles it.

    A family whose own code takes pictures of any size keeps positions for other pictures than its
    processor makes.
    """
    sides = {source.pictures for source in beside.sources if source.pictures is not None}
    if len(sides) > 1 and image_size is None:
        said = " and ".join(f"{side} px" for side in sorted(sides))
        raise Refused(f"has two accounts of its pictures, {said}; pass --image-size")
    if image_size is not None or not found.resizes or beside.pictures is None:
        return image_size, []
    side, name = beside.pictures
    if side == config.image_size:
        return None, []
    return side, [
        f"takes {side} px, as {name} says, and its position embeddings of {config.image_size} px "
        f"are resized; --image-size {config.image_size} leaves them as they are"
    ]


def _own_metadata(
    path: Path, content: Any, metadata: dict[str, str]
) -> tuple[dict[str, str], bool]:
    """What the file says of itself, once it and its sidecar are whole, and whether it is ours."""
    # Not Path.is_file, which raises where the sidecar's name would be too long.
    ours, beside = metadata.get("format") == FORMAT, os.path.isfile(sidecar.sidecar_path(path))
    if beside and (ours or sidecar.describes(path, "checkpoint")):
        sidecar.read(path)  # refuses a sidecar that does not belong to it
    if ours:
        check_schema(metadata)
    check_sealed(content, metadata)
    return unsealed(metadata), ours


def _format_of(form: str, config: ArchConfig, adaptive: bool, method: dict[str, Any] | None) -> str:
    if method is not None:
        return method["name"]
    if adaptive:
        return "as-vit"
    if config.name not in ARCHS or form != "timm":
        return form
    return "lv-vit" if config.stem == "conv" else "deit"


def _notes(found: Translated, config: ArchConfig, beside: tuple[str, ...]) -> list[str]:
    """What of the network itself was left out, and what its output is where that is no classes."""
    notes = [*found.notes]
    if found.left_out:
        notes.append(f"left out, not needed for its output: {listed(found.left_out)}")
    if config.positions == "image" and config.prefix == 1:
        notes.append("its class token has no position of its own, as in DeiT-III")
    if config.head == "none":
        heads = f" (beside it lie {listed(beside)})" if beside else ""
        notes.append(f"has no head{heads}: its output is the class token, {config.dim} numbers")
    return notes


def _own_facts(metadata: Mapping[str, str], config: ArchConfig) -> Any:
    try:
        return facts.own_source(metadata, config)
    except (ValueError, RecursionError) as error:
        name = str(error) if str(error) in metadata else "preprocessing, heads or eps"
        value = f" {quoted(metadata[name])}" if name in metadata else ""
        raise Refused(
            f"says {name}{value}, which cannot be; write it again with this tool"
        ) from error


def telling_classes(config: ArchConfig) -> ArchConfig:
    """The architecture with its usual head, where it gave embeddings."""
    row = ARCHS.get(config.name)
    head: HeadName = row.head if row else "class"
    return replace(config, head=head) if config.output == "embedding" else config


def with_head(checkpoint: Checkpoint, num_classes: int, seed: int) -> Checkpoint:
    """Weights that give embeddings, with a fresh head of so many classes in place of theirs."""
    config = replace(telling_classes(checkpoint.config), num_classes=num_classes)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in build(config, False).state_dict().items()}
    generator, state = torch.Generator().manual_seed(seed), dict(checkpoint.state)
    for key in filter(_HEAD.match, shapes):
        state[key] = torch.zeros(shapes[key])
        if key.endswith("weight"):
            nn.init.trunc_normal_(state[key], std=0.02, generator=generator)
    return replace(checkpoint, config=config, state=state)


def require_one_token(checkpoint: Checkpoint) -> None:
    """Raise UserError for a network whose head averages tokens, where some are to leave."""
    if checkpoint.config.averages:
        raise UserError(
            f"{checkpoint.path} averages its tokens ({checkpoint.config.head}): adaptive forms of "
            "it come with methods that carry sizes; export or train it as it is with --dense"
        )


_HEAD = re.compile(r"(?:aux_)?head\.(?:weight|bias)$")


def build_model(checkpoint: Checkpoint, dense: bool = False) -> ViT:
    """The network of a checkpoint in eval mode, float32, on the CPU; `dense` drops thresholds."""
    adaptive = checkpoint.adaptive and not dense
    with torch.device("meta"):  # no time spent on an initialisation that is replaced at once
        fields, config = checkpoint.reduction, checkpoint.config
        method = restored(fields, config.prefix) if fields and adaptive else None
        model = build(config, adaptive, method)
    model.to_empty(device="cpu")
    wanted = {k: v for k, v in checkpoint.state.items() if adaptive or not LEARNED.match(k)}
    model.load_state_dict(wanted, strict=True)
    model.metadata = {**checkpoint.metadata, **checkpoint.origins.metadata()}
    return model.eval()


def save_checkpoint(
    path: Path, model: ViT, metadata: dict[str, str], backbone: Path | None = None
) -> None:  # fmt: skip
    """Write a model as `.safetensors` and its sidecar, whole or not at all.

    Args:
        metadata: text or JSON, kept beside the weights; format, schema, arch, image_size,
            num_classes, preprocessing, heads, eps and, where they are not the arch's own, stages
            are added and cannot be overridden.
        backbone: the file of the dense network, in the same folder: only what the method learned
            is written, and which file that is.

    Raises:
        UserError: another suffix than `.safetensors`, a weight or threshold that is not finite, a
            backbone elsewhere, or the folder cannot be written.
    """
    path, config = Path(path), model.config
    if path.suffix != ".safetensors":
        raise UserError(f"{path} cannot be written: give the checkpoint a name in .safetensors")
    own = stated(config)
    if model.reduction is not None and not isinstance(model.reduction, Threshold):
        schema = max(METHOD, int(own["schema"]))
        own |= {"schema": str(schema), "reduction": json.dumps(model.reduction.fields())}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    metadata = {key: value for key, value in metadata.items() if key != learned.BACKBONE}
    if backbone is not None:
        own |= {"schema": str(BESIDE), learned.BACKBONE: learned.record_of(path, backbone)}
        tensors = {key: value for key, value in tensors.items() if LEARNED.match(key)}
    if odd := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise UserError(
            f"{path} is not written: {listed(odd)} holds NaN or infinite values; "
            "lower the learning rate, or start from other weights"
        )
    entries = unsealed({**metadata, **own})
    fields = {"kind": "checkpoint", **provenance(["torch", "safetensors"])}
    fields |= {key: parsed(value) for key, value in entries.items() if key != "schema"}
    fields["thresholds"] = model.threshold_values()
    sidecar.write(path, safetensors.torch.save(tensors, sealed(tensors, entries)), fields)
