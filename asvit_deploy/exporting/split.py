"""Bucketed mode: our ONNX cut at its op nodes into segments of standard ops.

Between two segments the tokens that stay are compacted and padded with zero rows to a bucket; a
segment takes any number of rows and keeps the padding out of what it sums or compares over tokens.
What a method keeps of each row beside its token, its size, is compacted and padded with it. It is a
rewrite of the exported graph, so no checkpoint is needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from asvit_deploy import graph
from asvit_deploy.errors import UserError
from asvit_deploy.exporting.row_mask import RowMask
from asvit_deploy.models.config import OUTPUTS
from asvit_deploy.ops import onnx_op
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.reduction.methods import method_of
from asvit_deploy.runners.bucketed import INTO, KEPT, SIZES

_ROWS, _IMAGE_ROWS = "rows", "image_rows"  # symbolic dimensions of a segment's tokens and scores


def split_segments(model: onnx.ModelProto, name: str = "model") -> list[onnx.ModelProto]:
    """Cut a dynamic model of ours into one segment more than it has op nodes.

    Args:
        model: from `export` with its op nodes (`--ops auto` or `custom`), float32 or after
            `to_half`; T is the type of its tokens. With `--batch 1`, or `--batch dynamic` where the
            method hands sizes on or compares rows.
        name: how messages call it.

    Returns:
        The first: `images` float32 [1, 3, H, W] -> `tokens` T [1, M, D], `scores` float32
        [1, M-P]. Those between: `kept` T [1, rows, D], `length` int64 [1] -> `tokens` T
        [1, rows, D], `scores` float32 [1, rows-P]. The last: `kept`, `length` -> `logits` or
        `embedding` float32 [1, C]. Rows of `kept` from `length` on must be finite (by contract
        zero); nothing depends on them, and their scores are -inf.

        Of a method that hands sizes on, segments also put out `sizes` float32 [1, rows], as the
        rows are to carry it on, and `into` int64 [1, rows] where the method has one; the next one
        takes the kept rows' sizes as `kept_sizes`, if it needs them.

    Raises:
        UserError: there is no op node to cut at, the file is of another batch, or the method adds
            rows.
    """
    stages = len(onnx_op.nodes_of(model.graph))
    if not stages:
        raise UserError(
            f"{name} has no {onnx_op.OP_TYPE} node (dense, or exported with --ops standard); "
            "bucketed mode cuts the file that `asvit-deploy export` makes by default"
        )
    _refuse_misfit(model, name)
    known = graph.inferred(model)
    return [_Segment(model, known, number, number == stages).made() for number in range(stages + 1)]


def _refuse_misfit(model: onnx.ModelProto, name: str) -> None:
    """Raise UserError for a method or a batch that segments are not made of."""
    graph.refuse_packed(model, name)
    method, batch = _method_of(model), graph.batch_of(model)
    named = "its method" if method is None else f"its method {method.name}"
    whole = graph.opened(model).graph
    made = graph.values_of(whole)
    if "all_scores_0" in made or (method is not None and method.appends):
        raise UserError(
            f"{name} cannot be cut into segments: {named} adds rows at each cut, and buckets hold "
            "those that stay; build it dynamic, or with --mode padded"
        )
    sizes = any(_sizes_of(cut) for cut in graph.cuts_of(whole))
    looks = method is not None and (method.hands_on() or method.compares)
    if sizes or "into_0" in made or looks:
        if batch is not None:
            raise UserError(
                f"{name} takes one picture, and {named} looks at rows that only fill a bucket; "
                "export it with --batch dynamic"
            )
    elif batch != 1:
        raise UserError(
            f"{name} has a dynamic batch, and bucketed mode runs one image at a time; export it "
            "with --batch 1"
        )


def _method_of(model: onnx.ModelProto) -> type[Reduction] | None:
    """The method that the file's own metadata name."""
    properties = {entry.key: entry.value for entry in model.metadata_props}
    return method_of({"reduction": json.loads(properties.get("asvit_reduction", "null"))})


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
        # Graphs of any batch hide by `index_s >= 0` what only pads, and its scores are -inf.
        self.masked = graph.batch_of(source) is None
        tokens = known["tokens_0"]
        assert tokens.dtype is not None
        assert tokens.shape is not None
        self.kind, (_, self.rows, self.width) = tokens.dtype, tokens.shape

    def made(self) -> onnx.ModelProto:
        cuts = graph.cuts_of(self.graph)
        graph.forget_types(self.graph)
        if self.masked:
            self._take_one_picture()
        output = next(value for value in self.graph.outputs if value.name in OUTPUTS)
        self.graph.outputs[:] = [output] if self.last else self._ends(cuts[self.number])
        if self.number:
            self._begin(cuts[self.number - 1])
        graph.prune(self.graph)
        if self.number and not self.masked:
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
        return [tokens, scores, *self._beside(cut, tokens.shape[:2])]

    def _beside(self, cut: ir.Node, shape: Sequence[int | ir.SymbolicDim]) -> list[ir.Value]:
        """What comes to the cut beside them: sizes that are used behind it, and `into`."""
        if not self.masked:
            return []
        ends, into = [], graph.values_of(self.graph).get(f"into_{self.number}")
        if (sizes := _sizes_of(cut)) is not None:
            end = sizes[0]
            # float32 in every precision, whatever half graphs make of it
            if self.kinds.get(str(end.name), ir.DataType.FLOAT) != ir.DataType.FLOAT:
                cast = graph.cast(end, SIZES, ir.DataType.FLOAT)
                self.graph.append(cast)
                end = cast.outputs[0]
            ends.append((end, SIZES, ir.DataType.FLOAT))
        if into is not None:
            ends.append((into, INTO, ir.DataType.INT64))
        for value, name, kind in ends:
            value.name, value.dtype, value.shape = name, kind, ir.Shape(shape)
        return [value for value, *_ in ends]

    def _begin(self, cut: ir.Node) -> None:
        """Take what the cut leaves as inputs of the segment."""
        kept = ir.Value(name="kept", type=ir.TensorType(self.kind),
                        shape=ir.Shape([1, _ROWS, self.width]))  # fmt: skip
        length = ir.Value(name="length", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
        graph.redirect(cut.outputs[0], kept)
        self.graph.inputs[:] = [kept, length]
        if self.masked:
            self._number_rows(cut, kept, length)

    def _number_rows(self, cut: ir.Node, kept: ir.Value, length: ir.Value) -> None:
        """Stand in for the cut's index: rows in use have their own number, all others -1."""
        mask = RowMask(self.graph, self.prefix)
        number, in_use = _rows_in_use(mask, kept, length)
        absent, sizes = mask.constant(np.int64(-1), "rows_absent"), _sizes_of(cut)
        graph.redirect(cut.outputs[1], mask.add("Where", [in_use, number, absent], "rows_index"))
        if sizes is None:
            return
        given = ir.Value(name=KEPT + SIZES, type=ir.TensorType(ir.DataType.FLOAT),
                         shape=ir.Shape([1, _ROWS]))  # fmt: skip
        self.graph.inputs.append(given)
        one = mask.constant(np.float32(1), "rows_size")  # nothing divides by it, or takes its log
        in_place = mask.add("Where", [in_use, given, one], "sizes_in_use")
        kind = self.kinds.get(str(sizes[1].name), ir.DataType.FLOAT)
        if kind != ir.DataType.FLOAT:
            in_place = mask.insert(graph.cast(in_place, "sizes_rounded", kind)).outputs[0]
        graph.redirect(sizes[1], in_place)

    def _take_one_picture(self) -> None:
        """Make a graph of any batch one of a single picture."""
        one = graph.constant(self.graph, ir.tensor(np.array([1], np.int64), name="one_picture"))
        for node in list(self.graph):
            if node.op_type == "Shape" and _ends_of(node) == (0, 1) and self._counts_pictures(node):
                graph.redirect(node.outputs[0], one)
        for value in (self.graph.inputs[0], *self.graph.outputs):
            if value.shape is not None:
                value.shape = ir.Shape([1, *value.shape[1:]])

    def _counts_pictures(self, node: ir.Node) -> bool:
        shape = self.known[str(node.inputs[0].name)].shape if node.inputs[0] is not None else None
        return shape is None or not isinstance(shape[0], int)

    def _hide_padding(self) -> None:
        """Hide the rows from `length` on."""
        kept, length = self.graph.inputs
        mask = RowMask(self.graph, self.prefix)
        nodes = list(self.graph)
        _, mask.mask = _rows_in_use(mask, kept, length)
        for node in nodes:
            mask.before = node
            mixed = node.inputs[0].name if node.inputs and node.inputs[0] is not None else ""
            mask.hide(node, self.kinds.get(mixed or "", ir.DataType.FLOAT))
        if not self.last:
            mask.before = None
            mask.hide_scores(self.graph.outputs[1])


def _sizes_of(cut: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The rows' sizes in front of a cut and behind it, which move by its index; None where nothing
    behind it asks for them.
    """
    waiting = list(cut.outputs[1].uses())
    while waiting:
        user, position = waiting.pop()
        if user.op_type == "GatherElements" and position == 1:
            assert user.inputs[0] is not None
            return user.inputs[0], user.outputs[0]
        if user.op_type in _OF_AN_INDEX:
            waiting.extend(user.outputs[0].uses())
    return None


_OF_AN_INDEX = ("Reshape", "Clip", "Max")  # what stands between the op's index and a gather by it


def _ends_of(node: ir.Node) -> tuple[int, int | None]:
    """The dimensions of which a Shape speaks."""
    first, last = (node.attributes.get(name) for name in ("start", "end"))
    return first.as_int() if first is not None else 0, last.as_int() if last is not None else None


def _rows_in_use(
    mask: RowMask, kept: ir.Value, length: ir.Value
) -> tuple[ir.Value, ir.Value]:  # fmt: skip
    """Each row's number, int64 [rows], and whether it is below `length`, bool [1, rows]."""
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
    return number, mask.add("Unsqueeze", [below, zero_1d], "in_use")
