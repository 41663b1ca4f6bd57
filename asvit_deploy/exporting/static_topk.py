"""Static top-k: our ONNX with a fixed number of tokens per stage, the baseline of `bench`.

Every picture keeps as many tokens as the thresholds keep on average, so the MACs are the same and
every shape is known: what a runtime can make of the reduction without its adaptivity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from asvit_deploy.errors import UserError
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
        Standard ops only. Input `images` float32 [1, 3, H, W], output `logits` [1, C].

    Raises:
        UserError: there is no op node, or the batch is not fixed to one image.
        ValueError: `kept` does not fit the stages.
    """
    nodes = onnx_op.nodes_of(model.graph)
    if not nodes:
        raise UserError(f"{name} has no {onnx_op.OP_TYPE} node; name a file of --ops auto")
    if model.graph.input[0].type.tensor_type.shape.dim[0].dim_value != 1:
        raise UserError(f"{name} has a dynamic batch; export it with --batch 1")
    if len(kept) != len(nodes) or sorted(kept, reverse=True) != list(kept) or min(kept) < 1:
        raise ValueError(f"{list(kept)} image tokens do not fit {len(nodes)} stages")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph, replaced = result.graph, []
    compacted: dict[str, str] = {}
    for node in graph.node:
        node.input[:] = [compacted.get(value, value) for value in node.input]
        if (node.domain, node.op_type) != (onnx_op.DOMAIN, onnx_op.OP_TYPE):
            replaced.append(node)
            continue
        stage = len(compacted)
        compacted[node.output[0]] = f"chosen_{stage}"
        replaced += _choice(graph, node, stage, kept[stage])
    logits = next(output for output in graph.output if output.name == "logits")
    needed = _needed(replaced, "logits")
    del graph.node[:], graph.output[:], graph.value_info[:], result.functions[:]
    graph.node.extend(needed)
    graph.output.append(logits)
    used = {value for node in needed for value in node.input}
    weights = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    standard = [entry for entry in result.opset_import if not entry.domain]
    del result.opset_import[:]
    result.opset_import.extend(standard)
    onnx.checker.check_model(result, full_check=True)
    return result


def _choice(
    graph: onnx.GraphProto, op: onnx.NodeProto, stage: int, count: int
) -> list[onnx.NodeProto]:
    """tokens [1, M, D], scores [1, M-1] -> `chosen_s` [1, 1+k, D]."""

    def constant(what: str, value: np.ndarray) -> str:
        name = f"topk_{stage}_{what}"
        graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def node(op_type: str, inputs: list[str], *outputs: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op_type, inputs, list(outputs), name=outputs[0], **attributes)

    tokens, scores, _ = op.input
    name = f"topk_{stage}"
    k = constant("count", np.array([count], np.int64))
    first = constant("first", np.array([0], np.int64))  # the batch axis; the class token's row
    # A second TopK brings the places into order, as float32: runtimes sort no integers.
    return [
        node("TopK", [scores, k], f"{name}_score", f"{name}_place", axis=1),
        node("Cast", [f"{name}_place"], f"{name}_number", to=onnx.TensorProto.FLOAT),
        node("TopK", [f"{name}_number", k], f"{name}_rising", f"{name}_order", axis=1, largest=0),
        node("Cast", [f"{name}_rising"], f"{name}_token", to=onnx.TensorProto.INT64),
        node("Add", [f"{name}_token", constant("one", np.array(1, np.int64))], f"{name}_row"),
        node("Squeeze", [f"{name}_row", first], f"{name}_flat"),
        node("Concat", [first, f"{name}_flat"], f"{name}_rows", axis=0),
        node("Gather", [tokens, f"{name}_rows"], f"chosen_{stage}", axis=1),
    ]  # fmt: skip


def _needed(nodes: list[onnx.NodeProto], output: str) -> list[onnx.NodeProto]:
    """The nodes that `output` depends on, in order."""
    wanted, found = {output}, []
    for node in reversed(nodes):
        if wanted & set(node.output):
            found.append(node)
            wanted.update(node.input)
    return found[::-1]
