"""What a network is trained on: digits on clutter, a folder of pictures by class, or shards.

A source has no state: batch number `step` is a function of the seed and of `step`, which is all
that a resumed run has to know, and each of its pictures one of the seed and its number, so that
any number of processes and threads share a batch out without changing it.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import get_worker_info

from asvit_deploy.errors import UserError
from asvit_deploy.images import load_picture, pictures_in, preprocess, thinned
from asvit_deploy.models.registry import ArchConfig, Preprocessing
from asvit_deploy.training.augment import (
    NO_AUGMENTATION,
    Augmentation,
    erased,
    mixed,
    randaugmented,
)
from asvit_deploy.training.digits import CANVAS, CLASSES, ClutteredDigits
from asvit_deploy.training.shards import ShardOrder, ShardPictures, shards_in

_T = TypeVar("_T")


class Batch(NamedTuple):
    """Pictures and what they show."""

    images: Tensor  # float32 [B, 3, H, W], normalised
    labels: Tensor  # int64 [B]; float32 [B, C], probabilities, where pictures were mixed
    skipped: tuple[str, ...] = ()  # unreadable pictures that others stood in for


DIGITS_EPOCH = 50_000  # placements; the stream itself has no end
_BICUBIC = Image.Resampling.BICUBIC
_CROPS = 1  # the stream of draws; augmentation has others
# So many unreadable pictures on end are no accident, and nobody waits for the end of the search.
_STAND_INS = 64


class Source(Protocol):
    """Training and validation batches of one data set."""

    name: str
    classes: list[str]
    epoch: int  # pictures in one
    identity: dict[str, str]  # what a resumed run must find again: the data, classes, pictures

    def train_batch(self, step: int, size: int, part: range | None = None) -> Batch:
        """Batch number `step` of the endless training stream.

        Args:
            size: of the batch, all processes together.
            part: numbers within the batch of the pictures wanted, a process's share; by default
                all. What a picture is does not depend on it.

        Raises:
            UserError: mixing is on and `part` parts a pair; no picture far and wide can be read.
        """
        ...

    def fitting(self, count: int, after: int) -> Tensor:
        """At most `count` training pictures, float32 [P, 3, H, W], as evaluation would see them.

        Args:
            after: pictures trained on so far; those that come next are taken.
        """
        ...

    def validation(
        self, size: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Held-out pictures, once, in a fixed order; nothing where there are none.

        Args:
            limit: take exactly so many, spread evenly, where there are more.
            rank, world: the share of one process of several: every `world`-th of those pictures.
        """
        ...


def normalise(pixels: np.ndarray, rules: Preprocessing) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, (pixel / 255 - mean) / std."""
    return _standardised(torch.from_numpy(pixels).float() / 255, rules)


def _standardised(images: Tensor, rules: Preprocessing) -> Tensor:
    mean = torch.tensor(rules.mean).view(3, 1, 1)
    std = torch.tensor(rules.std).view(3, 1, 1)
    return (images - mean) / std


@dataclass(frozen=True)
class _Share:
    """Part of one training batch: which pictures, and where they come from."""

    step: int
    size: int
    part: range
    augmentation: Augmentation

    @staticmethod
    def of(step: int, size: int, part: range | None, augmentation: Augmentation) -> _Share:
        part = range(size) if part is None else part
        augmentation.check_part(size, part)
        return _Share(step, size, part, augmentation)

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


class _Threads:
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

    def __reduce__(self) -> tuple[type[_Threads], tuple[()]]:
        return _Threads, ()


# --- digits -------------------------------------------------------------------------------------


class DigitsSource:
    """Placements of digits (`digits.py`); validation takes the digits held out."""

    def __init__(
        self, config: ArchConfig, seed: int, augmentation: Augmentation = NO_AUGMENTATION
    ) -> None:
        augmentation.check_installed()
        if config.image_size != CANVAS:
            raise UserError(
                f"digits are {CANVAS}x{CANVAS} pixels and {config.name} takes "
                f"{config.image_size}; use as_deit_mini at its own image size"
            )
        self.name, self.classes, self.epoch = "digits", list(CLASSES), DIGITS_EPOCH
        self.identity = {"data": self.name, "classes": _fingerprint(self.classes)}
        self._config, self._seed, self._augmentation = config, seed, augmentation
        self._train, self._test = ClutteredDigits("train", seed), ClutteredDigits("test", seed)

    def train_batch(self, step: int, size: int, part: range | None = None) -> Batch:
        share = _Share.of(step, size, part, self._augmentation)
        placed = self._train.batch(np.array(share.positions))
        labels = torch.from_numpy(placed.labels)
        classes = len(self.classes)
        return Batch(*share.finished(placed.images, labels, self._config, classes, self._seed))

    def fitting(self, count: int, after: int) -> Tensor:
        start = math.ceil(after / count) * count
        placed = self._train.batch(np.arange(start, start + count))
        return normalise(placed.images, self._config.preprocessing)

    def validation(
        self, size: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        own = np.arange(rank, 2000 if limit is None else limit, world)
        for start in range(0, len(own), size):
            placed = self._test.batch(own[start : start + size])
            images = normalise(placed.images, self._config.preprocessing)
            yield Batch(images, torch.from_numpy(placed.labels))


# --- pictures -----------------------------------------------------------------------------------


class Pictures(Protocol):
    """Labelled pictures by number, wherever they lie."""

    classes: list[str]

    def __len__(self) -> int: ...

    @property
    def names(self) -> Iterable[str]:
        """What makes them these pictures, relative to their folder."""
        ...

    def label(self, number: int) -> int: ...

    def load(self, number: int) -> Image.Image:
        """Raises UserError where it cannot be read."""
        ...

    def name(self, number: int) -> str:
        """How messages call a picture."""
        ...


class FolderPictures:
    """Pictures in one subfolder per class.

    Raises:
        UserError: no such folder, fewer than two classes, a class without pictures, or one whose
            pictures lie in folders of their own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.classes, self._entries = _pictures_by_class(folder)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def names(self) -> Iterable[str]:
        return (path.relative_to(self._folder).as_posix() for path, _ in self._entries)

    def label(self, number: int) -> int:
        return self._entries[number][1]

    def load(self, number: int) -> Image.Image:
        path = self._entries[number][0]
        try:
            return load_picture(path)
        except OSError as error:  # such as a folder that was closed meanwhile
            raise UserError(
                f"cannot read {path}: {error.strerror}; check its permissions"
            ) from error

    def name(self, number: int) -> str:
        return str(self._entries[number][0])


class LabelledPictures:
    """Pictures in the arch's own preprocessing, for evaluation.

    Args:
        skip: leave unreadable pictures out and name them; by default one is refused.
    """

    def __init__(self, pictures: Pictures, config: ArchConfig, skip: bool = False) -> None:
        self.classes, self._skip = pictures.classes, skip
        self._pictures, self._config, self._threads = pictures, config, _Threads()

    def image(self, number: int) -> np.ndarray:
        """float32 [3, H, W]."""
        return preprocess(self._pictures.load(number), self._config)

    def _image_or_none(self, number: int) -> np.ndarray | None:
        try:
            return self.image(number)
        except UserError:
            if not self._skip:
                raise
            return None

    def validation(
        self, size: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        """Every picture once, in order; of more than `limit`, exactly so many, spread evenly; of
        those, every `world`-th."""
        own = thinned(range(len(self._pictures)), limit)[rank::world]
        for start in range(0, len(own), size):
            numbers = own[start : start + size]
            found = dict(zip(numbers, self._threads.map(self._image_or_none, numbers)))
            read = {number: image for number, image in found.items() if image is not None}
            skipped = tuple(self._pictures.name(n) for n in numbers if n not in read)
            side = self._config.image_size
            images = np.stack([*read.values()]) if read else np.empty((0, 3, side, side), "f4")
            labels = torch.tensor([self._pictures.label(n) for n in read], dtype=torch.int64)
            yield Batch(torch.from_numpy(images), labels, skipped)


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
        UserError: training and held-out pictures have different classes; kornia is needed and
            missing.
    """

    def __init__(
        self, name: str, train: Pictures, held_out: Pictures | None, order: Callable[[int], int],
        config: ArchConfig, seed: int, augmentation: Augmentation,
    ) -> None:  # fmt: skip
        augmentation.check_installed()
        self.name, self.classes, self.epoch = name, train.classes, len(train)
        if held_out is not None and held_out.classes != train.classes:
            odd = sorted(set(held_out.classes) ^ set(train.classes))
            told = f"differ in class {odd[0]!r}" if odd else "have their classes in another order"
            raise UserError(f"{name}: train and val {told}; make them equal")
        self.identity = {
            "data": self.name,
            "classes": _fingerprint(self.classes),
            "pictures": _fingerprint(train.names),
        }
        self._train, self._order, self._threads = train, order, _Threads()
        self._held_out = None if held_out is None else LabelledPictures(held_out, config, True)
        self._config, self._seed, self._augmentation = config, seed, augmentation

    def train_batch(self, step: int, size: int, part: range | None = None) -> Batch:
        share = _Share.of(step, size, part, self._augmentation)
        found = self._threads.map(self._cropped, share.positions, share.numbers)
        pixels, labels, skipped = zip(*found)
        images, targets = share.finished(
            np.stack(pixels), torch.tensor(labels), self._config, len(self.classes), self._seed
        )
        return Batch(images, targets, tuple(sorted(set().union(*skipped))))

    def _readable(self, position: int) -> tuple[Image.Image, int, list[str]]:
        """The picture there, or the next that can be read; its label; those passed over."""
        skipped: list[str] = []
        first: UserError | None = None
        for place in range(position, position + _STAND_INS):
            number = self._order(place)
            try:
                return self._train.load(number), self._train.label(number), skipped
            except UserError as error:
                first = first or error
                skipped.append(self._train.name(number))
        assert first is not None
        raise UserError(f"{first} (so are the {_STAND_INS - 1} that come next)") from first

    def _cropped(self, position: int, number: int) -> tuple[np.ndarray, int, list[str]]:
        """uint8 [3, H, W], cut and mirrored as the picture's own number says."""
        picture, label, skipped = self._readable(position)
        rng = np.random.default_rng((self._seed, _CROPS, number))
        side = self._config.image_size
        picture = picture.resize((side, side), _BICUBIC, box=random_crop(picture.size, rng))
        if rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        return np.asarray(picture).transpose(2, 0, 1), label, skipped

    def fitting(self, count: int, after: int) -> Tensor:
        count = min(count, self.epoch)
        epoch, place = divmod(after, self.epoch)
        # Within one epoch, so that no picture counts twice.
        start = after if place + count <= self.epoch else (epoch + 1) * self.epoch

        def image(position: int) -> np.ndarray:
            return preprocess(self._readable(position)[0], self._config)

        return torch.from_numpy(np.stack(self._threads.map(image, range(start, start + count))))

    def validation(
        self, size: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        if self._held_out is not None:
            yield from self._held_out.validation(size, limit, rank, world)


class FolderSource(PictureSource):
    """Pictures in one subfolder per class, in `train/` and perhaps `val/`, or in DIR itself.

    Raises:
        UserError: see `FolderPictures` and `PictureSource`.
    """

    def __init__(
        self, folder: Path, config: ArchConfig, seed: int,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:  # fmt: skip
        # Not Path.is_dir: it raises where a folder may not be searched, which is told later.
        parted = os.path.isdir(folder / "train")
        train = FolderPictures(folder / "train" if parted else folder)
        held_out = parted and os.path.isdir(folder / "val")
        super().__init__(
            str(folder), train, FolderPictures(folder / "val") if held_out else None,
            _Shuffled(len(train), seed), config, seed, augmentation,
        )  # fmt: skip


class ShardSource(PictureSource):
    """Pictures in shards (`shards.py`), in `train/` and perhaps `val/`, or in DIR itself.

    Raises:
        UserError: see `ShardPictures` and `PictureSource`; only `val/` holds shards.
    """

    def __init__(
        self, folder: Path, config: ArchConfig, seed: int,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:  # fmt: skip
        place = folder / "train" if shards_in(folder / "train") else folder
        if not shards_in(place):
            raise UserError(f"{folder} holds no shards to train on; put some into train/")
        train = ShardPictures(place)
        held_out = ShardPictures(folder / "val") if shards_in(folder / "val") else None
        order = ShardOrder(train.counts, seed)
        super().__init__(str(folder), train, held_out, order, config, seed, augmentation)


def _fingerprint(names: Iterable[str]) -> str:
    """How many names, and the start of the sha256 of them all in their order."""
    listed = list(names)
    # A file name may hold bytes that are no text; no name holds a zero.
    digest = hashlib.sha256("\0".join(listed).encode(errors="surrogateescape"))
    return f"{len(listed)} (sha256 {digest.hexdigest()[:12]})"


def _pictures_by_class(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of class folders or of shards")
    if not folder.is_dir():
        raise UserError(f"the data folder {folder} does not exist; pass a folder, or `digits`")
    try:
        classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
        if len(classes) < 2:
            raise UserError(
                f"{folder} holds {len(classes)} class folders; put the pictures of each class in a "
                "folder of its own, at least two"
            )
        entries = []
        for label, name in enumerate(classes):
            paths = pictures_in(folder / name)
            if not any(path.parent == folder / name for path in paths):
                _refuse_class(folder / name)
            entries += [(path, label) for path in paths]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; check its permissions") from error
    return classes, entries


def _refuse_class(folder: Path) -> NoReturn:
    """A class folder without a picture of its own: empty, or a level too many."""
    inner = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if inner:
        raise UserError(
            f"the class folder {folder} holds only folders, such as {inner[0]}; put its pictures "
            "into it directly, or name the folder that holds the class folders"
        )
    raise UserError(f"the class folder {folder} holds no picture; add some")


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


def _is_digits(data: str) -> bool:
    return data == "digits" and not Path(data).exists()


def _sharded(folder: Path) -> bool:
    return any(shards_in(place) for place in (folder, folder / "train", folder / "val"))


def open_source(
    data: str, config: ArchConfig, seed: int, augmentation: Augmentation = NO_AUGMENTATION
) -> Source:
    """`digits`, a folder of class subfolders, or one of shards.

    Raises:
        UserError: see `DigitsSource`, `FolderSource` and `ShardSource`.
    """
    if _is_digits(data):
        return DigitsSource(config, seed, augmentation)
    folder = Path(data)
    kind = ShardSource if _sharded(folder) else FolderSource
    return kind(folder, config, seed, augmentation)


def open_labelled(data: str, config: ArchConfig) -> DigitsSource | LabelledPictures:
    """`digits`, or the pictures of a folder of class subfolders or shards, of its `val/` where it
    has one.

    Raises:
        UserError: see `DigitsSource`, `FolderPictures` and `ShardPictures`; there are shards, but
            for training alone.
    """
    if _is_digits(data):
        return DigitsSource(config, 0)
    folder = Path(data)
    if not _sharded(folder):
        place = folder / "val" if os.path.isdir(folder / "val") else folder
        return LabelledPictures(FolderPictures(place), config)
    for place in (folder / "val", folder):
        if shards_in(place):
            return LabelledPictures(ShardPictures(place), config)
    raise UserError(
        f"{folder} has shards in train/ alone; name {folder / 'train'} to evaluate on those"
    )
