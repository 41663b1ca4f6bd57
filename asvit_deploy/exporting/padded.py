"""Padded mode: our ONNX with nothing removed, and what was dropped hidden from attention.

Every shape stays as it was at the input and every op is a standard one: a portable reference that
keeps exactly the tokens of dynamic mode and saves no work. It is a rewrite of the exported graph,
so no checkpoint is needed.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx.inliner
from onnx import helper

from asvit_deploy.errors import UserError
from asvit_deploy.exporting.row_mask import RowMask
from asvit_deploy.ops import onnx_op

_DOMAIN = "asvit.padded"
_ALL_ALIVE = "padded_all_alive"

# Dropped tokens carry -inf, which no threshold lets pass. The best is looked up among those alive,
# as the lowest rank: its place for the highest score, N + place for a NaN, 2 N + place for the
# rest. A NaN counts as the lowest finite number, so that the top is -inf only where every score is.
# A rank has no ties, so every runtime finds the same token. TopK, not ReduceMax and ReduceMin, as
# in the op's own function (`ops/onnx_op.py`).
_BODY = """
    lowest = Constant <value = float {{-3.4028234663852886e38}}> ()
    is_nan = IsNaN (scores)
    number = Where (is_nan, lowest, scores)
    axis_1 = Constant <value = int64[1] {{1}}> ()
    top, top_place = TopK <axis = 1, largest = 1, sorted = 1> (number, axis_1)
    highest = Equal (scores, top)
    is_top = And (highest, alive)
    none = Constant <value = float {{0}}> ()
    once = Constant <value = float {{{tokens}}}> ()
    twice = Constant <value = float {{{twice}}}> ()
    behind = Where (is_nan, once, twice)
    offset = Where (is_top, none, behind)
    place = Constant <value = float[1,{tokens}] {{{places}}}> ()
    rank = Add (place, offset)
    first, first_place = TopK <axis = 1, largest = 0, sorted = 1> (rank, axis_1)
    is_best = Equal (rank, first)
    above = Greater (scores, threshold)
    keep = Or (above, is_best)
    class_row = GreaterOrEqual (first, none)
    mask = Concat <axis = 1> (class_row, keep)
    one_each = Cast <to = 7> (mask)
    length = ReduceSum <keepdims = 0> (one_each, axis_1)
    row = Constant <value = int64[1,{rows}] {{{all_rows}}}> ()
    absent = Constant <value = int64 {{-1}}> ()
    index = Where (mask, row, absent)
"""


def _stage_function(tokens: int, opset: int) -> onnx.FunctionProto:
    """Which tokens stay: scores [B, N] -> mask [B, M], index [B, M], length [B]."""
    body = _BODY.format(
        tokens=tokens,
        twice=2 * tokens,
        rows=tokens + 1,
        places=", ".join(map(str, range(tokens))),
        all_rows=", ".join(map(str, range(tokens + 1))),
    )
    return onnx.parser.parse_function(
        f'<domain: "{_DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"Keep (scores, threshold, alive) => (mask, index, length)\n{{{body}}}"
    )


def to_padded(model: onnx.ModelProto, name: str = "model") -> onnx.ModelProto:
    """The padded form of a dynamic model of ours.

    Args:
        model: from `export`, float32, with its op nodes (`--ops auto` or `custom`).
        name: how messages call it.

    Returns:
        Standard ops only. Input `images`; outputs `logits` and per stage `length_s` int64 [B],
        class token included. Inside: `mask_s` bool [B, M], true where the row is in use after
        stage s; `index_s` int64 [B, M], the row's own number or -1; `scores_s` float32 [B, N], -inf
        where the token was gone before stage s.

    Raises:
        UserError: there is no op node to replace.
    """
    stages = len(onnx_op.nodes_of(model.graph))
    if not stages:
        raise UserError(
            f"{name} has no {onnx_op.OP_TYPE} node (dense, or exported with --ops standard); "
            "padded mode rewrites the file that `asvit-deploy export` makes by default"
        )
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _Rewrite(result).run()
    result = onnx.inliner.inline_local_functions(result)
    standard = [entry for entry in result.opset_import if not entry.domain]
    del result.opset_import[:]
    result.opset_import.extend(standard)
    properties = {entry.key: entry.value for entry in result.metadata_props}
    properties |= {"asvit_mode": json.dumps("padded"), "asvit_ops": json.dumps("standard")}
    helper.set_model_props(result, properties)
    onnx.checker.check_model(result, full_check=True)
    return result


class _Rewrite(RowMask):
    """Replaces each op node, in order; what comes after it sees the mask of the last stage."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model.graph)
        self.model = model
        self.opset = {entry.domain: entry.version for entry in model.opset_import}[""]
        # A batch of one has no masks in its graph; any other batch masks by `index_s >= 0`.
        self.masked = not self.graph.input[0].type.tensor_type.shape.dim[0].dim_value
        self.tokens = _tokens(model)
        self.compacted: dict[str, str] = {}
        self.stage = -1

    def run(self) -> None:
        graph = self.graph
        self.constant(np.ones((1, self.tokens), bool), _ALL_ALIVE)
        for node in list(graph.node):
            node.input[:] = [self.compacted.get(value, value) for value in node.input]
            if (node.domain, node.op_type) == (onnx_op.DOMAIN, onnx_op.OP_TYPE):
                self._replace(node)
            else:
                if not self.masked:
                    self.hide(node)
                self.nodes.append(node)
        del graph.node[:], graph.value_info[:], self.model.functions[:]
        graph.node.extend(self.nodes)
        self.model.functions.append(_stage_function(self.tokens, self.opset))
        self.model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))

    def _replace(self, node: onnx.NodeProto) -> None:
        tokens, scores, threshold = node.input
        compact, index, length, _ = node.output
        alive = _ALL_ALIVE
        if self.mask is not None:
            alive = self.image_mask()
            if not self.masked:
                self.hide_scores(scores)
        self.stage += 1
        self.mask = f"mask_{self.stage}"
        outputs = [self.mask, index, length]
        inputs = [scores, threshold, alive]
        self.nodes.append(helper.make_node("Keep", inputs, outputs, node.name, domain=_DOMAIN))
        self.compacted[compact] = tokens


def _tokens(model: onnx.ModelProto) -> int:
    """N, from the shape of the first stage's scores."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = {info.name: info for info in graph.value_info}
    return infos["scores_0"].type.tensor_type.shape.dim[1].dim_value
