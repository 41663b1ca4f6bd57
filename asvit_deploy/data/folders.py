"""Labelled pictures by number, and those of a folder of class folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from asvit_deploy.classes.order import in_order
from asvit_deploy.data.decode import SUFFIXES, Reduction, load_picture
from asvit_deploy.data.listing import (
    LOOSE,
    Listing,
    Passed,
    Seen,
    ending_of,
    kind_of,
    pictures_below,
    scanned,
    stays_out,
)
from asvit_deploy.errors import UserError


class Pictures(Protocol):
    """Labelled pictures by number, wherever they lie.

    `passed_over` counts what lies there too and is not taken, by ending or kind; `notes` says it
    in lines for stderr.
    """

    classes: list[str]
    classes_from: str  # what says what they are called
    passed_over: Counter[str]
    notes: list[str]

    def __len__(self) -> int: ...

    @property
    def names(self) -> Iterable[str]:
        """What makes them these pictures, relative to their folder."""
        ...

    def label(self, number: int) -> int: ...

    def load(self, number: int, reduction: Reduction | None = None) -> Image.Image:
        """As `load_picture`; raises UserError where it cannot be read."""
        ...

    def name(self, number: int) -> str:
        """How messages call a picture."""
        ...


class FolderPictures:
    """Pictures in one subfolder per class.

    Classes stand in the order of `classes.order.in_order`.

    Raises:
        UserError: no such folder, fewer than two classes, two that are one number or one folder, a
            class without pictures, or one whose pictures lie in folders of their own.
    """

    classes_from = "names of the class folders"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.classes, found, passed = _pictures_by_class(folder)
        self._names = [f"{c}/{name}" for c, own in zip(self.classes, found) for name in own.names]
        counts = [len(listing.names) for listing in found]
        self._labels: NDArray[np.int32] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.passed_over = Counter(passed.counts())
        self.notes = passed.lines(folder)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> Iterable[str]:
        return self._names

    def label(self, number: int) -> int:
        return int(self._labels[number])

    def load(self, number: int, reduction: Reduction | None = None) -> Image.Image:
        return load_picture(self._folder / self._names[number], reduction)

    def name(self, number: int) -> str:
        return str(self._folder / self._names[number])


class UnlabelledPictures:
    """The pictures of a folder with its subfolders, or one picture, without classes; see
    `Pictures`.

    Raises:
        UserError: there is none, or a folder may not be read.
    """

    classes_from = "none"

    def __init__(self, place: Path) -> None:
        self.classes: list[str] = []
        self._folder = place
        if place.is_dir():
            found = pictures_below(place)
        elif place.is_file():
            load_picture(place)  # refused now, not at its first use
            self._folder, found = place.parent, Listing([place.name], Passed())
        else:
            raise UserError(f"the data folder {place} does not exist; pass a folder, or `digits`")
        if not found.names:
            rest = found.passed.summary()
            raise UserError(f"{place} holds no picture{f', only {rest}' if rest else ''}; add some")
        self._names = found.names
        self.passed_over, self.notes = Counter(found.passed.counts()), found.passed.lines(place)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def names(self) -> Iterable[str]:
        return self._names

    def label(self, number: int) -> int:
        return -1

    def load(self, number: int, reduction: Reduction | None = None) -> Image.Image:
        return load_picture(self._folder / self._names[number], reduction)

    def name(self, number: int) -> str:
        return str(self._folder / self._names[number])


def why_unlabelled(folder: Path) -> str | None:
    """What keeps the subfolders of a folder from being classes, or None where they are."""
    if not folder.is_dir():
        return "it is one picture"
    names, passed = _top(folder)
    if loose := passed.kinds[LOOSE]:
        return f"{loose:,} picture{'s lie' if loose > 1 else ' lies'} in it directly"
    if len(names) < 2:
        return f"it holds {len(names) or 'no'} class folder{'s' * (len(names) != 1)}"
    for name in names:
        if not any(ending_of(entry.name) in SUFFIXES for entry in scanned(str(folder / name))):
            return f"its folder {name} holds no picture of its own"
    return None


def _pictures_by_class(folder: Path) -> tuple[list[str], list[Listing], Passed]:
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of class folders or of shards")
    if not folder.is_dir():
        raise UserError(f"the data folder {folder} does not exist; pass a folder, or `digits`")
    try:
        folders, passed = _top(folder)
        classes = in_order(folders, folder)
        if len(classes) < 2:
            rest = passed.summary()
            raise UserError(
                f"{folder} holds {len(classes)} class folder{'s' * (len(classes) != 1)}"
                f"{f' and {rest}' if rest else ''}; put the pictures of each class in a folder of "
                "its own, at least two"
            )
        seen = Seen()
        seen.enter(str(folder))
        for name in classes:  # before any is read, so that no link leads from one into another
            if (before := seen.enter(str(folder / name))) is not None:
                raise UserError(
                    f"the class folder {folder / name} and {before} are the same folder; remove "
                    "one of them"
                )
        found = []
        for name in classes:
            listing = pictures_below(folder / name, seen)
            if all("/" in path for path in listing.names):
                _refuse_class(folder / name, listing.passed)
            passed.update(listing.passed, f"{name}/")
            found.append(listing)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; check its permissions") from error
    return classes, found, passed


def _top(folder: Path) -> tuple[list[str], Passed]:
    """Names of the class folders, and an account of what lies beside them."""
    folders, passed = [], Passed()
    for entry in scanned(str(folder)):
        kind = stays_out(entry.name) or kind_of(entry)
        if kind == "folder":
            folders.append(entry.name)
        elif kind != "file":
            passed.add_kind(kind, entry.name)
        elif ending_of(entry.name) in SUFFIXES:
            passed.add_kind(LOOSE, entry.name)
        else:
            passed.add(entry.name)
    return folders, passed


def _refuse_class(folder: Path, passed: Passed) -> NoReturn:
    """A class folder without a picture of its own: empty, or a level too many."""
    inner = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if inner:
        raise UserError(
            f"the class folder {folder} holds only folders, such as {inner[0]}; put its pictures "
            "into it directly, or name the folder that holds the class folders"
        )
    rest = passed.summary()
    raise UserError(
        f"the class folder {folder} holds no picture{f', only {rest}' if rest else ''}; add some"
    )


# --- splits -------------------------------------------------------------------------------------

_SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}


class Splits:
    """The parts of a data folder by the names of its subfolders, in any case.

    `train`, `training`; `val`, `valid`, `validation`; `test`, `testing`, which is never used
    unless it is named itself. `valid` and the like may be classes too (valid and invalid parts):
    they are parts only where one that nobody would take for a class lies beside them, or where they
    hold folders or shards rather than pictures.

    Raises:
        UserError: two folders are one part, or the folder may not be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, Path] = {}
        entries = list(scanned(str(folder))) if os.path.isdir(folder) else []
        named = sorted(
            entry.name for entry in entries
            if entry.name.lower() in SPLIT_OF and kind_of(entry) == "folder"
        )  # fmt: skip
        sure = len({SPLIT_OF[name.lower()] for name in named} & {"train", "val"}) == 2
        for name in named:
            split = SPLIT_OF[name.lower()]
            if not (sure or name in ("train", "val") or parted(folder / name)):
                continue
            if split in self._found:
                raise UserError(
                    f"{folder} holds both {self._found[split].name}/ and {name}/, and either may "
                    f"be meant by {split}; keep one of them, or join them"
                )
            self._found[split] = folder / name
        parts = {path.name for path in self._found.values()}
        self._others = [e.name for e in entries if e.name not in parts and not stays_out(e.name)]

    @property
    def train(self) -> Path | None:
        return self._found.get("train")

    @property
    def val(self) -> Path | None:
        return self._found.get("val")

    @property
    def test(self) -> Path | None:
        return self._found.get("test")

    def same(self) -> list[str]:
        """A line where training and validation are one folder under two names."""
        if self.train and self.val and os.path.samefile(self.train, self.val):
            return [f"{self.val} is {self.train} itself: validation sees the training pictures"]
        return []

    def unused(self, *used: Path, read: Sequence[str] = ()) -> list[str]:
        """A line each for the parts that are not used, and for what lies beside the parts.

        Args:
            used: by default training and validation.
            read: names beside the parts that are read, or reported elsewhere.
        """
        places = used or (self.train, self.val)
        lines = [f"not used: {path}" for path in self._found.values() if path not in places]
        if beside := sorted(set(self._others) - set(read)):
            more = f", … {len(beside)} in all" if len(beside) > 3 else ""
            lines.append(f"not read in {self.folder}: {', '.join(beside[:3])}{more}")
        return lines


def parted(folder: Path) -> bool:
    """Whether a folder holds folders or shards, and no picture of its own."""
    holds = False
    for entry in scanned(str(folder)):
        if ending_of(entry.name) in SUFFIXES:
            return False
        holds |= entry.name.lower().endswith(".tar") or (
            not stays_out(entry.name) and kind_of(entry) == "folder"
        )
    return holds
