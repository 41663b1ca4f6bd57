"""Static top-k: our ONNX with a fixed number of tokens per stage, the baseline of `bench`.

Every picture keeps as many tokens as the thresholds keep on average, so the MACs are the same and
every shape is known: what a runtime can make of the reduction without its adaptivity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from asvit_deploy import graph
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import OUTPUTS
from asvit_deploy.ops import onnx_op


def to_static_topk(
    model: onnx.ModelProto, kept: Sequence[int], name: str = "model"
) -> onnx.ModelProto:
    """Replace each op node by the choice of the highest scores, in their original order.

    Args:
        model: from `export` with `--batch 1` and its op nodes, float32 or after `to_half`.
        kept: image tokens that stay after each stage, falling or equal, at least 1.
        name: how messages call it.

    Returns:
        Standard ops only. Input `images` float32 [1, 3, H, W], output `logits` or `embedding`
        [1, C].

    Raises:
        UserError: there is no op node, or the batch is not fixed to one image.
        ValueError: `kept` does not fit the stages.
    """
    nodes = onnx_op.nodes_of(model.graph)
    if not nodes:
        raise UserError(f"{name} has no {onnx_op.OP_TYPE} node; name a file of --ops auto")
    graph.refuse_packed(model, name)
    if graph.batch_of(model) != 1:
        raise UserError(f"{name} has a dynamic batch; export it with --batch 1")
    if len(kept) != len(nodes) or sorted(kept, reverse=True) != list(kept) or min(kept) < 1:
        raise ValueError(f"{list(kept)} image tokens do not fit {len(nodes)} stages")
    prefix = graph.prefix_of(graph.inferred(model))
    result = graph.opened(model)
    whole = result.graph
    graph.forget_types(whole)
    whole.outputs[:] = [value for value in whole.outputs if value.name in OUTPUTS]
    for stage, (cut, count) in enumerate(zip(graph.cuts_of(whole), kept)):
        choice = _choice(whole, cut, stage, count, prefix)
        whole.insert_before(cut, choice)
        graph.redirect(cut.outputs[0], choice[-1].outputs[0])
    graph.prune(whole)
    result.functions.clear()
    proto = graph.closed(result)
    graph.keep_standard_opset(proto)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _choice(whole: ir.Graph, cut: ir.Node, stage: int, count: int, prefix: int) -> list[ir.Node]:
    """tokens [1, M, D], scores [1, M-P] -> `chosen_s` [1, P+k, D]."""
    name = f"topk_{stage}"
    nodes: list[ir.Node] = []

    def constant(what: str, value: Any) -> ir.Value:
        tensor = ir.tensor(np.array(value, np.int64), name=f"{name}_{what}")
        return graph.constant(whole, tensor)

    def add(op_type: str, inputs: list[ir.Value | None], *outputs: str, **numbers: int) -> ir.Value:
        attributes = {key: ir.AttrInt64(key, value) for key, value in numbers.items()}
        nodes.append(graph.node(op_type, inputs, outputs, attributes))
        return nodes[-1].outputs[0]

    tokens, scores, _ = cut.inputs
    k = constant("count", [count])
    first = constant("first", [0])  # the batch axis; the class token's row
    add("TopK", [scores, k], f"{name}_score", f"{name}_place", axis=1)
    # A second TopK brings the places into order, as float32: runtimes sort no integers.
    place = nodes[-1].outputs[1]
    number = add("Cast", [place], f"{name}_number", to=ir.DataType.FLOAT)
    rising = add("TopK", [number, k], f"{name}_rising", f"{name}_order", axis=1, largest=0)
    token = add("Cast", [rising], f"{name}_token", to=ir.DataType.INT64)
    row = add("Add", [token, constant("one", prefix)], f"{name}_row")
    flat = add("Squeeze", [row, first], f"{name}_flat")
    others = [constant("others", range(1, prefix))] if prefix > 1 else []
    rows = add("Concat", [first, *others, flat], f"{name}_rows", axis=0)
    add("Gather", [tokens, rows], f"chosen_{stage}", axis=1)
    return nodes
