"""What the state of a run must look like, before any of it is put back.

torch's own loaders take nearly anything and fail a step later, or go on with other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from asvit_deploy.training.trainer import Trainer

_SET_EACH_STEP = "lr"
_NEEDED = frozenset(("params", "weight_decay", "pace", "lr", "betas", "eps"))  # torch fills others
# How torch computes an update and not what it computes; another machine chooses another way.
_MACHINES = frozenset(("foreach", "fused", "capturable", "differentiable"))


def misfit(content: Mapping[str, Any], trainer: Trainer) -> str | None:
    """The first part of a state that is not what this run would have saved; None where all are."""
    networks = {"model": trainer.model.state_dict()}
    if trainer.average is not None:
        networks["average"] = trainer.average.state_dict()
    for name, own in networks.items():
        if not _like(content.get(name), own):
            return name
    if not _like(content.get("rng"), torch.get_rng_state()):
        return "rng"
    if not _optimizer_fits(content.get("optimizer"), trainer.optimizer):
        return "optimizer"
    if trainer.scaler.is_enabled() and not _scaler_fits(
        content.get("scaler"), trainer.scaler.state_dict()
    ):
        return "scaler"
    return None


def _like(found: Any, own: Any) -> bool:
    """Whether a value has the other's form: names, types and shapes; numbers may differ."""
    if isinstance(own, Tensor):
        # Of layouts first: of others there is no more to ask.
        plain = isinstance(found, Tensor) and found.layout == torch.strided and not found.is_meta
        return plain and (found.dtype, found.shape) == (own.dtype, own.shape)
    if isinstance(own, Mapping):
        same = isinstance(found, Mapping) and found.keys() == own.keys()
        return same and all(_like(found[key], value) for key, value in own.items())
    return type(found) is type(own)


def _optimizer_fits(found: Any, optimizer: torch.optim.Optimizer) -> bool:
    own = optimizer.state_dict()
    if not isinstance(found, Mapping) or found.keys() != own.keys():
        return False
    groups, state = found["param_groups"], found["state"]
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        return False
    if not all(map(_group_fits, groups, own["param_groups"])) or not isinstance(state, Mapping):
        return False
    numbers = [number for group in own["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    by_number = dict(zip(numbers, weights))
    return all(
        type(number) is int and number in by_number and _moments_fit(moments, by_number[number])
        for number, moments in state.items()
    )


def _group_fits(found: Any, own: Mapping[str, Any]) -> bool:
    """Whether a group has the weights and settings of this run's; a torch that knows more
    settings, or fewer, may have saved it."""
    if not isinstance(found, Mapping) or not found.keys() >= _NEEDED:
        return False
    rate = found.get(_SET_EACH_STEP)
    if type(rate) is not float or not math.isfinite(rate):
        return False
    for name, value in found.items():
        if name == _SET_EACH_STEP or name not in own:
            continue
        wanted = own[name]
        alike = type(value) is type(wanted)
        if name in _MACHINES:
            alike = value is None or type(value) is bool
        elif alike:
            alike = value == wanted
        if not alike:
            return False
    return True


def _moments_fit(found: Any, weight: Tensor) -> bool:
    own = {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}
    return _like(found, own) and 0 <= found["step"].item() < 2**53


def _scaler_fits(found: Any, own: Mapping[str, Any]) -> bool:
    def number(value: Any) -> bool:
        return type(value) in (int, float) and 0 <= value < math.inf

    same = isinstance(found, Mapping) and found.keys() == own.keys()
    return same and all(map(number, found.values())) and found["scale"] > 0
