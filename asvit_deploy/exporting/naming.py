"""Names of values in our graphs, from what was traced.

A value is called by what it is and at which stage, `scores_0`, `index_0`, `length_0` and so on,
whatever computes it: the op, a gather of fixed rows, a merge inside a block. Runners, rewrites and
other tools find values by these names.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from asvit_deploy import graph
from asvit_deploy.models.config import OUTPUTS
from asvit_deploy.ops import onnx_op


def name_traced(whole: ir.Graph, names: Sequence[str]) -> None:
    """Name the outputs of a traced graph, and keep as outputs only the network's own and
    `length_s`.

    Where the op makes a stage's `index_s`, what goes in and comes out of it is named as well; of a
    stage without the op, what was traced has a name and nothing else.

    Args:
        names: one for each output: one of `OUTPUTS`, or what it is and its stage.
    """
    _free(whole, names)
    named: set[ir.Value] = set()
    outputs = []
    for output, name in zip(whole.outputs, names, strict=True):
        value = _as_made(output)
        if name.startswith("before_") and value.name == name.replace("before", "tokens"):
            continue  # the op takes it, and it is called so
        if value in named or value.is_graph_input():
            value = _repeated(whole, value)
        value.name = name
        named.add(value)
        if name in OUTPUTS or name.startswith("length_"):
            outputs.append(value)
            continue
        if name.startswith("index_"):
            _name_cut(value.producer(), name.removeprefix("index_"), named)
    whole.outputs[:] = outputs
    graph.prune(whole)


def _free(whole: ir.Graph, names: Sequence[str]) -> None:
    """Rename what the exporter happened to call as we will: its `index_1` is an indexing."""
    taken = set(names)
    for name, value in graph.values_of(whole).items():
        if name in taken:
            value.name = f"traced_{name}"


def _repeated(whole: ir.Graph, value: ir.Value) -> ir.Value:
    """The same once more: a value has one name, and an input keeps its own."""
    node = ir.Node("", "Identity", [value])
    whole.append(node)
    return node.outputs[0]


def _as_made(value: ir.Value) -> ir.Value:
    """A value in front of the Reshape that only states the shape of what the op made of a batch."""
    node = value.producer()
    if node is not None and node.op_type == "Reshape" and node.inputs[0] is not None:
        maker = node.inputs[0].producer()
        return node.inputs[0] if maker is not None and graph.is_cut(maker) else value
    return value


def _name_cut(cut: ir.Node | None, stage: str, named: set[ir.Value]) -> None:
    if cut is None or not graph.is_cut(cut):
        return
    cut.name = f"stage_{stage}/{onnx_op.OP_TYPE}"
    taken = {value.name for value in named}
    for name, value in zip((*onnx_op.INPUTS, *onnx_op.OUTPUTS), (*cut.inputs, *cut.outputs)):
        assert value is not None
        own = f"{name}_{stage}"
        # Rows that a method adds are ranked beside those whose scores were traced.
        value.name = own if value in named or own not in taken else f"all_{own}"
