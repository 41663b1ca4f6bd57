"""Shards in a folder: which files they are, which split each belongs to, and their classes."""

from __future__ import annotations

import re
from pathlib import Path

from asvit_deploy.classes.name_files import read_names
from asvit_deploy.data.folders import SPLIT_OF
from asvit_deploy.errors import UserError

_COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


def _listed(folder: Path, *endings: str) -> list[str]:
    """Names of files with these endings, in any case; none where there is no such folder."""
    try:
        if not folder.is_dir():
            return []
        names = [p.name for p in folder.iterdir() if p.name[0] != "."]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; check its permissions") from None
    return sorted(name for name in names if name.lower().endswith(endings))


def shards_in(folder: Path) -> list[Path]:
    """The tar files of a folder itself, by name; none where there is no such folder.

    Raises:
        UserError: the folder may not be read.
    """
    return [folder / name for name in _listed(folder, ".tar")]


def compressed_in(folder: Path) -> list[str]:
    """Names of the folder's compressed tar files, which are not read."""
    return _listed(folder, *_COMPRESSED)


def split_of(name: str) -> str | None:
    """`train`, `val` or `test` where a file's name says so with one word and no other."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name.rpartition(".")[0])
    found = {SPLIT_OF[word.lower()] for word in words if word.lower() in SPLIT_OF}
    return found.pop() if len(found) == 1 else None


def by_split(folder: Path) -> dict[str | None, list[Path]]:
    """The shards of a folder itself by the split that their names give; None where none does.

    Raises:
        UserError: some names say a split and others none; the folder may not be read.
    """
    found: dict[str | None, list[Path]] = {}
    for path in shards_in(folder):
        found.setdefault(split_of(path.name), []).append(path)
    if None in found and len(found) > 1:
        named = next(paths[0] for split, paths in found.items() if split)
        raise UserError(
            f"{folder} holds shards of a split, such as {named.name}, and others whose names do "
            f"not say of which, such as {found[None][0].name}; put them into train/ and val/"
        )
    return found


def names_file(folder: Path) -> Path | None:
    """The `classes.txt` of the shards in `folder`, or the one beside it, where there is one."""
    places = (folder / "classes.txt", folder.parent / "classes.txt")
    return next((path for path in places if path.exists()), None)


def class_names(folder: Path) -> list[str]:
    """The classes of the shards in `folder`, as its `classes.txt` has them.

    Raises:
        UserError: there is none, it cannot be read, or it does not hold at least two names, all
            different.
    """
    path = names_file(folder)
    if path is None:
        raise UserError(
            f"{folder} holds shards but no classes.txt; write one with a class name a line, in the "
            "order of the labels, or name it with --classes"
        )
    return read_names(path, least=2)
