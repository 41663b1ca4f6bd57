"""Padded mode: our ONNX with nothing removed, and what was dropped hidden from attention.

Every shape stays as it was at the input and every op is a standard one: a portable reference that
keeps exactly the tokens of dynamic mode and saves no work. It is a rewrite of the exported graph,
so no checkpoint is needed.
"""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir

from asvit_deploy import graph
from asvit_deploy.errors import UserError
from asvit_deploy.exporting.row_mask import RowMask
from asvit_deploy.ops import onnx_op

DOMAIN = "asvit.padded"  # of the functions that stand for cuts until they are inlined
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


def _stage_function(
    tokens: int, opset: int, prefix: int = 1, name: str = "Keep"
) -> onnx.FunctionProto:
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
        f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\n'
        f"{name} (scores, threshold, alive) => (mask, index, length)\n{{{body}}}"
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
    graph.refuse_packed(model, name)
    rewrite = Rewrite(model)
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


class Rewrite(RowMask):
    """Replaces op nodes, in order; what comes after one sees the mask of the last stage."""

    def __init__(self, source: onnx.ModelProto) -> None:
        known = graph.inferred(source)
        self.model = graph.opened(source)
        super().__init__(self.model.graph, graph.prefix_of(known))
        self.opset = graph.opset_of(source)
        # A batch of one has no masks in its graph; any other batch masks by `index_s >= 0`.
        self.masked = graph.batch_of(source) is None
        self.tokens = graph.rows_of(known["scores_0"])
        # Rows that a method adds at each cut are ranked there with the others.
        ranked = known.get("all_scores_0", known["scores_0"])
        self.appends = graph.rows_of(ranked) - self.tokens
        self.functions: dict[str, onnx.FunctionProto] = {}

    def run(self, physical: Collection[int] = ()) -> None:
        """Replace the op nodes of all stages but those that are `physical`."""
        graph.forget_types(self.graph)
        stage = 0
        for node in list(self.graph):
            self.before = node
            if graph.is_cut(node):
                if stage not in physical:
                    self._replace(node, stage)
                stage += 1
            elif not self.masked:
                self.hide(node)

    def keeps(self, stage: int, scores: ir.Value) -> tuple[str, list[ir.Value]]:
        """The function of a stage, and what it is told beside scores and threshold."""
        tokens = self.tokens + (stage + 1) * self.appends
        name = f"Keep{tokens}"
        self.functions[name] = _stage_function(tokens, self.opset, self.prefix, name)
        if self.masked or self.mask is None:  # a graph with masks has scores of -inf by itself
            every = self.constant(np.ones((1, tokens), bool), f"{_ALL_ALIVE}_{tokens}")
            return name, [every]
        self.hide_scores(scores)
        return name, [self.image_mask()]

    def closed(self) -> onnx.ModelProto:
        """The model with the stages' functions, standard ops but for that."""
        self.model.functions.clear()
        properties = self.model.metadata_props
        properties |= {"asvit_mode": json.dumps("padded"), "asvit_ops": json.dumps("standard")}
        return self.with_functions()

    def with_functions(self) -> onnx.ModelProto:
        """The model with the stages' functions beside those that it has."""
        self.model.opset_imports[DOMAIN] = 1
        result = graph.closed(self.model)
        result.functions.extend(self.functions.values())
        return result

    def _replace(self, cut: ir.Node, stage: int) -> None:
        tokens, scores, threshold = cut.inputs
        assert tokens is not None
        assert scores is not None
        name, alive = self.keeps(stage, scores)
        compact, index, length, _ = cut.outputs
        names = [f"mask_{stage}", str(index.name), str(length.name)]
        # Read again: what hides scores has taken their place.
        inputs = [cut.inputs[1], threshold, *alive]
        keep = self.insert(graph.node(name, inputs, names, name=cut.name, domain=DOMAIN))
        self.mask = keep.outputs[0]
        for old, new in zip((index, length), keep.outputs[1:]):
            graph.redirect(old, new)
        graph.redirect(compact, tokens)
        graph.remove(self.graph, [cut])
