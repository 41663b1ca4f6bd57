"""Bucketed mode: our ONNX cut at its op nodes into segments of standard ops.

Between two segments the tokens that stay are compacted and padded with zero rows to a bucket; a
segment takes any number of rows and keeps the padding out of what it sums or compares over tokens.
It is a rewrite of the exported graph, so no checkpoint is needed.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from asvit_deploy import graph
from asvit_deploy.errors import UserError
from asvit_deploy.exporting.row_mask import RowMask
from asvit_deploy.models.config import OUTPUTS
from asvit_deploy.ops import onnx_op
from asvit_deploy.reduction.methods import METHODS

_ROWS, _IMAGE_ROWS = "rows", "image_rows"  # symbolic dimensions of a segment's tokens and scores


def split_segments(model: onnx.ModelProto, name: str = "model") -> list[onnx.ModelProto]:
    """Cut a dynamic model of ours into one segment more than it has op nodes.

    Args:
        model: from `export` with `--batch 1` and its op nodes (`--ops auto` or `custom`), float32
            or after `to_half`; T is the type of its tokens.
        name: how messages call it.

    Returns:
        The first: `images` float32 [1, 3, H, W] -> `tokens` T [1, M, D], `scores` float32
        [1, M-P]. Those between: `kept` T [1, rows, D], `length` int64 [1] -> `tokens` T
        [1, rows, D], `scores` float32 [1, rows-P]. The last: `kept`, `length` -> `logits` or
        `embedding` float32 [1, C]. Rows of `kept` from `length` on must be finite (by contract
        zero); nothing depends on them, and their scores are -inf.

    Raises:
        UserError: there is no op node to cut at, the batch is not fixed to one image, or the method
            hands more than tokens on.
    """
    stages = len(onnx_op.nodes_of(model.graph))
    if not stages:
        raise UserError(
            f"{name} has no {onnx_op.OP_TYPE} node (dense, or exported with --ops standard); "
            "bucketed mode cuts the file that `asvit-deploy export` makes by default"
        )
    if graph.batch_of(model) != 1:
        raise UserError(
            f"{name} has a dynamic batch, and bucketed mode runs one image at a time; export it "
            "with --batch 1"
        )
    properties = {entry.key: entry.value for entry in model.metadata_props}
    method = json.loads(properties.get("asvit_reduction", "{}")).get("name")
    if method is not None and METHODS[method].hands_on():
        raise UserError(
            f"{name} is of the method {method}, whose rows carry more than their tokens, and "
            "bucketed mode hands on tokens alone; build it dynamic, or with --mode padded"
        )
    known = graph.inferred(model)
    return [_Segment(model, known, number, number == stages).made() for number in range(stages + 1)]


def thresholds_of(model: onnx.ModelProto) -> list[float]:
    """The thresholds that the op nodes of a model compare with, in stage order."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = onnx_op.nodes_of(model.graph)
    return [numpy_helper.to_array(values[node.input[2]]).item() for node in nodes]


def rows_of(segments: list[onnx.ModelProto]) -> int:
    """M: the rows that the first segment puts out, prefix included."""
    return segments[0].graph.output[0].type.tensor_type.shape.dim[1].dim_value


def prefix_of(segments: list[onnx.ModelProto]) -> int:
    """P: the rows that the first segment puts out and does not score."""
    return rows_of(segments) - segments[0].graph.output[1].type.tensor_type.shape.dim[1].dim_value


class _Segment:
    """What lies behind cut `number` - 1 and before cut `number`.

    Args:
        known: every value of the whole model with its type and shape.
        last: nothing is cut behind it.
    """

    def __init__(
        self, source: onnx.ModelProto, known: dict[str, ir.Value], number: int, last: bool
    ) -> None:
        self.known, self.number, self.last = known, number, last
        self.model = graph.opened(source)
        self.graph = self.model.graph
        self.kinds = {name: value.dtype or ir.DataType.FLOAT for name, value in known.items()}
        self.prefix = graph.prefix_of(known)
        tokens = known["tokens_0"]
        assert tokens.dtype is not None
        assert tokens.shape is not None
        self.kind, (_, self.rows, self.width) = tokens.dtype, tokens.shape

    def made(self) -> onnx.ModelProto:
        cuts = graph.cuts_of(self.graph)
        graph.forget_types(self.graph)
        output = next(value for value in self.graph.outputs if value.name in OUTPUTS)
        self.graph.outputs[:] = [output] if self.last else self._ends(cuts[self.number])
        if self.number:
            self._begin(cuts[self.number - 1])
        graph.prune(self.graph)
        if self.number:
            self._hide_padding()
        self.model.functions.clear()
        properties = self.model.metadata_props
        if "asvit_mode" in properties:
            properties["asvit_mode"] = json.dumps("bucketed")
        properties["asvit_stage"] = json.dumps(self.number)
        self.graph.name = f"stage_{self.number}"
        self.graph.metadata_props.clear()  # which says what was traced: the whole
        self.model.producer_name = self.model.producer_version = None
        result = graph.closed(self.model)
        graph.keep_standard_opset(result)
        onnx.checker.check_model(result, full_check=True)
        return result

    def _ends(self, cut: ir.Node) -> list[ir.Value]:
        """What comes to the cut, as outputs of the segment."""
        tokens, scores, _ = cut.inputs
        assert tokens is not None
        assert scores is not None
        rows, image_rows = (_ROWS, _IMAGE_ROWS) if self.number else (
            self.rows, self.rows - self.prefix)  # fmt: skip
        tokens.name, tokens.dtype = "tokens", self.kind
        tokens.shape = ir.Shape([1, rows, self.width])
        scores.name, scores.dtype = "scores", ir.DataType.FLOAT
        scores.shape = ir.Shape([1, image_rows])
        return [tokens, scores]

    def _begin(self, cut: ir.Node) -> None:
        """Take what the cut leaves as inputs of the segment."""
        kept = ir.Value(name="kept", type=ir.TensorType(self.kind),
                        shape=ir.Shape([1, _ROWS, self.width]))  # fmt: skip
        length = ir.Value(name="length", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
        graph.redirect(cut.outputs[0], kept)
        self.graph.inputs[:] = [kept, length]

    def _hide_padding(self) -> None:
        """Hide the rows from `length` on."""
        kept, length = self.graph.inputs
        mask = RowMask(self.graph, self.prefix)
        nodes = list(self.graph)
        mask.mask = _rows_in_use(mask, kept, length)
        for node in nodes:
            mask.before = node
            mixed = node.inputs[0].name if node.inputs and node.inputs[0] is not None else ""
            mask.hide(node, self.kinds.get(mixed or "", ir.DataType.FLOAT))
        if not self.last:
            mask.before = None
            mask.hide_scores(self.graph.outputs[1])


def _rows_in_use(mask: RowMask, kept: ir.Value, length: ir.Value) -> ir.Value:
    """bool [1, rows]: the row's number is below `length`."""
    numbers = {"zero": 0, "one": 1}
    zero, zero_1d, one, _ = (
        mask.constant(np.array(value, np.int64), f"rows_{name}")
        for label, number in numbers.items()
        for name, value in ((label, number), (f"{label}_1d", [number]))
    )
    shape = mask.add("Shape", [kept], "rows_shape")
    count = mask.add("Gather", [shape, one], "rows_count")
    number = mask.add("Range", [zero, count, one], "rows_number")
    below = mask.add("Less", [number, length], "rows_below")
    return mask.add("Unsqueeze", [below, zero_1d], "in_use")
