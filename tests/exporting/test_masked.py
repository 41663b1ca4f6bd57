"""A few compactions and masks between: the tokens of the file in which all cuts compact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import raises_one_line

from asvit_deploy import per_picture
from asvit_deploy.exporting.half import rounded, to_half
from asvit_deploy.exporting.masked import with_masks
from asvit_deploy.exporting.padded import to_padded
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.graph import with_function
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.ops import onnx_op
from asvit_deploy.parity import compare
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

# Every way to hand on what leaving rows carry, and none.
ADAPTING = ["size-passing", "tome", "topk-nearest", "topk-scalar", "evit", "topk"]
PICTURES = 8


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    return list(generator.normal(size=(PICTURES, 3, 28, 28)).astype(np.float32))


def fitted(name, pictures, prefix=1, blocks=(0, 1, 2), most=None):
    """Per picture, cuts in blocks that lie close to each other."""
    config = replace(arch("as_deit_mini"), depth=4, stages=(1, 2, 3), image_size=28, prefix=prefix,
                     num_classes=7).saving()  # fmt: skip
    torch.manual_seed(0)
    dense = build(config, adaptive=False).eval()
    with torch.no_grad():
        for block in dense.blocks:
            block.attn.qkv.weight.mul_(4)
    made = per_picture.fit(dense, RANKED[name], pictures, 0.7, blocks, most)
    return dense.with_reduction(made)


def agrees(model, graph, pictures, batch=1, **how):
    """The graph, with its function, on these pictures; how many keep the same tokens."""
    rows = model.config.prefix, model.reduction.appends
    runner = OrtRunner(with_function(graph), rows=rows)
    names = [str(i) for i in range(len(pictures))]
    found = compare(TorchRunner(model), runner, pictures, names, model.boundaries(),
                    batch=batch, **how)  # fmt: skip
    assert found.failures == []
    assert len(found.mean_kept) == len(model.cuts)
    return found.equal_sets


def lengths(model, pictures):
    with torch.inference_mode():
        traces = [model(torch.from_numpy(picture)[None])[1] for picture in pictures]
    return np.array([[int(n) for n in trace.length] for trace in traces])


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTING)
def test_every_method_keeps_the_same_tokens(pictures, name):
    model = fitted(name, pictures)
    assert (lengths(model, pictures).std(0) > 0).any(), "pictures differ"
    graph = to_onnx(model, "dynamic")
    for physical, batch in (([2], 1), ([0], 3), ([], 1), ([0, 1, 2], 3)):
        masked = with_masks(graph, physical)
        assert len(onnx_op.nodes_of(masked.graph)) == len(physical)
        assert agrees(model, masked, pictures, batch) == PICTURES
    assert agrees(model, to_padded(graph), pictures, 3) == PICTURES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["size-passing", "evit"])
def test_several_prefix_rows_and_a_bound(pictures, name):
    model = fitted(name, pictures, prefix=3, most=38)
    masked = with_masks(to_onnx(model, "dynamic", "custom"), [1])
    assert agrees(model, masked, pictures, 3) == PICTURES


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [1e9, 1e-12, float("nan")])
@pytest.mark.parametrize("stage", [0, 2])
def test_one_or_all_stay(pictures, threshold, stage):
    """The best stays in any case, as the op has it, before a compaction and behind one."""
    model = fitted("topk", pictures)
    with torch.no_grad():
        model.reduction.boundaries()[stage].fill_(threshold)
    masked = with_masks(to_onnx(model, "dynamic"), [1])
    assert agrees(model, masked, pictures[:3], 3) == 3


@pytest.mark.slow
def test_half_precision(pictures):
    model = fitted("size-passing", pictures)
    half = to_half(with_masks(to_onnx(model, "dynamic"), [1]), "fp16")
    assert len(onnx_op.nodes_of(half.graph)) == 1
    runner = OrtRunner(rounded(with_function(half)), optimize=False)
    names = [str(i) for i in range(PICTURES)]
    found = compare(TorchRunner(model), runner, pictures, names, model.boundaries(), "fp16")
    assert found.failures == []


@pytest.mark.slow
def test_what_cannot_be_masked_is_refused(pictures):
    model = fitted("topk", pictures[:4])
    raises_one_line(lambda: with_masks(to_onnx(model), [1], "one.onnx"),
                    "one.onnx takes one picture", "--batch dynamic")  # fmt: skip
    with pytest.raises(ValueError, match="not among 3 cuts"):
        with_masks(to_onnx(model, "dynamic"), [3])
