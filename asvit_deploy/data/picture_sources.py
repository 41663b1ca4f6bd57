"""Training and held-out pictures of folders and shards; see `sources.Source`."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from asvit_deploy.data.augment import NO_AUGMENTATION, Augmentation
from asvit_deploy.data.batches import Batch, Share, Threads, slice_of
from asvit_deploy.data.crops import Crops
from asvit_deploy.data.folders import Pictures
from asvit_deploy.data.images import preprocess
from asvit_deploy.data.labelled import LabelledPictures
from asvit_deploy.data.parts import folders_to_train, pictures_to_train, shards_to_train
from asvit_deploy.data.shard_order import ShardOrder
from asvit_deploy.data.shards import ShardPictures
from asvit_deploy.data.skips import Skips
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig

_CROPS = 1  # the stream of draws; augmentation has others
# So many unreadable pictures in a row are no accident, and the search must end.
_STAND_INS = 64


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
        # Pictures without labels are all of one class, which nobody asks for.
        targets = share.mixed(images, labels.clamp_min(0), max(1, len(self.classes)))
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

        positions = range(start, start + count)[slice_of(part)]
        images, labels, skipped = zip(*self._threads.map(seen, positions))
        unread = tuple(sorted(set().union(*skipped)))
        return Batch(torch.from_numpy(np.stack(images)), torch.tensor(labels), unread)

    def validation(
        self, size: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        if self._held_out is not None:
            yield from self._held_out.validation(size, limit, rank, world)


class FolderSource(PictureSource):
    """Pictures in one subfolder per class, or without labels in any, in `train/` and perhaps
    `val/`, or in DIR itself.

    Raises:
        UserError: see `parts.folders_to_train`, `parts.pictures_to_train` and `PictureSource`.
    """

    def __init__(
        self, folder: Path, config: ArchConfig, seed: int,
        augmentation: Augmentation = NO_AUGMENTATION, labelled: bool = True,
    ) -> None:  # fmt: skip
        parts = folders_to_train(folder) if labelled else pictures_to_train(folder)
        assert parts.train is not None
        super().__init__(
            str(folder), parts.train, parts.val, _Shuffled(len(parts.train), seed), config, seed,
            augmentation, parts.notes,
        )  # fmt: skip


class ShardSource(PictureSource):
    """Pictures in shards (`shards.py`), in `train/` and perhaps `val/`, or in DIR itself.

    Args:
        names: of the labels, in place of `classes.txt`.
        labelled: whether labels are asked for; without, there may be none.

    Raises:
        UserError: see `parts.shards_to_train` and `PictureSource`.
    """

    def __init__(
        self, folder: Path, config: ArchConfig, seed: int,
        augmentation: Augmentation = NO_AUGMENTATION, names: Sequence[str] | None = None,
        labelled: bool = True,
    ) -> None:  # fmt: skip
        parts = shards_to_train(folder, names, labelled)
        assert isinstance(parts.train, ShardPictures)
        order = ShardOrder(parts.train.counts, seed)
        super().__init__(
            str(folder), parts.train, parts.val, order, config, seed, augmentation, parts.notes
        )


def fingerprint(names: Iterable[str]) -> str:
    """How many names, and the start of the sha256 of them all in their order."""
    listed = list(names)
    # A file name may hold bytes that are no text; no name holds a zero.
    digest = hashlib.sha256("\0".join(listed).encode(errors="surrogateescape"))
    return f"{len(listed)} (sha256 {digest.hexdigest()[:12]})"
