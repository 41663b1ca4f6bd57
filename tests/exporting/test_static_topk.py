"""Static top-k: fixed shapes, the highest scores in their order, the same MACs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from asvit_deploy.errors import UserError
from asvit_deploy.exporting.half import to_half
from asvit_deploy.exporting.static_topk import to_static_topk
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.torch_stages import StaticModel

KEPT = (100, 40, 7)


@pytest.fixture(scope="module")
def exported(mini_artifacts):
    return onnx.load(mini_artifacts["1", "auto"])


def test_keeps_the_highest_scores_in_order(exported, mini, photos):
    model = to_static_topk(exported, KEPT)
    ours = OrtRunner(model, record=False)
    theirs = StaticModel(mini, [1 + k for k in KEPT])
    for i in range(6):
        logits = ours.session.run(["logits"], {"images": photos[i][None]})[0]
        wanted = theirs.infer(torch.from_numpy(photos[i][None]))
        assert np.abs(logits - wanted).max() <= 1e-5 * np.abs(wanted).max(), "rounding only"


def test_every_shape_is_fixed(exported):
    model = to_static_topk(exported, KEPT)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
    shapes = {info.name: [d.dim_value for d in info.type.tensor_type.shape.dim]
              for info in inferred.value_info}  # fmt: skip
    for stage, kept in enumerate(KEPT):
        assert shapes[f"chosen_{stage}"][1] == 1 + kept
    assert [output.name for output in model.graph.output] == ["logits"]


@pytest.mark.slow
def test_in_half_precision(exported, photos):
    whole = OrtRunner(to_static_topk(exported, KEPT), record=False)
    half = OrtRunner(to_static_topk(to_half(exported, "fp16"), KEPT), record=False)
    a, b = (r.session.run(["logits"], {"images": photos[0][None]})[0] for r in (whole, half))
    assert np.abs(a - b).max() <= 2e-2 * np.abs(a).max()


def test_refusals(exported, mini_artifacts):
    for kept in ((10, 20, 5), (10, 5), (10, 5, 0)):
        with pytest.raises(ValueError, match="do not fit 3 stages"):
            to_static_topk(exported, kept)
    with pytest.raises(UserError, match="dynamic batch"):
        to_static_topk(onnx.load(mini_artifacts["dynamic", "auto"]), KEPT)
    with pytest.raises(UserError, match=r"m\.onnx has no ThresholdCompact node"):
        to_static_topk(onnx.load(mini_artifacts["1", "standard"]), KEPT, "m.onnx")
