"""One training batch: what is in it, which part of it is wanted, and the threads that fill it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from asvit_deploy.data.augment import Augmentation, erased, mixed, randaugmented
from asvit_deploy.models.config import ArchConfig, Preprocessing

_T = TypeVar("_T")


class Batch(NamedTuple):
    """Pictures and what they show."""

    images: Tensor  # float32 [B, 3, H, W], normalised
    labels: Tensor  # int64 [B]; float32 [B, C], probabilities, where pictures were mixed
    skipped: tuple[str, ...] = ()  # unreadable pictures that others stood in for


def normalise(pixels: np.ndarray, rules: Preprocessing) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, (pixel / 255 - mean) / std."""
    return _standardised(torch.from_numpy(pixels).float() / 255, rules)


def _standardised(images: Tensor, rules: Preprocessing) -> Tensor:
    mean = torch.tensor(rules.mean).view(3, 1, 1)
    std = torch.tensor(rules.std).view(3, 1, 1)
    return (images - mean) / std


@dataclass(frozen=True)
class Share:
    """Part of one training batch: which pictures, and where they come from."""

    step: int
    size: int
    part: range
    augmentation: Augmentation

    @staticmethod
    def of(step: int, size: int, part: range | None, augmentation: Augmentation) -> Share:
        part = range(size) if part is None else part
        augmentation.check_part(size, part)
        return Share(step, size, part, augmentation)

    @property
    def numbers(self) -> list[int]:
        """Each picture's own number in the run, which seeds what happens to it."""
        return [self.step * self.size + number for number in self.part]

    @property
    def positions(self) -> list[int]:
        """Each picture's place in the endless order; copies of a picture share one."""
        return [self.augmentation.position(self.step, self.size, n) for n in self.part]

    def finished(
        self, pixels: np.ndarray, labels: Tensor, config: ArchConfig, classes: int, seed: int
    ) -> tuple[Tensor, Tensor]:
        """From uint8 pixels [B, 3, H, W] to a network's input, augmented."""
        rules, augmentation = config.preprocessing, self.augmentation
        images = torch.from_numpy(pixels).float() / 255
        if augmentation.randaugment:
            images = randaugmented(images, augmentation.randaugment, seed, self.numbers)
        images = _standardised(images, rules)
        if augmentation.erase:
            images = erased(images, augmentation.erase, seed, self.numbers)
        if augmentation.mixes:
            return mixed(images, labels, classes, augmentation, seed, self.step, self.part)
        return images, labels


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
