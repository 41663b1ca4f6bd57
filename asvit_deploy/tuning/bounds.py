"""Bounds on shares, exact or on the safe side; counts of pictures are all they go by.

No bound here is an approximation by a normal distribution: at the few disagreements that matter
here those are wrong by half.
"""

from __future__ import annotations

from collections.abc import Callable

ERROR = 0.05  # one-sided, of each test
# Of it, what goes to the pictures that get worse and to those that get better, with labels.
_WORSE, _BETTER = 0.8, 0.2
_MOST_PICTURES = 10_000_000


def upper(hits: int, total: int, error: float = ERROR) -> float:
    """The share that lies above the true one but with that probability (Clopper, Pearson, 1934)."""
    from scipy.stats import beta

    return 1.0 if hits >= total else float(beta.ppf(1 - error, hits + 1, total - hits))


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
    from scipy.stats import betabinom

    half = error / 2
    low = 0 if hits == 0 else betabinom.ppf(half, other, hits, total - hits + 1)
    high = other if hits == total else betabinom.ppf(1 - half, other, hits + 1, total - hits)
    return float(low) / other, float(high) / other


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
