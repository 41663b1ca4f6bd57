"""LayerScale folded into the layers before it."""

from __future__ import annotations

from dataclasses import replace

import onnxruntime
import pytest
import torch
from torch import nn

from asvit_deploy.exporting.half import to_half
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.blocks import LayerScale
from asvit_deploy.models.folding import folded

CONFIG = replace(arch("as_deit_tiny"), name="scaled", dim=96, heads=3, depth=4, stages=(1, 2),
                 image_size=48, num_classes=7, layer_scale=True)  # fmt: skip


@pytest.fixture(params=[True, False], ids=["adaptive", "dense"])
def model(request):
    torch.manual_seed(0)
    network = build(CONFIG, request.param).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):  # of either sign, as trained ones are
                parameter.copy_(torch.randn(96).sign() * torch.empty(96).uniform_(0.05, 0.5))
            elif not name.startswith("thresholds"):
                parameter.add_(0.05 * torch.randn_like(parameter))
        for stage, threshold in enumerate(network.thresholds):
            score = network(torch.randn(1, 3, 48, 48))[1].scores[stage][0].sort()[0]
            threshold.fill_((score[2] + score[3]) / 2)
    return network


def scales(network):
    return [module for module in network.modules() if isinstance(module, LayerScale)]


@torch.no_grad()
def test_the_function_is_the_same_and_the_model_stays_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, twin = torch.randn(3, 3, 48, 48), folded(model)
    assert scales(twin) == []
    assert len(scales(model)) == 8
    torch.testing.assert_close(twin(images)[0], model(images)[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(twin(images)[1].index, model(images)[1].index):
        assert ours.equal(theirs)
    assert model.state_dict().keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    gamma, block = model.blocks[1].ls2.gamma, twin.blocks[1].mlp.fc2
    assert block.weight.equal(model.blocks[1].mlp.fc2.weight * gamma[:, None])
    assert block.bias.equal(model.blocks[1].mlp.fc2.bias * gamma)
    assert twin.blocks[1].mlp.fc1 is model.blocks[1].mlp.fc1  # nothing is copied in vain


@torch.no_grad()
def test_a_row_that_half_precision_would_lose_keeps_its_factor(model):
    """Rows of weights up to 0.5: the smallest factor that folds is 2^-13."""
    for block in model.blocks:
        block.attn.proj.weight.clamp_(-0.5, 0.5)[:, 0] = 0.5
    model.blocks[0].ls1.gamma[5] = 2.0**-13
    model.blocks[1].ls1.gamma[5] = 0.99 * 2.0**-13
    model.blocks[2].ls1.gamma[5] = 0
    model.blocks[3].ls1.gamma[5] = 2e5  # and one that it could not hold
    twin, images = folded(model), torch.randn(2, 3, 48, 48)
    kept = [isinstance(block.ls1, LayerScale) for block in twin.blocks]
    assert kept == [False, True, False, True]
    assert all(isinstance(block.ls2, nn.Identity) for block in twin.blocks)
    assert twin.blocks[1].attn.proj is model.blocks[1].attn.proj
    torch.testing.assert_close(twin(images)[0], model(images)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_folded_half_precision_holds_as_well_as_any_weights():
    """The bound that the rule promises, at factors from what folds at least to large ones."""
    torch.manual_seed(0)
    network = build(CONFIG, adaptive=False).eval()
    for block in network.blocks:
        block.ls2.gamma.copy_(10 ** torch.empty(96).uniform_(-2.5, 1))
    rows = torch.cat([block.mlp.fc2.weight for block in folded(network).blocks])
    lost = (rows.half().float() - rows).abs().amax(1) / rows.abs().amax(1)
    assert lost.max() <= 2**-11


def test_networks_without_it_are_left_alone():
    plain = build(replace(CONFIG, layer_scale=False), adaptive=False)
    assert folded(plain) is plain


def run(proto, images):
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["1", "dynamic"])
@torch.no_grad()
def test_the_graph_has_no_factor_and_agrees(model, batch):
    """Folded: as many multiplications as a network without LayerScale has."""
    proto, images = to_onnx(model, batch, "standard"), torch.randn(1, 3, 48, 48)
    plain = build(replace(CONFIG, layer_scale=False), model.adaptive).eval()
    other = to_onnx(plain, batch, "standard")
    count = [sum(n.op_type == "Mul" for n in p.graph.node) for p in (proto, other)]
    assert count[0] == count[1]
    wanted = model(images)[0]
    torch.testing.assert_close(run(proto, images), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(to_half(proto, "fp16"), images), wanted, rtol=0.05, atol=0.02)
