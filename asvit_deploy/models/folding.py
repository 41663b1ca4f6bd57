"""A network as graphs are to have it: LayerScale in the layers before it, where that costs nothing,
and a layer of its own for each product of the last block.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from asvit_deploy.models.blocks import Attention, Block, LayerScale
from asvit_deploy.models.vit import ViT

_Module = TypeVar("_Module", bound=nn.Module)
_HALF = torch.finfo(torch.float16)


def folded(model: ViT) -> ViT:
    """The same function with fewer nodes.

    Each factor of LayerScale goes into the layer before it where it is free: where float16 can hold
    each row of the scaled weights, whose largest is then no smaller than float16's smallest normal
    number, and none over its largest. What is rounded is at most 2^-11 of a row's largest weight,
    as with weights of any size; a smaller row would lose more in half precision than a factor that
    stays. Where the last block works out the prefix alone, its weights are parted as they are used,
    since a graph would part them on every run. Weights of the model are shared, not changed.
    """
    if model.config.layer_scale:
        model = _shallow(model)
        model.blocks = nn.ModuleList(map(_folded_block, model.blocks))  # type: ignore[arg-type]
    if model.config.last_block == "prefix":
        model = _shallow(model)
        *others, last = model.blocks
        model.blocks = nn.ModuleList([*others, _parted_block(last)])  # type: ignore[arg-type]
    return model


def _parted_block(block: Block) -> Block:
    twin = _shallow(block)
    twin.attn = _PartedAttention(block.attn)
    return twin


class _PartedAttention(Attention):
    """The same attention with two layers in place of one."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.heads, self.proj, self.qkv = attention.heads, attention.proj, attention.qkv
        width = attention.qkv.in_features
        self.query = _rows_of(attention.qkv, slice(None, width))
        self.key_value = _rows_of(attention.qkv, slice(width, None))

    def parted(self) -> tuple[nn.Linear, nn.Linear]:
        return self.query, self.key_value


def _rows_of(layer: nn.Linear, rows: slice) -> nn.Linear:
    weight, bias = layer.weight.detach()[rows], layer.bias
    return _linear(weight, None if bias is None else bias.detach()[rows], layer.training)


def _folded_block(block: Block) -> Block:
    twin = _shallow(block)
    twin.attn, twin.mlp = _shallow(block.attn), _shallow(block.mlp)
    for owner, layer, scale in ((twin.attn, "proj", "ls1"), (twin.mlp, "fc2", "ls2")):
        one, rest = _folded_layer(getattr(owner, layer), getattr(block, scale))
        setattr(owner, layer, one)
        setattr(twin, scale, rest)
    return twin


def _folded_layer(layer: nn.Linear, scale: nn.Module) -> tuple[nn.Linear, nn.Module]:
    """One layer for both, or both as they are."""
    if not isinstance(scale, LayerScale):
        return layer, scale
    gamma = scale.gamma.detach()
    weight, bias = gamma[:, None] * layer.weight.detach(), gamma * layer.bias.detach()
    if not _held_by_half(weight, bias):
        return layer, scale
    return _linear(weight, bias, layer.training), nn.Identity()


def _linear(weight: Tensor, bias: Tensor | None, training: bool) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made.train(training)


def _held_by_half(weight: Tensor, bias: Tensor) -> bool:
    largest = weight.abs().amax(1)
    rows = (largest == 0) | (largest >= _HALF.tiny)
    return bool(rows.all()) and max(largest.max(), bias.abs().max()).item() <= _HALF.max


def _shallow(module: _Module) -> _Module:
    """A copy with room for other parts; parameters and parts are shared."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
