"""Multiply-accumulates of one image, by the formula of the AS-ViT release.

Everything is polynomial in n, the tokens of a block (class token included), so the functions take
ints, floats, numpy arrays or torch tensors alike and stay differentiable. Not counted, as there:
the DeiT family's LayerNorm, softmax and head, and the token scores of either family.

What is counted is what is carried out: a network whose last block works out the prefix alone
(`ArchConfig.last_block`) costs less than the release's formula says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from asvit_deploy.models.config import STEM_WIDTH, ArchConfig
from asvit_deploy.reduction.base import Reduction

# An int, a float, a numpy array or a torch tensor: whatever has + and *.
Number = Any
# Halves in front of which rows leave, as `ViT.cuts` has them, or the method, whose own cost then
# counts too; None: before the blocks of the architecture's stages.
Cuts: TypeAlias = "Sequence[int] | Reduction | None"

# Operations per element as the LV-ViT half of the release counts them.
_LAYER_NORM, _ACTIVATION, _SOFTMAX = 5, 8, 5


def stem_macs(config: ArchConfig) -> int:
    """Patch embedding: one convolution, or three at half resolution and a projection."""
    if config.stem == "patch":
        return config.image_tokens * config.dim * 3 * config.patch_size**2
    half = (config.image_size // 2) ** 2
    return half * STEM_WIDTH * (3 * 49 + 2 * STEM_WIDTH * 9 + config.dim)


def block_macs(config: ArchConfig, n: Number) -> Number:
    """One transformer block on `n` rows: 4nd^2 + 2dn^2 + 2ndm, plus LV-ViT's small change."""
    d, m, h = config.dim, config.hidden, config.heads
    linear = 4 * d * d + 2 * d * m
    quadratic = 2 * d
    if config.counts_elementwise:
        # Two LayerNorms, two residuals, the biases of proj, fc1 and fc2, GELU; softmax and scale.
        linear += 2 * _LAYER_NORM * d + 2 * d + 2 * d + m + _ACTIVATION * m
        quadratic += (_SOFTMAX + 1) * h
    return n * linear + n * n * quadratic


def attend_macs(config: ArchConfig, n: Number) -> Number:
    """The first half of a block: 4nd^2 + 2dn^2."""
    return block_macs(config, n) - feed_macs(config, n)


def feed_macs(config: ArchConfig, n: Number) -> Number:
    """The second half of a block: 2ndm."""
    d, m = config.dim, config.hidden
    linear = 2 * d * m
    if config.counts_elementwise:
        linear += _LAYER_NORM * d + d + d + m + _ACTIVATION * m
    return n * linear


def model_macs(config: ArchConfig, lengths: Sequence[Number], cuts: Cuts = None) -> Number:
    """The whole network, given the rows left after each cut.

    Args:
        lengths: one entry per cut, prefix included, in order.
        cuts: see `Cuts`.
    """
    halves = halves_of(config, cuts)
    rows: list[Number | int] = [config.rows, *lengths]
    edges = [0, *halves, 2 * config.depth]
    if len(rows) != len(edges) - 1:
        raise ValueError(f"{config.name} has {len(halves)} stages, got {len(lengths)}")
    total = stem_macs(config)
    if isinstance(cuts, Reduction):
        total = sum((cuts.macs(stage, rows[stage]) for stage in range(len(halves))), total)
    for n, first, last in zip(rows, edges, edges[1:]):
        total = total + part_macs(config, n, first, last)
    return total


def halves_of(config: ArchConfig, cuts: Cuts) -> Sequence[int]:
    """The cuts themselves."""
    if cuts is None:
        return [2 * stage for stage in config.stages]
    return cuts.cuts if isinstance(cuts, Reduction) else cuts


def part_macs(config: ArchConfig, n: Number, first: int, last: int) -> Number:
    """The halves from `first` up to `last` on `n` rows."""
    total, whole = 0, 2 * config.depth
    if config.last_block == "prefix" and last == whole and first <= whole - 2:
        total, last = last_block_macs(config, n), whole - 2
    if first < last and first % 2:
        total, first = total + feed_macs(config, n), first + 1
    if first < last and last % 2:
        total, last = total + attend_macs(config, n), last - 1
    return total + (last - first) // 2 * block_macs(config, n)


def last_block_macs(config: ArchConfig, n: Number) -> Number:
    """A block on `n` rows of which the P prefix rows alone are wanted.

    Keys and values of all rows, 2nd^2; queries, projection and attention of P, 2Pd^2 + 2Pnd; the
    second half on P.
    """
    d, p = config.dim, config.prefix
    macs = n * 2 * d * d + 2 * p * d * d + 2 * p * d * n + feed_macs(config, p)
    if config.counts_elementwise:
        macs = macs + n * _LAYER_NORM * d + 2 * p * d + p * n * (_SOFTMAX + 1) * config.heads
    return macs


def fixed_lengths(config: ArchConfig, reduction: Reduction) -> list[int]:
    """Rows behind each cut where every picture keeps as many, prefix and appended rows included.

    Raises:
        ValueError: the counts depend on the picture.
    """
    lengths, tokens = [], config.image_tokens
    for stage in range(len(reduction.cuts)):
        kept = reduction.counts(stage, tokens)
        if kept is None:
            raise ValueError(f"{reduction.name} keeps another number on every picture")
        tokens = kept + reduction.added(tokens, kept)
        lengths.append(config.prefix + tokens)
    return lengths


def dense_macs(config: ArchConfig) -> int:
    """The dense network with its class token (197 tokens at 224 px), as it is carried out."""
    return model_macs(config, [config.rows] * len(config.stages))


def teacher_macs(config: ArchConfig) -> int:
    """The dense network as the release counts its teacher: image tokens only (196 at 224 px)."""
    return stem_macs(config) + config.depth * block_macs(config, config.image_tokens)


def unavoidable_macs(config: ArchConfig) -> int:
    """What remains when every stage keeps one image token."""
    return model_macs(config, [config.prefix + 1] * len(config.stages))


def budget_macs(config: ArchConfig, budget: float) -> float:
    """Target t = f * teacher."""
    return budget * teacher_macs(config)
