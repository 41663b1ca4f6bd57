"""MACs against the figures that the release's formula gives, to the last digit quoted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asvit_deploy.models.archs import ARCHS, arch
from asvit_deploy.models.macs import (
    block_macs,
    budget_macs,
    dense_macs,
    model_macs,
    stem_macs,
    teacher_macs,
    unavoidable_macs,
)

FIGURES = [
    ("as_deit_tiny", 224, "1.2464", "1.2535"),
    ("as_deit_small", 224, "4.5736", "4.5985"),
    ("as_deit_base", 224, "17.471", "17.563"),
    ("as_lvvit_s", 224, "6.5189", "6.5478"),
    ("as_lvvit_m", 224, "12.636", "12.697"),
    ("as_deit_base", 384, "55.38", "55.48"),
]


def quoted(macs: float, like: str) -> str:
    return f"{macs / 1e9:.{len(like.split('.')[1])}f}"


@pytest.mark.parametrize(("name", "size", "teacher", "dense"), FIGURES)
def test_both_rows_of_the_table(name, size, teacher, dense):
    config = arch(name).at(size)
    assert quoted(teacher_macs(config), teacher) == teacher
    assert quoted(dense_macs(config), dense) == dense


@pytest.mark.parametrize(
    ("name", "budget", "target"),
    [("as_deit_small", 0.65, "2.973"), ("as_deit_small", 0.5, "2.287"),
     ("as_lvvit_s", 0.7, "4.563"), ("as_lvvit_s", 0.6, "3.911"),
     ("as_lvvit_m", 0.76, "9.603"), ("as_lvvit_m", 0.67, "8.466")],
)  # fmt: skip
def test_targets_of_the_paper(name, budget, target):
    assert quoted(budget_macs(arch(name), budget), target) == target


@pytest.mark.parametrize(
    ("lengths", "budget"), [((129, 85, 56), 0.65), ((84, 36, 16), 0.5)]
)  # fmt: skip
def test_uniform_twins_of_as_deit_s_meet_their_budget(lengths, budget):
    config = arch("as_deit_small")
    # The counts are whole numbers, so the twins only come near: within half a percent.
    assert model_macs(config, lengths) == pytest.approx(budget_macs(config, budget), rel=5e-3)


def test_by_hand():
    config = arch("as_deit_mini")
    n, d, m = 10, config.dim, config.hidden
    by_hand = 3 * n * d * d + 2 * d * n * n + n * d * d + 2 * n * d * m
    assert block_macs(config, n) == by_hand
    lengths, total = (10, 6, 2), stem_macs(config)
    for i in range(config.depth):
        stage = sum(i >= block for block in config.stages)
        total += block_macs(config, (197, *lengths)[stage])
    assert model_macs(config, lengths) == total


@pytest.mark.parametrize("name", ARCHS)
def test_least_is_below_teacher_is_below_dense(name):
    config = arch(name)
    assert unavoidable_macs(config) < teacher_macs(config) < dense_macs(config)


def test_numbers_arrays_and_tensors_agree_and_gradients_flow():
    config, lengths = arch("as_lvvit_s"), (130, 90, 40)
    exact = model_macs(config, lengths)
    arrays = model_macs(config, [np.array([float(n), 5.0]) for n in lengths])
    tensors = [torch.tensor([float(n)], dtype=torch.float64, requires_grad=True) for n in lengths]
    total = model_macs(config, tensors)
    total.sum().backward()
    assert arrays[0] == exact
    assert total.item() == exact
    assert all(t.grad.item() > 0 for t in tensors)


def test_wrong_number_of_stages_is_refused():
    with pytest.raises(ValueError, match="3 stages, got 2"):
        model_macs(arch("as_deit_small"), (100, 50))
