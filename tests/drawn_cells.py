"""Drawings read back: what each cell of each panel shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from asvit_deploy.drawing.figure import GAP, MARGIN
from asvit_deploy.drawing.tokens import frame_width


def panels_of(drawing: Path, side: int) -> list[np.ndarray]:
    """The panels of a row, uint8 [S, S, 3], the input first."""
    pixels = np.asarray(Image.open(drawing))
    assert pixels.dtype == np.uint8
    count = (pixels.shape[1] - 2 * MARGIN + GAP) // (side + GAP)
    assert pixels.shape[1] == 2 * MARGIN + count * side + (count - 1) * GAP
    top = pixels.shape[0] - MARGIN - side
    lefts = [MARGIN + place * (side + GAP) for place in range(count)]
    return [pixels[top : top + side, left : left + side] for left in lefts]


def cell_of(panel: np.ndarray, token: int, grid: int) -> np.ndarray:
    size = len(panel) // grid
    row, column = divmod(token, grid)
    return panel[row * size : (row + 1) * size, column * size : (column + 1) * size]


def taker(token: int, kept, into) -> int | None:
    """Who has a token behind these cuts, one step after the other; None where it is lost."""
    for staying, goes in zip(kept, into):
        steps = set()
        while token not in staying:
            if token in steps or goes[token] == token:
                return None
            steps.add(token)
            token = int(goes[token])
    return token


def frame_of(cell: np.ndarray) -> tuple[int, ...] | None:
    """The one colour of a cell's frame, or None."""
    width = frame_width(len(cell))
    edge = np.ones(cell.shape[:2], bool)
    edge[width:-width, width:-width] = False
    colours = np.unique(cell[edge], axis=0)
    return tuple(colours[0].tolist()) if len(colours) == 1 else None


def inside(cell: np.ndarray) -> np.ndarray:
    width = frame_width(len(cell))
    return cell[width:-width, width:-width]


def agree(drawing: Path, picture: np.ndarray, tokens: int, kept, into=None, cuts=None) -> int:
    """Compare a drawing with a runner's tokens of one image; how many groups were seen.

    Args:
        picture: uint8 [S, S, 3], the crop as it must be shown.
        tokens: N.
        kept, into: as `Prediction` has them, of one image.
        cuts: those that are shown.
    """
    first, *panels = panels_of(drawing, len(picture))
    assert np.array_equal(first, picture)
    cuts = range(len(kept)) if cuts is None else cuts
    assert len(panels) == len(cuts)
    return sum(
        _panel_agrees(panel, picture, tokens, kept[: cut + 1], into and into[: cut + 1])
        for panel, cut in zip(panels, cuts)
    )


def _panel_agrees(panel, picture, tokens, kept, into) -> int:
    grid = round(tokens**0.5)
    staying = {int(token) for token in kept[-1]}
    found = {t: taker(t, kept, into) if into else None for t in range(tokens) if t not in staying}
    colours: dict[int, tuple[int, ...]] = {}
    for token in range(tokens):
        here, was = cell_of(panel, token, grid), cell_of(picture, token, grid)
        if token in staying and token not in found.values():
            assert np.array_equal(here, was), token
        elif token in staying:
            assert np.array_equal(inside(here), inside(was)), token
            colour = frame_of(here)
            assert colour is not None, token
            colours[token] = colour
        else:
            assert not np.array_equal(here, was), token
            if found[token] is None:  # pale and without colours of its own, between white lines
                assert here.min() > 160, token
                apart = np.diff(here[1:-1, 1:-1].astype(int), axis=2)
                assert apart.min() > 4, token
                assert np.ptp(apart, axis=(0, 1)).max() <= 1, token
                assert (here[0] == 255).all(), token
    for token, by in found.items():
        if by is not None:
            assert frame_of(cell_of(panel, token, grid)) == colours[by], token
    assert len(set(colours.values())) == len(colours)
    return len(colours)
