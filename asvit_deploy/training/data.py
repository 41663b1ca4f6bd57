"""What a network is trained on: digits on clutter, or a folder of pictures by class.

A source has no state: batch number `step` is a function of the seed and of `step`, which is all
that a resumed run has to know.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from asvit_deploy.errors import UserError
from asvit_deploy.images import load_picture, pictures_in, preprocess, thinned
from asvit_deploy.models.registry import ArchConfig, Preprocessing
from asvit_deploy.training.digits import CANVAS, CLASSES, ClutteredDigits

Batch = tuple[Tensor, Tensor]  # images float32 [B, 3, H, W], normalised; labels int64 [B]

DIGITS_EPOCH = 50_000  # placements; the stream itself has no end
_BICUBIC = Image.Resampling.BICUBIC


class Source(Protocol):
    """Training and validation batches of one data set."""

    name: str
    classes: list[str]
    epoch: int  # pictures in one
    identity: dict[str, str]  # what a resumed run must find again: the data, classes, pictures

    def train_batch(self, step: int, size: int) -> Batch:
        """Batch number `step` of the endless training stream."""
        ...

    def validation(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Held-out pictures, once, in a fixed order; nothing where there are none.

        Args:
            limit: take exactly so many, spread evenly, where there are more.
        """
        ...


def normalise(pixels: np.ndarray, rules: Preprocessing) -> Tensor:
    """uint8 [B, 3, H, W] -> float32, (pixel / 255 - mean) / std."""
    mean = torch.tensor(rules.mean).view(3, 1, 1)
    std = torch.tensor(rules.std).view(3, 1, 1)
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


class DigitsSource:
    """Placements of digits (`digits.py`); validation takes the digits held out."""

    def __init__(self, config: ArchConfig, seed: int) -> None:
        if config.image_size != CANVAS:
            raise UserError(
                f"digits are {CANVAS}x{CANVAS} pixels and {config.name} takes "
                f"{config.image_size}; use --arch as_deit_mini"
            )
        self.name, self.classes, self.epoch = "digits", list(CLASSES), DIGITS_EPOCH
        self.identity = {"data": self.name, "classes": _fingerprint(self.classes)}
        self._rules = config.preprocessing
        self._train, self._test = ClutteredDigits("train", seed), ClutteredDigits("test", seed)

    def _batch(self, stream: ClutteredDigits, start: int, stop: int) -> Batch:
        placements = stream.batch(np.arange(start, stop))
        return normalise(placements.images, self._rules), torch.from_numpy(placements.labels)

    def train_batch(self, step: int, size: int) -> Batch:
        return self._batch(self._train, step * size, (step + 1) * size)

    def validation(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        count = 2000 if limit is None else limit
        for start in range(0, count, size):
            yield self._batch(self._test, start, min(start + size, count))


class LabelledFolder:
    """Pictures in one subfolder per class, in the arch's own preprocessing.

    Raises:
        UserError: no such folder, fewer than two classes, or a class without pictures.
    """

    def __init__(self, folder: Path, config: ArchConfig) -> None:
        self.classes, self._entries = _pictures_by_class(folder)
        self._config = config
        self._workers = ThreadPoolExecutor(min(os.cpu_count() or 1, 8))

    def validation(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Every picture once, in order; of more than `limit`, exactly so many, spread evenly."""
        entries = thinned(self._entries, limit)
        for start in range(0, len(entries), size):
            part = entries[start : start + size]
            pictures = self._workers.map(
                lambda entry: preprocess(load_picture(entry[0]), self._config), part
            )
            yield torch.from_numpy(np.stack(list(pictures))), _labels(part)


class FolderSource:
    """Pictures in one subfolder per class, in `train/` and perhaps `val/`, or in DIR itself.

    Training takes random resized crops (8-100 % of the area, sides up to 4:3) and mirrors every
    second one; validation takes the arch's own preprocessing.

    Raises:
        UserError: no such folder, fewer than two classes, a class without pictures, or other
            classes in `val/` than in `train/`.
    """

    def __init__(self, folder: Path, config: ArchConfig, seed: int) -> None:
        train = folder / "train" if (folder / "train").is_dir() else folder
        self.classes, self._train = _pictures_by_class(train)
        self._val: LabelledFolder | None = None
        if train != folder and (folder / "val").is_dir():
            self._val = LabelledFolder(folder / "val", config)
            if self._val.classes != self.classes:
                odd = sorted(set(self._val.classes) ^ set(self.classes))[0]
                raise UserError(f"{folder}: train and val differ in class {odd!r}; make them equal")
        self.name, self.epoch = str(folder), len(self._train)
        names = (path.relative_to(train).as_posix() for path, _ in self._train)
        self.identity = {
            "data": self.name,
            "classes": _fingerprint(self.classes),
            "pictures": _fingerprint(names),
        }
        self._config, self._seed = config, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._workers = ThreadPoolExecutor(min(os.cpu_count() or 1, 8))

    def _pick(self, position: int) -> tuple[Path, int]:
        epoch, place = divmod(position, self.epoch)
        if self._order[0] != epoch:
            shuffled = np.random.default_rng((self._seed, epoch)).permutation(self.epoch)
            self._order = (epoch, shuffled)
        return self._train[self._order[1][place]]

    def train_batch(self, step: int, size: int) -> Batch:
        positions = range(step * size, (step + 1) * size)
        picked = [self._pick(position) for position in positions]
        jobs = [(path, (self._seed, 1, p)) for (path, _), p in zip(picked, positions)]
        images = np.stack(list(self._workers.map(self._augmented, jobs)))
        return normalise(images, self._config.preprocessing), _labels(picked)

    def _augmented(self, job: tuple[Path, tuple[int, int, int]]) -> np.ndarray:
        path, seed = job
        rng, side = np.random.default_rng(seed), self._config.image_size
        picture = load_picture(path)
        picture = picture.resize((side, side), _BICUBIC, box=random_crop(picture.size, rng))
        if rng.random() < 0.5:
            picture = ImageOps.mirror(picture)
        return np.asarray(picture).transpose(2, 0, 1)

    def validation(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        if self._val is not None:
            yield from self._val.validation(size, limit)


def _fingerprint(names: Iterable[str]) -> str:
    """How many names, and the start of the sha256 of them all in their order."""
    listed = list(names)
    # A file name may hold bytes that are no text; no name holds a zero.
    digest = hashlib.sha256("\0".join(listed).encode(errors="surrogateescape"))
    return f"{len(listed)} (sha256 {digest.hexdigest()[:12]})"


def _labels(entries: list[tuple[Path, int]]) -> Tensor:
    return torch.tensor([label for _, label in entries])


def _pictures_by_class(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
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
            if not paths:
                raise UserError(f"the class folder {folder / name} holds no picture; add some")
            entries += [(path, label) for path in paths]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; check its permissions") from error
    return classes, entries


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


def open_source(data: str, config: ArchConfig, seed: int) -> Source:
    """`digits`, or a folder of class subfolders.

    Raises:
        UserError: see `DigitsSource` and `FolderSource`.
    """
    if data == "digits" and not Path(data).exists():
        return DigitsSource(config, seed)
    return FolderSource(Path(data), config, seed)


def open_labelled(data: str, config: ArchConfig) -> DigitsSource | LabelledFolder:
    """`digits`, or the pictures of a folder of class subfolders, of its `val/` where it has one.

    Raises:
        UserError: see `DigitsSource` and `LabelledFolder`.
    """
    if data == "digits" and not Path(data).exists():
        return DigitsSource(config, 0)
    folder = Path(data)
    return LabelledFolder(folder / "val" if (folder / "val").is_dir() else folder, config)
