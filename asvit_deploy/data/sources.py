"""What a network is trained on: digits on clutter, a folder of pictures by class, or shards.

A source has no state: batch number `step` is a function of the seed and of `step`, which is all
that a resumed run has to know, and each of its pictures one of the seed and its number, so that
any number of processes and threads share a batch out without changing it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from asvit_deploy.data.augment import NO_AUGMENTATION, Augmentation
from asvit_deploy.data.batches import Batch, Share, normalise, slice_of
from asvit_deploy.data.digits import CANVAS, CLASSES, ClutteredDigits
from asvit_deploy.data.folders import Splits, UnlabelledPictures, parted, why_unlabelled
from asvit_deploy.data.labelled import LabelledPictures
from asvit_deploy.data.parts import (
    folders_to_evaluate,
    is_sharded,
    shards_to_evaluate,
    unused_labels,
)
from asvit_deploy.data.picture_sources import FolderSource, ShardSource, fingerprint
from asvit_deploy.data.skips import Skips
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.status import Say, silent

DIGITS_EPOCH = 50_000  # placements; the stream itself has no end


class Source(Protocol):
    """Training and validation batches of one data set."""

    name: str
    classes: list[str]
    classes_from: str  # what says what they are called
    epoch: int  # pictures in one
    identity: dict[str, str]  # what a resumed run must find again: the data, classes, pictures
    held_out: int | None  # pictures to validate on; None where they have no end
    passed_over: Counter[str]  # what lies there too, by ending or kind
    notes: list[str]  # lines for stderr: what was not taken, and why

    def train_batch(self, step: int, size: int, part: range | None = None) -> Batch:
        """Batch number `step` of the endless training stream.

        Args:
            size: of the batch, all processes together.
            part: numbers within the batch of the pictures wanted, a process's share; by default
                all. What a picture is does not depend on it.

        Raises:
            UserError: mixing is on and `part` separates a pair; none of the next pictures can be
                read.
        """
        ...

    def fitting(self, count: int, after: int, part: range | None = None) -> Batch:
        """At most `count` training pictures as evaluation would see them.

        Args:
            after: pictures trained on so far; those that come next are taken.
            part: numbers of those wanted; by default all.
        """
        ...

    def validation(
        self, size: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Held-out pictures, once, in a fixed order; nothing where there are none.

        Args:
            limit: take exactly so many, spread evenly, where there are more; of digits, whose
                placements have no end, the first so many (by default 2,000).
            rank, world: the share of one process of several: every `world`-th of those pictures.
        """
        ...


class DigitsSource:
    """Placements of digits (`digits.py`); validation takes the digits held out."""

    classes_from = "digits"

    def __init__(
        self, config: ArchConfig, seed: int, augmentation: Augmentation = NO_AUGMENTATION
    ) -> None:
        if config.image_size != CANVAS:
            raise UserError(
                f"digits are {CANVAS}x{CANVAS} pixels and {config.name} takes "
                f"{config.image_size}; use as_deit_mini at its own image size"
            )
        self.name, self.classes, self.epoch = "digits", list(CLASSES), DIGITS_EPOCH
        self.identity = {"data": self.name, "classes": fingerprint(self.classes)}
        self.held_out: int | None = None
        self.passed_over, self.notes = Counter[str](), list[str]()
        self._config, self._seed, self._augmentation = config, seed, augmentation
        self._train, self._test = ClutteredDigits("train", seed), ClutteredDigits("test", seed)

    def train_batch(self, step: int, size: int, part: range | None = None) -> Batch:
        share = Share.of(step, size, part, self._augmentation, self._config, self._seed)
        (positions, rows), images = zip(*share.copies.items()), share.room()
        placed = self._train.batch(np.array(positions))
        labels = torch.empty(len(share.part), dtype=torch.int64)
        for own, label, pixels in zip(rows, placed.labels, placed.images):
            labels[own] = int(label)
            for row in own:
                share.put(Image.fromarray(pixels.transpose(1, 2, 0)), images, row)
        return Batch(images, share.mixed(images, labels, len(self.classes)))

    def fitting(self, count: int, after: int, part: range | None = None) -> Batch:
        start = math.ceil(after / count) * count
        placed = self._train.batch(start + np.arange(count)[slice_of(part)])
        images = normalise(placed.images, self._config.preprocessing)
        return Batch(images, torch.from_numpy(placed.labels))

    def validation(
        self, size: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        own = np.arange(rank, 2000 if limit is None else limit, world)
        for start in range(0, len(own), size):
            placed = self._test.batch(own[start : start + size])
            images = normalise(placed.images, self._config.preprocessing)
            yield Batch(images, torch.from_numpy(placed.labels))


def _is_digits(data: str) -> bool:
    return data == "digits" and not Path(data).exists()


def open_source(
    data: str, config: ArchConfig, seed: int, augmentation: Augmentation = NO_AUGMENTATION,
    names: Sequence[str] | None = None, labelled: bool = True,
) -> Source:  # fmt: skip
    """`digits`, a folder of class subfolders, or one of shards.

    Args:
        names: what the labels of shards mean, in place of their `classes.txt`.
        labelled: whether the pictures' labels are asked for; else any pictures will do, and where
            there are labels a note says that they are not used.

    Raises:
        UserError: see `DigitsSource`, `FolderSource` and `ShardSource`.
    """
    if not data:
        raise UserError("--data is empty; pass a folder, or `digits`")
    folder = Path(data)
    if _is_digits(data):
        digits = DigitsSource(config, seed, augmentation)
        digits.notes += [] if labelled else [unused_labels(data)]
        return digits
    if is_sharded(folder):
        return ShardSource(folder, config, seed, augmentation, names, labelled)
    return FolderSource(folder, config, seed, augmentation, labelled)


def open_labelled(
    data: str, config: ArchConfig, skips: Skips | None = None, names: Sequence[str] | None = None
) -> DigitsSource | LabelledPictures:
    """`digits`, or the pictures of a folder of class subfolders or shards, of its validation part
    where it has one.

    Args:
        skips: see `LabelledPictures`.
        names: what the labels of shards mean where there is no `classes.txt`.

    Raises:
        UserError: see `DigitsSource`, `parts.folders_to_evaluate` and `parts.shards_to_evaluate`.
    """
    if not data:
        raise UserError("--data is empty; pass a folder, or `digits`")
    if _is_digits(data):
        return DigitsSource(config, 0)
    folder = Path(data)
    sharded = is_sharded(folder)
    parts = shards_to_evaluate(folder, names) if sharded else folders_to_evaluate(folder)
    assert parts.val is not None
    return LabelledPictures(parts.val, config, skips, parts.notes)


def open_pictures(
    data: str, config: ArchConfig, skips: Skips | None = None, say: Say = silent
) -> DigitsSource | LabelledPictures:
    """As `open_labelled` where the pictures have classes; else all those of the folder, or the one
    picture, with labels of -1 and no classes.

    Args:
        say: gets a line on why there are none.

    Raises:
        UserError: as `open_labelled`; there is no picture at all.
    """
    folder = Path(data)
    if not data or _is_digits(data) or not folder.exists() or is_sharded(folder):
        return open_labelled(data, config, skips)
    splits = Splits(folder)
    parts = [path for path in (splits.train, splits.test) if path and parted(path)]
    place = splits.val or folder
    why = why_unlabelled(place)
    if why is None or (parts and splits.val is None):
        return open_labelled(data, config, skips)
    say(f"{place}: no classes, for {why}; pictures are taken without labels")
    notes = [] if splits.val is None else splits.unused()
    return LabelledPictures(UnlabelledPictures(place), config, skips, notes)
