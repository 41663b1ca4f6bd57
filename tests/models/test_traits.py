"""Every trait of an architecture against a forward pass written from the weights alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

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


def norm(x, state, name, eps):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def activate(x, kind):
    if kind == "quick_gelu":
        return x / (1 + torch.exp(-1.702 * x))
    if kind == "gelu_tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def written_out(state, config, image):
    """Logits of one image [3, H, W], dense, in float64."""
    c, g, p = config, config.grid, config.patch_size
    patches = image.double().reshape(3, g, p, g, p).permute(1, 3, 0, 2, 4).reshape(g * g, -1)
    weight = state["patch_embed.proj.weight"].flatten(1)
    image_rows = patches @ weight.T + state.get("patch_embed.proj.bias", 0)
    first = [state["cls_token"][0]] + ([state["reg_token"][0]] if c.prefix > 1 else [])
    if c.positions == "image":
        x = torch.cat([*first, image_rows + state["pos_embed"][0]])
    else:
        x = torch.cat([*first, image_rows]) + state["pos_embed"][0]
    x = norm(x, state, "norm_pre", c.eps) if c.norm_pre else x
    for i in range(c.depth):
        b = f"blocks.{i}"
        y = linear(norm(x, state, f"{b}.norm1", c.eps), state, f"{b}.attn.qkv")
        q, k, v = y.reshape(len(x), 3, c.heads, -1).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / math.sqrt(c.dim // c.heads)).softmax(2)
        y = linear((weights @ v).permute(1, 0, 2).flatten(1), state, f"{b}.attn.proj")
        x = x + y * state.get(f"{b}.ls1.gamma", 1) * c.residual
        y = activate(
            linear(norm(x, state, f"{b}.norm2", c.eps), state, f"{b}.mlp.fc1"), c.activation
        )
        y = linear(y, state, f"{b}.mlp.fc2")
        x = x + y * state.get(f"{b}.ls2.gamma", 1) * c.residual
    if c.head == "mean_norm":
        mean = x[c.prefix :].mean(0, keepdim=True)
        return linear(norm(mean, state, "norm", c.eps)[0], state, "head")
    x = norm(x, state, "norm", c.eps)
    tokens = x[c.prefix :]
    if c.head == "mean":
        return linear(tokens.mean(0), state, "head")
    if c.head == "class_and_tokens":
        return linear(x[0], state, "head") + linear(tokens, state, "aux_head").amax(0) / 2
    if c.head == "class_and_mean":
        return linear(torch.cat([x[0], tokens.mean(0)]), state, "head")
    if c.head == "two_classes":
        return (linear(x[0], state, "head") + linear(x[1], state, "head_dist")) / 2
    return x[0] if c.head == "none" else linear(x[0], state, "head")


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
