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
import onnx_ir as ir

from asvit_deploy import graph
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
    above = Less (threshold, scores)
    keep = Or (above, is_best)
    class_row = GreaterOrEqual (first, none)
    mask = Concat <axis = 1> ({prefix}, keep)
    one_each = Cast <to = 7> (mask)
    length = ReduceSum <keepdims = 0> (one_each, axis_1)
    row = Constant <value = int64[1,{rows}] {{{all_rows}}}> ()
    absent = Constant <value = int64 {{-1}}> ()
    index = Where (mask, row, absent)
"""


def _stage_function(tokens: int, opset: int, prefix: int = 1) -> onnx.FunctionProto:
    """Which tokens stay: scores [B, N] -> mask [B, P+N], index [B, P+N], length [B]."""
    rows = prefix + tokens
    body = _BODY.format(
        tokens=tokens,
        twice=2 * tokens,
        rows=rows,
        prefix=", ".join(["class_row"] * prefix),
        places=", ".join(map(str, range(tokens))),
        all_rows=", ".join(map(str, range(rows))),
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
        Standard ops only. Input `images`; outputs `logits` or `embedding` and per stage
        `length_s` int64 [B], prefix included. Inside: `mask_s` bool [B, M], true where the row is
        in use after stage s; `index_s` int64 [B, M], the row's own number or -1; `scores_s` float32
        [B, N], -inf where the token was gone before stage s.

    Raises:
        UserError: there is no op node to replace, or its method needs masks that it lacks.
    """
    if not onnx_op.nodes_of(model.graph):
        raise UserError(
            f"{name} has no {onnx_op.OP_TYPE} node (dense, or exported with --ops standard); "
            "padded mode rewrites the file that `asvit-deploy export` makes by default"
        )
    rewrite = _Rewrite(model)
    if "asvit_reduction" in rewrite.model.metadata_props and not rewrite.masked:
        raise UserError(
            f"{name} takes one picture, and its method looks at tokens that padded mode leaves in "
            "place; export it with --batch dynamic"
        )
    rewrite.run()
    result = onnx.inliner.inline_local_functions(rewrite.closed())
    graph.keep_standard_opset(result)
    onnx.checker.check_model(result, full_check=True)
    return result


class _Rewrite(RowMask):
    """Replaces each op node, in order; what comes after it sees the mask of the last stage."""

    def __init__(self, source: onnx.ModelProto) -> None:
        known = graph.inferred(source)
        self.model = graph.opened(source)
        super().__init__(self.model.graph, graph.prefix_of(known))
        self.opset = graph.opset_of(source)
        # A batch of one has no masks in its graph; any other batch masks by `index_s >= 0`.
        self.masked = graph.batch_of(source) is None
        self.tokens = graph.rows_of(known["scores_0"])
        self.all_alive = self.constant(np.ones((1, self.tokens), bool), _ALL_ALIVE)

    def run(self) -> None:
        graph.forget_types(self.graph)
        stage = 0
        for node in list(self.graph):
            self.before = node
            if graph.is_cut(node):
                self._replace(node, stage)
                stage += 1
            elif not self.masked:
                self.hide(node)

    def closed(self) -> onnx.ModelProto:
        """The model with the stage's function, standard ops but for that."""
        self.model.functions.clear()
        properties = self.model.metadata_props
        properties |= {"asvit_mode": json.dumps("padded"), "asvit_ops": json.dumps("standard")}
        self.model.opset_imports[_DOMAIN] = 1
        result = graph.closed(self.model)
        result.functions.append(_stage_function(self.tokens, self.opset, self.prefix))
        return result

    def _replace(self, cut: ir.Node, stage: int) -> None:
        alive = self.all_alive
        if self.mask is not None:
            alive = self.image_mask()
            if not self.masked:
                assert cut.inputs[1] is not None
                self.hide_scores(cut.inputs[1])
        tokens, scores, threshold = cut.inputs
        compact, index, length, _ = cut.outputs
        assert tokens is not None
        names = [f"mask_{stage}", str(index.name), str(length.name)]
        inputs = [scores, threshold, alive]
        keep = self.insert(graph.node("Keep", inputs, names, name=cut.name, domain=_DOMAIN))
        self.mask = keep.outputs[0]
        for old, new in zip((index, length), keep.outputs[1:]):
            graph.redirect(old, new)
        graph.redirect(compact, tokens)
        graph.remove(self.graph, [cut])
