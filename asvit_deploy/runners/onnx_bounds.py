"""What an ONNX file asks of the machine, found out before it is run.

A graph of 200 bytes can ask for any memory or time: by a shape, by functions that call one another,
by a loop, by data in other files.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import onnx
import onnx.inliner

from asvit_deploy.bounded import MOST_ONNX, open_regular
from asvit_deploy.ops import onnx_op

Refuse = Callable[[str], NoReturn]

_MOST_NODES = 100_000  # functions written out; LV-ViT-M in standard ops has 1,000
_MOST_MACS = 10**13  # of one picture, as far as shapes show; ViT-G at 518 pixels has 2e12
SECONDS = 20  # for one picture; the largest network here takes less than one on a core
_FOR = onnx.AttributeProto
# What `export` writes, in its graphs and in the op's function; `tests/runners/test_onnx_bounds.py`
# compares. No loop among them, and nothing that makes a shape up.
VOCABULARY = frozenset((
    "Abs", "Add", "And", "ArgMax", "ArgMin", "Cast", "CastLike", "Clip", "Concat", "Constant",
    "Conv", "CumSum", "Div", "Equal", "Erf", "Exp", "Expand", "Gather", "GatherElements",
    "GatherND", "Gelu", "Gemm", "Greater", "GreaterOrEqual", "Identity", "IsNaN",
    "LayerNormalization", "Less", "Log", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "NonZero",
    "Not", "Or", "Pow", "Range", "Reciprocal", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceSum", "Relu", "Reshape", "ScatterElements", "Shape", "Sigmoid", "Slice", "Softmax",
    "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where",
))  # fmt: skip
# And those that `exporting.int8` adds.
QUANTISED = frozenset(
    ("DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear")
)  # fmt: skip


def read(path: Path, refuse: Refuse) -> onnx.ModelProto:
    """An ONNX file with the data that it keeps in others.

    Raises:
        UserError, OSError: see `files.open_regular`; by way of `refuse`, it is too large.
        Exception: whatever onnx raises where it is none.
    """
    with open_regular(path, "ONNX file") as file:
        if os.fstat(file.fileno()).st_size > MOST_ONNX:
            refuse("has more than 2 GiB, which no ONNX file can have")
        model = onnx.load_model_from_string(file.read())
    _check_calls(model, refuse)
    total = 0
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            total += _external_bytes(path, tensor, refuse)
            if total > MOST_ONNX:
                refuse("keeps more than 2 GiB in other files, which no runtime here takes")
    onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    return model


def _external_bytes(path: Path, tensor: onnx.TensorProto, refuse: Refuse) -> int:
    given = {entry.key: entry.value for entry in tensor.external_data}
    location = given.get("location", "")
    if not location or os.path.isabs(location) or ".." in Path(location).parts:
        refuse(f"keeps {tensor.name} in {location!r}, outside its folder")
    with open_regular(path.parent / location, "file of weights") as file:
        size = os.fstat(file.fileno()).st_size
    length = given.get("length", "")
    # A length of 0 means all of it to onnx.
    return int(length) or size if length.isdecimal() and len(length) < 20 else size


def _attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.AttributeProto]:
    for node in nodes:
        yield from node.attribute


def _subgraphs(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for attribute in _attributes(nodes):
        if attribute.type == _FOR.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _bodies(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The graph, the functions, and whatever graphs their nodes hold."""
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        body = waiting.pop()
        yield body
        waiting += _subgraphs(body.node)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for body in _bodies(model):
        if isinstance(body, onnx.GraphProto):
            yield from body.initializer
            for sparse in body.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for attribute in _attributes(body.node):
            if attribute.type == _FOR.TENSOR:
                yield attribute.t
            yield from attribute.tensors


def _check_calls(model: onnx.ModelProto, refuse: Refuse) -> None:
    """Refuse functions that call themselves, or one another so often that none can write them
    out."""
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size_of(body: Any, above: tuple[tuple[str, str], ...]) -> int:
        total = len(body.node)
        for node in body.node:
            key = (node.domain, node.op_type)
            if key in functions:
                if key in above or len(above) > 100:
                    refuse(f"holds a function {node.op_type} that calls itself")
                if key not in sizes:
                    sizes[key] = size_of(functions[key], (*above, key))
                total += sizes[key]
            for graph in _subgraphs([node]):
                total += size_of(graph, above)
        if total > _MOST_NODES:
            refuse(f"holds more than {_MOST_NODES:,} nodes, functions written out")
        return total

    size_of(model.graph, ())
    for key, function in functions.items():
        size_of(function, (key,))


def check_runnable(model: onnx.ModelProto, largest: int, refuse: Refuse) -> None:
    """Refuse a graph that could run for ever, or over more values than its network has.

    Args:
        largest: values that one tensor may hold, for one picture.
    """
    for body in _bodies(model):
        if found := next((n for n in body.node if any(_subgraphs([n]))), None):
            refuse(f"holds a loop or a branch ({found.op_type}), which is not run")
    for tensor in _tensors(model):
        if math.prod(tensor.dims) > largest:
            refuse(f"holds a tensor {tensor.name} of shape {list(tensor.dims)}, too large for it")
    whole = model
    if model.functions:
        whole = onnx.inliner.inline_local_functions(model)
    single = onnx.ModelProto()
    single.CopyFrom(whole)
    for info in single.graph.input:
        dims = info.type.tensor_type.shape.dim
        if dims and not dims[0].dim_value:  # any number of pictures: judged by one
            dims[0].dim_value = 1
    del single.graph.value_info[:]  # which the file itself says, and which would be believed
    for info in single.graph.output:
        info.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    except Exception as error:
        refuse(f"has shapes that do not fit ({' '.join(str(error).split())[:80]})")
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    for info in (*graph.input, *graph.value_info, *graph.output):
        shapes[info.name] = [d.dim_value for d in info.type.tensor_type.shape.dim]
        if math.prod(d or 1 for d in shapes[info.name]) > largest:
            refuse(f"computes {info.name} of shape {shapes[info.name]}, too large for it")
    if sum(_macs(node, shapes) for node in graph.node) > _MOST_MACS:
        refuse("computes more than any network for one picture")


def _macs(node: onnx.NodeProto, shapes: dict[str, list[int]]) -> int:
    """Multiplications of a node as far as shapes show."""
    if node.op_type not in ("MatMul", "MatMulInteger", "Gemm", "Conv", "Einsum", "ConvTranspose"):
        return 0
    out = math.prod(d or 1 for d in shapes.get(node.output[0], []))
    inputs = [shapes.get(name, []) for name in node.input[:2]]
    if node.op_type in ("Conv", "ConvTranspose") and len(inputs) == 2:
        return out * math.prod(d or 1 for d in inputs[1][1:])
    return out * max((d for shape in inputs for d in shape[-2:]), default=1)


def check_ours(model: onnx.ModelProto, refuse: Refuse) -> None:
    """Refuse what `export` cannot have written."""
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            refuse("keeps data in other files, as `export` never does")
    for function in model.functions:
        if (function.domain, function.name) != (onnx_op.DOMAIN, onnx_op.OP_TYPE):
            refuse(f"holds a function {function.name}, which `export` never writes")
    for body in _bodies(model):
        for node in body.node:
            if node.domain in ("", "ai.onnx") and node.op_type not in VOCABULARY | QUANTISED:
                refuse(f"holds an op {node.op_type}, which `export` never writes")


# --- time -------------------------------------------------------------------------------------


@contextlib.contextmanager
def time_limit(options: Any, pictures: int) -> Iterator[None]:
    """End a run of ONNX Runtime that takes longer.

    Args:
        options: its RunOptions.
    """

    def end() -> None:
        options.terminate = True

    timer = threading.Timer(SECONDS * max(pictures, 1), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
