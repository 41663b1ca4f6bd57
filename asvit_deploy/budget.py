"""What a budget of MACs allows, and fixed counts that meet it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import (
    dense_macs,
    fixed_lengths,
    model_macs,
    teacher_macs,
    unavoidable_macs,
)
from asvit_deploy.models.vit import Trace, ViT
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.reduction.methods import rising
from asvit_deploy.reduction.ranked import Ranked

TOLERANCE = 0.01  # of the budget


def check_budget(config: ArchConfig, budget: float) -> None:
    """Refuse a budget that no thresholds can meet.

    Raises:
        UserError: it names the range of the arch.
    """
    _require_tokens(config)
    teacher = teacher_macs(config)
    least, most = unavoidable_macs(config) / teacher, dense_macs(config) / teacher
    if not least < budget < most:
        raise UserError(
            f"budget {budget:g} is out of reach for {config.name} at {config.image_size} px; "
            f"choose one between {math.ceil(least * 1000) / 1000:.3f} and {min(most, 1):.3f}"
        )


def _require_tokens(config: ArchConfig) -> None:
    """Raise UserError where no token can leave."""
    if unavoidable_macs(config) >= dense_macs(config):
        raise UserError(
            f"{config.name} at {config.image_size} px has nothing to remove: of its "
            f"{config.image_tokens} image token{'s' * (config.image_tokens != 1)} one always "
            "stays; choose a larger image size"
        )


def trace_macs(config: ArchConfig, trace: Trace) -> Tensor:
    """MACs / teacher of each image of a batch, float64 [B]."""
    return model_macs(config, [n.double() for n in trace.length]) / teacher_macs(config)


def network_macs(model: ViT, trace: Trace) -> Tensor:
    """As `trace_macs`, at the cuts of the network's own method, with what that costs itself."""
    assert model.reduction is not None
    lengths = [n.double() for n in trace.length]
    return model_macs(model.config, lengths, model.reduction) / teacher_macs(model.config)


def fixed_counts(
    config: ArchConfig, method: type[Ranked], budget: float, blocks: Sequence[int] | None = None,
    asked: str | None = None,
) -> Ranked:  # fmt: skip
    """The method with counts of one ratio at every cut that meet a budget.

    Args:
        budget: f, MACs carried out as a fraction of the dense ones as the release counts them.
        blocks: where it cuts; by default at its usual ones.
        asked: the method that messages name, where this one only counts for it.

    Raises:
        UserError: blocks that do not fit, a network of one token, or no ratio comes within one per
            cent of the budget.
    """
    _require_tokens(config)
    blocks = fitting(config, method, blocks)

    def at(ratio: float) -> tuple[Ranked, float]:
        with torch.device("meta"):  # nothing is drawn at random for what is only counted
            made = method.planned(
                config.dim, config.prefix, blocks, planned_counts(config, method, blocks, ratio)
            )
        return made, carried_out(config, made) / teacher_macs(config)

    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] < budget else (low, middle)
    best, macs = min((at(low), at(high)), key=lambda one: abs(one[1] - budget))
    if not 0 < budget < math.inf or abs(macs / budget - 1) > TOLERANCE:  # NaN is not above 0
        least, most = at(0.0)[1], at(1.0)[1]
        reached = f"{math.ceil(least * 1000) / 1000:.3f} to {math.floor(most * 1000) / 1000:.3f}"
        if least < budget < most:  # so few tokens that one of them is over 1 %
            reached += f", and nearest to it {macs:.3f}"
        raise UserError(
            f"budget {budget:g} is out of reach of {asked or method.name} with "
            f"{len(blocks)} cut{'s' * (len(blocks) != 1)} on {config.name} at "
            f"{config.image_size} px: it reaches {reached}; choose another budget or other cuts"
        )
    return method.planned(config.dim, config.prefix, blocks, best.kept)


def planned_counts(
    config: ArchConfig, method: type[Ranked], blocks: Sequence[int], ratio: float
) -> list[int]:
    """Image rows behind each cut where each keeps that share of what comes to it.

    Counts that the method raises to what it can do are written as they are carried out.
    """
    kept, exact, tokens = [], float(config.image_tokens), config.image_tokens
    for stage in range(len(blocks)):
        # The share is of what would be there exactly, so that rounding does not add up.
        exact = exact * ratio
        kept.append(max(1, min(round(exact), tokens)))
        made = method.planned(config.dim, config.prefix, blocks[: stage + 1], kept)
        counted = made.counts(stage, tokens)
        assert counted is not None
        kept[-1], tokens = counted, counted + made.added(tokens, counted)
    return kept


def carried_out(config: ArchConfig, reduction: Reduction) -> float:
    """MACs of the network with those fixed counts, its own included."""
    return float(model_macs(config, fixed_lengths(config, reduction), reduction))


def macs_of(
    config: ArchConfig, reduction: Reduction, lengths: NDArray[np.int64]
) -> NDArray[np.float64]:
    """MACs carried out for each picture, the method's own included, as `carried_out`.

    Args:
        lengths: int64 [images, cuts].
    """
    rows = list(lengths.T.astype(np.float64))
    return np.asarray(model_macs(config, rows, reduction), np.float64)


def taught_at(
    model: ViT, method: type[Reduction], blocks: Sequence[int] | None
) -> Sequence[int] | None:
    """Where a method cuts that takes over what the network's own learned for each cut.

    Raises:
        UserError: other blocks are asked for than it was trained at.
    """
    own = model.reduction
    if own is None or type(own) is not method or method.settled != "training":
        return blocks
    if blocks is not None and tuple(blocks) != own.blocks:
        asked, known = (",".join(map(str, some)) for some in (blocks, own.blocks))
        raise UserError(
            f"cuts {asked} are others than the {known} that this {method.name} was trained at; "
            f"drop them, or train it there (finetune --method {method.name} --cuts {asked})"
        )
    return own.blocks


def fitting(
    config: ArchConfig, method: type[Reduction], blocks: Sequence[int] | None
) -> tuple[int, ...]:
    """The blocks, once they rise and lie in the network.

    Raises:
        UserError: they do not.
    """
    if blocks is None:
        return method.usual_blocks(config.stages, config.depth)
    whole = all(type(block) is int for block in blocks)
    cuts = [2 * block + (method.place == "inside") for block in blocks] if whole else []
    if not cuts or not rising(cuts, config.depth):
        raise UserError(
            f"cuts {','.join(map(str, blocks))} do not fit {config.name}; pass rising block "
            f"numbers between {int(method.place == 'before')} and {config.depth - 1}"
        )
    return tuple(blocks)
