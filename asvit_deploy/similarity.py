"""Embeddings compared by their cosines: agreement, nearest neighbours, votes of neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.errors import UserError

_COSINES = 1 << 23  # at a time, 64 MB; all of 50,000 pictures' would take 20 GB
_EXACT = 4096  # rows; of more, float32 finds the nearest, in half the time
_RESAMPLES = 1000
_SAME = 1e-9  # of two cosines: the same picture twice, and the order of a sum


def units(vectors: NDArray) -> NDArray[np.float64]:
    """Each row [P, D] over its norm; NaN where it has none: of norm zero, or not finite."""
    wide = np.asarray(vectors, np.float64)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        made = wide / norms(wide)[:, None]
    made[~np.isfinite(made).all(1)] = np.nan
    return made


def norms(vectors: NDArray) -> NDArray[np.float64]:
    """Euclidean, of each row [P, D]."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.sqrt(np.square(np.asarray(vectors, np.float64)).sum(1))


def directions(vectors: NDArray, whose: str) -> NDArray[np.float64]:
    """As `units`, of embeddings that all have to have a direction.

    Args:
        whose: what gives them, for the message.

    Raises:
        UserError: one has none.
    """
    made = units(vectors)
    if odd := int(np.isnan(made[:, 0]).sum()):
        raise UserError(
            f"{whose} gives embeddings that are zero or not finite on {odd} of {len(made)} "
            "pictures, which have no cosine; take weights that did not diverge"
        )
    return made


def cosines(ours: NDArray, theirs: NDArray) -> NDArray[np.float64]:
    """Of each pair of rows [P, D]; NaN where one of them has no direction."""
    return (units(ours) * units(theirs)).sum(1)


def nearest(directions: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each unit row [P, D] the number of the nearest other one; of equal ones the first.

    A row without a direction is nobody's neighbour; -1 where there is no other.
    """
    found = np.full(len(directions), -1, np.int64)
    for rows, cosine in _others(directions):
        best = cosine.argmax(1)
        there = np.isfinite(np.take_along_axis(cosine, best[:, None], 1)[:, 0])
        found[rows] = np.where(there, best, -1)
    return found


def same_nearest(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """For each of three pictures or more whether `theirs` has the nearest other that `ours` has.

    Where `ours` has several that are equally near, any of them.
    """
    mine, other = nearest(ours), nearest(theirs)
    return (ours * ours[mine]).sum(1) - (ours * ours[other]).sum(1) <= _SAME


def voted(
    directions: NDArray[np.float64], labels: NDArray[np.int64], neighbours: int
) -> NDArray[np.int64]:
    """For each unit row [P, D] the label that most of its nearest others have, itself left out.

    Of labels with as many votes, the one whose cosines add up to more. At most P - 1 vote.
    """
    count = min(neighbours, len(directions) - 1)
    found = np.empty(len(directions), np.int64)
    for rows, cosine in _others(directions):
        voters = np.argpartition(cosine, -count, 1)[:, -count:]
        theirs, weight = labels[voters], np.take_along_axis(cosine, voters, 1)
        same = theirs[:, :, None] == theirs[:, None]
        # The sum of cosines lies between -count and count: it decides between equal numbers only.
        ranked = same.sum(2) + ((same * weight[:, None]).sum(2) + count) / (2 * count + 1)
        found[rows] = np.take_along_axis(theirs, ranked.argmax(1)[:, None], 1)[:, 0]
    return found


def _others(directions: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray]]:
    """Cosines [b, P] of some rows with all, -inf with themselves and where there are none."""
    count = max(1, _COSINES // max(1, len(directions)))
    if len(directions) > _EXACT:
        directions = directions.astype(np.float32)  # type: ignore[assignment]
    for first in range(0, len(directions), count):
        rows = slice(first, min(first + count, len(directions)))
        with np.errstate(invalid="ignore"):
            cosine = directions[rows] @ directions.T
        cosine[np.isnan(cosine)] = -np.inf
        cosine[np.arange(rows.stop - first), np.arange(first, rows.stop)] = -np.inf
        yield rows, cosine


def agreement(dense: NDArray, other: NDArray, whose: str) -> dict[str, Any]:
    """How far embeddings [P, D] agree with the dense network's on the same pictures.

    Args:
        whose: what gives them, for messages.

    Returns:
        cosine: their mean; low, high: its 95 % interval over pictures (bootstrap); p10: the cosine
        that a tenth of the pictures lie under; neighbour: share of pictures whose nearest other one
        is the same, which is left out where there are fewer than three.

    Raises:
        UserError: an embedding has no direction.
    """
    ours, theirs = directions(dense, f"{whose}, dense,"), directions(other, whose)
    cosine = (ours * theirs).sum(1)
    low, high = mean_interval(cosine)
    said = {"cosine": float(cosine.mean()), "low": low, "high": high,
            "p10": float(np.quantile(cosine, 0.1))}  # fmt: skip
    if len(cosine) > 2:  # of two pictures, each is the other's
        said["neighbour"] = float(same_nearest(ours, theirs).mean())
    return said


def mean_interval(values: NDArray[np.float64], share: float = 0.95) -> tuple[float, float]:
    """Of the mean, 95 %, by bootstrap; of differences in pairs, where those are the values."""
    rng, count = np.random.default_rng(0), len(values)
    values = np.sort(values)  # so that nothing depends on who brought which
    draws = [values[rng.integers(0, count, count)].mean() for _ in range(_RESAMPLES)]
    low, high = np.percentile(draws, [50 * (1 - share), 50 * (1 + share)])
    return float(low), float(high)
