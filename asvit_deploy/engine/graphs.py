"""The graph that an engine is built from: the artefact's own, in the mode and precision wanted."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from asvit_deploy.engine.source import Source
from asvit_deploy.errors import UserError
from asvit_deploy.exporting.half import to_half
from asvit_deploy.exporting.masked import with_masks
from asvit_deploy.exporting.padded import to_padded
from asvit_deploy.ops import onnx_op
from asvit_deploy.precision import Half


def make_graph(
    source: Source, mode: str, precision: Half | None, physical: Collection[int] | None = None
) -> onnx.ModelProto:
    """The graph of that mode and precision; its op nodes still have their function.

    Args:
        physical: stages at which rows really leave, see `exporting.masked`; None: all.

    Raises:
        UserError: the file is foreign, or has not what the mode needs.
    """
    model, name = source.model, str(source.path)
    if source.artefact is None and (mode != "dynamic" or precision):
        raise UserError(
            f"{name} has no sidecar, so it is built as it is: leave --mode {mode}, --fp16 and "
            "--bf16 out, or name a file that `asvit-deploy export` made"
        )
    _refuse_int8(source, mode, precision)
    static = source.fields.get("mode") == "static"
    if static and mode != "dynamic":
        raise UserError(f"the rows of {name} are fixed already; leave --mode {mode} out")
    if mode == "padded":
        model = to_padded(model, name)
    elif source.adaptive and not static and not onnx_op.nodes_of(model.graph):
        raise UserError(
            f"{name} was exported with --ops standard, which builds no {mode} engine; "
            "export it with --ops auto"
        )
    if physical is not None:
        model = with_masks(model, physical, name)
    return to_half(model, precision, name) if precision else model


def _refuse_int8(source: Source, mode: str, precision: Half | None) -> None:
    """Raise UserError where an int8 file cannot become that engine."""
    if source.fields.get("precision") != "int8":
        return
    if source.fields.get("quantisation", {}).get("kind") != "static":
        raise UserError(
            f"{source.path} is int8 by each picture's own ranges, which TensorRT does not read; "
            "export it with --int8 static"
        )
    if precision:
        raise UserError(f"{source.path} is int8 already; leave --{precision} out")
    if mode != "dynamic":
        raise UserError(
            f"{source.path} is int8, which is built in dynamic mode alone; leave --mode {mode} out"
        )
