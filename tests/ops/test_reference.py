"""The numpy oracle against what the contract says in words, case by case, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from asvit_deploy.ops.cases import CASES, Case
from asvit_deploy.ops.reference import keep_mask, threshold_compact

NAN, INF = float("nan"), float("inf")
LOWEST = float(np.finfo(np.float32).min)


def kept(scores: list[float], threshold: float) -> list[int]:
    return np.flatnonzero(keep_mask(np.array([scores], np.float32), threshold)[0]).tolist()


@pytest.mark.parametrize(
    ("scores", "threshold", "expected"),
    [
        ([0.1, 0.6, 0.5, 0.7], 0.5, [1, 3]),  # strict: 0.5 is not above 0.5
        ([0.5, 0.5, 0.5], 0.5, [0]),  # nothing above: the best, lowest index on a tie
        ([0.1, 0.4, 0.2, 0.4], 0.5, [1]),
        ([0.1, 0.2, 0.3], 0.0, [0, 1, 2]),
        ([0.3], 0.5, [0]),
        ([NAN, 0.2, 0.1], 0.5, [1]),  # NaN ranks below every number,
        ([NAN, LOWEST, NAN], 0.5, [1]),
        ([NAN, NAN, -INF, -INF], 0.5, [0]),  # and above -inf: padding never comes back
        ([-INF, NAN, NAN], 0.5, [1]),
        ([-INF, LOWEST, NAN], 0.5, [1]),
        ([NAN, INF, NAN], INF, [1]),  # +inf is a number
        ([-INF, NAN], -INF, [1]),  # NaN never passes, it stays for want of a number
        ([NAN, 0.2], -INF, [1]),
        ([NAN, NAN], 0.5, [0]),
        ([-INF, -INF, -INF], 0.5, [0]),
        ([NAN, 0.9, NAN, 0.8], 0.5, [1, 3]),
        ([0.2, INF, 0.1, INF], INF, [1]),  # inf is not above inf
        ([-INF, 0.2, -INF], -INF, [1]),  # nor -inf above -inf
        ([-INF, 0.2, 0.1], -INF, [1, 2]),
        ([0.2, 0.9, 0.3], NAN, [1]),  # a NaN threshold passes nothing
        ([NAN, NAN], NAN, [0]),
        ([-0.0, -0.0], 0.0, [0]),
        ([-0.5, -0.25], -0.3, [1]),
    ],
)
def test_which_tokens_stay(scores, threshold, expected):
    assert kept(scores, threshold) == expected


def test_the_threshold_is_compared_in_float32():
    tenth = float(np.float32(0.1))  # above 0.1 in double precision, equal to it in float32
    assert tenth > 0.1
    assert kept([0.0, tenth, tenth], 0.1) == [1]


def test_rows_order_padding_and_sizes_by_hand():
    tokens = np.arange(2 * 5 * 2, dtype=np.float32).reshape(2, 5, 2)
    scores = np.array([[0.9, 0.1, 0.8, 0.2], [0.1, 0.2, 0.3, 0.4]], np.float32)
    compact, index, length, size = threshold_compact(tokens, scores, 0.5)
    assert index.tolist() == [[0, 1, 3], [0, 4, -1]]
    assert compact.tolist() == [
        [[0, 1], [2, 3], [6, 7]],
        [[10, 11], [18, 19], [0, 0]],
    ]
    assert length.tolist() == [3, 2]
    assert size == 3
    assert size.shape == ()
    assert index.dtype == length.dtype == size.dtype == np.int64


def test_prefix_rows_stay_whatever_the_scores_say():
    tokens = np.arange(2 * 5 * 2, dtype=np.float32).reshape(2, 5, 2)
    scores = np.array([[0.9, 0.8], [NAN, -INF]], np.float32)
    compact, index, length, size = threshold_compact(tokens, scores, 0.5)
    assert index.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, -1]]
    assert compact.tolist() == [
        [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]],
        [[10, 11], [12, 13], [14, 15], [16, 17], [0, 0]],
    ]
    assert length.tolist() == [5, 4]
    assert size == 5


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_at_least_one_image_token_stays_behind_any_prefix(prefix):
    tokens = np.ones((1, prefix + 3, 2), np.float32)
    index = threshold_compact(tokens, np.array([[0.1, 0.3, 0.2]], np.float32), 0.5).index
    assert index.tolist() == [[*range(prefix), prefix + 1]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_invariants(case: Case):
    compact, index, length, size = threshold_compact(case.tokens, case.scores, case.threshold)
    assert compact.shape == (*index.shape, case.tokens.shape[2])
    assert index.shape == (len(case.tokens), size)
    for b, count in enumerate(length):
        rows = index[b, :count]
        assert case.prefix + 1 <= count <= case.tokens.shape[1]
        assert rows[: case.prefix].tolist() == [*range(case.prefix)]
        assert (np.diff(rows) > 0).all()
        assert (compact[b, :count] == case.tokens[b, rows]).all()
        assert (index[b, count:] == -1).all()
        assert (compact[b, count:] == 0).all()
        dropped = np.setdiff1d(np.arange(case.tokens.shape[1]), rows) - case.prefix
        assert not (case.scores[b, dropped] > np.float32(case.threshold)).any()
        if count > case.prefix + 1:  # more than the floor: every one of them passed
            passed = rows[case.prefix :] - case.prefix
            assert (case.scores[b, passed] > np.float32(case.threshold)).all()


@pytest.mark.parametrize(
    ("tokens", "scores"),
    [((0, 5, 4), (0, 4)), ((1, 1, 4), (1, 0)), ((1, 5, 4), (1, 5)), ((2, 5, 4), (1, 4)),
     ((5, 4), (5, 3)), ((1, 5, 4), (1, 6)), ((2, 5, 4), (2, 0)), ((2, 0, 4), (2, 0)),
     ((2, 0, 4), (2, 3)), ((2, 5, 4), (2,)), ((2, 5, 4), (2, 3, 1)), ((0, 5, 4), (0, 0))],
)  # fmt: skip
def test_shapes_that_are_refused(tokens, scores):
    with pytest.raises(ValueError, match=r"^(?!.*\n).*(do not fit|nothing to compact)"):
        threshold_compact(np.zeros(tokens, np.float32), np.zeros(scores, np.float32), 0.5)
