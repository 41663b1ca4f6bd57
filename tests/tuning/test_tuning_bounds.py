"""Bounds that decide what may be promised: against scipy, and by going through every outcome."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from asvit_deploy.tuning import bounds

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("hits", "total"), [(0, 64), (0, 598), (3, 650), (40, 41), (5, 5)])
def test_clopper_pearson_is_scipys(hits, total):
    theirs = stats.binomtest(hits, total).proportion_ci(0.95, "exact")
    assert bounds.interval(hits, total) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert bounds.upper(hits, total) == pytest.approx(
        stats.beta.ppf(0.95, hits + 1, total - hits) if hits < total else 1.0, abs=1e-9
    )


def test_sixty_four_pictures_without_a_disagreement_bound_the_drop_at_four_points_and_a_half():
    """The issue's own figure, 4.7 points, is 3 / 64; exactly it is 1 - 0.05^(1/64)."""
    assert 100 * bounds.upper(0, 64) == pytest.approx(100 * (1 - 0.05 ** (1 / 64)), abs=1e-9)
    assert 4.5 < 100 * bounds.upper(0, 64) < 4.7


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.3, 0.5, 0.97])
def test_the_bound_covers_the_share_in_nineteen_of_twenty_samples(share):
    total = 60
    missed = sum(
        stats.binom.pmf(k, total, share)
        for k in range(total + 1) if bounds.upper(k, total) < share
    )  # fmt: skip
    assert missed <= 0.05 + 1e-12


@pytest.mark.parametrize("worse", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("better", [0.0, 0.02, 0.1, 0.3])
def test_the_drop_of_accuracy_is_covered_whatever_the_shares_are(worse, better):
    """Every outcome of 25 pictures, each of which gets worse, better, or stays."""
    total, missed = 25, 0.0
    for w in range(total + 1):
        for b in range(total + 1 - w):
            ways = math.comb(total, w) * math.comb(total - w, b)
            chance = ways * worse**w * better**b * (1 - worse - better) ** (total - w - b)
            if chance > 1e-15 and bounds.drop_upper(w, b, total) < worse - better:
                missed += chance
    assert missed <= 0.05 + 1e-9


@pytest.mark.parametrize("share", [0.005, 0.05, 0.5, 0.95, 0.999])
def test_another_sample_lies_where_it_is_expected(share):
    first, other, inside = 40, 30, 0.0
    for k, m in itertools.product(range(first + 1), range(other + 1)):
        low, high = bounds.expected(k, first, other)
        if low - 1e-12 <= m / other <= high + 1e-12:
            inside += stats.binom.pmf(k, first, share) * stats.binom.pmf(m, other, share)
    assert inside >= 0.95 - 1e-9


def test_what_is_expected_is_wider_than_what_is_known():
    known, expected = bounds.interval(640, 650), bounds.expected(640, 650, 650)
    assert expected[0] < known[0] < 640 / 650 < known[1] < expected[1]
    assert bounds.expected(650, 650, 650)[1] == 1.0
    assert bounds.expected(0, 650, 650)[0] == 0.0


def test_needed_pictures_are_the_fewest_to_a_thousandth():
    needed = bounds.pictures_needed(lambda n: bounds.upper(0, n) <= 0.005, 64)
    assert needed == pytest.approx(math.log(0.05) / math.log(0.995), abs=1)
    assert bounds.pictures_needed(lambda n: False, 10) is None


def test_a_fixed_sequence_errs_in_one_run_of_twenty():
    """Candidates that all lie just beyond the demand, the likeliest first: the chance that any is
    passed is that of the first alone."""
    rng, total, most, runs = np.random.default_rng(0), 300, 0.02, 4000
    shares = (0.0201, 0.021, 0.022, 0.025, 0.03)
    false = 0
    for _ in range(runs):
        for share in shares:
            if bounds.upper(int(rng.binomial(total, share)), total) > most:
                break
            false += 1
            break
    # Three standard deviations of the simulation itself.
    assert false / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
