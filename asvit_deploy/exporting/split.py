"""Bucketed mode: our ONNX cut at its op nodes into models of standard ops.

Between two stages the tokens that stay are compacted and padded with zero rows to a bucket; a
stage takes any number of rows and keeps the padding out of what it sums or compares over tokens.
It is a rewrite of the exported graph, so no checkpoint is needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from asvit_deploy.errors import UserError
from asvit_deploy.exporting.row_mask import RowMask
from asvit_deploy.ops import onnx_op

_ROWS, _IMAGE_ROWS = "rows", "image_rows"  # symbolic dimensions of a stage's tokens and scores


def split_stages(model: onnx.ModelProto, name: str = "model") -> list[onnx.ModelProto]:
    """Cut a dynamic model of ours into one stage model more than it has op nodes.

    Args:
        model: from `export` with `--batch 1` and its op nodes (`--ops auto` or `custom`), float32
            or after `to_half`; T is the type of its tokens.
        name: how messages call it.

    Returns:
        The first: `images` float32 [1, 3, H, W] -> `tokens` T [1, M, D], `scores` float32
        [1, M-1]. Those between: `kept` T [1, rows, D], `length` int64 [1] -> `tokens` T
        [1, rows, D], `scores` float32 [1, rows-1]. The last: `kept`, `length` -> `logits` float32
        [1, C]. Rows of `kept` from `length` on must be finite (by contract zero); nothing depends
        on them, and their scores are -inf.

    Raises:
        UserError: there is no op node to cut at, or the batch is not fixed to one image.
    """
    nodes = onnx_op.nodes_of(model.graph)
    if not nodes:
        raise UserError(
            f"{name} has no {onnx_op.OP_TYPE} node (dense, or exported with --ops standard); "
            "bucketed mode cuts the file that `asvit-deploy export` makes by default"
        )
    if model.graph.input[0].type.tensor_type.shape.dim[0].dim_value != 1:
        raise UserError(
            f"{name} has a dynamic batch, and bucketed mode runs one image at a time; export it "
            "with --batch 1"
        )
    tokens = _Tokens.of(model)
    starts = [None, *(node.output[0] for node in nodes)]
    ends = [*({node.input[0]: "tokens", node.input[1]: "scores"} for node in nodes), _LAST]
    return [
        _stage(model, s, start, end, tokens) for s, (start, end) in enumerate(zip(starts, ends))
    ]


def thresholds_of(model: onnx.ModelProto) -> list[float]:
    """The thresholds that the op nodes of a model compare with, in stage order."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = onnx_op.nodes_of(model.graph)
    return [numpy_helper.to_array(values[node.input[2]]).item() for node in nodes]


def rows_of(stages: list[onnx.ModelProto]) -> int:
    """M: the rows that the first stage puts out, class token included."""
    return stages[0].graph.output[0].type.tensor_type.shape.dim[1].dim_value


_LAST = {"logits": "logits"}


@dataclass(frozen=True)
class _Tokens:
    """Type and shape [1, M, D] of the tokens in front of the first op node."""

    kind: int
    rows: int
    width: int

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Tokens:
        graph = onnx.shape_inference.infer_shapes(model).graph
        name = onnx_op.nodes_of(graph)[0].input[0]
        kind = next(info.type.tensor_type for info in graph.value_info if info.name == name)
        return cls(kind.elem_type, *(dim.dim_value for dim in kind.shape.dim[1:]))


def _stage(
    model: onnx.ModelProto, number: int, start: str | None, ends: dict[str, str], tokens: _Tokens
) -> onnx.ModelProto:
    """What lies between the op's output `start` and the values `ends` (old name: new name)."""
    stage = onnx.ModelProto(ir_version=model.ir_version)
    stage.opset_import.extend(entry for entry in model.opset_import if not entry.domain)
    names = {**ends, start: "kept"} if start else ends
    for source in _between(model.graph, start, ends):
        node = stage.graph.node.add()
        node.CopyFrom(source)
        node.input[:] = [names.get(value, value) for value in source.input]
        node.output[:] = [names.get(value, value) for value in source.output]
    used = {value for node in stage.graph.node for value in node.input}
    stage.graph.initializer.extend(t for t in model.graph.initializer if t.name in used)
    stage.graph.name = f"stage_{number}"
    _declare(stage.graph, model.graph, tokens, first=start is None)
    if start is not None:
        _mask_padding(stage)
    for entry in model.metadata_props:
        value = json.dumps("bucketed") if entry.key == "asvit_mode" else entry.value
        stage.metadata_props.add(key=entry.key, value=value)
    stage.metadata_props.add(key="asvit_stage", value=json.dumps(number))
    onnx.checker.check_model(stage, full_check=True)
    return stage


def _between(
    graph: onnx.GraphProto, start: str | None, ends: dict[str, str]
) -> list[onnx.NodeProto]:
    """The nodes that `ends` depend on, in order, not looking past `start`."""
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    found: set[int] = set()
    waiting = list(ends)
    while waiting:
        value = waiting.pop()
        number = producer.get(value)
        if value != start and number is not None and number not in found:
            found.add(number)
            waiting.extend(graph.node[number].input)
    return [graph.node[number] for number in sorted(found)]


def _declare(graph: onnx.GraphProto, whole: onnx.GraphProto, tokens: _Tokens, first: bool) -> None:
    """Inputs and outputs of a stage."""
    rows, image_rows = (tokens.rows, tokens.rows - 1) if first else (_ROWS, _IMAGE_ROWS)
    shape = [1, rows, tokens.width]
    info = helper.make_tensor_value_info
    if first:
        graph.input.append(whole.input[0])
    else:
        graph.input.append(info("kept", tokens.kind, shape))
        graph.input.append(info("length", TensorProto.INT64, [1]))
    made = {value for node in graph.node for value in node.output}
    if "logits" in made:
        graph.output.append(next(output for output in whole.output if output.name == "logits"))
    else:
        graph.output.append(info("tokens", tokens.kind, shape))
        graph.output.append(info("scores", TensorProto.FLOAT, [1, image_rows]))


def _mask_padding(stage: onnx.ModelProto) -> None:
    """Hide the rows from `length` on."""
    inferred = onnx.shape_inference.infer_shapes(stage).graph
    kinds = {info.name: info.type.tensor_type.elem_type for info in inferred.value_info}
    graph = stage.graph
    mask = RowMask(graph)
    mask.mask = _rows_in_use(mask)
    scored = False
    for node in list(graph.node):
        mask.hide(node, kinds.get(node.input[0], TensorProto.FLOAT))
        mask.nodes.append(node)
        scored = scored or "scores" in node.output
    if scored:
        mask.hide_scores("scores")
    del graph.node[:]
    graph.node.extend(mask.nodes)


def _rows_in_use(mask: RowMask) -> str:
    """bool [1, rows]: the row's number is below `length`."""
    for name, value in (("zero", 0), ("one", 1)):
        mask.constant(np.array(value, np.int64), f"rows_{name}")
        mask.constant(np.array([value], np.int64), f"rows_{name}_1d")
    mask.add("Shape", ["kept"], "rows_shape")
    mask.add("Gather", ["rows_shape", "rows_one"], "rows_count")
    mask.add("Range", ["rows_zero", "rows_count", "rows_one"], "rows_number")
    mask.add("Less", ["rows_number", "length"], "rows_below")
    return mask.add("Unsqueeze", ["rows_below", "rows_zero_1d"], "in_use")
