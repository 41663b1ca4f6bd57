"""One training batch: what is in it, which part of it is wanted, and the threads that fill it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

from asvit_deploy.data.augment import Augmentation, mixed
from asvit_deploy.models.config import ArchConfig, Preprocessing

_T = TypeVar("_T")


class Batch(NamedTuple):
    """Pictures and what they show."""

    images: Tensor  # float32 [B, 3, H, W], normalised
    labels: Tensor  # int64 [B]; float32 [B, C], probabilities, where pictures were mixed
    skipped: tuple[str, ...] = ()  # unreadable pictures that others stood in for


def normalise(pixels: np.ndarray, rules: Preprocessing) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, (pixel / 255 - mean) / std."""
    images = torch.from_numpy(pixels).float()
    _standardise(images, rules)
    return images


def slice_of(part: range | None) -> slice:
    """Where those of a part stand among all; None: all of them."""
    return slice(None) if part is None else slice(part.start, part.stop)


def _standardise(images: Tensor, rules: Preprocessing) -> None:
    """In place: passes over new memory take longer than the arithmetic."""
    mean = torch.tensor(rules.mean).view(3, 1, 1)
    std = torch.tensor(rules.std).view(3, 1, 1)
    images.div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class Share:
    """Part of one training batch: which pictures, where they come from, and what they become."""

    step: int
    size: int
    part: range
    augmentation: Augmentation
    config: ArchConfig
    seed: int

    @staticmethod
    def of(
        step: int, size: int, part: range | None, augmentation: Augmentation, config: ArchConfig,
        seed: int,
    ) -> Share:  # fmt: skip
        """All of the batch by default.

        Raises:
            UserError: see `Augmentation.check_part`.
        """
        part = range(size) if part is None else part
        augmentation.check_part(size, part)
        return Share(step, size, part, augmentation, config, seed)

    def number(self, row: int) -> int:
        """A picture's own number in the run, which seeds what happens to it."""
        return self.step * self.size + self.part[row]

    @property
    def copies(self) -> dict[int, list[int]]:
        """For each place in the endless order, the rows of this part that show its picture."""
        found: dict[int, list[int]] = {}
        for row, number in enumerate(self.part):
            position = self.augmentation.position(self.step, self.size, number)
            found.setdefault(position, []).append(row)
        return found

    def room(self) -> Tensor:
        """float32 [B, 3, H, W], for `put` to fill."""
        side = self.config.image_size
        return torch.empty(len(self.part), 3, side, side)

    def put(self, picture: Image.Image, images: Tensor, row: int) -> None:
        """Augment a picture, cut and mirrored, and normalise it into its row."""
        rules, number, image = self.config.preprocessing, self.number(row), images[row]
        red, green, blue = (min(255, round(255 * mean)) for mean in rules.mean)
        picture = self.augmentation.changed(picture, (red, green, blue), self.seed, number)
        image.copy_(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        _standardise(image, rules)
        self.augmentation.erase_from(image, self.seed, number)

    def mixed(self, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Labels of all the pictures, once these have been mixed where that is on."""
        if not self.augmentation.mixes:
            return labels
        return mixed(images, labels, classes, self.augmentation, self.seed, self.step, self.part)


class Threads:
    """Threads that decode, made at first use in each process: no fork or pickle carries them."""

    def __init__(self) -> None:
        self._made: tuple[int, ThreadPoolExecutor | None] = (-1, None)

    def map(self, work: Callable[..., _T], *arguments: Iterable[Any]) -> list[_T]:
        """All the results, in order."""
        process, pool = self._made
        if pool is None or process != os.getpid():
            # One of many worker processes has a core to itself at best.
            count = 1 if get_worker_info() else min(os.cpu_count() or 1, 8)
            pool = ThreadPoolExecutor(count)
            self._made = (os.getpid(), pool)
        return list(pool.map(work, *arguments))

    def __reduce__(self) -> tuple[type[Threads], tuple[()]]:
        return Threads, ()
