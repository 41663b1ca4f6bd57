"""Fates of tokens and their colours, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from asvit_deploy.drawing.tokens import Fate, fates, palette, panel, scaled


def ints(*values):
    return np.array(values, np.int64)


def test_what_is_lost_stays_lost():
    first, second = fates([ints(0, 2, 3), ints(3)], None, 4)
    assert first.stays.tolist() == [True, False, True, True]
    assert first.group.tolist() == [0, -1, 2, 3]
    assert second.group.tolist() == [-1, -1, -1, 3]
    assert not second.receives.any()


def test_groups_go_with_the_token_that_took_them():
    into = [ints(0, 0, 2, 2), ints(2, -1, 2, -1)]
    first, second = fates([ints(0, 2), ints(2)], into, 4)
    assert first.group.tolist() == [0, 0, 2, 2]
    assert first.receives.tolist() == [True, False, True, False]
    assert second.group.tolist() == [2, 2, 2, 2]
    assert second.receives.tolist() == [False, False, True, False]


def test_a_taker_that_leaves_at_the_same_cut_hands_on():
    (fate,) = fates([ints(3)], [ints(1, 2, 3, 3)], 4)
    assert fate.group.tolist() == [3, 3, 3, 3]


def test_a_ring_and_a_token_that_goes_nowhere_are_lost():
    (fate,) = fates([ints(3)], [ints(1, 0, 2, 3)], 4)
    assert fate.group.tolist() == [-1, -1, -1, 3]


def test_rows_that_a_method_adds_stand_for_no_place():
    first, second = fates([ints(0, 1, 3), ints(1, 4)], None, 4)
    assert first.stays.tolist() == [True, True, False, True]
    assert second.group.tolist() == [-1, 1, -1, -1]


def test_what_a_token_that_stays_says_of_another_is_not_looked_at():
    """`into` names a partner for those that stay too."""
    (fate,) = fates([ints(0, 1, 3)], [ints(1, 1, 3, 1)], 4)
    assert fate.group.tolist() == [0, 1, 3, 3]


@pytest.mark.parametrize("grid", [1, 2, 7, 13, 14, 16, 24, 37])
def test_colours_differ_and_those_of_neighbours_by_much(grid):
    colours = palette(grid).astype(int)
    assert len(np.unique(colours, axis=0)) == grid**2
    square = colours.reshape(grid, grid, 3)
    for down, right in ((0, 1), (1, 0), (1, 1)):
        far = np.abs(square[down:, right:] - square[: grid - down, : grid - right]).max(2)
        assert far.size == 0 or far.min() >= 50


@pytest.mark.parametrize(("size", "patch", "side"), [
    (28, 4, 196), (56, 4, 224), (160, 16, 320), (192, 16, 192), (224, 16, 224), (384, 16, 384),
    (518, 14, 444), (1024, 16, 448), (4096, 16, 1024), (4096, 4096, 448), (16, 16, 192),
])  # fmt: skip
def test_panels_have_a_size_and_whole_cells(size, patch, side):
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    shown = scaled(pixels, size // patch)
    assert shown.shape == (side, side, 3)
    assert side % (size // patch) == 0
    if side >= size:
        times = side // size
        assert np.array_equal(shown[::times, ::times], pixels)
        assert np.array_equal(shown[times - 1 :: times, times - 1 :: times], pixels)
    else:
        assert abs(shown.mean() - pixels.mean()) < 1


@pytest.mark.parametrize("value", [0, 128, 222, 255])
@pytest.mark.parametrize("group", [-1, 1])
def test_what_has_gone_differs_whatever_the_picture_is(value, group):
    """Flat pictures too, of the very colour that is faded to, or of a group's own colour."""
    fate = Fate(np.array([False, True, True, True]), ints(group, 1, 2, 3))
    colour = {128: palette(2)[1], 222: [206, 213, 226]}.get(value, [value] * 3)
    picture = np.broadcast_to(colour, (32, 32, 3)).astype(np.uint8)
    drawn = panel(picture, fate)
    assert not np.array_equal(drawn[:16, :16], picture[:16, :16])
    assert np.array_equal(drawn[16:], picture[16:])
    assert np.array_equal(drawn[2:14, 18:30], picture[2:14, 18:30])


def test_the_picture_itself_is_not_drawn_into():
    picture = np.zeros((8, 8, 3), np.uint8)
    panel(picture, Fate(np.array([False] * 4), ints(-1, -1, -1, -1)))
    assert not picture.any()
