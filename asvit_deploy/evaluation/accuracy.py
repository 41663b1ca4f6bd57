"""Top-1, top-5, MACs and kept tokens of a model over a labelled set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.costs import kept_of, macs_of, summarise_costs
from asvit_deploy.intervals import wilson
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import Cuts
from asvit_deploy.runners.base import Runner

# images float32 [B, 3, H, W], normalised; labels int64 [B], the model's own class numbers
LabelledArrays = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Scored:
    """One row per image.

    Attributes:
        rank: place of the true class among the logits, 0 the highest: int64 [P]. It stands behind
            whatever is not below it, NaN too; where it is NaN itself, behind all C.
        kept: image tokens left after each stage: int64 [P, stages], no columns when dense.
        macs: float64 [P].
    """

    rank: NDArray[np.int64]
    kept: NDArray[np.int64]
    macs: NDArray[np.float64]


def score(
    runner: Runner, batches: Iterable[LabelledArrays], config: ArchConfig,
    cuts: Cuts = None,
) -> Scored:  # fmt: skip
    """Run every batch as it comes.

    Args:
        cuts: as `model_macs`.

    Returns:
        no rows where there is no image, such as in one of more processes than images.
    """
    ranks, kept = [np.empty(0, np.int64)], []
    for images, labels in batches:
        prediction = runner(images)
        ranks.append(_rank(prediction.output, labels))
        kept.append(kept_of(prediction, config))
    rank, tokens = np.concatenate(ranks), np.concatenate(kept or [np.empty((0, 0), np.int64)])
    return Scored(rank, tokens, macs_of(tokens, config, cuts))


def joined(parts: Sequence[Scored]) -> Scored:
    """The images of all parts.

    Raises:
        UserError: there is no image at all.
    """
    filled = [part for part in parts if len(part.rank)]
    if not filled:
        raise UserError("there is no picture to evaluate on")
    columns = zip(*((part.rank, part.kept, part.macs) for part in filled))
    return Scored(*(np.concatenate(column) for column in columns))


def _rank(logits: NDArray, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """As `Scored.rank`: a model that says the same of every class has recognised nothing."""
    true = np.take_along_axis(logits, labels[:, None], 1)
    before = (~(logits < true)).sum(1) - 1  # less the true class itself
    return np.where(np.isnan(true[:, 0]), logits.shape[1], before)


def summarise(scored: Scored, config: ArchConfig) -> dict[str, Any]:
    """Figures for JSON.

    Returns:
        `top1` and `top5` (value, low, high; of five classes or fewer, the latter says only
        whether there was an answer), and the figures of `costs.summarise_costs`.
    """
    images = len(scored.rank)
    return {
        "images": images,
        "top1": wilson(int((scored.rank < 1).sum()), images),
        "top5": wilson(int((scored.rank < min(5, config.num_classes)).sum()), images),
        "num_classes": config.num_classes,
        **summarise_costs(scored.kept, scored.macs, config),
    }
