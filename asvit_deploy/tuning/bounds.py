"""Bounds on shares, exact or on the safe side; counts of pictures are all they go by.

No bound here is an approximation by a normal distribution: at the few disagreements that matter
here those are wrong by half.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ERROR = 0.05  # one-sided, of each test
# Of it, what goes to the pictures that get worse and to those that get better, with labels.
_WORSE, _BETTER = 0.8, 0.2
_MOST_PICTURES = 10_000_000


@lru_cache(maxsize=8)
def _log_factorials(most: int) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])


def at_most(hits: int, total: int, share: float) -> float:
    """P(X <= hits) of a binomial X of so many draws."""
    if hits >= total or share <= 0:
        return 1.0
    if hits < 0 or share >= 1:
        return 0.0
    logs, k = _log_factorials(total), np.arange(hits + 1)
    terms = logs[total] - logs[k] - logs[total - k]
    terms = terms + k * math.log(share) + (total - k) * math.log1p(-share)
    return float(min(1.0, np.exp(terms).sum()))


def _crossing(falling: Callable[[float], float], value: float) -> float:
    """Where a function that falls on [0, 1] comes down to a value."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > value else (low, middle)
    return high


def upper(hits: int, total: int, error: float = ERROR) -> float:
    """The share that lies above the true one but with that probability (Clopper, Pearson, 1934)."""
    if hits >= total:
        return 1.0
    return _crossing(lambda share: at_most(hits, total, share), error)


def lower(hits: int, total: int, error: float = ERROR) -> float:
    """Likewise the share that lies below it."""
    return 1 - upper(total - hits, total, error)


def interval(hits: int, total: int, error: float = ERROR) -> tuple[float, float]:
    """Both ends, with half of the error each."""
    return lower(hits, total, error / 2), upper(hits, total, error / 2)


def drop_upper(worse: int, better: int, total: int, error: float = ERROR) -> float:
    """A bound on how much accuracy falls, of pictures that two networks both answered.

    The fall is P(only the first is right) - P(only the second is). Each has its own exact bound,
    and the errors of the two add up to `error` at most (Bonferroni), so the bound holds whatever
    the shares are. An exact test of the difference would have to hold for the worst share of
    pictures on which both differ, and gains nothing where few do. Most of the error goes to the
    first: where nothing gets better it is that which decides.

    Args:
        worse: pictures that only the first got right.
        better: those that only the second did.
    """
    return upper(worse, total, _WORSE * error) - lower(better, total, _BETTER * error)


def drop_lower(worse: int, better: int, total: int, error: float = ERROR) -> float:
    """Likewise a fall that is at least there."""
    return -drop_upper(better, worse, total, error)


def expected(hits: int, total: int, other: int, error: float = ERROR) -> tuple[float, float]:
    """Between which shares another sample of the same pictures' kind will lie.

    Both samples are by chance, so this is wider than `interval`: of another of the same size by
    about 1.4. Thatcher's limits (1964): exact, and on the safe side as counts are whole.

    Args:
        other: pictures of that sample.
    """
    low = 0 if hits == 0 else _quantile(other, hits, total - hits + 1, error / 2)
    high = other if hits == total else _quantile(other, hits + 1, total - hits, 1 - error / 2)
    return low / other, high / other


def _quantile(draws: int, a: int, b: int, probability: float) -> int:
    """Of a beta-binomial count: the least k with P(X <= k) >= probability."""
    logs, k = _log_factorials(draws + a + b), np.arange(draws + 1)
    # B(k + a, n - k + b) / B(a, b) by factorials, since a and b are whole.
    terms = logs[draws] - logs[k] - logs[draws - k] + logs[k + a - 1] + logs[draws - k + b - 1]
    terms = terms - logs[draws + a + b - 1] + logs[a + b - 1] - logs[a - 1] - logs[b - 1]
    sums = np.cumsum(np.exp(terms))
    return int(np.searchsorted(sums, probability * sums[-1]))


def pictures_needed(fits: Callable[[int], bool], have: int) -> int | None:
    """The least number of pictures, doubled and halved, that would do; None: none would.

    Args:
        fits: whether so many would; once they do, more do.
        have: that do not.
    """
    low, high = have, max(have, 1)
    while not fits(high):
        low, high = high, high * 2
        if high > _MOST_PICTURES:
            return None
    while high - low > max(1, high // 1000):
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
