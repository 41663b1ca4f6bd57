"""DynamicViT by thresholds and LTMP in every form of a graph, beside PyTorch's decisions."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from conftest import raises_one_line

from asvit_deploy import per_picture
from asvit_deploy.budget import fixed_counts
from asvit_deploy.exporting.half import rounded, to_half
from asvit_deploy.exporting.masked import with_masks
from asvit_deploy.exporting.padded import to_padded
from asvit_deploy.exporting.split import split_segments, thresholds_of
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.graph import with_function
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.ops import onnx_op
from asvit_deploy.parity import compare
from asvit_deploy.reduction.dynamicvit import DynamicViT
from asvit_deploy.reduction.schedule import Schedule
from asvit_deploy.runners.bucketed import BucketedRunner, OrtStages
from asvit_deploy.runners.onnx_bounds import VOCABULARY
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner
from asvit_deploy.runners.torch_stages import TorchStages

PICTURES, PREFIX = 8, 2
BUCKETS = (8, 16, 24, 32, 40, 49 + PREFIX)
_normal = np.random.default_rng(0).normal(size=(PICTURES, 3, 28, 28)).astype(np.float32)
LEARNED = ["dynamicvit", "ltmp"]


@functools.cache
def dense():
    config = replace(arch("as_deit_mini"), depth=4, stages=(1, 2, 3), image_size=28, prefix=PREFIX,
                     num_classes=7).saving()  # fmt: skip
    torch.manual_seed(0)
    model = build(config, adaptive=False).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    return model


@functools.cache
def fitted(name):
    """Per picture, 49 image tokens."""
    model, some = dense(), list(_normal)
    if name == "ltmp":
        return model.with_reduction(per_picture.fit_pairs(model, some, 0.7))
    own = DynamicViT.planned(model.config.dim, model.config.prefix, (1, 2, 3), None)
    with torch.no_grad():
        for predictor in own.predictors:
            predictor.out_conv[4].weight.mul_(30)
    taught = model.with_reduction(own)
    return model.with_reduction(per_picture.fit(taught, DynamicViT, some, 0.7, (1, 2, 3)))


@functools.cache
def exported(name, batch="dynamic"):
    model = fitted(name)
    graph = to_onnx(model, batch)
    said = {"asvit_reduction": json.dumps(model.reduction.fields())}  # as an exported file has it
    onnx.helper.set_model_props(graph, said)
    return graph


def agrees(model, runner, batch=1, **how):
    names = [str(i) for i in range(PICTURES)]
    found = compare(TorchRunner(model), runner, list(_normal), names, model.boundaries(),
                    batch=batch, **how)  # fmt: skip
    assert found.failures == []
    assert len(found.mean_kept) == len(model.cuts)
    return found.equal_sets


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_function_standard_ops_masks_and_padding_keep_the_same_tokens(name):
    model, graph = fitted(name), exported(name)
    standard = onnx.inliner.inline_local_functions(with_function(graph))
    for one, batch in (
        (exported(name, "1"), 1), (graph, 3), (standard, 3), (exported(name, "packed"), 3),
        (to_padded(graph), 3), (with_masks(graph, [1]), 3), (with_masks(graph, []), 3),
    ):  # fmt: skip
        assert agrees(model, OrtRunner(with_function(one), rows=(PREFIX, 0)), batch) == PICTURES
    assert len(onnx_op.nodes_of(with_masks(graph, [1]).graph)) == 1
    assert onnx_op.nodes_of(standard.graph) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
@pytest.mark.parametrize("name", LEARNED)
def test_buckets_keep_the_same_tokens(name, kind):
    model, graph = fitted(name), exported(name)
    if kind == "torch":
        stages = TorchStages(model, BUCKETS)
    else:
        stages = OrtStages(split_segments(graph), thresholds_of(graph))
    runner = BucketedRunner(stages, len(model.cuts), BUCKETS)
    assert agrees(model, runner) == PICTURES


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_files_of_one_picture_hide_no_rows(name):
    """Both compare rows, and such graphs cannot tell which are there."""
    one = exported(name, "1")
    raises_one_line(lambda: to_padded(one, "m.onnx"), "m.onnx", "--batch dynamic")
    raises_one_line(lambda: split_segments(one, "m.onnx"), "m.onnx", "--batch dynamic")


@pytest.mark.slow
# In bfloat16 a pair's partner is a near tie here, and with it what that partner is handed.
@pytest.mark.parametrize(
    ("name", "precision"), [("dynamicvit", "fp16"), ("dynamicvit", "bf16"), ("ltmp", "fp16")]
)
def test_half_precision_decides_in_float32(name, precision):
    half = with_function(to_half(exported(name, "1"), precision))
    kinds = {value.name: value.type.tensor_type.elem_type for value in half.graph.value_info}
    kinds |= {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    decide = {kinds[f"{kind}_{s}"] for kind in ("scores", "threshold") for s in range(3)}
    assert decide == {onnx.TensorProto.FLOAT}
    runner = OrtRunner(rounded(half), optimize=False, rows=(PREFIX, 0))
    agrees(fitted(name), runner, precision=precision)


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(("equal", "batch"), [(False, 3), (True, 1)])
@pytest.mark.parametrize("name", ["dynamicvit", "schedule"])
def test_fixed_counts_are_plain_ops(name, equal, batch):
    base = dense()
    if name == "schedule":
        method = Schedule((0, 1, 2), (40, 24, 11), PREFIX, None, (5, 0, 9))
    else:
        plan = fixed_counts(base.config, DynamicViT, 0.7)
        method = plan.taught_by(fitted(name).reduction)
    model = base.with_reduction(method)
    images = torch.randn(batch, 3, 28, 28)
    if equal:
        images = torch.zeros_like(images)
    graph = to_onnx(model, "1" if batch == 1 else "dynamic")
    assert {node.op_type for node in graph.graph.node} <= VOCABULARY
    output, _ = model(images)
    found = OrtRunner(graph).infer(images.numpy())[0]
    np.testing.assert_allclose(found, output.numpy(), rtol=0, atol=1e-5)
