"""Every method with fixed counts as an ONNX graph: plain ops, and the same choice of equals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import STAGES, network

from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.runners.onnx_bounds import VOCABULARY
from asvit_deploy.runners.onnx_runtime import OrtRunner


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(("equal", "batch"), [(False, 3), (True, 1)])
@pytest.mark.parametrize("method", RANKED.values())
def test_the_graph_is_the_network(method, equal, batch):
    few = method.name in ("bat", "tome-stages")
    model = network(method, 1, STAGES[0], (7, 3, 1) if few else (30, 18, 10))
    images = torch.randn(batch, 3, 112, 112)
    if equal:  # all tokens are, so that every score is tied
        model.pos_embed.zero_()
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
        images = torch.full_like(images, 0.5)
    graph = to_onnx(model, "1" if batch == 1 else "dynamic")
    assert {node.op_type for node in graph.graph.node} <= VOCABULARY
    output, trace = model(images)
    found = OrtRunner(graph).infer(images.numpy())
    named = dict(zip((out.name for out in graph.graph.output), found))
    np.testing.assert_allclose(named["logits"], output.numpy(), rtol=0, atol=1e-5)
    for stage, length in enumerate(trace.length):
        assert named.get(f"length_{stage}", length.numpy()).tolist() == length.tolist()
