"""Weights in memory: a module of another library, or a state dict, and what its configs say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from asvit_deploy.checkpoints.configs import CONFIG, PREPROCESSOR, Beside, sources_of
from asvit_deploy.checkpoints.fact_source import FactSource
from asvit_deploy.errors import UserError
from asvit_deploy.models.vit import ViT

_DEEPEST = 4  # wrappers around each other
_NAMES = {CONFIG: "its config", PREPROCESSOR: "its preprocessor"}


@dataclass(frozen=True)
class Held:
    """Weights in memory.

    Attributes:
        name: what messages call them.
        config: as `config.json` would have it; empty where nothing is known.
    """

    state: dict[str, Tensor]
    name: str
    config: dict[str, Any]
    beside: Beside


def held(network: Any, config: Any, preprocessor: Any) -> Held:
    """A module's or a state dict's weights with its configs.

    Raises:
        UserError: it is neither, or a config is no dictionary of plain values.
    """
    network = _unwrapped(network)
    if isinstance(network, ViT):
        raise UserError(
            "the network is one that load gave, and nothing need be loaded; pass it to save, or "
            "copy it with copy.deepcopy"
        )
    if isinstance(network, nn.Module):
        name, state = type(network).__name__, network.state_dict()
        config = _own_config(network) if config is None else config
    elif isinstance(network, Mapping) and network:
        name, state = "the state dict", dict(network)
    else:
        raise UserError(
            f"{type(network).__name__} cannot be loaded; pass a path, a torch module or a state "
            "dict"
        )
    plain = {} if config is None else _plain(config, "config")
    if isinstance(network, nn.Module) and "model_type" in plain:
        plain["architectures"] = [name]  # which transformers notes when it saves
    contents = {CONFIG: plain} if plain else {}
    if preprocessor is not None:
        contents[PREPROCESSOR] = _plain(preprocessor, "preprocessor")
    beside = sources_of(contents, " of it")
    for source in beside.sources:
        source.name = _NAMES[source.name]
    if (layers := _layers(network)) is not None:
        beside = replace(beside, sources=(*beside.sources, layers))
    return Held(state, name, plain, beside)


def _unwrapped(network: Any) -> Any:
    """The module within torch's wrappers for several devices and for compiled ones."""
    for _ in range(_DEEPEST):
        if type(network).__name__ in ("DataParallel", "DistributedDataParallel"):
            network = network.module
        elif type(network).__name__ == "OptimizedModule":
            network = network._orig_mod
    return network


def _layers(network: Any) -> FactSource | None:
    """What the layers of a timm module say, which its config does not."""
    blocks = getattr(network, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        return None
    source = FactSource("its layers")
    source.say("eps", getattr(getattr(blocks[0], "norm1", None), "eps", None))
    return source


def _own_config(network: nn.Module) -> Any:
    """transformers' config, or timm's, as their `config.json` would have it."""
    own = getattr(network, "config", None)
    if own is not None and hasattr(own, "to_dict"):
        own = own.to_dict()
    if isinstance(own, Mapping):
        return own
    timm = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None)
    if not isinstance(timm, Mapping):
        return None
    found: dict[str, Any] = {"pretrained_cfg": dict(timm)}
    for key in ("num_classes", "num_features", "global_pool"):
        value = getattr(network, key, None)
        if type(value) in (int, str):
            found[key] = value
    # The network's own heads, activation and size, where it was not made as its name says.
    return {**found, "model_args": _timm_args(network)}


def _timm_args(network: nn.Module) -> dict[str, Any]:
    blocks, embed = getattr(network, "blocks", None), getattr(network, "patch_embed", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        return {}
    found: dict[str, Any] = {
        "num_heads": getattr(getattr(blocks[0], "attn", None), "num_heads", None),
        "img_size": getattr(embed, "img_size", None),
    }
    act = getattr(getattr(blocks[0], "mlp", None), "act", None)
    if isinstance(act, nn.GELU):
        found["act_layer"] = "gelu" if act.approximate == "none" else "gelu_tanh"
    elif act is not None:
        found["act_layer"] = {"QuickGELU": "quick_gelu"}.get(
            type(act).__name__, type(act).__name__.lower()
        )
    return {key: value for key, value in found.items() if value is not None}


def _plain(value: Any, name: str) -> dict[str, Any]:
    """A config as JSON has it; numbers for keys become text."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    try:
        found = json.loads(json.dumps(dict(value), default=_text))
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(value, Mapping):
        raise UserError(f"{name} is no dictionary such as {CONFIG} holds; pass one")
    return found


def _text(value: Any) -> str:
    return str(value)
