"""The dense networks against a plain forward pass that is written from the papers' equations.

    z_0 = [cls, patches] + pos      z' = z + k MSA(LN(z))      z = z' + k MLP(LN(z'))

DeiT has k = 1 and answers head(LN(z)_cls); LV-ViT has k = 1/2 and adds half the tokens' best votes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS, arch
from asvit_deploy.models.vit import ViT

# dim, depth, heads, MLP width, blocks whose input is compacted (0-based), stem
TABLE = {
    "as_deit_tiny": (192, 12, 3, 768, (4, 7, 10), "patch"),
    "as_deit_small": (384, 12, 6, 1536, (4, 7, 10), "patch"),
    "as_deit_base": (768, 12, 12, 3072, (4, 7, 10), "patch"),
    "as_lvvit_s": (384, 16, 6, 1152, (5, 9, 13), "conv"),
    "as_lvvit_m": (512, 20, 8, 1536, (6, 11, 16), "conv"),
    "as_deit_mini": (128, 6, 2, 256, (2, 3, 4), "conv"),
}


@dataclass(frozen=True)
class Facts:
    """What the plain forward must know of a network, none of it taken from the package."""

    heads: int
    patch: int
    conv_stem: bool
    lvvit: bool
    size: int  # pixels of the test's images

    @property
    def eps(self) -> float:
        return 1e-5 if self.lvvit else 1e-6

    @property
    def residual(self) -> float:
        return 0.5 if self.lvvit else 1.0


NETWORKS = {
    "as_deit_tiny": Facts(heads=3, patch=16, conv_stem=False, lvvit=False, size=64),
    "as_lvvit_s": Facts(heads=6, patch=16, conv_stem=True, lvvit=True, size=64),
    "as_deit_mini": Facts(heads=2, patch=4, conv_stem=True, lvvit=False, size=24),
}
DEPTH = 2


def plain_forward(state: dict[str, Tensor], images: Tensor, facts: Facts) -> Tensor:
    """float64 [B, 3, H, W] -> logits [B, C]."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + facts.eps).sqrt()
        return centred / deviation * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        joint = x @ state[f"{name}.qkv.weight"].T
        if not facts.lvvit:
            joint = joint + state[f"{name}.qkv.bias"]
        heads = []
        for q, k, v in zip(*(part.chunk(facts.heads, -1) for part in joint.chunk(3, -1))):
            logits = q @ k.mT / q.shape[-1] ** 0.5  # (B, M, M)
            weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
            heads.append(weights @ v)
        return linear(torch.cat(heads, -1), f"{name}.proj")

    def mlp(x: Tensor, name: str) -> Tensor:
        x = linear(x, f"{name}.fc1")
        return linear(x * (1 + torch.erf(x / 2**0.5)) / 2, f"{name}.fc2")

    x = embed(state, images, facts)
    for i in range(DEPTH):
        x = x + facts.residual * attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn")
        x = x + facts.residual * mlp(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
    x = norm(x, "norm")
    logits = linear(x[:, 0], "head")
    return logits + linear(x[:, 1:], "aux_head").amax(1) / 2 if facts.lvvit else logits


def embed(state: dict[str, Tensor], images: Tensor, facts: Facts) -> Tensor:
    """float64 [B, 3, H, W] -> tokens [B, M, D], class token first, positions added."""
    x, patch = images, facts.patch
    if facts.conv_stem:
        for i, (stride, padding) in enumerate([(2, 3), (1, 1), (1, 1)], 1):
            x = F.conv2d(x, state[f"patch_embed.conv{i}.weight"], None, stride, padding)
            x = batch_norm(state, x, f"patch_embed.bn{i}").clamp(min=0)
        patch //= 2  # the first convolution halved the picture
    b, c, height, width = x.shape
    x = x.reshape(b, c, height // patch, patch, width // patch, patch)
    x = x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)  # row by row
    x = x @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    return torch.cat([state["cls_token"].expand(b, 1, -1), x], 1) + state["pos_embed"]


def batch_norm(state: dict[str, Tensor], x: Tensor, name: str) -> Tensor:
    """With the running statistics, [B, C, H, W]."""
    part = {k: state[f"{name}.{k}"][:, None, None] for k in ("weight", "bias")}
    mean, var = (state[f"{name}.running_{k}"][:, None, None] for k in ("mean", "var"))
    return (x - mean) / (var + 1e-5).sqrt() * part["weight"] + part["bias"]


def randomised(name: str) -> ViT:
    """A short dense network in which no parameter or running statistic has its initial value."""
    config = replace(arch(name), depth=DEPTH, stages=(1,), num_classes=20)
    model = build(config.at(NETWORKS[name].size), adaptive=False).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("running_var") or ("norm" in key and key.endswith("weight")):
                value.uniform_(0.5, 2.0)
            elif value.is_floating_point():
                value.normal_(0.0, 0.05)  # about 1 / sqrt(fan-in): activations keep their scale
    return model


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_dense_network_is_the_papers(name):
    facts, model = NETWORKS[name], randomised(name)
    images = torch.randn(2, 3, facts.size, facts.size)
    state = {k: v.double() for k, v in model.state_dict().items()}
    expected = plain_forward(state, images.double(), facts)
    scale = expected.abs().max()
    # Float32 rounds the logits about 1e-6 of their scale; float64 leaves nothing else to differ,
    # so that an epsilon of 1e-5 for one of 1e-6 is seen too.
    assert (model(images)[0] - expected).abs().max() <= 2e-6 * scale
    model = model.double()
    assert (model(images.double())[0] - expected).abs().max() <= 1e-12 * scale
    assert (model.forward_masked(images.double())[0] - expected).abs().max() <= 1e-12 * scale


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_reaches_the_logits(name):
    model = randomised(name)
    size = NETWORKS[name].size
    model(torch.randn(2, 3, size, size))[0].square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


def test_table_names_every_arch():
    assert set(ARCHS) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_architecture_is_the_papers(name):
    dim, depth, heads, hidden, stages, stem = TABLE[name]
    row = arch(name)
    assert (row.dim, row.depth, row.heads, row.hidden) == (dim, depth, heads, hidden)
    assert (row.stages, row.stem) == (stages, stem)
    with torch.device("meta"):
        model = build(row)
    assert len(model.blocks) == depth
    assert len(model.thresholds) == 3
    for block in model.blocks:
        assert block.attn.heads == heads
        assert block.attn.qkv.weight.shape == (3 * dim, dim)
        assert block.mlp.fc1.weight.shape == (hidden, dim)
