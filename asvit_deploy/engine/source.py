"""What an engine is built from: an ONNX artefact of ours, or a foreign file without our ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper

from asvit_deploy import sidecar
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.errors import UserError
from asvit_deploy.ops import onnx_op
from asvit_deploy.runners.base import Reference
from asvit_deploy.runners.onnx_runtime import load_model


@dataclass
class Source:
    """An ONNX file.

    Attributes:
        path: the file.
        model: its contents.
        artefact: the artefact it is, or None for a foreign file.
        reference: what its graphs were compared with (`engine.comparison`), kept for the next one.
        tried: whether it was run in a child first (`engine.comparison`).
    """

    path: Path
    model: onnx.ModelProto
    artefact: OnnxArtefact | None
    reference: tuple[Reference, str] | None = None
    tried: bool = False

    @property
    def adaptive(self) -> bool:
        return self.artefact is not None and self.artefact.adaptive

    @property
    def needs_plugin(self) -> bool:
        """Whether its graph holds the op."""
        return bool(onnx_op.nodes_of(self.model.graph))

    @property
    def fields(self) -> dict[str, Any]:
        """The sidecar's fields; empty for a foreign file."""
        return self.artefact.fields if self.artefact else {}


def open_source(path: Path) -> Source:
    """Open an ONNX file and find out whose it is.

    Raises:
        UserError: it is no ONNX file, a sidecar or an op node of it was tampered with, or it is
            foreign and holds ops that no plugin of ours provides.
    """
    if sidecar.sidecar_path(path).is_file():
        artefact = OnnxArtefact(path)
        _check_nodes(path, artefact.model, len(artefact.fields["thresholds"]))
        _check_thresholds(path, artefact.model, artefact.fields["thresholds"])
        return Source(path, artefact.model, artefact)
    model = load_model(path)
    foreign = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    if _claims_to_be_ours(model) or foreign == [onnx_op.DOMAIN]:
        sidecar.read(path)  # raises: it is ours, and its sidecar is missing
    if foreign:
        raise UserError(
            f"{path} holds ops of {', '.join(foreign)}, for which there is no plugin here; "
            "name a file that `asvit-deploy export` made"
        )
    return Source(path, model, None)


def _claims_to_be_ours(model: onnx.ModelProto) -> bool:
    return any(entry.key.startswith("asvit_") for entry in model.metadata_props)


def _check_nodes(path: Path, model: onnx.ModelProto, stages: int) -> None:
    """Raise UserError where the op's nodes are not those that `export` writes."""
    export = "export it again"
    for entry in model.opset_import:
        if entry.domain == onnx_op.DOMAIN and entry.version != onnx_op.VERSION:
            raise UserError(
                f"{path} uses version {entry.version} of the {onnx_op.DOMAIN} ops, this version "
                f"of the tool knows {onnx_op.VERSION}; {export}"
            )
    ours = [node for node in model.graph.node if node.domain == onnx_op.DOMAIN]
    for node in ours:
        if node.op_type != onnx_op.OP_TYPE:
            raise UserError(f"{path}: node {node.name} is an unknown op {node.op_type}; {export}")
        attributes = {a.name: a.s.decode(errors="replace") for a in node.attribute}
        if attributes != onnx_op.PLUGIN_ATTRIBUTES:
            raise UserError(
                f"{path}: node {node.name} carries {attributes or 'no attributes'} where "
                f"{onnx_op.PLUGIN_ATTRIBUTES} must stand; {export}"
            )
        if (len(node.input), len(node.output)) != (len(onnx_op.INPUTS), len(onnx_op.OUTPUTS)):
            raise UserError(
                f"{path}: node {node.name} has {len(node.input)} inputs and {len(node.output)} "
                f"outputs, {len(onnx_op.INPUTS)} and {len(onnx_op.OUTPUTS)} must be; {export}"
            )
        if empty := [known for known, name in zip(onnx_op.INPUTS, node.input) if not name]:
            raise UserError(f"{path}: node {node.name} has no {empty[0]}; {export}")
    if ours and len(ours) != stages:
        raise UserError(f"{path} holds {len(ours)} op nodes, its sidecar says {stages}; {export}")


def _check_thresholds(path: Path, model: onnx.ModelProto, thresholds: Sequence[float]) -> None:
    """Raise UserError where a node does not compare with what the sidecar says of its stage."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = onnx_op.nodes_of(model.graph)
    for node, threshold in zip(nodes, thresholds):
        tensor = values.get(node.input[2])
        if tensor is None or tensor.dims or tensor.data_type != onnx.TensorProto.FLOAT:
            raise UserError(
                f"{path}: the threshold of node {node.name} is no float32 number in the file; "
                "export it again"
            )
        found = onnx.numpy_helper.to_array(tensor).item()
        if found != np.float32(threshold):
            raise UserError(
                f"{path}: the threshold of node {node.name} is {found:.8g}, its sidecar says "
                f"{threshold:.8g}; export it again"
            )
