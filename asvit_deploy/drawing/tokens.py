"""A picture cut by cut: what stays as it is, what has gone faded or in its group's colour."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SIDE, _MOST_SIDE = 192, 448  # pixels of a panel: the least, and the most unless cells are tiny
_LEAST_CELL = 4  # pixels of a token
# What has gone fades towards the first, which no grey picture has, between lines of the second.
_MIST, _GRID = np.array([206.0, 213.0, 226.0]), 255
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Fate:
    """What has become of every image token behind a cut.

    Attributes:
        stays: bool [N].
        group: int64 [N], the token that it is part of now, itself where it stays; -1 where what it
            carried is lost.
    """

    stays: NDArray[np.bool_]
    group: NDArray[np.int64]

    @property
    def receives(self) -> NDArray[np.bool_]:
        """Bool [N]: those that stay and stand for others too."""
        sizes = np.bincount(self.group[self.group >= 0], minlength=len(self.group))
        return self.stays & (sizes > 1)


def fates(
    kept: Sequence[NDArray[np.int64]], into: Sequence[NDArray[np.int64]] | None, tokens: int
) -> list[Fate]:
    """The fate of one image's tokens behind each cut.

    Args:
        kept, into: of one image, as `runners.base.Prediction` has them.
        tokens: N; numbers from there on are rows that a method adds, which stand for no place.
    """
    width = max([tokens, *(int(stage.max()) + 1 for stage in kept if len(stage))])
    root, found = np.arange(width), []
    for s, staying in enumerate(kept):
        alive = np.zeros(width, bool)
        alive[staying] = True
        goes = np.arange(width)
        if into is not None:
            said = into[s][:width]
            goes[: len(said)] = np.where((said >= 0) & (said < width), said, goes[: len(said)])
        goes[alive] = np.flatnonzero(alive)
        for _ in range(width.bit_length()):  # who takes a token may leave too, and hand it on
            goes = goes[goes]
        arrives = np.where(alive[goes], goes, -1)
        root = np.where(root >= 0, arrives[root], -1)
        group = np.where(root[:tokens] < tokens, root[:tokens], -1)
        found.append(Fate(alive[:tokens], group))
    return found


@functools.lru_cache
def palette(grid: int) -> NDArray[np.uint8]:
    """A colour for the group of each image token, uint8 [N, 3]; neighbours' are far apart."""
    row, column = np.divmod(np.arange(grid**2), grid)
    # The plastic number's powers: points of a lattice that never come close to each other.
    hue = (row * 0.7548776662466927 + column * 0.5698402909980532) % 1
    light = np.array([0.40, 0.52, 0.64])[(row + 2 * column) % 3]
    light = light + 0.06 * (hue * 8191 % 1)  # so that of many no two are the same
    strength = 0.75 * np.minimum(light, 1 - light)
    turned = (np.array([0, 8, 4]) + 12 * hue[:, None]) % 12
    wave = np.clip(np.minimum(turned - 3, 9 - turned), -1, 1)
    colours = light[:, None] - strength[:, None] * wave
    return np.round(255 * colours).astype(np.uint8)


def scaled(pixels: NDArray[np.uint8], grid: int) -> NDArray[np.uint8]:
    """The crop at the size of a panel, a whole number of pixels for each token.

    Small ones are enlarged pixel by pixel; what is over 448 pixels is averaged down.

    Args:
        pixels: uint8 [H, W, 3], H = W.
    """
    size = len(pixels)
    if size <= _MOST_SIDE:
        times = -(-_SIDE // size)
        return pixels.repeat(times, 0).repeat(times, 1)
    from PIL import Image

    side = grid * max(_LEAST_CELL, _MOST_SIDE // grid)
    smaller = Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)
    return np.asarray(smaller)


def panel(picture: NDArray[np.uint8], fate: Fate) -> NDArray[np.uint8]:
    """The picture behind a cut, uint8 [S, S, 3].

    Tokens that stay show the picture, pixel for pixel. Those that have gone are pale, or in the
    colour of the group that they are part of; so is a frame around the token that took them.

    Args:
        picture: uint8 [S, S, 3], of `scaled`.
    """
    grid = round(len(fate.stays) ** 0.5)
    cell = len(picture) // grid
    cells = picture.reshape(grid, cell, grid, cell, 3).swapaxes(1, 2).reshape(-1, cell, cell, 3)
    cells, colours = cells.copy(), palette(grid)
    lost, merged = ~fate.stays & (fate.group < 0), ~fate.stays & (fate.group >= 0)
    luma = cells @ _LUMA  # [N, cell, cell]
    cells[lost] = np.round(0.2 * luma[lost][..., None] + 0.8 * _MIST)
    light = 0.7 + 0.3 * luma[merged] / 255
    theirs = colours[fate.group[merged]]
    cells[merged] = np.round(light[..., None] * theirs[:, None, None])
    _frame(cells, lost, np.full((lost.sum(), 3), _GRID, np.uint8), 1)
    width = frame_width(cell)
    _frame(cells, merged, theirs, width)
    _frame(cells, fate.receives, colours[fate.receives], width)
    rows = cells.reshape(grid, grid, cell, cell, 3).swapaxes(1, 2)
    return rows.reshape(picture.shape)


def frame_width(cell: int) -> int:
    """Pixels of the frame of a group's tokens, where each is `cell` pixels wide."""
    return min(3, max(1, cell // 8))


def _frame(
    cells: NDArray[np.uint8], which: NDArray[np.bool_], colours: NDArray[np.uint8], width: int
) -> None:
    """Draw a frame inside each of these cells."""
    cell = cells.shape[1]
    edge = np.ones((cell, cell), bool)
    edge[width : cell - width, width : cell - width] = False
    places = np.flatnonzero(which)
    rows, columns = np.nonzero(edge)
    cells[places[:, None], rows, columns] = colours[:, None]
