"""Padded mode keeps exactly the tokens of dynamic mode and changes no shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from conftest import sharpened
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession as OrtSession
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from asvit_deploy.data.images import open_images
from asvit_deploy.errors import UserError
from asvit_deploy.exporting import padded
from asvit_deploy.exporting.padded import to_padded
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.ops.cases import CASES, EDGES
from asvit_deploy.ops.reference import keep_mask
from asvit_deploy.parity import compare
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "batch"),
    [(("1", "auto"), 1), (("1", "custom"), 1), (("dynamic", "auto"), 1), (("dynamic", "auto"), 5)],
)
def test_same_tokens_and_logits_as_pytorch(mini, mini_artifacts, photos, key, batch):
    runner = OrtRunner(to_padded(onnx.load(mini_artifacts[key])))
    parity = compare(
        TorchRunner(mini), runner, list(photos), photos.names, mini.threshold_values(), batch=batch
    )
    assert parity.failures == []
    assert parity.equal_sets == len(photos)


@pytest.mark.slow
@pytest.mark.parametrize("key", [("1", "auto"), ("dynamic", "auto")])
def test_scores_of_the_alive_equal_those_of_dynamic_mode(mini_artifacts, photos, key):
    ours = OrtRunner(to_padded(onnx.load(mini_artifacts[key])))(photos[1][None])
    theirs = OrtRunner(mini_artifacts[key])(photos[1][None])
    for stage in range(3):
        np.testing.assert_array_equal(ours.lengths[stage], theirs.lengths[stage])
        np.testing.assert_allclose(ours.scores[stage][0], theirs.scores[stage][0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("key", [("1", "auto"), ("dynamic", "auto")])
def test_standard_ops_and_static_shapes(mini_artifacts, key):
    model = to_padded(onnx.load(mini_artifacts[key]))
    assert {node.domain for node in model.graph.node} == {""}
    assert [entry.domain for entry in model.opset_import] == [""]
    assert not model.functions
    assert "NonZero" not in {node.op_type for node in model.graph.node}
    assert [o.name for o in model.graph.output] == ["logits", "length_0", "length_1", "length_2"]
    if key[0] == "1":
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        shapes = [[d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.value_info]
        assert all(all(shape) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("key", [("1", "auto"), ("dynamic", "auto")])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("threshold", [1e9, 1e-12, float("nan"), -float("inf")])
def test_one_or_all_tokens_stay(mini, mini_artifacts, photos, stage, threshold, key):
    model = build(mini.config).eval()
    model.load_state_dict(mini.state_dict())
    with torch.no_grad():
        model.thresholds[stage].fill_(threshold)
    proto = onnx.load(mini_artifacts[key])
    tensor = next(t for t in proto.graph.initializer if t.name == f"threshold_{stage}")
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(threshold, np.float32), tensor.name))
    runner = OrtRunner(to_padded(proto))
    for i in range(2):
        expected, actual = TorchRunner(model)(photos[i][None]), runner(photos[i][None])
        for s in range(3):
            np.testing.assert_array_equal(actual.kept[s][0], expected.kept[s][0])
        error = np.abs(actual.output - expected.output).max()
        assert error <= 1e-4 * np.abs(expected.output).max()


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["1", "dynamic"])
def test_lvvit_votes_of_kept_tokens_only(batch):
    config = replace(arch("as_lvvit_s"), depth=5, stages=(2, 3, 4), num_classes=20).at(64)
    images = open_images(None, config, limit=4)
    # Few tokens stay, so that the votes of dropped ones would show.
    model = sharpened(config, images, keep=(0.5, 0.4, 0.2))
    parity = compare(
        TorchRunner(model),
        OrtRunner(to_padded(to_onnx(model, batch))),
        list(images),
        images.names,
        model.threshold_values(),
        batch=4 if batch == "dynamic" else 1,
    )
    assert parity.failures == []


def _keep_model(tokens):
    """The stage's function by itself, inlined: mask, index, length."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20, "{padded.DOMAIN}": 1]>\n'
        "g (float[B,N] scores, float threshold, bool[B,N] alive)"
        " => (bool[B,M] mask, int64[B,M] index, int64[B] length) {\n"
        f"mask, index, length = {padded.DOMAIN}.Keep (scores, threshold, alive)\n}}"
    )
    model.functions.append(padded._stage_function(tokens, 20))
    return onnx.inliner.inline_local_functions(model)


def _keep(scores, threshold, alive):
    feeds = {"scores": scores, "threshold": np.float32(threshold), "alive": alive}
    return ReferenceEvaluator(_keep_model(scores.shape[1])).run(None, feeds)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_selection_is_the_oracle_s(case):
    mask, _, length = _keep(case.scores, case.threshold, np.ones(case.scores.shape, bool))
    np.testing.assert_array_equal(mask[:, 1:], keep_mask(case.scores, case.threshold))
    np.testing.assert_array_equal(length, 1 + mask[:, 1:].sum(1))


@pytest.mark.parametrize("case", EDGES, ids=lambda case: case.name)
def test_selection_in_onnx_runtime_is_the_oracle_s(case):
    """Where dropped tokens lie between: each image twice as long, every other token gone."""
    scores = np.repeat(case.scores, 2, axis=1)
    alive = np.arange(scores.shape[1])[None] % 2 == 1
    scores[:, ::2] = -np.inf
    model = _keep_model(scores.shape[1])
    session = OrtSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"scores": scores, "threshold": np.array(case.threshold, np.float32)}
    feeds["alive"] = np.repeat(alive, len(scores), axis=0)
    mask = session.run(["mask"], feeds)[0]
    assert not mask[:, 1::2].any()
    np.testing.assert_array_equal(mask[:, 2::2], keep_mask(case.scores, case.threshold))


@pytest.mark.parametrize("batch", [1, "B"])
def test_selection_passes_the_shape_inference_of_onnx_runtime_s_quantiser(batch):
    model = _keep_model(9)
    for value in (model.graph.input[0], model.graph.input[2]):
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, [batch, 9]))
    inferred = SymbolicShapeInference.infer_shapes(model, 2**31 - 1, False, False, 0)
    shapes = [[d.dim_value for d in o.type.tensor_type.shape.dim] for o in inferred.graph.output]
    one = 1 if batch == 1 else 0
    assert shapes == [[one, 10], [one, 10], [one]]


@pytest.mark.parametrize("threshold", [0.5, 2.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 2, 7, 196])
def test_selection_among_the_alive(tokens, threshold):
    random = np.random.default_rng(tokens)
    lowest = np.finfo(np.float32).min
    values = np.array([0.0, 0.25, 0.5, 0.75, np.nan, -np.inf, np.inf, -0.0, lowest], np.float32)
    scores = random.choice(values, (64, tokens))
    alive = random.random((64, tokens)) < 0.6
    alive[np.arange(64), random.integers(0, tokens, 64)] = True
    scores[:8] = np.where(alive[:8], np.nan, -np.inf)
    scores[8:24] = random.choice(np.array([np.nan, -np.inf], np.float32), (16, tokens))
    scores[24:32] = random.choice(np.array([np.nan, -np.inf, lowest], np.float32), (8, tokens))
    scores = np.where(alive, scores, -np.inf).astype(np.float32)
    mask, index, length = _keep(scores, threshold, alive)
    for b in range(64):
        expected = np.zeros(tokens, bool)
        expected[alive[b]] = keep_mask(scores[b, alive[b]][None], threshold)[0]
        np.testing.assert_array_equal(mask[b, 1:], expected)
    assert mask[:, 0].all()
    np.testing.assert_array_equal(length, mask.sum(1))
    np.testing.assert_array_equal(index, np.where(mask, np.arange(tokens + 1), -1))


@pytest.mark.slow
def test_refuses_what_has_no_op_node(mini, mini_artifacts):
    with pytest.raises(UserError, match=r"here\.onnx has no ThresholdCompact"):
        to_padded(onnx.load(mini_artifacts["1", "standard"]), "here.onnx")
    with pytest.raises(UserError, match="no ThresholdCompact"):
        to_padded(to_onnx(build(mini.config, adaptive=False).eval()))


@pytest.mark.slow
def test_metadata_says_so(mini_artifacts):
    model = to_padded(onnx.load(mini_artifacts["1", "auto"]))
    props = {p.key: p.value for p in model.metadata_props}
    assert (props["asvit_mode"], props["asvit_ops"]) == ('"padded"', '"standard"')
