"""LayerScale taken into the layers before it, where that costs nothing."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from asvit_deploy.models.blocks import Block, LayerScale
from asvit_deploy.models.vit import ViT

_Module = TypeVar("_Module", bound=nn.Module)
_HALF = torch.finfo(torch.float16)


def folded(model: ViT) -> ViT:
    """The same function with each factor of LayerScale in the layer before it, where it is free.

    Free means that float16 can hold each row of the scaled weights: its largest is no smaller than
    float16's smallest normal number, and none is over its largest. What is rounded then is at most
    2^-11 of a row's largest weight, as with weights of any size; a smaller row would lose more in
    half precision than a factor that stays. Weights of the model are shared, not changed.
    """
    if not model.config.layer_scale:
        return model
    twin = _shallow(model)
    twin.blocks = nn.ModuleList(map(_folded_block, model.blocks))  # type: ignore[arg-type]
    return twin


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
    with torch.device("meta"):
        one = nn.Linear(layer.in_features, layer.out_features)
    one.weight, one.bias = nn.Parameter(weight), nn.Parameter(bias)
    return one.train(layer.training), nn.Identity()


def _held_by_half(weight: Tensor, bias: Tensor) -> bool:
    largest = weight.abs().amax(1)
    rows = (largest == 0) | (largest >= _HALF.tiny)
    return bool(rows.all()) and max(largest.max(), bias.abs().max()).item() <= _HALF.max


def _shallow(module: _Module) -> _Module:
    """A copy with room for other parts; parameters and parts are shared."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
