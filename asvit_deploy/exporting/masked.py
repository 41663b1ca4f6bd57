"""Our ONNX with rows that really leave at a few cuts, and are hidden from attention between them.

Many cuts close to each other cost more compactions than these save work. What decides, who stays
and what becomes of the rest is the same; it is a rewrite of the exported graph, so no checkpoint is
needed.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
import onnx.inliner
import onnx_ir as ir

from asvit_deploy import graph
from asvit_deploy.errors import UserError
from asvit_deploy.exporting.padded import DOMAIN, Rewrite

_KEEP = "Keep"
# As padded mode's, for any number of rows, as behind a cut where rows left. What is gone scores
# -inf in these graphs by itself. Ranks are exact, and no image has as many rows as `once`.
_BODY = """
    lowest = Constant <value = float {{-3.4028234663852886e38}}> ()
    is_nan = IsNaN (scores)
    number = Where (is_nan, lowest, scores)
    axis_0 = Constant <value = int64[1] {{0}}> ()
    axis_1 = Constant <value = int64[1] {{1}}> ()
    top, top_place = TopK <axis = 1, largest = 1, sorted = 1> (number, axis_1)
    is_top = Equal (scores, top)
    none = Constant <value = float {{0}}> ()
    once = Constant <value = float {{1000000}}> ()
    twice = Constant <value = float {{2000000}}> ()
    behind = Where (is_nan, once, twice)
    offset = Where (is_top, none, behind)
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    tokens_1d = Shape <start = 1, end = 2> (scores)
    tokens = Squeeze (tokens_1d, axis_0)
    number_of = Range (zero, tokens, one)
    place = Cast <to = 1> (number_of)
    rank = Add (place, offset)
    first, first_place = TopK <axis = 1, largest = 0, sorted = 1> (rank, axis_1)
    is_best = Equal (rank, first)
    above = Less (threshold, scores)
    keep = Or (above, is_best)
    class_row = GreaterOrEqual (first, none)
    mask = Concat <axis = 1> ({prefix}, keep)
    one_each = Cast <to = 7> (mask)
    length = ReduceSum <keepdims = 0> (one_each, axis_1)
    rows_1d = Shape <start = 1, end = 2> (mask)
    rows = Squeeze (rows_1d, axis_0)
    row = Range (zero, rows, one)
    absent = Constant <value = int64 {{-1}}> ()
    index = Where (mask, row, absent)
"""


def with_masks(
    model: onnx.ModelProto, physical: Collection[int], name: str = "model"
) -> onnx.ModelProto:
    """A dynamic model of ours whose rows leave at the physical cuts and are hidden at all others.

    Args:
        model: from `export` with `--batch dynamic` and its op nodes (`--ops auto` or `custom`),
            float32.
        physical: stage numbers.
        name: how messages call it.

    Returns:
        As `export --ops auto` writes it, with an op node for each physical cut; `index_s` of any
        other cut is int64 [B, M], the row's own number or -1.

    Raises:
        UserError: the graph takes one picture, and hides no rows.
        ValueError: `physical` are not among its cuts.
    """
    cuts = len(graph.cuts_of(graph.opened(model).graph))
    if not set(physical) <= set(range(cuts)):
        raise ValueError(f"{sorted(physical)} are not among {cuts} cuts")
    if len(set(physical)) == cuts:
        return model
    graph.refuse_packed(model, name)
    if graph.batch_of(model) is not None:
        raise UserError(
            f"{name} takes one picture, so its graph hides no rows; export it with --batch dynamic"
        )
    # With its function, which tells P by shapes that the rewrite forgets.
    rewrite = _Rewrite(graph.with_function(model))
    rewrite.run(physical)
    result = onnx.inliner.inline_selected_functions(rewrite.with_functions(), [(DOMAIN, _KEEP)])
    others = [entry for entry in result.opset_import if entry.domain != DOMAIN]
    del result.opset_import[:]
    result.opset_import.extend(others)
    onnx.checker.check_model(result, full_check=True)
    return result


class _Rewrite(Rewrite):
    """Of graphs that hide by `index_s >= 0` what is not there."""

    def keeps(self, stage: int, scores: ir.Value) -> tuple[str, list[ir.Value]]:
        body = _BODY.format(prefix=", ".join(["class_row"] * self.prefix))
        self.functions[_KEEP] = onnx.parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: ["" : {self.opset}]>\n'
            f"{_KEEP} (scores, threshold) => (mask, index, length)\n{{{body}}}"
        )
        return _KEEP, []
