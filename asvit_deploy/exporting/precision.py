"""Half precision written into the graph: half weights and activations, float32 islands.

What stays float32: the scores from the class row on, every softmax, LayerNorm and norm, the
comparison with the thresholds, graph inputs and outputs, and what this opset does not define for
the half type (at opset 20 that is bfloat16's Conv). A builder that is strongly typed then has no
say in it, and the same graph can be compared with PyTorch before an engine is built from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from typing import Literal

import onnx
import onnx.inliner
import torch
from onnx import TensorProto, helper, numpy_helper

from asvit_deploy.errors import UserError
from asvit_deploy.ops import onnx_op

Precision = Literal["fp16", "bf16"]

NAMES = {"fp16": "float16", "bf16": "bfloat16"}
_ONNX_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_TORCH_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_HALF_TYPES = tuple(_ONNX_TYPES.values())

# Sums of many terms, or quotients of them: rounding each term to half would show.
_ISLANDS = frozenset(("Softmax", "LayerNormalization", "ReduceL2", "ReduceSum", "ReduceMean"))
# They move or look at numbers without computing, so they take the type that comes.
_MOVES = frozenset(
    ("Cast", "CastLike", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
     "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)  # fmt: skip


def _upstream(graph: onnx.GraphProto, values: Iterable[str], stop: Iterable[str] = ()) -> set[int]:
    """Indices of the nodes that `values` depend on, not looking past `stop`."""
    producer = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    seen, waiting, nodes = set(stop), list(values), set()
    while waiting:
        value = waiting.pop()
        if value not in seen and value in producer:
            nodes.add(producer[value])
            waiting.extend(graph.node[producer[value]].input)
        seen.add(value)
    return nodes


def _scoring_and_selection(graph: onnx.GraphProto) -> tuple[set[int], set[int]]:
    """Nodes that only the scores need, and nodes between the scores and the next block."""
    values = {name for node in graph.node for name in node.output}
    scoring: set[int] = set()
    selection: set[int] = set()
    stage = 0
    stop: set[str] = set()
    while f"scores_{stage}" in values:
        tokens, scores = f"tokens_{stage}", f"scores_{stage}"
        stop |= {tokens, scores}  # padded: a stage's selection asks the one before
        scoring |= _upstream(graph, [scores]) - _upstream(graph, [tokens])
        ends = [f"{name}_{stage}" for name in ("compact", "index", "length")]
        selection |= _upstream(graph, ends, stop)
        stage += 1
    return scoring, selection


@cache
def _defined(op_type: str, domain: str, opset: int, half: int) -> bool:
    """Whether every float parameter of the op may be `half` at this opset."""
    kind = f"tensor({TensorProto.DataType.Name(half).lower()})"
    schema = onnx.defs.get_schema(op_type, opset, domain)
    return all(
        kind in constraint.allowed_type_strs
        for constraint in schema.type_constraints
        if "tensor(float)" in constraint.allowed_type_strs
    )


def refuse_half(model: onnx.ModelProto, name: str) -> None:
    """Raise UserError where a graph holds half precision already."""
    graph = model.graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    kinds |= {info.type.tensor_type.elem_type for info in (*graph.input, *graph.output)}
    if kinds & set(_HALF_TYPES):
        raise UserError(
            f"{name} is in half precision already; leave --fp16/--bf16 out, or name the float32 "
            "file that `asvit-deploy export` wrote"
        )


def to_half(model: onnx.ModelProto, precision: Precision, name: str = "model") -> onnx.ModelProto:
    """A copy of a float32 model of ours that computes in half precision.

    Args:
        model: dynamic, padded or dense, with or without the op's function; float32 [B, 3, H, W] in.
        precision: "fp16" or "bf16".
        name: how messages call the model.

    Returns:
        The model with the same inputs and outputs, their types too. `scores_s` and `threshold_s`
        stay float32; `tokens_s` and `compact_s` are half.

    Raises:
        UserError: it is half already, or a weight does not fit float16.
    """
    refuse_half(model, name)
    return _Rewrite(model, precision, name).run()


class _Rewrite:
    """One pass over the nodes in order; `half` holds the values that are half by now."""

    def __init__(self, model: onnx.ModelProto, precision: Precision, name: str) -> None:
        self.source, self.precision, self.name = model, precision, name
        self.kind = _ONNX_TYPES[precision]
        self.opset = {entry.domain: entry.version for entry in model.opset_import}[""]
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.floats = _float_values(model)
        self.scoring, self.selection = _scoring_and_selection(model.graph)
        self.half: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        self.converted: dict[tuple[str, bool], str] = {}
        self.new_weights: list[TensorProto] = []

    def run(self) -> onnx.ModelProto:
        for number, node in enumerate(self.source.graph.node):
            self._visit(number, node)
        result = onnx.ModelProto()
        result.CopyFrom(self.source)
        graph = result.graph
        for output in graph.output:
            if output.name in self.half:
                self._restore_output(output.name)
        del graph.node[:]
        graph.node.extend(self.nodes)
        used = {value for node in self.nodes for value in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *self.new_weights])
        self._retype(graph)
        for entry in result.metadata_props:
            if entry.key == "asvit_precision":
                entry.value = json.dumps(NAMES[self.precision])
        onnx.checker.check_model(result)
        return result

    def _visit(self, number: int, source: onnx.NodeProto) -> None:
        node = onnx.NodeProto()
        node.CopyFrom(source)
        is_op = (node.domain, node.op_type) == (onnx_op.DOMAIN, onnx_op.OP_TYPE)
        wants = self._wants_half(number, node)
        if wants is not None:
            for i, value in enumerate(node.input):
                # The op's payload is half; its scores and threshold are not.
                if value in self.floats and not (is_op and i > 0):
                    node.input[i] = self._as(value, wants)
        self.nodes.append(node)
        if wants and node.op_type not in ("Cast", "Shape"):
            self.half.update(value for value in node.output if value in self.floats)

    def _wants_half(self, number: int, node: onnx.NodeProto) -> bool | None:
        """Whether a node computes in half; None where no input of it is a float."""
        inputs = [value for value in node.input if value in self.floats]
        if not inputs:
            return None
        if (node.domain, node.op_type) == (onnx_op.DOMAIN, onnx_op.OP_TYPE):
            return True
        moves = node.op_type in _MOVES
        if moves or number in self.selection:
            activations = [value for value in inputs if value not in self.weights]
            if activations:
                return any(value in self.half for value in activations)
            return number not in self.scoring and number not in self.selection
        if number in self.scoring or node.op_type in _ISLANDS:
            return False
        return _defined(node.op_type, node.domain, self.opset, self.kind)

    def _as(self, value: str, half: bool) -> str:
        """The name of `value` in the wanted type, made on first use."""
        if half == (value in self.half):
            return value
        key = (value, half)
        if key not in self.converted:
            name = f"{value}_{self.precision if half else 'fp32'}"
            self.converted[key] = name
            if value in self.weights:
                self.new_weights.append(self._weight(self.weights[value], name))
            else:
                to = self.kind if half else TensorProto.FLOAT
                self.nodes.append(helper.make_node("Cast", [value], [name], name=name, to=to))
        return self.converted[key]

    def _weight(self, tensor: TensorProto, name: str) -> TensorProto:
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        half = values.to(_TORCH_TYPES[self.precision])
        if not torch.equal(half.isfinite(), values.isfinite()):
            raise UserError(
                f"{self.name}: weight {tensor.name} holds {values.abs().max():.3g}, beyond "
                f"{NAMES[self.precision]}'s range; use --bf16 or build without --fp16"
            )
        return helper.make_tensor(
            name, self.kind, tensor.dims, half.view(torch.int16).numpy().tobytes(), raw=True
        )

    def _restore_output(self, name: str) -> None:
        """Graph outputs keep name and type: the half value gets another name before the Cast."""
        inner = f"{name}_{self.precision}"
        for node in self.nodes:
            node.input[:] = [inner if value == name else value for value in node.input]
            node.output[:] = [inner if value == name else value for value in node.output]
        self.half.add(inner)
        self.half.discard(name)
        self.nodes.append(
            helper.make_node("Cast", [inner], [name], name=inner, to=TensorProto.FLOAT)
        )

    def _retype(self, graph: onnx.GraphProto) -> None:
        for info in graph.value_info:
            if info.name in self.half:
                info.type.tensor_type.elem_type = self.kind


def _float_values(model: onnx.ModelProto) -> set[str]:
    """Names of all float32 values, found by ONNX's own inference (through the function too)."""
    inferred = onnx.ModelProto()
    inferred.CopyFrom(model)
    if not inferred.functions and onnx_op.nodes_of(inferred.graph):
        opset = {entry.domain: entry.version for entry in model.opset_import}[""]
        inferred.functions.append(onnx_op.function_body(True, opset))
    del inferred.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(inferred).graph
    infos = [*graph.input, *graph.output, *graph.value_info]
    names = {i.name for i in infos if i.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 twin of a half model, for a check that a CPU can run.

    Every node computes in float32 on half inputs and its result is rounded to half, as tensor cores
    do that accumulate in float32. ONNX Runtime's CPU has no bfloat16 kernels at all, and of float16
    it keeps whole chains in float32 without rounding between. Run it with the runtime's graph
    optimisations off, which might join the casts.

    Args:
        model: from `to_half`, its op's function inlined or present.

    Returns:
        The same values under the same names; half values hold float32 numbers.
    """
    source = onnx.inliner.inline_local_functions(model)
    half = _half_values(source)
    result = onnx.ModelProto()
    result.CopyFrom(source)
    graph = result.graph
    kinds = [tensor.data_type for tensor in graph.initializer if tensor.data_type in _HALF_TYPES]
    del graph.node[:]
    del graph.value_info[:]
    for node in source.graph.node:
        copy = graph.node.add()
        copy.CopyFrom(node)
        if node.op_type == "Cast" and node.output[0] in half:
            graph.node.pop()
            graph.node.extend(_round(node.input[0], node.output[0], kinds[0]))
            continue
        for i, value in enumerate(node.output):
            if value in half and node.op_type not in _MOVES:
                copy.output[i] = f"{value}_exact"
                graph.node.extend(_round(f"{value}_exact", value, kinds[0]))
    for tensor in graph.initializer:
        if tensor.data_type in _HALF_TYPES:
            tensor.CopyFrom(_widened(tensor))
    return result


def _round(value: str, output: str, kind: int) -> list[onnx.NodeProto]:
    narrow = f"{output}_rounded"
    return [
        helper.make_node("Cast", [value], [narrow], name=narrow, to=kind),
        helper.make_node("Cast", [narrow], [output], name=f"{output}_wide", to=TensorProto.FLOAT),
    ]


def _widened(tensor: TensorProto) -> TensorProto:
    kind = torch.float16 if tensor.data_type == TensorProto.FLOAT16 else torch.bfloat16
    values = torch.frombuffer(bytearray(tensor.raw_data), dtype=kind).reshape(tuple(tensor.dims))
    return numpy_helper.from_array(values.float().numpy(), tensor.name)


def _half_values(model: onnx.ModelProto) -> set[str]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(copy).graph
    infos = [*graph.value_info, *graph.output]
    return {i.name for i in infos if i.type.tensor_type.elem_type in _HALF_TYPES}
