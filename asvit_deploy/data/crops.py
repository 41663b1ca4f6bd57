"""Random resized crops of pictures that are decoded no larger, and no more often, than need be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps

from asvit_deploy.data.decode import REDUCED, Reduction

_BICUBIC = Image.Resampling.BICUBIC
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Crops:
    """Crops of some pictures, each decoded once for all its crops of one scale.

    What a crop shows follows from the picture and its draws alone, whatever was cut out before.

    Args:
        load: a picture by its number, see `decode.load_picture`.
        side: of the crops.
    """

    def __init__(self, load: Callable[[int, Reduction], Image.Image], side: int) -> None:
        self._load, self._side = load, side
        # Of a picture that was decoded before: its size, and whether it can be had smaller.
        self._known: dict[int, tuple[tuple[int, int], bool]] = {}
        self._decoded: dict[tuple[int, int], Image.Image] = {}

    def one(self, draws: tuple[int, ...], number: int) -> Image.Image:
        """A crop of 8-100 % of the area and sides between 3:4 and 4:3, every second one mirrored.

        A JPEG is decoded at a half, a quarter or an eighth of its size where the crop is no
        smaller than `side` even so.

        Args:
            draws: seeds them.

        Raises:
            UserError: see `load`.
        """
        box: Box | None = None
        times, mirrored = 1, False

        def draw(size: tuple[int, int], reducible: bool) -> int:
            nonlocal box, times, mirrored
            rng = np.random.default_rng(draws)
            box, mirrored = random_crop(size, rng), rng.random() < 0.5
            times = coarsest(box, self._side) if reducible else 1
            self._known[number] = size, reducible
            return times

        if number in self._known:
            draw(*self._known[number])
        picture = None if box is None else self._decoded.get((number, times))
        if picture is None:
            picture = self._load(number, lambda size: draw(size, True))
            if box is None:
                draw(picture.size, False)
            self._decoded[number, times] = picture
        assert box is not None
        left, top, right, bottom = (edge / times for edge in box)
        crop = picture.resize((self._side, self._side), _BICUBIC, (left, top, right, bottom))
        return ImageOps.mirror(crop) if mirrored else crop


def coarsest(box: Box, side: int) -> int:
    """How many times smaller a picture can be decoded whose crop is to fill `side` pixels."""
    least = min(box[2] - box[0], box[3] - box[1])
    return max(times for times in REDUCED if least >= times * side or times == 1)


def random_crop(
    size: tuple[int, int], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A box (left, top, right, bottom) of 8-100 % of the area and sides between 3:4 and 4:3."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if 1 <= w <= width and 1 <= h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h
    side = min(width, height)  # too elongated for any such box: the middle square
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
