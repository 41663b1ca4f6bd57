"""Pairs of similar tokens, and what rows that leave hand on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from asvit_deploy.ops.torch_op import best_places
from asvit_deploy.reduction.matching import alternating, pairs
from asvit_deploy.reduction.rows import Rows, averaged, chosen, moved, with_row

PREFIX = 2


@pytest.mark.parametrize("hide", [None, "keep", "alive", "among"])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_pairs_row_by_row(hide, tokens):
    there = torch.ones(4, tokens, dtype=torch.bool)
    if hide is not None:
        there[1:] = torch.rand(3, tokens) > 0.3
        there[1] = torch.arange(tokens) == tokens // 2  # a lone one
    stay = F.pad(there, (PREFIX, 0), value=True)
    side = {"keep": {"keep": stay.float()}, "alive": {"alive": stay}}.get(hide, {})
    rows = Rows(torch.randn(4, PREFIX + tokens, 5), **side)
    likeness = F.normalize(torch.randn(4, tokens, 4), dim=2)
    found = pairs(rows, likeness, PREFIX, there if hide == "among" else None)
    for image in range(4):
        places = there[image].nonzero()[:, 0].tolist()
        even, odd = places[::2], places[1::2]
        alike = likeness[image] @ likeness[image].T
        best = {i: max(odd, key=lambda j, i=i, alike=alike: alike[i, j]) for i in even if odd}
        assert found.paired[image].nonzero()[:, 0].tolist() == sorted(best)
        into = list(range(PREFIX + tokens))
        for i, j in best.items():
            into[PREFIX + i] = PREFIX + j
            torch.testing.assert_close(found.cosine[image, i], alike[i, j])
        assert found.into[image].tolist() == into


def test_places_are_ranks_among_what_is_there():
    even, odd = alternating(Rows(torch.zeros(1, 1 + 5, 1)), 1)
    assert even.tolist() == [[True, False, True, False, True]]
    assert odd.tolist() == [[False, True, False, True, False]]
    keep = torch.tensor([[1.0, 1, 0, 0, 1, 1, 0, 1]])
    even, odd = alternating(Rows(torch.zeros(1, 8, 1), keep=keep), 1)
    assert even[0].nonzero()[:, 0].tolist() == [0, 4]
    assert odd[0].nonzero()[:, 0].tolist() == [3, 6]


def test_the_first_of_equals():
    scores = torch.tensor([[1.0, 3, 3, torch.inf, 1, 3], [2, 2, 2, 2, 2, 2]])
    assert best_places(scores, 3).tolist() == [[3, 1, 2], [0, 1, 2]]
    assert chosen(scores, 3).nonzero().tolist() == [[0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2]]
    many = torch.ones(1, 3000)
    assert best_places(many, 50).tolist() == [list(range(50))]


def test_sizes_and_means_go_where_they_are_sent():
    tokens, into = torch.randn(1, 5, 3), torch.tensor([[0, 1, 4, 4, 4]])
    leaving, sizes = torch.tensor([[0.0, 0, 1, 1, 0]]), torch.tensor([[1.0, 2, 3, 4, 5]])
    assert moved(sizes, into, leaving).tolist() == [[1, 2, 3, 4, 12]]
    for given in (tokens, tokens[0]):  # of one picture, without its batch axis
        found = averaged(Rows(given), into, leaving, sizes).tokens
        assert found.shape == given.shape
        wanted = (3 * tokens[0, 2] + 4 * tokens[0, 3] + 5 * tokens[0, 4]) / 12
        torch.testing.assert_close(found.reshape(5, 3)[4], wanted)
        torch.testing.assert_close(found.reshape(5, 3)[:4], tokens[0, :4])


def test_an_appended_row_stays_and_counts_once():
    rows = Rows(torch.zeros(2, 3, 4), alive=torch.tensor([[True, True, False]] * 2))
    longer = with_row(rows, torch.ones(2, 4))
    assert longer.tokens[:, 3].eq(1).all()
    assert longer.alive.tolist() == [[True, True, False, True]] * 2
    assert longer.size is None
    sized = with_row(rows, torch.ones(2, 4), torch.tensor([3.0, 5.0]))
    assert sized.size.tolist() == [[1, 1, 1, 3], [1, 1, 1, 5]]
