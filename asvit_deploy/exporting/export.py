"""Checkpoint to ONNX artefact: load, export, compare with PyTorch, then put in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from asvit_deploy import sidecar
from asvit_deploy.checkpoints.facts import fields_of
from asvit_deploy.checkpoints.load import Checkpoint, build_model, require_one_token
from asvit_deploy.checkpoints.places import name_of, source_of
from asvit_deploy.classes.network import OWN
from asvit_deploy.data.images import ImageSet
from asvit_deploy.errors import CheckFailed, UserError
from asvit_deploy.exporting.int8 import Kind
from asvit_deploy.exporting.quantised import quantised
from asvit_deploy.exporting.to_onnx import OPSET, to_onnx
from asvit_deploy.graph import opset_of, with_function
from asvit_deploy.models.archs import description
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import ViT
from asvit_deploy.parity import Parity, compare
from asvit_deploy.precision import FLOAT32
from asvit_deploy.reduction.methods import METHODS
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.runners.base import Remembered
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

# Sidecar fields that describe the file's surroundings and not the model; not repeated inside it.
_OUTSIDE = ("source", "tool", "libraries", "python", "command")


def default_output(checkpoint: Path, dense: bool, int8: bool = False) -> Path:
    """`as_deit_s.pt` -> `as_deit_s.onnx`, or `as_deit_s.dense.int8.onnx`, in the current folder."""
    return Path(name_of(checkpoint) + ".dense" * dense + ".int8" * int8 + ".onnx")


def require_adaptive(checkpoint: Checkpoint) -> None:
    """Raise UserError where a checkpoint has no method."""
    if not checkpoint.adaptive:
        ways = "run `asvit-deploy calibrate` (no training) or `finetune` on it, pass --method"
        if checkpoint.config.averages:  # thresholds, which are what trains, do not carry sizes
            able = ", ".join(name for name, made in METHODS.items() if made.carries_sizes)
            ways = f"run `asvit-deploy calibrate` on it, pass --method with one of {able}"
        raise UserError(
            f"{checkpoint.path} is a dense {checkpoint.config.name.removeprefix('as_')}, whose "
            f"tokens all stay; {ways}, or export it as it is with --dense"
        )
    if checkpoint.reduction is None:
        require_one_token(checkpoint)


def describe_model(
    model: ViT, checkpoint: Checkpoint, proto: onnx.ModelProto, batch: str, ops: str
) -> dict[str, Any]:
    """The sidecar fields that say what a model is and how its input is made."""
    config = model.config
    classes = checkpoint.metadata.get("classes")
    return {
        "kind": "onnx",
        "arch": config.name,
        **architecture_fields(config),
        "adaptive": model.adaptive,
        "image_size": config.image_size,
        "image_tokens": config.image_tokens,
        "num_classes": config.num_classes,
        "last_block": config.last_block,
        "classes": json.loads(classes) if classes else None,
        "classes_from": checkpoint.metadata.get("classes_from", OWN) if classes else None,
        **fields_of(config),
        **checkpoint.origins.fields(),
        **method_fields(model, checkpoint.metadata),
        "precision": FLOAT32.name,
        "mode": _mode(model),
        "batch": batch,
        "opset": opset_of(proto),
        "ir_version": proto.ir_version,
        "ops": ops if model.threshold_values() else "standard",
    }


def architecture_fields(config: ArchConfig) -> dict[str, Any]:
    """What a sidecar says of a network that is no row of the table, and of one that gives
    embeddings."""
    traits, fields = description(config), dict[str, Any]()
    if traits is not None:
        fields["architecture"] = traits
    if config.output != "logits":
        fields["output"] = config.output
    return fields


def _mode(model: ViT) -> str:
    if model.reduction is None:
        return "dense"
    return "dynamic" if model.threshold_values() else "static"


def method_fields(model: ViT, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a sidecar says of how a model's tokens leave: the one place here that knows a method."""
    budget, own = metadata.get("budget"), isinstance(model.reduction, Threshold)
    fields: dict[str, Any] = {
        "stages": list(model.config.stages) if own else [],
        "thresholds": model.threshold_values(),
        "budget": float(budget) if budget and model.adaptive else None,
    }
    if fields["budget"] is not None and "budget_by" in metadata:
        fields["budget_by"] = metadata["budget_by"]
    if model.config.prefix > 1:
        fields["prefix"] = model.config.prefix
    if model.reduction is not None and not own:
        fields |= {"reduction": model.reduction.fields(), "appended": model.reduction.appends}
    return fields


def embed_metadata(proto: onnx.ModelProto, fields: dict[str, Any]) -> None:
    """Write the fields into the file itself, one JSON value each, keys `asvit_<field>`."""
    values = {k: v for k, v in fields.items() if k not in _OUTSIDE and v is not None}
    onnx.helper.set_model_props(proto, {f"asvit_{k}": json.dumps(v) for k, v in values.items()})


def verify(
    proto: onnx.ModelProto, model: ViT, pictures: Sequence[NDArray[np.float32]],
    names: Sequence[str], batch: str, precision: str = FLOAT32.option,
) -> dict[str, Parity]:  # fmt: skip
    """Compare a model with PyTorch, one image at a time and, if it can, in batches.

    Args:
        pictures, names: as `parity.compare`.
        precision: a key of `parity.LIMITS`.
    """
    runner, reference = OrtRunner(with_function(proto)), Remembered(TorchRunner(model))
    thresholds, output = model.boundaries(), model.config.output
    return {
        f"batch {size}": compare(
            reference, runner, pictures, names, thresholds, precision, size, output
        )
        for size in ((1,) if batch == "1" else (1, 4))
    }


@dataclass(frozen=True)
class Made:
    """A graph that agrees with PyTorch, and what its sidecar says but for where it came from.

    Attributes:
        parity: how it agrees, by the size of the batches.
    """

    proto: onnx.ModelProto
    fields: dict[str, Any]
    parity: dict[str, Parity]

    def write(self, output: Path, **more: Any) -> None:
        """Put it in place with its sidecar, which gets `more` fields.

        Raises:
            UserError: as `sidecar.write`.
        """
        sidecar.write(output, self.proto.SerializeToString(), {**self.fields, **more})


def made(
    model: ViT, checkpoint: Checkpoint, pictures: Sequence[NDArray[np.float32]],
    names: Sequence[str], output: Path, batch: str = "1", ops: str = "auto",
    stage_outputs: bool = False, opset: int = OPSET, traced: onnx.ModelProto | None = None,
) -> Made:  # fmt: skip
    """A network's graph, compared with PyTorch.

    Args:
        model: the checkpoint's network, as it is to be exported.
        pictures, names: as `verify`.
        output: where it is to go, for messages.
        batch, ops, stage_outputs, opset: as `to_onnx`.
        traced: the graph, where there is one that these would make.

    Raises:
        CheckFailed: it does not agree.
    """
    proto = traced or to_onnx(model, batch, ops, opset, stage_outputs)
    fields = {**describe_model(model, checkpoint, proto, batch, ops), **sidecar.provenance()}
    embed_metadata(proto, fields)
    parity = verify(proto, model, pictures, names, batch)
    for name, result in parity.items():
        if not result.passed:
            raise CheckFailed(
                f"the exported model does not match PyTorch at {name} "
                f"({'; '.join(result.failures)}); {output} was not written"
            )
    return Made(proto, fields, parity)


def in_int8(
    one: Made, model: ViT, kind: Kind, pictures: Sequence[NDArray[np.float32]],
    names: Sequence[str], name: str, batch: str = "1",
) -> tuple[Made, str]:  # fmt: skip
    """Its int8 form, see `exporting.quantised`, and a line on it.

    Args:
        name: how messages call the model.

    Raises:
        UserError, CheckFailed: as `quantised`.
    """
    found = quantised(
        one.proto, kind, pictures, names,
        lambda proto, some, labels: verify(proto, model, some, labels, batch, "int8"), name,
    )  # fmt: skip
    fields = {**one.fields, "precision": "int8", "quantisation": found.fields}
    embed_metadata(found.model, fields)
    return Made(found.model, fields, found.parity), found.said()


def export(
    checkpoint: Checkpoint,
    output: Path,
    images: ImageSet,
    batch: str = "1",
    ops: str = "auto",
    dense: bool = False,
    stage_outputs: bool = False,
    ema: bool = False,
    opset: int = OPSET,
    int8: Kind | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Parity]:
    """Export a checkpoint; the file takes its place only once it agrees with PyTorch.

    Args:
        output: the ONNX file; its sidecar goes beside it.
        images: what the comparison runs on.
        batch: as `to_onnx`.
        ops: "auto", "custom" or "standard", see `to_onnx`.
        dense: export without the stages.
        stage_outputs: make `index_s` graph outputs too.
        ema: whether `checkpoint` was loaded from the averaged weights; recorded for later.
        opset: version of the standard ops, see `to_onnx`.
        int8: how linear layers are quantised, see `exporting.int8`; None: not at all.
        say: gets a line on which were.

    Returns:
        how what was written agrees, by the size of the batches.

    Raises:
        UserError: a dense checkpoint without `dense`, an output that cannot be written, or pictures
            that do not do for int8.
        CheckFailed: the exported model does not agree with PyTorch; nothing was written.
    """
    if not dense:
        require_adaptive(checkpoint)
    model = build_model(checkpoint, dense=dense)
    pictures, names = images.loaded()
    one = made(model, checkpoint, pictures, names, output, batch, ops, stage_outputs, opset)
    if int8 is not None:
        one, line = in_int8(one, model, int8, pictures, names, str(checkpoint.path), batch)
        say(line)
    source = source_of(checkpoint.path, format=checkpoint.format, ema=ema)
    one.write(output, source=source, compared={"pictures": images.source, **images.account})
    return one.parity
