"""Labelled pictures by number, and those of a folder of class folders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn, Protocol

from PIL import Image

from asvit_deploy.classes.order import in_order
from asvit_deploy.errors import UserError
from asvit_deploy.images import load_picture, pictures_in


class Pictures(Protocol):
    """Labelled pictures by number, wherever they lie."""

    classes: list[str]
    classes_from: str  # what says what they are called

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

    Classes stand in the order of `classes.order.in_order`.

    Raises:
        UserError: no such folder, fewer than two classes, two that are one number, a class without
            pictures, or one whose pictures lie in folders of their own.
    """

    classes_from = "names of the class folders"

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


def _pictures_by_class(folder: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    if folder.is_file():
        raise UserError(f"{folder} is a file; name the folder of class folders or of shards")
    if not folder.is_dir():
        raise UserError(f"the data folder {folder} does not exist; pass a folder, or `digits`")
    try:
        found = (p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
        classes = in_order(found, folder)
        if len(classes) < 2:
            raise UserError(
                f"{folder} holds {len(classes)} class folder{'s' * (len(classes) != 1)}; put the "
                "pictures of each class in a folder of its own, at least two"
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
