"""Surgery on ONNX graphs, over `onnx_ir`: its values know their producer and their users.

A rewrite opens a model, changes the graph in place and closes it; weights are copied once, when it
is closed, and the model that was opened stays as it is. Below the runners, which add outputs and
inputs to what they are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir
from onnx import numpy_helper
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from asvit_deploy.errors import UserError
from asvit_deploy.ops import onnx_op

# The first cut's scores; of methods that add rows, first those with the scores of these.
_RANKED = ("all_scores_0", "scores_0")
_BATCH, _PACKED = "asvit_batch", '"packed"'  # a field of the sidecar's, which the file has too
_LARGEST_SHAPE = 64  # numbers of a constant that can be a shape, axes or bounds


def opened(model: onnx.ModelProto) -> ir.Model:
    """The model to be changed; its weights are those of `model`, not copies."""
    return ir.from_proto(model)


def closed(model: ir.Model) -> onnx.ModelProto:
    """The model to be run, checked or written."""
    return ir.to_proto(model)


# --- what is there ------------------------------------------------------------------------------


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard ops."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def batch_of(model: onnx.ModelProto) -> int | None:
    """How many pictures the first input takes; None for any number."""
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None


def mark_packed(model: onnx.ModelProto) -> None:
    """Say in the file that its pictures' rows stand in one [T, D]."""
    onnx.helper.set_model_props(model, {_BATCH: _PACKED})


def refuse_packed(model: onnx.ModelProto, name: str) -> None:
    """Raise UserError for a file of `mark_packed`, whose rows a rewrite does not find in place."""
    if any((entry.key, entry.value) == (_BATCH, _PACKED) for entry in model.metadata_props):
        raise UserError(
            f"{name} was exported with --batch packed, and is not rewritten for this; export it "
            "with --batch dynamic"
        )


def values_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every value of a graph by its name."""
    values = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    values |= {value.name: value for node in graph for value in node.outputs}
    return {name: value for name, value in values.items() if name}


def stage_values(model: onnx.ModelProto, kind: str) -> list[str]:
    """The names of a kind of value, such as `index`, in every stage of a model of ours."""
    made = {name for node in model.graph.node for name in node.output}
    names = (f"{kind}_{stage}" for stage in itertools.count())
    return list(itertools.takewhile(made.__contains__, names))


def is_cut(node: ir.Node) -> bool:
    """Whether a node is the op at which tokens leave."""
    return (node.domain, node.op_type) == (onnx_op.DOMAIN, onnx_op.OP_TYPE)


def cuts_of(graph: ir.Graph) -> list[ir.Node]:
    """The op's nodes, in stage order."""
    return [node for node in graph if is_cut(node)]


def upstream(values: Iterable[ir.Value], stop: Iterable[ir.Value] = ()) -> set[ir.Node]:
    """The nodes that `values` depend on, not looking past `stop`."""
    seen, waiting, nodes = set(stop), list(values), set()
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value not in seen and node is not None and node not in nodes:
            nodes.add(node)
            waiting.extend(given for given in node.inputs if given is not None)
        seen.add(value)
    return nodes


def inferred(model: onnx.ModelProto) -> dict[str, ir.Value]:
    """Every value by its name, with the type and shape that ONNX infers, through the op's function
    too; what the file itself says of the values inside is not believed."""
    copy = opened(model)
    forget_types(copy.graph)
    for name, weight in tuple(copy.graph.initializers.items()):
        tensor = weight.const_value
        if tensor is not None and tensor.size > _LARGEST_SHAPE:  # its numbers are no shape
            del copy.graph.initializers[name]
            copy.graph.inputs.append(weight)
    whole = with_function(closed(copy))
    return values_of(opened(onnx.shape_inference.infer_shapes(whole, data_prop=True)).graph)


def prefix_of(values: dict[str, ir.Value]) -> int:
    """P, the rows in front that never leave: rows of the first cut's tokens less its scores.

    Args:
        values: from `inferred`.
    """
    return rows_of(values["tokens_0"]) - rows_of(values.get(_RANKED[0], values[_RANKED[1]]))


def rows_of(value: ir.Value) -> int:
    """How many rows a value [B, rows, ...] has, which no batch changes."""
    rows = value.shape[1] if value.shape is not None else None
    assert isinstance(rows, int)
    return rows


# --- what is changed ----------------------------------------------------------------------------


def forget_types(graph: ir.Graph) -> None:
    """Drop what is known of the values inside, for a rewrite that changes types or shapes."""
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None


def forget_notes(model: ir.Model) -> None:
    """Drop what an exporter noted at nodes, values and functions: where in whose files each was
    traced. The model's own metadata stays."""
    ClearMetadataAndDocStringPass()(model)
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        for node in body.all_nodes():
            for value in node.outputs:
                _forget_note(value)
        for value in body.inputs:
            _forget_note(value)
    for value in model.graph.initializers.values():
        _forget_note(value)


def _forget_note(value: ir.Value) -> None:
    value.metadata_props.clear()
    value.doc_string = None


def constant(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """An initialiser, which carries the tensor's name."""
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), const_value=tensor,
                     shape=ir.Shape(tensor.numpy().shape))  # fmt: skip
    graph.register_initializer(value)
    return value


def node(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    outputs: Sequence[str] | str,
    attributes: dict[str, ir.Attr] | None = None,
    name: str | None = None,
    domain: str = "",
) -> ir.Node:
    """A node whose outputs, and by default itself, carry these names."""
    names = [outputs] if isinstance(outputs, str) else list(outputs)
    return ir.Node(
        domain, op_type, inputs, list((attributes or {}).values()),
        outputs=[ir.Value(name=output) for output in names], name=name or names[0],
    )  # fmt: skip


def cast(value: ir.Value, output: str, to: int, name: str | None = None) -> ir.Node:
    """A conversion to an ONNX type."""
    return node("Cast", [value], output, {"to": ir.AttrInt64("to", to)}, name)


def redirect(
    old: ir.Value, new: ir.Value, spare: Iterable[ir.Node] = (), outputs: bool = True
) -> None:
    """Let every user of `old`, the graph's outputs if wanted, take `new`, all but the `spare`; its
    type and shape come along where `new` has none."""
    spared = set(spare)
    if new.type is None and old.dtype is not None:
        new.type = ir.TensorType(old.dtype)  # of its own: setting a dtype changes the object
    new.shape = old.shape if new.shape is None else new.shape
    for user, position in tuple(old.uses()):
        if user not in spared:
            user.replace_input_with(position, new)
    graph = old.graph
    if graph is not None and outputs:
        graph.outputs[:] = [new if value is old else value for value in graph.outputs]


def take_over(old: ir.Value, new: ir.Value, inner: str, spare: Iterable[ir.Node] = ()) -> None:
    """Put `new` in the place of `old`, under its name; `old` is called `inner` from then on."""
    name, old.name = old.name, inner
    new.name = name
    redirect(old, new, spare)


def remove(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Take nodes out whose outputs nobody uses any more."""
    graph.remove(nodes, safe=True)


def prune(graph: ir.Graph) -> None:
    """Drop the nodes and initialisers that no output of the graph needs."""
    needed = upstream(graph.outputs)
    remove(graph, [node for node in graph if node not in needed])
    drop_unused_initialisers(graph)


def drop_unused_initialisers(graph: ir.Graph) -> None:
    for name, value in tuple(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def keep_standard_opset(model: onnx.ModelProto) -> None:
    """Forget the domains of ops and functions that are gone."""
    standard = [entry for entry in model.opset_import if not entry.domain]
    del model.opset_import[:]
    model.opset_import.extend(standard)


# --- the op's function --------------------------------------------------------------------------


def with_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the op's function, which `--ops custom` leaves out: without it, and without a
    library, the node means nothing to a runtime. The model itself where it needs none."""
    if model.functions or not onnx_op.nodes_of(model.graph):
        return model
    result = closed(opened(model))
    body = onnx_op.function_body(batch_of(model) != 1, opset_of(model), _stored_prefix(model))
    result.functions.append(body)
    return result


def _stored_prefix(model: onnx.ModelProto) -> int:
    """As `prefix_of`, from the shapes that the file keeps; 1 where it keeps none."""
    rows = {}
    for info in model.graph.value_info:
        if info.name in ("tokens_0", *_RANKED):
            rows[info.name] = info.type.tensor_type.shape.dim[1].dim_value
    tokens, ranked = rows.get("tokens_0"), next((rows[name] for name in _RANKED if name in rows), 0)
    return tokens - ranked if tokens and ranked else 1


def without_function(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model without the op's function."""
    copy = opened(model)
    for key in [key for key in copy.functions if key[0] == onnx_op.DOMAIN]:
        del copy.functions[key]
    return closed(copy)


def with_lengths_from_zero(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which OpenVINO sees that no length is negative.

    It bounds what is computed of lengths, such as that of all tokens but the prefix, and takes no
    graph in which one that `Expand` is given might lie below zero.
    """
    copy = opened(model)
    bottom: ir.Value | None = None
    for cut in tuple(copy.graph):
        shape = cut.inputs[1] if cut.op_type == "Expand" else None
        made = shape.producer() if shape is not None else None
        if shape is None or made is None or made.op_type in ("Constant", "Shape"):
            continue
        if bottom is None:
            bottom = constant(copy.graph, ir.tensor(np.array(0, np.int64), name="no_length_below"))
        bounded = node("Max", [shape, bottom], f"{cut.outputs[0].name}_lengths")
        copy.graph.insert_before(cut, bounded)
        cut.replace_input_with(1, bounded.outputs[0])
    return closed(copy)


def give_thresholds(model: onnx.ModelProto, values: Sequence[float]) -> bool:
    """Put other thresholds, one a cut, in the place of a model's own.

    Returns:
        whether that could be done: not where one is missing, or where anything reads it but a cut
        or a comparison. The model then stays as it is.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    names = [f"threshold_{stage}" for stage in range(len(values))]
    readers = {node.op_type for node in model.graph.node if set(names) & set(node.input)}
    if not stored.keys() >= set(names) or not readers <= {onnx_op.OP_TYPE, "Greater"}:
        return False
    for name, value in zip(names, values):
        stored[name].CopyFrom(numpy_helper.from_array(np.array(value, np.float32), name))
    return True


def with_stage_outputs(model: onnx.ModelProto, stages: int) -> onnx.ModelProto:
    """A copy that also puts out each stage's `length_s`, `index_s`, `into_s` and `scores_s`.

    What another tool took out of a file of ours is left out.
    """
    copy = opened(model)
    outputs, made = copy.graph.outputs, values_of(copy.graph)
    for stage in range(stages):
        for kind, rank in (("length", 1), ("index", 2), ("into", 2), ("scores", 2)):
            value = made.get(f"{kind}_{stage}")
            if value is not None and value.producer() is not None and value not in outputs:
                number = ir.DataType.FLOAT if kind == "scores" else ir.DataType.INT64
                value.type, value.shape = ir.TensorType(number), ir.Shape([None] * rank)
                outputs.append(value)
    return closed(copy)


def with_decisions(model: onnx.ModelProto, stages: int) -> onnx.ModelProto:
    """A copy of a dynamic model of ours to which what stays is given.

    Its further inputs `decision_s` float32 [1, N_s], 1 where a token of stage s's input stays and 0
    where it leaves, stand where its own scores and thresholds stood.
    """
    copy = opened(model)
    values = values_of(copy.graph)
    half = ir.tensor(np.array(0.5, np.float32), name="decision_threshold")
    half_way = constant(copy.graph, half)
    for stage in range(stages):
        given = ir.Value(
            name=f"decision_{stage}",
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([1, None]),
        )
        copy.graph.inputs.append(given)
        for name, new in (("scores", given), ("threshold", half_way)):
            if (own := values.get(f"{name}_{stage}")) is not None:
                redirect(own, new, outputs=False)
    return closed(copy)
