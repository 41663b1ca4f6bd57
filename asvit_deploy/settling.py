"""A method on a budget, whichever it is: by counting, or by what pictures say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from asvit_deploy import per_picture, scheduling
from asvit_deploy.budget import fixed_counts, taught_at
from asvit_deploy.distance import distance
from asvit_deploy.errors import UserError
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.reduction.ltmp import LTMP
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.schedule import Schedule


def on_budget(
    model: ViT, method: type[Reduction], images: Sequence[np.ndarray], budget: float,
    blocks: Sequence[int] | None = None, tick: Callable[[], object] = lambda: None,
) -> Reduction:  # fmt: skip
    """The method with the counts, or the pairs of thresholds, that meet a budget.

    Args:
        model: in eval mode; what its own reduction learned beside thresholds is taken over.
        images: float32 [3, H, W] each, normalised, of which only some methods look at.
        budget: f, as `budget.fixed_counts` has it.
        tick: called once for each pass of a picture, at most `passes` times for each.

    Raises:
        UserError: a budget or cuts that the method cannot meet, or it must be trained and the
            network has it not, or not at these cuts.
    """
    if issubclass(method, Schedule):
        config = model.config
        return scheduling.search(
            model, images, budget, lambda dense, other: distance(config, dense, other).mean(),
            blocks, tick,
        )  # fmt: skip
    if issubclass(method, LTMP):
        return per_picture.fit_pairs(model, images, budget, blocks, tick)
    assert issubclass(method, Ranked)
    require_taught(model, method)
    blocks = taught_at(model, method, blocks)
    return fixed_counts(model.config, method, budget, blocks).taught_by(model.reduction)


def require_taught(model: ViT, method: type[Reduction]) -> None:
    """Raise UserError for a method that must be trained, where the network is not one of it."""
    if method.settled == "training" and type(model.reduction) is not method:
        raise UserError(
            f"{method.name} must be trained, and {model.config.name} has none of it; name a "
            f"checkpoint of {method.name}"
        )


def passes(method: type[Reduction]) -> int:
    """Passes of each picture that `on_budget` takes at most."""
    if issubclass(method, Schedule):
        return scheduling.MOST_TRIED
    return 1 if issubclass(method, LTMP) else 0
