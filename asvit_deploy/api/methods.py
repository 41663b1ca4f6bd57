"""Which method a command takes, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from asvit_deploy.api.inputs import require_numbers, require_one_of
from asvit_deploy.errors import UserError

if TYPE_CHECKING:
    from asvit_deploy.checkpoints.load import Checkpoint

AUTO, THRESHOLD = "auto", "threshold"
EXECUTED, RELEASE = "executed", "release"  # how a budget counts MACs


def method_for(checkpoint: Checkpoint, name: str | None) -> str:
    """The method to take for a checkpoint.

    Args:
        name: as asked for; None: the checkpoint's own, and "auto" for dense weights.

    Raises:
        UserError: there is no such method, the checkpoint is of another one, or its head averages
            tokens whose sizes the method does not carry.
    """
    from asvit_deploy.reduction.methods import METHODS

    fields = checkpoint.reduction
    own = (fields["name"] if fields else THRESHOLD) if checkpoint.adaptive else None
    name = name or own or AUTO
    require_one_of("method", name, (AUTO, *METHODS))
    if own not in (None, name):
        raise UserError(
            f"{checkpoint.path} is a checkpoint of the method {own}; pass --method {own}, or name "
            "the dense weights that it was made from"
        )
    require_sizes(checkpoint, name)
    return name


def require_sizes(checkpoint: Checkpoint, name: str) -> None:
    """Raise UserError for a method without sizes where the network's head averages tokens."""
    from asvit_deploy.reduction.methods import METHODS

    if name != AUTO and checkpoint.config.averages and not METHODS[name].carries_sizes:
        able = ", ".join(other for other, made in METHODS.items() if made.carries_sizes)
        raise UserError(
            f"{checkpoint.path} averages its tokens ({checkpoint.config.head}), and {name} does "
            f"not say how many each stands for; pass --method with one of {able}, or --dense to "
            "export or train it as it is"
        )


def require_trained(checkpoint: Checkpoint, name: str) -> None:
    """Raise UserError for a method that must be trained where the checkpoint is not of it."""
    from asvit_deploy.reduction.methods import METHODS

    own = checkpoint.reduction and checkpoint.reduction["name"]
    if name != AUTO and METHODS[name].settled == "training" and own != name:
        raise UserError(
            f"{checkpoint.path} has none of what {name} learns: pass a checkpoint of {name}, or "
            f"run `asvit-deploy finetune --method {name}` first"
        )


def with_method(
    checkpoint: Checkpoint, method: str | None, budget: float | None, cuts: Sequence[int] | None,
    max_kept: int | None = None,
) -> Checkpoint:  # fmt: skip
    """A checkpoint as options want its tokens to leave.

    Dense weights get a method with fixed counts, for which no picture is needed; of a checkpoint
    whose thresholds decide, pictures can be bounded.

    Args:
        method: a name; None: the checkpoint's own, or none.
        budget: f, for dense weights; 0.65 by default.
        cuts: likewise, the blocks at which it cuts.
        max_kept: rows, prefix included, that any picture keeps behind the last cut at most.

    Raises:
        UserError: the options do not go together, or as `method_for` and `fixed_counts`.
    """
    from asvit_deploy.reduction.methods import RANKED

    require_numbers({"budget": budget})
    if method is not None:
        method = method_for(checkpoint, method)
    if checkpoint.adaptive or method is None:
        return _bounded(checkpoint, budget, cuts, max_kept)
    require_trained(checkpoint, method)
    if method not in RANKED:
        raise UserError(
            f"{checkpoint.path} is dense, and --method {method} is settled on pictures: run "
            f"`asvit-deploy calibrate --method {method}` first"
        )
    if max_kept is not None:
        raise UserError(
            "--max-kept bounds what pictures keep by thresholds, and this method keeps as many of "
            "each; drop it, or run `asvit-deploy calibrate --per-picture` first"
        )
    from asvit_deploy.budget import fixed_counts

    budget = 0.65 if budget is None else budget
    made = fixed_counts(checkpoint.config, RANKED[method], budget, cuts)
    metadata = {**checkpoint.metadata, "budget": str(budget), "budget_by": EXECUTED}
    return replace(checkpoint, adaptive=True, reduction=made.fields(), metadata=metadata)


def _bounded(
    checkpoint: Checkpoint, budget: float | None, cuts: Sequence[int] | None, max_kept: int | None
) -> Checkpoint:
    """A checkpoint that has its method, or none."""
    given = {"--budget": budget, "--cuts": cuts, "--max-kept": max_kept}
    named = [option for option, value in given.items() if value is not None]
    if not named:
        return checkpoint
    if not checkpoint.adaptive:
        raise UserError(f"{named[0]} is of a method; pass --method too")
    if named != ["--max-kept"]:
        raise UserError(
            f"{checkpoint.path} has its budget and its cuts; drop {named[0]}, or run "
            "`asvit-deploy calibrate` on the dense weights"
        )
    from asvit_deploy.per_picture import bounds
    from asvit_deploy.reduction.methods import restored
    from asvit_deploy.reduction.ranked import Ranked

    assert max_kept is not None
    config, fields = checkpoint.config, checkpoint.reduction
    made = restored(fields, config.prefix) if fields else None
    if not isinstance(made, Ranked) or made.kept is not None:
        name = fields["name"] if fields else THRESHOLD
        raise UserError(
            f"{checkpoint.path} is a checkpoint of {name}, whose counts --max-kept does not bound; "
            "drop it"
        )
    bound = bounds(config, made, max_kept)
    return replace(checkpoint, reduction={**made.fields(), "most": bound})
