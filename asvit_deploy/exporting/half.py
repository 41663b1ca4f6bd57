"""Half precision written into the graph: half weights and activations, float32 islands.

What stays float32: the scores from the class row on, where leaving tokens go, every softmax,
LayerNorm, norm and logarithm, every comparison of what is float32, graph inputs and outputs, and
what this opset does not define for the half type (at opset 20 that is bfloat16's Conv). A builder
that is strongly typed then has no say in it, and the same graph can be compared with PyTorch before
an engine is built from it.
"""

from __future__ import annotations

import itertools
import json
from functools import cache

import onnx
import onnx.inliner
import onnx_ir as ir
import torch

from asvit_deploy import graph, precision
from asvit_deploy.errors import UserError
from asvit_deploy.precision import Half, Precision

_HALF_TYPES = {ir.DataType(row.onnx_type): row for row in precision.HALVES}

# Sums of many terms, or quotients of them: rounding each term to half would show. And logarithms,
# whose absolute error is a relative one of what they are added to.
_ISLANDS = frozenset(
    ("Softmax", "LayerNormalization", "ReduceL2", "ReduceSum", "ReduceMean", "Log")
)
# They move or look at numbers without computing, so they take the type that comes.
_MOVES = frozenset(
    ("Cast", "CastLike", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
     "Identity", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
     "ArgMax", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "ReduceMax", "TopK",
     "Where")
)  # fmt: skip


_STAGE_VALUES = ("before", "tokens", "scores", "into", "weight", "compact", "index", "length")


def _scoring_and_selection(whole: ir.Graph) -> tuple[set[ir.Node], set[ir.Node]]:
    """Nodes that only a cut's decision needs, and nodes between the scores and the next block."""
    values = graph.values_of(whole)
    scoring: set[ir.Node] = set()
    selection: set[ir.Node] = set()
    stop: set[ir.Value] = set()
    stage = 0
    while f"scores_{stage}" in values:
        before, tokens, scores, into, weight, *ends = (
            [values[name] for name in (f"{kind}_{stage}",) if name in values]
            for kind in _STAGE_VALUES
        )
        stop |= {*tokens, *scores}  # padded: a stage's selection asks the one before
        # What the op takes may be mixed from the scores already, where a method merges.
        begin = graph.upstream(before or tokens)
        scoring |= graph.upstream([*scores, *into, *weight]) - begin
        selection |= graph.upstream(itertools.chain(*ends), stop)
        stage += 1
    return scoring, selection


@cache
def _defined(op_type: str, domain: str, opset: int, half: Precision) -> bool:
    """Whether every float parameter of the op may be `half` at this opset."""
    schema = onnx.defs.get_schema(op_type, opset, domain)
    return all(
        half.tensor_type in constraint.allowed_type_strs
        for constraint in schema.type_constraints
        if precision.FLOAT32.tensor_type in constraint.allowed_type_strs
    )


def refuse_half(model: onnx.ModelProto, name: str) -> None:
    """Raise UserError where a graph holds half precision already."""
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    ends = (*model.graph.input, *model.graph.output)
    kinds |= {info.type.tensor_type.elem_type for info in ends}
    if kinds & set(_HALF_TYPES):
        raise UserError(
            f"{name} is in half precision already; leave --fp16/--bf16 out, or name the float32 "
            "file that `asvit-deploy export` wrote"
        )


def to_half(model: onnx.ModelProto, half: Half, name: str = "model") -> onnx.ModelProto:
    """A copy of a float32 model of ours that computes in half precision.

    Args:
        model: dynamic, padded or dense, with or without the op's function; float32 [B, 3, H, W] in.
        half: "fp16" or "bf16".
        name: how messages call the model.

    Returns:
        The model with the same inputs and outputs, their types too. `scores_s` and `threshold_s`
        stay float32; `tokens_s` and `compact_s` are half.

    Raises:
        UserError: it is half already, or a weight does not fit float16.
    """
    refuse_half(model, name)
    rewrite = _Rewrite(model, precision.of_option(half), name)
    rewrite.run()
    result = graph.closed(rewrite.model)
    onnx.checker.check_model(result)
    return result


class _Rewrite:
    """One pass over the nodes in order; `half` holds the values that are half by now."""

    def __init__(self, source: onnx.ModelProto, precision: Precision, name: str) -> None:
        self.model, self.precision, self.name = graph.opened(source), precision, name
        self.graph = self.model.graph
        self.opset = graph.opset_of(source)
        known = graph.inferred(source)
        self.floats = {
            value for label, value in graph.values_of(self.graph).items()
            if label in known and known[label].dtype == ir.DataType.FLOAT
        }  # fmt: skip
        self.scoring, self.selection = _scoring_and_selection(self.graph)
        self.half: set[ir.Value] = set()
        self.converted: dict[tuple[ir.Value, bool], ir.Value] = {}
        self.weights: list[ir.TensorProtocol] = []

    def run(self) -> None:
        for node in list(self.graph):
            self._visit(node)
        for output in list(self.graph.outputs):
            if output in self.half:
                self._restore_output(output)
        graph.drop_unused_initialisers(self.graph)
        for value in self.half:
            if value.type is not None:
                value.dtype = ir.DataType(self.precision.onnx_type)
        if "asvit_precision" in self.model.metadata_props:
            self.model.metadata_props["asvit_precision"] = json.dumps(self.precision.name)

    def _visit(self, node: ir.Node) -> None:
        wants = self._wants_half(node)
        if wants is not None:
            for i, value in enumerate(node.inputs):
                # The op's payload is half; its scores and threshold are not.
                if value in self.floats and not (graph.is_cut(node) and i > 0):
                    assert value is not None
                    node.replace_input_with(i, self._as(value, wants, node))
        if wants and node.op_type not in ("Cast", "Shape"):
            self.half.update(value for value in node.outputs if value in self.floats)

    def _wants_half(self, node: ir.Node) -> bool | None:
        """Whether a node computes in half; None where no input of it is a float."""
        inputs = [value for value in node.inputs if value in self.floats]
        if not inputs:
            return None
        if graph.is_cut(node):
            return True
        if node.op_type in _MOVES or node in self.selection:
            activations = [v for v in inputs if v is not None and not v.is_initializer()]
            if activations:
                return any(value in self.half for value in activations)
            return node not in self.scoring and node not in self.selection
        if node in self.scoring or node.op_type in _ISLANDS:
            return False
        return _defined(node.op_type, node.domain, self.opset, self.precision)

    def _as(self, value: ir.Value, half: bool, before: ir.Node) -> ir.Value:
        """`value` in the wanted type, made on first use in front of the node that wants it."""
        if half == (value in self.half):
            return value
        key = (value, half)
        if key not in self.converted:
            name = f"{value.name}_{self.precision.option if half else 'fp32'}"
            if value.is_initializer():
                self.converted[key] = self._weight(value, name)
            else:
                wanted = self.precision if half else precision.FLOAT32
                made = graph.cast(value, name, wanted.onnx_type)
                self.graph.insert_before(before, made)
                self.converted[key] = made.outputs[0]
        return self.converted[key]

    def _weight(self, weight: ir.Value, name: str) -> ir.Value:
        assert weight.const_value is not None
        values = torch.from_numpy(weight.const_value.numpy().copy())
        half = values.to(self.precision.torch_type)
        if not torch.equal(half.isfinite(), values.isfinite()):
            raise UserError(
                f"{self.name}: weight {weight.name} holds {values.abs().max():.3g}, beyond "
                f"{self.precision.name}'s range; use --bf16 or build without --fp16"
            )
        return graph.constant(self.graph, ir.tensor(half, name=name))

    def _restore_output(self, inner: ir.Value) -> None:
        """Graph outputs keep name and type: the half value gets another name before the Cast."""
        label = f"{inner.name}_{self.precision.option}"
        made = graph.cast(inner, str(inner.name), precision.FLOAT32.onnx_type, name=label)
        self.graph.append(made)
        graph.take_over(inner, made.outputs[0], label, spare=inner.consumers())


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
    known = graph.inferred(source)
    result = graph.opened(source)
    half = {
        value for label, value in graph.values_of(result.graph).items()
        if label in known and known[label].dtype in _HALF_TYPES
    }  # fmt: skip
    kind = next((value.dtype for value in half if value.is_initializer()), None)
    graph.forget_types(result.graph)
    for node in list(result.graph):
        if node.op_type == "Cast" and node.outputs[0] in half:
            assert kind is not None
            assert node.inputs[0] is not None
            _round(result.graph, node, node.inputs[0], node.outputs[0], kind)
            graph.remove(result.graph, [node])
        elif node.op_type not in _MOVES:
            after = node
            for value in node.outputs:
                if value in half:
                    assert kind is not None
                    after = _round(result.graph, after, value, value, kind)
    for value in result.graph.initializers.values():
        if value in half:
            _widen(value)
    return graph.closed(result)


def _round(
    whole: ir.Graph, after: ir.Node, value: ir.Value, output: ir.Value, kind: ir.DataType
) -> ir.Node:
    """Behind a node, `value` rounded to half in the place and under the name of `output`."""
    name = str(output.name)
    narrow = graph.cast(value, f"{name}_rounded", kind)
    wide = graph.cast(narrow.outputs[0], f"{name}_wide", precision.FLOAT32.onnx_type)
    graph.take_over(output, wide.outputs[0], f"{name}_exact", spare=[narrow])
    whole.insert_after(after, [narrow, wide])
    return wide


def _widen(weight: ir.Value) -> None:
    tensor = weight.const_value
    assert tensor is not None
    row = _HALF_TYPES[tensor.dtype]
    values = torch.frombuffer(bytearray(tensor.tobytes()), dtype=row.torch_type)
    wide = values.reshape(tensor.numpy().shape).float().numpy()
    weight.const_value = ir.tensor(wide, name=weight.name)
    weight.dtype = ir.DataType.FLOAT
