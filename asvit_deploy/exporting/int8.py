"""Int8 written into the graph by ONNX Runtime's quantiser: 8-bit linear layers, all else float32.

Quantised are the products with constant matrices: the linear layers of the blocks and the head.
Weights have one scale per output channel. Dynamic: each layer's input is rounded to 8 bits by its
own range, as CPUs like it; files take one picture, since in a batch one range would serve all.
Static: by ranges that calibration pictures showed, as QuantizeLinear and DequantizeLinear, which
TensorRT and OpenVINO read.

What stays float32: the patches' convolution, LayerNorm, softmax, the products of the attention,
scores, norms and the comparison with thresholds; and layers whose own rounding moves their output
by more than a limit, see `layer_errors`: in trained networks a few tokens of a few layers are
hundreds of times larger than the rest, and one range for all of them leaves the rest no bits.

The quantiser is ONNX Runtime's because it is there wherever the file is to run; NNCF would bring
another copy of PyTorch's graph and OpenVINO's tool chain.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from asvit_deploy import graph
from asvit_deploy.errors import UserError
from asvit_deploy.files import scratch
from asvit_deploy.precision import FLOAT32, HALVES
from asvit_deploy.runners.onnx_runtime import arithmetic_of, import_onnxruntime, session_options

Kind = Literal["dynamic", "static"]
_PRODUCTS = ("Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """A product with a constant matrix.

    Attributes:
        name: of the matrix, such as `model.blocks.6.mlp.fc2.weight`.
        node: of the product.
        given: what is multiplied.
        matrix: float32 [in, out].
    """

    name: str
    node: str
    given: str
    matrix: NDArray[np.float32]


def linear_layers(model: onnx.ModelProto) -> list[Layer]:
    """What int8 can hold of a model; everything else always stays float32."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type not in _PRODUCTS or node.domain or node.input[1] not in stored:
            continue
        matrix = numpy_helper.to_array(stored[node.input[1]])
        if any(entry.name == "transB" and entry.i for entry in node.attribute):
            matrix = matrix.T
        if matrix.ndim == 2:
            found.append(Layer(node.input[1], node.name, node.input[0], matrix))
    return found


def smoothed(model: onnx.ModelProto, pictures: Sequence[NDArray[np.float32]]) -> onnx.ModelProto:
    """The same network, whose normalised tokens need fewer bits.

    A few channels behind a LayerNorm are far larger than the rest. Each channel is divided by s in
    the LayerNorm's weights and multiplied by s in the layers that read it, s = max|x|^a / max|w|^(1
    - a) with a = 0.65: what is hard to round moves from the activations, with one range for all
    channels, into the weights (Xiao et al., SmoothQuant, 2023). Where anything but linear layers
    reads the tokens, they stay.

    Args:
        pictures: float32 [3, H, W] each.
    """
    layers = {layer.node: layer for layer in linear_layers(model)}
    largest: dict[str, NDArray[np.float32]] = {}
    for given in _inputs_of(model, list(layers.values()), pictures):
        for name, x in given.items():
            peaks = np.abs(x).reshape(-1, x.shape[-1]).max(0)
            largest[name] = np.maximum(largest.get(name, 0.0), peaks)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    for node in result.graph.node:
        if node.op_type != "LayerNormalization" or len(node.input) < 3:
            continue
        readers = _readers(result, node.output[0])
        if not readers or not all(reader.name in layers for reader in readers):
            continue
        peaks = np.maximum.reduce([largest[layers[reader.name].given] for reader in readers])
        rows = np.maximum.reduce([np.abs(layers[reader.name].matrix).max(1) for reader in readers])
        scale = np.maximum(peaks, _TINY) ** _SHIFT / np.maximum(rows, _TINY) ** (1 - _SHIFT)
        scale = (scale / np.exp(np.log(scale).mean())).clip(1 / _MOST, _MOST).astype(np.float32)
        for i in (1, 2):
            _give(result, node, i, numpy_helper.to_array(stored[node.input[i]]) / scale)
        for reader in readers:
            wide = layers[reader.name].matrix * scale[:, None]
            turned = any(entry.name == "transB" and entry.i for entry in reader.attribute)
            _give(result, reader, 1, wide.T if turned else wide)
    used = {name for node in result.graph.node for name in node.input}
    used |= {output.name for output in result.graph.output}  # counts that are fixed
    kept = [tensor for tensor in result.graph.initializer if tensor.name in used]
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    return result


_SHIFT, _TINY, _MOST = 0.65, 1e-5, 100.0


def _readers(model: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    """The nodes that read a value, a part of its rows too."""
    found: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if name in node.input:
            found += _readers(model, node.output[0]) if node.op_type == "Slice" else [node]
    return found


def _give(
    model: onnx.ModelProto, node: onnx.NodeProto, place: int, values: NDArray[np.float32]
) -> None:
    """Weights of a node's own, under the name of those that it had where nobody else has them:
    what is equal, such as the weights of fresh norms, is stored once."""
    name = node.input[place]
    sharing = sum(list(other.input).count(name) for other in model.graph.node)
    own = name if sharing == 1 else f"{name}_of_{node.output[0]}"
    made = numpy_helper.from_array(np.ascontiguousarray(values, np.float32), own)
    if own == name:
        next(t for t in model.graph.initializer if t.name == name).CopyFrom(made)
    else:
        model.graph.initializer.append(made)
        node.input[place] = own


def layer_errors(
    model: onnx.ModelProto, kind: Kind, pictures: Sequence[NDArray[np.float32]]
) -> dict[str, float]:
    """By how much rounding a layer's input to 8 bits moves its output, by the layer's name.

    |W e| / |W x| over all rows of all pictures, x the input in float32 and e its rounding alone.

    Args:
        pictures: float32 [3, H, W] each.
    """
    layers = linear_layers(model)
    ranges: dict[str, tuple[float, float]] = {}
    if kind == "static":
        for given in _inputs_of(model, layers, pictures):
            for name, x in given.items():
                low, high = ranges.get(name, (0.0, 0.0))
                ranges[name] = (min(low, float(x.min())), max(high, float(x.max())))
    moved, whole = dict[str, float](), dict[str, float]()
    for given in _inputs_of(model, layers, pictures):
        for layer in layers:
            x = given[layer.given]
            error = torch.from_numpy(_rounded(x, kind, ranges.get(layer.given)) - x)
            matrix = torch.tensor(layer.matrix)
            both = (error @ matrix, torch.from_numpy(x) @ matrix)
            for sums, product in zip((moved, whole), both):
                sums[layer.name] = sums.get(layer.name, 0.0) + float(product.square().sum())
    return {name: math.sqrt(moved[name] / whole[name]) if whole[name] else 0.0
            for name in (layer.name for layer in layers)}  # fmt: skip


def _inputs_of(
    model: onnx.ModelProto, layers: Sequence[Layer], pictures: Iterable[NDArray[np.float32]]
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """What each layer is given, picture by picture."""
    names = sorted({layer.given for layer in layers})
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    there = {output.name for output in shown.graph.output}
    for name in names:
        if name not in there:
            shown.graph.output.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
    session = import_onnxruntime().InferenceSession(
        graph.with_function(shown).SerializeToString(), session_options(1),
        providers=["CPUExecutionProvider"],
    )  # fmt: skip
    wanted = session.get_inputs()[0].name
    for picture in pictures:
        yield dict(zip(names, session.run(names, {wanted: picture[None]})))


def _rounded(
    x: NDArray[np.float32], kind: Kind, known: tuple[float, float] | None
) -> NDArray[np.float32]:
    """x as the quantiser rounds it: 256 steps over its range, or 255 around 0 over a known one."""
    if kind == "static":
        assert known is not None
        step = max(-known[0], known[1]) / 127 or 1.0
        return (np.clip(np.round(x / step), -127, 127) * step).astype(np.float32)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.round(-low / step)
    return ((np.clip(np.round(x / step) + zero, 0, 255) - zero) * step).astype(np.float32)


def require_float32(model: onnx.ModelProto, name: str = "the model") -> None:
    """Raise UserError where a graph holds half precision or int8 already."""
    holds = arithmetic_of(model)
    ends = {info.type.tensor_type.elem_type for info in (*model.graph.input, *model.graph.output)}
    holds = next((half.option for half in HALVES if half.onnx_type in ends), holds)
    if holds != FLOAT32.option:
        raise UserError(
            f"{name} is in {holds} already, and int8 is made from float32; name the checkpoint, or "
            "the float32 file that `asvit-deploy export` wrote"
        )


def to_int8(
    model: onnx.ModelProto, kind: Kind, float32: Iterable[str] = (),
    pictures: Sequence[NDArray[np.float32]] = (),
) -> onnx.ModelProto:  # fmt: skip
    """A copy of a float32 model of ours whose linear layers are int8.

    Args:
        model: of any mode, with or without the op's function.
        kind: "dynamic" or "static".
        float32: names of layers that stay as they are.
        pictures: float32 [3, H, W] each, which the ranges of the static kind are taken from.

    Returns:
        The model with the same inputs and outputs.

    Raises:
        UserError: it is in half precision or int8 already.
    """
    require_float32(model)
    kept = set(float32)
    chosen = {layer.node for layer in linear_layers(model) if layer.name not in kept}
    others = [node.name for node in model.graph.node
              if node.op_type in _PRODUCTS and node.name not in chosen]  # fmt: skip
    # The dynamic quantiser makes a Gemm a MatMul first, under a longer name.
    others += [f"{name}_MatMul" for name in others]
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]  # which it does not believe, and fails on
    with scratch("int8") as folder:
        output = folder / "int8.onnx"
        _quantise(bare, output, kind, others, pictures)
        result = onnx.load(str(output))
    _keep_opsets(result, model)
    props = {entry.key: entry.value for entry in result.metadata_props}
    onnx.helper.set_model_props(result, {**props, "asvit_precision": '"int8"'})
    onnx.checker.check_model(result)
    return result


def _quantise(
    model: onnx.ModelProto, output: Path, kind: Kind, others: list[str],
    pictures: Sequence[NDArray[np.float32]],
) -> None:  # fmt: skip
    from onnxruntime import quantization as library

    given: dict[str, Any] = {
        "op_types_to_quantize": list(_PRODUCTS), "per_channel": True,
        "weight_type": library.QuantType.QInt8, "nodes_to_exclude": others,
    }  # fmt: skip
    root, name = logging.getLogger(), model.graph.input[0].name
    level, wanted = root.level, logging.ERROR  # it asks for a preparation that does not help here
    root.setLevel(wanted)
    try:
        if kind == "dynamic":
            library.quantize_dynamic(model, output, extra_options={"MatMulConstBOnly": True},
                                     **given)  # fmt: skip
            return

        class Reader(library.CalibrationDataReader):
            def __init__(self) -> None:
                self.left = iter(pictures)

            def get_next(self) -> dict[str, NDArray[np.float32]] | None:
                picture = next(self.left, None)
                return None if picture is None else {name: picture[None]}

        library.quantize_static(
            model, output, Reader(), quant_format=library.QuantFormat.QDQ,
            activation_type=library.QuantType.QInt8,  # TensorRT takes no other, and no int32 bias
            extra_options={"ActivationSymmetric": True, "QuantizeBias": False}, **given,
        )  # fmt: skip
    finally:
        root.setLevel(level)


def _keep_opsets(result: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Drop domains that the quantiser names and the graph does not use: other readers refuse."""
    used = {node.domain for node in result.graph.node}
    known = {entry.domain for entry in model.opset_import}
    kept = [entry for entry in result.opset_import if entry.domain in used | known]
    del result.opset_import[:]
    result.opset_import.extend(kept)
