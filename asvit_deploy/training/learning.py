"""What learns in a run, and at which pace: the network's weights, and what is a method's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Learning
from asvit_deploy.training.recipe import Recipe, rate


class Learners:
    """The optimiser and the parameters that it updates.

    AdamW; matrices of the network are decayed, everything else is not. What a method's parameters
    do, `Reduction.learning` says: those that are relative stand in the optimiser as logarithms,
    derived anew at each step, so that the parameters alone are the state of a run.

    Args:
        own: what the method has that learns.

    Attributes:
        weights: what is clipped together: the network's own, and what learns as they do.
        optimizer: one group has one `pace`, its rate over the run's.
    """

    def __init__(self, model: ViT, recipe: Recipe, own: list[Learning]) -> None:
        self._recipe = recipe
        slot = None if model.reduction is None else f"{model.reduction.slot}."
        network = {
            name: weight for name, weight in model.named_parameters()
            if weight.requires_grad and not (slot and name.startswith(slot))
        }  # fmt: skip
        plain = [k for k, v in network.items() if v.ndim < 2 or k in ("cls_token", "pos_embed")]
        decayed = [v for k, v in network.items() if k not in plain]
        groups = [
            self._group(decayed, 1.0, decays=True),
            self._group([network[k] for k in plain], 1.0),
        ]
        self.weights = list(network.values())
        self._relative: list[tuple[nn.Parameter, nn.Parameter]] = []  # itself, and its logarithm
        self._bounded: list[tuple[nn.Parameter, float]] = []
        for learning in own:
            groups += self._groups_of(learning)
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.lr)

    def _group(
        self, parameters: list[nn.Parameter], pace: float, decays: bool = False
    ) -> dict[str, Any]:
        decay = self._recipe.weight_decay if decays else 0.0
        return {"params": parameters, "weight_decay": decay, "pace": pace}

    def _groups_of(self, learning: Learning) -> Iterator[dict[str, Any]]:
        own = list(learning.parameters)
        if learning.least is not None:
            self._bounded += [(parameter, learning.least) for parameter in own]
        if learning.relative is not None:
            logarithms = [nn.Parameter(parameter.detach().log()) for parameter in own]
            self._relative += zip(own, logarithms)
            yield self._group(logarithms, learning.relative / self._recipe.lr)
            return
        self.weights += own
        decayed = [p for p in own if learning.decayed and p.ndim > 1]
        yield self._group(decayed, 1.0, decays=True)
        yield self._group([p for p in own if not (learning.decayed and p.ndim > 1)], 1.0)

    def set_rate(self, step: int) -> None:
        """That of the step, each group at its pace."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self._recipe, step) * group["pace"]

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the gradients of what is relative to its logarithms, d/d(log t) = t d/dt."""
        for parameter, logarithm in self._relative:
            logarithm.copy_(parameter.log())
            assert parameter.grad is not None
            logarithm.grad = parameter.grad * parameter

    def slopes(self) -> list[Tensor]:
        """How steep the loss is in what is not clipped with the weights, a number of each."""
        logarithms = [logarithm for _, logarithm in self._relative]
        return [p.grad.abs().sum() for p in logarithms if p.grad is not None]

    def clip(self) -> Tensor:
        """Bound the norm of the weights' gradient; returns what it was."""
        # Apart from the thresholds: in their own unit, they have gradients 1e4 times as large.
        return nn.utils.clip_grad_norm_(self.weights, self._recipe.clip or math.inf)

    @torch.no_grad()
    def follow(self) -> None:
        """After an update: what is relative is what its logarithm says, nothing below its least."""
        for parameter, logarithm in self._relative:
            parameter.copy_(logarithm.exp())
        for parameter, least in self._bounded:
            parameter.clamp_(min=least)
