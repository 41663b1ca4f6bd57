"""The op's model-local function: what a runtime without our library computes, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from asvit_deploy.ops import onnx_op
from asvit_deploy.ops.cases import CASES
from asvit_deploy.ops.reference import threshold_compact

ort = pytest.importorskip("onnxruntime")
SymbolicShapeInference = pytest.importorskip(
    "onnxruntime.tools.symbolic_shape_infer"
).SymbolicShapeInference

TYPES = {
    "float": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}
# The body for one image, and the one for any batch, which must do for one image too.
BODIES = {False: [case for case in CASES if len(case.tokens) == 1], True: CASES}

# tokens, scores, threshold -> the op's outputs
Runner = Callable[[np.ndarray, np.ndarray, np.ndarray], Sequence[np.ndarray]]


def model_of(kind: int, batched: bool, opset: int, cast: bool, prefix: int = 1) -> onnx.ModelProto:
    """The op alone; `cast` lets the payload enter and leave as float32, exactly."""
    outside = TensorProto.FLOAT if cast else kind
    nodes = [
        helper.make_node("Cast", ["tokens"], ["narrow"], to=kind),
        helper.make_node(
            onnx_op.OP_TYPE, ["narrow", *onnx_op.INPUTS[1:]],
            ["narrow_compact", *onnx_op.OUTPUTS[1:]],
            domain=onnx_op.DOMAIN, **onnx_op.PLUGIN_ATTRIBUTES,
        ),
        helper.make_node("Cast", ["narrow_compact"], ["compact"], to=outside),
    ]  # fmt: skip
    info, whole = helper.make_tensor_value_info, TensorProto.INT64
    kinds = (outside, ["B", "M", "D"]), (TensorProto.FLOAT, ["B", "N"]), (TensorProto.FLOAT, [])
    inputs = [info(name, *form) for name, form in zip(onnx_op.INPUTS, kinds)]
    outputs = [info("compact", outside, None)]
    outputs += [info(name, whole, None) for name in onnx_op.OUTPUTS[1:]]
    return helper.make_model(
        helper.make_graph(nodes, "op", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(onnx_op.DOMAIN, 1)],
        ir_version=10,
        functions=[onnx_op.function_body(batched, opset, prefix)],
    )


@functools.cache
def runner(kind: str, batched: bool, opset: int, prefix: int) -> Runner:
    """The function of that payload in ONNX Runtime, with no library registered."""
    code, dtype = TYPES[kind]
    if kind == "bfloat16" and batched:
        # ONNX Runtime's CPU has no Where for bfloat16: there the standard's own evaluator answers.
        evaluator = ReferenceEvaluator(model_of(code, batched, opset, False, prefix))
        return lambda *given: evaluator.run(None, dict(zip(onnx_op.INPUTS, given)))
    cast = kind == "bfloat16"  # ONNX Runtime takes no numpy array of that type
    model = model_of(code, batched, opset, cast, prefix)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def run(tokens, scores, threshold):
        given = tokens.astype(np.float32) if cast else tokens, scores, threshold
        compact, *rest = session.run(None, dict(zip(onnx_op.INPUTS, given)))
        return [compact.astype(dtype) if cast else compact, *rest]

    return run


@pytest.mark.parametrize("opset", [18, 20])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(
    ("batched", "case"),
    [
        pytest.param(batched, case, id=f"{case.name}-{'batched' if batched else 'single'}")
        for batched, cases in BODIES.items()
        for case in cases
    ],
)
def test_function_is_the_oracle_bit_for_bit(batched, case, kind, opset):
    tokens = case.tokens.astype(TYPES[kind][1])
    wanted = threshold_compact(tokens, case.scores, case.threshold)
    threshold = np.array(case.threshold, np.float32)
    result = runner(kind, batched, opset, case.prefix)(tokens, case.scores, threshold)
    for field, mine, right in zip(wanted._fields, result, wanted, strict=True):
        assert (mine.shape, mine.dtype) == (right.shape, right.dtype), field
        same = mine.tobytes() == right.tobytes()  # not in the assert, which would print both
        assert same, field


@pytest.mark.parametrize(
    ("rows", "count", "prefix"), [(9, 8, 1), ("M", "N", 1), (9, 4, 5), ("M", "N", 5)]
)
def test_inlined_body_passes_the_shape_inference_of_onnx_runtime_s_quantiser(rows, count, prefix):
    """It raises at what it does not know; the batched body's GatherND it takes for another."""
    model = model_of(TensorProto.FLOAT, False, 20, True, prefix)
    for value, shape in zip(model.graph.input, ([1, rows, 16], [1, count])):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    inlined = onnx.inliner.inline_local_functions(model)
    inferred = SymbolicShapeInference.infer_shapes(inlined, 2**31 - 1, False, False, 0)
    ranks = {info.name: len(info.type.tensor_type.shape.dim) for info in inferred.graph.value_info}
    assert ranks["narrow_compact"] == 3
    outputs = {info.name: info.type.tensor_type for info in inferred.graph.output}
    assert [len(outputs[name].shape.dim) for name in onnx_op.OUTPUTS] == [3, 2, 1, 0]


@pytest.mark.parametrize("batched", BODIES)
def test_body_of_one_prefix_row_is_the_one_that_files_have(batched):
    """Files made before there were longer prefixes stay equal, bit for bit."""
    body = onnx_op.function_body(batched, 20)
    assert body == onnx_op.function_body(batched, 20, 1)
    (keep,) = (node for node in body.node if "keep" in node.output)
    assert list(keep.input) == ["every", "image_keep"]


@pytest.mark.parametrize("prefix", [0, -1, 4096])
def test_prefix_that_no_call_can_have_is_refused(prefix):
    with pytest.raises(ValueError, match=f"a prefix of {prefix} rows; it has 1 to 4095"):
        onnx_op.function_body(False, 20, prefix)


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("batched", BODIES)
@pytest.mark.parametrize("kind", ["float", "float16"])
def test_function_passes_payload_bits_unchanged(kind, batched, prefix):
    """NaN payloads, infinities, denormals and negative zeros are data here."""
    rng = np.random.default_rng(0)
    images = 3 if batched else 1
    tokens = rng.integers(0, 256, (images, 17, 256), np.uint8).view(TYPES[kind][1])
    tokens[:, ::4] = -0.0
    if kind == "float16":  # ONNX Runtime's CPU selects halves as float32, which quiets NaNs
        tokens[np.isnan(tokens)] = np.inf
    scores = rng.random((images, 17 - prefix), dtype=np.float32)
    wanted = threshold_compact(tokens, scores, 0.5).compact
    compact = runner(kind, batched, 20, prefix)(tokens, scores, np.array(0.5, np.float32))[0]
    assert compact.shape == wanted.shape
    same = compact.tobytes() == wanted.tobytes()
    assert same
