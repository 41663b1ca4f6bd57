"""Labelled pictures as a network takes them, once each, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from asvit_deploy.data.batches import Batch, Threads
from asvit_deploy.data.decode import PictureError
from asvit_deploy.data.folders import Pictures
from asvit_deploy.data.images import preprocess, thinned
from asvit_deploy.data.skips import Skips
from asvit_deploy.models.config import ArchConfig


class LabelledPictures:
    """Pictures in the arch's own preprocessing, for evaluation.

    Args:
        skips: passes unreadable pictures over as far as it allows; by default one is refused.
    """

    def __init__(
        self, pictures: Pictures, config: ArchConfig, skips: Skips | None = None,
        notes: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.classes, self.skips = pictures.classes, Skips() if skips is None else skips
        self.classes_from = pictures.classes_from
        self.held_out: int | None = len(pictures)
        self.passed_over, self.notes = pictures.passed_over, [*notes, *pictures.notes]
        self._pictures, self._config, self._threads = pictures, config, Threads()

    def image(self, number: int) -> np.ndarray:
        """float32 [3, H, W]."""
        return preprocess(self._pictures.load(number), self._config)

    def _image_or_error(self, number: int) -> np.ndarray | PictureError:
        try:
            return self.image(number)
        except PictureError as error:
            return error

    def validation(
        self, size: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Every picture once, in order; of more than `limit`, exactly so many, spread evenly; of
        those, every `world`-th.

        Raises:
            UserError: more cannot be read than `skips` allows.
        """
        own = thinned(range(len(self._pictures)), limit)[rank::world]
        for start in range(0, len(own), size):
            numbers = own[start : start + size]
            read, skipped = {}, []
            for number, image in zip(numbers, self._threads.map(self._image_or_error, numbers)):
                if isinstance(image, PictureError):
                    skipped.append(self._pictures.name(number))
                    self.skips.add(skipped[-1], image)
                else:
                    read[number] = image
            side = self._config.image_size
            images = np.stack([*read.values()]) if read else np.empty((0, 3, side, side), "f4")
            labels = torch.tensor([self._pictures.label(n) for n in read], dtype=torch.int64)
            yield Batch(torch.from_numpy(images), labels, tuple(skipped))
