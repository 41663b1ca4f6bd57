"""Multiply-accumulates of one image, by the formula of the AS-ViT release.

Everything is polynomial in n, the tokens of a block (class token included), so the functions take
ints, floats, numpy arrays or torch tensors alike and stay differentiable. Not counted, as there:
the DeiT family's LayerNorm, softmax and head, and the token scores of either family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asvit_deploy.models.config import STEM_WIDTH, ArchConfig

# An int, a float, a numpy array or a torch tensor: whatever has + and *.
Number = Any

# Operations per element as the LV-ViT half of the release counts them.
_LAYER_NORM, _ACTIVATION, _SOFTMAX = 5, 8, 5


def stem_macs(config: ArchConfig) -> int:
    """Patch embedding: one convolution, or three at half resolution and a projection."""
    if config.stem == "patch":
        return config.image_tokens * config.dim * 3 * config.patch_size**2
    half = (config.image_size // 2) ** 2
    return half * STEM_WIDTH * (3 * 49 + 2 * STEM_WIDTH * 9 + config.dim)


def block_macs(config: ArchConfig, n: Number) -> Number:
    """One transformer block on `n` tokens: 4nd^2 + 2dn^2 + 2ndm, plus LV-ViT's small change."""
    d, m, h = config.dim, config.hidden, config.heads
    linear = 4 * d * d + 2 * d * m
    quadratic = 2 * d
    if config.counts_elementwise:
        # Two LayerNorms, two residuals, the biases of proj, fc1 and fc2, GELU; softmax and scale.
        linear += 2 * _LAYER_NORM * d + 2 * d + 2 * d + m + _ACTIVATION * m
        quadratic += (_SOFTMAX + 1) * h
    return n * linear + n * n * quadratic


def model_macs(config: ArchConfig, lengths: Sequence[Number]) -> Number:
    """The whole network, given the tokens left after each stage.

    Args:
        lengths: one entry per stage, class token included, in stage order.
    """
    tokens: list[Number | int] = [config.rows, *lengths]
    edges = [0, *config.stages, config.depth]
    if len(tokens) != len(edges) - 1:
        raise ValueError(f"{config.name} has {len(config.stages)} stages, got {len(lengths)}")
    total = stem_macs(config)
    for n, first, last in zip(tokens, edges, edges[1:]):
        total = total + (last - first) * block_macs(config, n)
    return total


def dense_macs(config: ArchConfig) -> int:
    """The dense network with its class token (197 tokens at 224 px)."""
    return model_macs(config, [config.rows] * len(config.stages))


def teacher_macs(config: ArchConfig) -> int:
    """The dense network as the release counts its teacher: image tokens only (196 at 224 px)."""
    return stem_macs(config) + config.depth * block_macs(config, config.image_tokens)


def unavoidable_macs(config: ArchConfig) -> int:
    """What remains when every stage keeps one image token."""
    return model_macs(config, [2] * len(config.stages))


def budget_macs(config: ArchConfig, budget: float) -> float:
    """Target t = f * teacher."""
    return budget * teacher_macs(config)
