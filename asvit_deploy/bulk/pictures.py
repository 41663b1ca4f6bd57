"""The pictures of a bulk run, cut into parts."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from asvit_deploy.data.folders import Pictures, UnlabelledPictures
from asvit_deploy.data.parts import is_sharded
from asvit_deploy.data.shard_folders import shards_in
from asvit_deploy.data.shards import ShardPictures
from asvit_deploy.errors import UserError

_OF_A_FOLDER = 256  # pictures in a part: few enough that a stop costs little


@dataclass(frozen=True)
class Part:
    """Pictures that are done together.

    Attributes:
        number: among the parts, from 0.
        pictures: their numbers.
        identity: what makes them these pictures: where they lie, of which size and time.
    """

    number: int
    pictures: range
    identity: str


class CutPictures:
    """The pictures of a folder with its subfolders, of the shards that lie in a folder, or of one
    shard; labels are not looked at.

    Attributes:
        parts: what they are cut into.
        notes: lines on what lies there too and is not taken.
        passed_over: likewise, how many by ending or kind.

    Raises:
        UserError: there is no picture, or a shard is damaged.
    """

    def __init__(self, place: Path) -> None:
        shards = [place] if _is_shard(place) else shards_in(place)
        self._root = place.parent if _is_shard(place) else place
        self._pictures: Pictures
        if shards:
            self._pictures = ShardPictures(self._root, shards, labelled=False)
            self.parts = _cut(self._pictures.counts, self._pictures.identities)
        else:
            _require_folder(place)
            self._pictures = UnlabelledPictures(place)
            names = list(self._pictures.names)
            starts = range(0, len(names), _OF_A_FOLDER)
            own = [names[start : start + _OF_A_FOLDER] for start in starts]
            self.parts = _cut(tuple(map(len, own)), [_digest(place.resolve(), o) for o in own])
        self.notes, self.passed_over = self._pictures.notes, dict(self._pictures.passed_over)
        self.load = self._pictures.load

    def __len__(self) -> int:
        return len(self._pictures)

    def name(self, number: int) -> str:
        """A picture's path from the folder, or its shard and member."""
        return self._pictures.name(number).removeprefix(f"{self._root}{os.sep}")


def _is_shard(place: Path) -> bool:
    return place.suffix.lower() == ".tar" and not place.is_dir()


def _require_folder(place: Path) -> None:
    if not place.is_dir():
        what = "is neither a folder nor a shard (.tar)" if place.exists() else "does not exist"
        raise UserError(f"{place} {what}; name a folder of pictures or of shards with --data")
    if is_sharded(place):
        raise UserError(f"the shards of {place} lie in folders in it; name one of these")


def _cut(counts: tuple[int, ...], identities: list[str]) -> list[Part]:
    ends = pairwise([0, *accumulate(counts)])
    return [Part(i, range(*end), what) for i, (end, what) in enumerate(zip(ends, identities))]


def _digest(folder: Path, names: list[str]) -> str:
    files = [f"{folder}", *(f"{name}:{_state(folder / name)}" for name in names)]
    return hashlib.sha256("\0".join(files).encode(errors="surrogateescape")).hexdigest()


def _state(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:  # whoever reads it says more
        return str(error.strerror)
    return f"{status.st_size}:{status.st_mtime_ns}"
