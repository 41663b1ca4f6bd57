"""Every trait of an architecture against a forward pass written from the weights alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from written_out import written_out

from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS, arch
from asvit_deploy.models.config import TRAITS
from asvit_deploy.models.heads import HEADS

SMALL = replace(arch("as_deit_tiny"), dim=48, heads=3, depth=3, stages=(1, 2), image_size=48,
                num_classes=7)  # fmt: skip
ALONE = {
    "plain": {},
    "qkv_bias": {"qkv_bias": False},
    "patch_bias": {"patch_bias": False},
    "eps": {"eps": 1e-2},
    "residual": {"residual": 0.5},
    "layer_scale": {"layer_scale": True},
    "norm_pre": {"norm_pre": True},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "quick_gelu": {"activation": "quick_gelu"},
    "registers": {"prefix": 5},
    "positions": {"positions": "image"},
    "registers without positions": {"prefix": 5, "positions": "image"},
    "tokens vote": {"head": "class_and_tokens"},
    "mean of the tokens": {"head": "class_and_mean"},
    "distilled": {"head": "two_classes", "prefix": 2},
    "antialiased": {"positions_resize": "bicubic_antialias"},
    "projection": {"head": "projection"},
    "mean": {"head": "mean"},
    "mean, then norm": {"head": "mean_norm"},
    "embedding": {"head": "none"},
}  # fmt: skip
TOGETHER = {"DINOv2 with registers": {"layer_scale": True, "prefix": 5, "positions": "image",
                                      "head": "class_and_mean"},
            "CLIP": {"norm_pre": True, "activation": "quick_gelu", "patch_bias": False,
                     "head": "projection", "eps": 1e-5}}  # fmt: skip


def network(traits, adaptive=False):
    torch.manual_seed(0)
    model = build(replace(SMALL, **traits), adaptive).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # no bias or factor is left at 0 or 1
            if not name.startswith("thresholds"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
@pytest.mark.parametrize("traits", [*ALONE.values(), *TOGETHER.values()], ids=[*ALONE, *TOGETHER])
def test_dense(traits):
    model, images = network(traits), torch.randn(2, 3, 48, 48)
    state = {name: value.double() for name, value in model.state_dict().items()}
    wanted = torch.stack([written_out(state, model.config, image) for image in images])
    for logits in (model(images)[0], model.forward_masked(images)[0],
                   torch.cat([model(image[None])[0] for image in images])):  # fmt: skip
        torch.testing.assert_close(logits.double(), wanted, rtol=1e-4, atol=1e-5)


def test_every_trait_and_head_is_tried():
    known = {name for traits in ALONE.values() for name in traits}
    assert set(TRAITS) - {"stem"} <= known  # the stem's are in test_backbone.py
    assert {traits.get("head", "class") for traits in ALONE.values()} == set(HEADS)


@torch.no_grad()
@pytest.mark.parametrize("traits", [*ALONE.values(), *TOGETHER.values()], ids=[*ALONE, *TOGETHER])
def test_adaptive_forms_agree(traits):
    """Batches, single images and the masked form; the prefix never leaves."""
    model, images = network(traits, adaptive=True), torch.randn(4, 3, 48, 48)
    prefix = model.config.prefix
    for stage, threshold in enumerate(model.thresholds):
        scores = torch.cat([model(image[None])[1].scores[stage][0] for image in images]).sort()[0]
        threshold.fill_((scores[len(scores) // 3] + scores[len(scores) // 3 + 1]) / 2)
    logits, trace = model(images)
    masked, _, masks = model.forward_masked(images)
    alone = torch.cat([model(image[None])[0] for image in images])
    torch.testing.assert_close(logits, alone, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits, masked, rtol=0, atol=2e-5)
    for index, length, mask in zip(trace.index, trace.length, masks):
        assert index[:, :prefix].tolist() == [list(range(prefix))] * 4
        assert length.tolist() == (prefix + mask.sum(1)).tolist()
    assert len(set(trace.length[-1].tolist())) > 1


@pytest.mark.parametrize("name", ARCHS)
def test_table_says_what_the_families_are(name):
    row = arch(name)
    lvvit = name.startswith("as_lvvit")
    assert row.head == ("class_and_tokens" if lvvit else "class")
    assert (row.residual, row.qkv_bias) == ((0.5, False) if lvvit else (1.0, True))
    assert row.counts_elementwise == lvvit
    assert (row.prefix, row.positions, row.activation) == (1, "all", "gelu")
    assert not row.layer_scale
    assert not row.norm_pre
