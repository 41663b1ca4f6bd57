"""Thresholds: the training mask and its gradients, and removal by a mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asvit_deploy.ops.cases import EDGES, SIZES
from asvit_deploy.ops.reference import keep_mask
from asvit_deploy.reduction.removal import compact_masked, mean_k_keep_mask
from asvit_deploy.reduction.threshold import (
    TEMPERATURE,
    soft_keep_mask,
)

SCORES = torch.tensor([[0.10, 0.50, 0.51, 0.30], [0.01, 0.02, 0.04, 0.03]])
ALL = torch.ones_like(SCORES)


def test_forward_values_are_zero_and_one():
    mask = soft_keep_mask(SCORES, torch.tensor(0.5), ALL, TEMPERATURE)
    # Image 0: strictly above; image 1: nothing is, so its best stays.
    assert mask.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]


def test_a_dropped_token_never_returns():
    alive = torch.tensor([[1.0, 1, 0, 1], [1, 1, 0, 0]])
    mask = soft_keep_mask(SCORES, torch.tensor(0.2), alive, TEMPERATURE)
    # Image 1's best is gone: the best of those alive stays.
    assert mask.tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]


def test_gradients_are_those_of_the_sigmoid():
    scores = SCORES.clone().requires_grad_()
    threshold = torch.tensor(0.3, requires_grad=True)
    weights = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    (soft_keep_mask(scores, threshold, ALL, 20.0) * weights).sum().backward()
    soft = torch.sigmoid(20.0 * (SCORES - 0.3))
    slope = 20.0 * soft * (1 - soft) * weights
    torch.testing.assert_close(scores.grad, slope)
    torch.testing.assert_close(threshold.grad, -slope.sum())


def test_gradient_reaches_the_stage_before():
    alive = ALL.clone().requires_grad_()
    soft_keep_mask(SCORES, torch.tensor(0.2), alive, TEMPERATURE).sum().backward()
    assert alive.grad.tolist() == [[0, 1, 1, 1], [0, 0, 1, 0]]


def test_higher_thresholds_keep_fewer():
    scores = torch.rand(8, 40)
    counts = [
        soft_keep_mask(scores, torch.tensor(t), torch.ones_like(scores), TEMPERATURE).sum().item()
        for t in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 320
    assert counts[-1] == 8


@pytest.mark.slow
def test_compact_masked_keeps_exactly_the_mask():
    tokens, keep = torch.randn(3, 6, 4), torch.rand(3, 5) > 0.5
    keep[:, 2] = True
    compact, index, length = compact_masked(tokens, keep)
    for b in range(3):
        rows = torch.cat([torch.tensor([0]), 1 + keep[b].nonzero()[:, 0]])
        assert length[b] == len(rows)
        assert index[b, : len(rows)].equal(rows)
        assert compact[b, : len(rows)].equal(tokens[b, rows])


def test_mean_k_is_the_floor_of_the_mean():
    scores = torch.tensor(
        [
            [0.1, 0.9, 0.2, 0.8, 0.7, 0.6],  # 4 above 0.5
            [0.6, 0.1, 0.7, 0.2, 0.8, 0.3],  # 3
            [0.1, 0.3, 0.5, 0.2, 0.4, 0.0],  # none: 0.5 is not above itself
            [0.9, 0.8, 0.7, 0.6, 0.1, 0.2],  # 4; 11 / 4 = 2.75, so 2 of each stay
        ]
    )
    keep = mean_k_keep_mask(scores, torch.tensor(0.5))
    assert keep.int().tolist() == [
        [0, 1, 0, 1, 0, 0],
        [0, 0, 1, 0, 1, 0],
        [0, 0, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 0],
    ]


def test_mean_k_of_one_image_is_its_own_count():
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.5]])
    keep = mean_k_keep_mask(scores, torch.tensor(0.5))
    assert keep.int().tolist() == [[0, 1, 0, 1, 0]]


def test_mean_k_ranks_as_the_op_does():
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[-inf, nan, 0.5, nan, 0.2], [0.9, nan, 0.8, 0.7, 0.6]])
    assert mean_k_keep_mask(scores, torch.tensor(0.1)).tolist() == [
        [False, True, True, False, True],
        [True, False, True, True, False],
    ]


@pytest.mark.parametrize("case", EDGES + SIZES, ids=lambda case: case.name)
def test_the_training_form_obeys_the_op_s_contract(case):
    scores = torch.from_numpy(case.scores).requires_grad_()
    threshold = torch.tensor(case.threshold, dtype=torch.float32, requires_grad=True)
    mask = soft_keep_mask(scores, threshold, torch.ones_like(scores), TEMPERATURE)
    np.testing.assert_array_equal(mask.detach(), keep_mask(case.scores, case.threshold))
    mask.sum().backward()
    assert scores.grad.isfinite().all()
    assert threshold.grad.isfinite()


@pytest.mark.parametrize("case", EDGES + SIZES, ids=lambda case: case.name)
def test_mean_k_of_one_image_is_the_op_s_choice(case):
    for row in case.scores:
        mine = mean_k_keep_mask(torch.from_numpy(row[None]), torch.tensor(case.threshold))
        np.testing.assert_array_equal(mine, keep_mask(row[None], case.threshold))


def test_dropped_tokens_do_not_come_back_where_the_others_are_nan():
    scores = torch.tensor([[0.9, torch.nan, torch.nan, 0.8]])
    alive = torch.tensor([[0.0, 1, 1, 0]])
    mask = soft_keep_mask(scores, torch.tensor(0.5), alive, TEMPERATURE)
    assert mask.tolist() == [[0, 1, 0, 0]]
