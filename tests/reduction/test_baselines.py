"""What a method must beat: chance, and the lowest scores."""

from __future__ import annotations

import pytest
import torch
from by_hand import STAGES, network, same_by_hand, same_in_all_forms

from asvit_deploy.reduction.baselines import MinK, Random
from asvit_deploy.reduction.methods import restored
from asvit_deploy.reduction.rows import Rows

PRIME = 65519


def lowest(here, kept):
    rising = sorted(here.rows, key=here.score)
    return here.without(rising[kept:])


def by_chance(here, kept):
    drawn = {row: (pow(n + 7919 * (here.stage + 1), 3, PRIME) + 12345) % PRIME
             for n, row in enumerate(here.rows, 1)}  # fmt: skip
    return here.without(sorted(here.rows, key=lambda row: -drawn[row])[kept:])


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize(("method", "cut"), [(MinK, lowest), (Random, by_chance)])
def test_it_is_what_it_says(method, cut, prefix):
    model = network(method, prefix)
    same_by_hand(model, lambda here: cut(here, STAGES[1][here.stage]))


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("method", [MinK, Random])
def test_masked_form_batches_and_single_images_agree(method, prefix):
    same_in_all_forms(network(method, prefix), torch.randn(4, 3, 112, 112))


@torch.no_grad()
def test_chance_is_the_same_on_every_picture_and_draws_no_place_twice():
    model = network(Random)
    _, trace = model(torch.randn(4, 3, 112, 112))
    assert all((index == index[0]).all() for index in trace.index)
    # No two scores are equal, in any number of tokens, so that no runtime has to choose.
    for stage in (0, 11):
        rows = Rows(torch.zeros(1, 1 + 16384, 1))
        score = model.reduction.rank(stage, rows, None).score
        assert score.unique().numel() == 16384
        assert 0 < score.min() < score.max() <= 1
        assert score.mean() == pytest.approx(0.5, abs=0.02)
        # It scatters: neighbours stay about as often as chance has it.
        stays = score[0] > score[0].median()
        assert (stays[1:] == stays[:-1]).float().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("method", [MinK, Random])
def test_it_is_restored_from_its_fields(method):
    made = restored(method((1, 3, 4), (30, 15, 7), 3).fields(), 3)
    assert type(made) is method
    assert (made.blocks, made.kept, made.prefix) == ((1, 3, 4), (30, 15, 7), 3)
