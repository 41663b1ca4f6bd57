"""What a network is trained on: digits on clutter, a folder of pictures by class, or shards.

A source has no state: batch number `step` is a function of the seed and of `step`, which is all
that a resumed run has to know, and each of its pictures one of the seed and its number, so that
any number of processes and threads share a batch out without changing it.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from asvit_deploy.data.augment import NO_AUGMENTATION, Augmentation
from asvit_deploy.data.batches import Batch, Share, Threads, normalise
from asvit_deploy.data.crops import Crops
from asvit_deploy.data.digits import CANVAS, CLASSES, ClutteredDigits
from asvit_deploy.data.folders import (
    Pictures,
    Splits,
    UnlabelledPictures,
    parted,
    why_unlabelled,
)
from asvit_deploy.data.images import preprocess
from asvit_deploy.data.labelled import LabelledPictures
from asvit_deploy.data.parts import (
    folders_to_evaluate,
    folders_to_train,
    is_sharded,
    shards_to_evaluate,
    shards_to_train,
)
from asvit_deploy.data.shard_order import ShardOrder
from asvit_deploy.data.shards import ShardPictures
from asvit_deploy.data.skips import Skips
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.status import Say, silent

DIGITS_EPOCH = 50_000  # placements; the stream itself has no end
_CROPS = 1  # the stream of draws; augmentation has others
# So many unreadable pictures in a row are no accident, and the search must end.
_STAND_INS = 64


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
        placed = self._train.batch(start + np.arange(count)[_slice(part)])
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


class _Shuffled:
    """The endless order of pictures that can be had in any order: a permutation an epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __call__(self, position: int) -> int:
        """The number of the picture that stands there."""
        epoch, place = divmod(position, self._count)
        known = self._order  # one read: another thread may be in another epoch
        if known[0] != epoch:
            known = (epoch, np.random.default_rng((self._seed, epoch)).permutation(self._count))
            self._order = known
        return int(known[1][place])


class PictureSource:
    """Training pictures in an endless order, and perhaps held-out ones.

    Training takes random resized crops (8-100 % of the area, sides up to 4:3) and mirrors every
    second one, then augments; validation takes the arch's own preprocessing. For a training
    picture that cannot be read, the next of the order that can stands in.

    Raises:
        UserError: training and held-out pictures have different classes.
    """

    def __init__(
        self, name: str, train: Pictures, held_out: Pictures | None, order: Callable[[int], int],
        config: ArchConfig, seed: int, augmentation: Augmentation, notes: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.name, self.classes, self.epoch = name, train.classes, len(train)
        self.classes_from = train.classes_from
        if held_out is not None and held_out.classes != train.classes:
            odd = sorted(set(held_out.classes) ^ set(train.classes))
            difference = (
                f"differ in class {odd[0]!r}" if odd else "have their classes in another order"
            )
            raise UserError(f"{name}: train and val {difference}; make them equal")
        self.identity = {
            "data": self.name,
            "classes": fingerprint(self.classes),
            "pictures": fingerprint(train.names),
        }
        parts = [train] if held_out is None else [train, held_out]
        self.held_out: int | None = 0 if held_out is None else len(held_out)
        self.passed_over = sum((part.passed_over for part in parts), Counter[str]())
        self.notes = [*notes, *(note for part in parts for note in part.notes)]
        self._train, self._order, self._threads = train, order, Threads()
        # The run itself counts them: those of training and of all processes too.
        self._held_out: LabelledPictures | None = None
        if held_out is not None:
            self._held_out = LabelledPictures(held_out, config, Skips(sys.maxsize))
        self._config, self._seed, self._augmentation = config, seed, augmentation

    def train_batch(self, step: int, size: int, part: range | None = None) -> Batch:
        share = Share.of(step, size, part, self._augmentation, self._config, self._seed)
        images, labels = share.room(), torch.empty(len(share.part), dtype=torch.int64)

        def put(position: int, rows: list[int]) -> list[str]:
            """Each of the picture's copies into its row; the names of pictures passed over."""
            crops, skipped = Crops(self._train.load, self._config.image_size), []
            for row in rows:
                draws = self._seed, _CROPS, share.number(row)
                picture, labels[row], passed = self._readable(position, partial(crops.one, draws))
                share.put(picture, images, row)
                skipped += passed
            return skipped

        skipped = self._threads.map(put, *zip(*share.copies.items()))
        targets = share.mixed(images, labels, len(self.classes))
        return Batch(images, targets, tuple(sorted(set().union(*skipped))))

    def _readable(
        self, position: int, load: Callable[[int], Image.Image]
    ) -> tuple[Image.Image, int, list[str]]:
        """What `load` makes of the picture there, or of the next that can be read; its label;
        those passed over."""
        skipped: list[str] = []
        first: UserError | None = None
        for place in range(position, position + _STAND_INS):
            number = self._order(place)
            try:
                return load(number), self._train.label(number), skipped
            except UserError as error:
                first = first or error
                skipped.append(self._train.name(number))
        assert first is not None
        raise UserError(f"{first} (so are the {_STAND_INS - 1} that come next)") from first

    def fitting(self, count: int, after: int, part: range | None = None) -> Batch:
        count = min(count, self.epoch)
        epoch, place = divmod(after, self.epoch)
        # Within one epoch, so that no picture counts twice.
        start = after if place + count <= self.epoch else (epoch + 1) * self.epoch

        def seen(position: int) -> tuple[np.ndarray, int, list[str]]:
            picture, label, skipped = self._readable(position, self._train.load)
            return preprocess(picture, self._config), label, skipped

        positions = range(start, start + count)[_slice(part)]
        images, labels, skipped = zip(*self._threads.map(seen, positions))
        unread = tuple(sorted(set().union(*skipped)))
        return Batch(torch.from_numpy(np.stack(images)), torch.tensor(labels), unread)

    def validation(
        self, size: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        if self._held_out is not None:
            yield from self._held_out.validation(size, limit, rank, world)


class FolderSource(PictureSource):
    """Pictures in one subfolder per class, in `train/` and perhaps `val/`, or in DIR itself.

    Raises:
        UserError: see `parts.folders_to_train` and `PictureSource`.
    """

    def __init__(
        self, folder: Path, config: ArchConfig, seed: int,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:  # fmt: skip
        parts = folders_to_train(folder)
        assert parts.train is not None
        super().__init__(
            str(folder), parts.train, parts.val, _Shuffled(len(parts.train), seed), config, seed,
            augmentation, parts.notes,
        )  # fmt: skip


class ShardSource(PictureSource):
    """Pictures in shards (`shards.py`), in `train/` and perhaps `val/`, or in DIR itself.

    Args:
        names: of the labels, in place of `classes.txt`.

    Raises:
        UserError: see `parts.shards_to_train` and `PictureSource`.
    """

    def __init__(
        self, folder: Path, config: ArchConfig, seed: int,
        augmentation: Augmentation = NO_AUGMENTATION, names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        parts = shards_to_train(folder, names)
        assert isinstance(parts.train, ShardPictures)
        order = ShardOrder(parts.train.counts, seed)
        super().__init__(
            str(folder), parts.train, parts.val, order, config, seed, augmentation, parts.notes
        )


def _slice(part: range | None) -> slice:
    return slice(None) if part is None else slice(part.start, part.stop)


def fingerprint(names: Iterable[str]) -> str:
    """How many names, and the start of the sha256 of them all in their order."""
    listed = list(names)
    # A file name may hold bytes that are no text; no name holds a zero.
    digest = hashlib.sha256("\0".join(listed).encode(errors="surrogateescape"))
    return f"{len(listed)} (sha256 {digest.hexdigest()[:12]})"


def _is_digits(data: str) -> bool:
    return data == "digits" and not Path(data).exists()


def open_source(
    data: str, config: ArchConfig, seed: int, augmentation: Augmentation = NO_AUGMENTATION,
    names: Sequence[str] | None = None,
) -> Source:  # fmt: skip
    """`digits`, a folder of class subfolders, or one of shards.

    Args:
        names: what the labels of shards mean, in place of their `classes.txt`.

    Raises:
        UserError: see `DigitsSource`, `FolderSource` and `ShardSource`.
    """
    if not data:
        raise UserError("--data is empty; pass a folder, or `digits`")
    if _is_digits(data):
        return DigitsSource(config, seed, augmentation)
    folder = Path(data)
    if is_sharded(folder):
        return ShardSource(folder, config, seed, augmentation, names)
    return FolderSource(folder, config, seed, augmentation)


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
