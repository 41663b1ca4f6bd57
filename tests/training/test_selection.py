"""Rules that stand in for the thresholds: counts, order, and that nothing comes back."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS, arch
from asvit_deploy.models.macs import model_macs, teacher_macs
from asvit_deploy.training.selection import (
    forward_selected,
    highest,
    min_k,
    ratio_counts,
    static_top_k,
    top_k,
)


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    config = replace(arch("as_deit_mini"), dim=32, heads=2, depth=5, stages=(1, 2, 3))
    model = build(config.at(20, 10)).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(20)
    return model


def test_highest_takes_the_first_of_equals_among_those_alive():
    scores = torch.tensor([[0.5, 0.5, 0.9, 0.5], [0.1, 0.2, 0.3, 0.4]])
    alive = torch.tensor([[True, True, False, True], [True] * 4])
    kept = highest(scores, alive, torch.tensor([2, 3]))
    assert kept.tolist() == [[True, True, False, False], [False, True, True, True]]
    assert highest(scores, alive, torch.tensor([4, 0])).tolist() == [alive[0].tolist(), [False] * 4]


def test_highest_ranks_as_the_op_does_and_wakes_no_token():
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[nan, -inf, 0.5, nan, 0.2], [inf, nan, -inf, -inf, 0.9]])
    alive = torch.tensor([[True] * 5, [False, True, True, True, False]])
    kept = highest(scores, alive, torch.tensor([3, 2]))
    assert kept.int().tolist() == [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0]]
    assert highest(scores, alive, torch.tensor([5, 3])).equal(alive)


def test_the_same_counts_by_scores_are_the_thresholds_own_choice():
    model, images = small(), torch.randn(4, 3, 20, 20)
    for stage, threshold in enumerate(model.thresholds):
        threshold.data.fill_(0.03 + 0.005 * stage)
    logits, trace = model(images)
    counts = [length - 1 for length in trace.length]
    assert all(count.float().std() > 0 for count in counts)
    torch.testing.assert_close(forward_selected(model, images, top_k(counts)), logits)
    lowest = forward_selected(model, images, min_k(counts))
    assert (lowest - logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("budget", [0.5, 0.65, 0.8])
def test_ratio_counts_meet_the_budget(name, budget):
    config = arch(name)
    if name == "as_deit_mini":  # its stem alone is a quarter
        config = config.with_stages((1, 2, 4))
    counts = ratio_counts(config, budget)
    share = model_macs(config, [1 + count for count in counts]) / teacher_macs(config)
    assert share == pytest.approx(budget, rel=0.01)
    assert counts == sorted(counts, reverse=True)
    # The same share at every stage, to a few whole tokens.
    shares = [(n / config.image_tokens) ** (1 / stage) for stage, n in enumerate(counts, 1)]
    for stage, count in enumerate(counts, 1):
        assert abs(count - config.image_tokens * shares[0] ** stage) <= 8


def test_static_top_k_trains_and_removes_the_same_tokens():
    model, images = small(), torch.randn(3, 3, 20, 20)
    counts = [15, 9, 4]
    masked, _, masks = model.forward_masked(images, selector=static_top_k(counts))
    assert [mask.sum(1).tolist() for mask in masks] == [[count] * 3 for count in counts]
    assert all((later <= earlier).all() for earlier, later in pairwise(masks))
    rule = top_k([torch.full((3,), count) for count in counts])
    torch.testing.assert_close(forward_selected(model, images, rule), masked, atol=1e-5, rtol=1e-5)
    model.train()
    model.forward_masked(images, selector=static_top_k(counts))[0].sum().backward()
    assert all(threshold.grad is None for threshold in model.thresholds)


def test_ratio_counts_leave_room_for_the_rows_in_front():
    config = replace(arch("as_deit_small"), prefix=5)
    counts = ratio_counts(config, 0.65)
    share = model_macs(config, [5 + count for count in counts]) / teacher_macs(config)
    assert share == pytest.approx(0.65, rel=1e-3)
