"""Which pictures of a data folder are for training, which are held out, and what is neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asvit_deploy.data.folders import (
    FolderPictures,
    Pictures,
    Splits,
    UnlabelledPictures,
    parted,
    why_unlabelled,
)
from asvit_deploy.data.listing import pictures_below
from asvit_deploy.data.shard_folders import (
    by_split,
    compressed_in,
    names_file,
    shards_in,
    split_of,
)
from asvit_deploy.data.shards import ShardPictures
from asvit_deploy.errors import UserError

NO_VALIDATION = "no validation pictures"


@dataclass
class Parts:
    """Training and held-out pictures where there are any, and lines for stderr."""

    train: Pictures | None = None
    val: Pictures | None = None
    notes: list[str] = field(default_factory=list)


def is_sharded(folder: Path) -> bool:
    """Whether a folder, or one of its parts, holds shards.

    Raises:
        UserError: it holds compressed ones and nothing else, or may not be read.
    """
    splits = Splits(folder)
    places = [place for place in (folder, splits.train, splits.val) if place]
    if any(shards_in(place) for place in places):
        return True
    for place in places:
        compressed = compressed_in(place)
        if compressed and not any(path.is_dir() for path in place.iterdir()):
            raise UserError(
                f"{place} holds compressed shards, such as {compressed[0]}, in which no picture "
                "can be found by number; unpack them to .tar files"
            )
    return False


# --- folders of class folders -------------------------------------------------------------------


def folders_to_train(folder: Path) -> Parts:
    """Raises UserError where there is nothing to train on; see `FolderPictures`."""
    splits = Splits(folder)
    if splits.train is None:
        if splits.val is not None and parted(splits.val):
            raise UserError(
                f"{folder} has {splits.val.name}/ and nothing to train on; put the class folders "
                "of the training pictures into train/"
            )
        return Parts(FolderPictures(folder), None, [f"{NO_VALIDATION}: {folder} has no val/"])
    return _with_val(Parts(FolderPictures(splits.train)), splits, FolderPictures)


def _with_val(parts: Parts, splits: Splits, opened: Callable[[Path], Pictures]) -> Parts:
    """The parts with the pictures of val/ beside the training ones, or a note without any."""
    if splits.val is None:
        parts.notes.append(f"{NO_VALIDATION}: there is no val/ beside {splits.train}")
    else:
        parts.val = opened(splits.val)
    parts.notes += splits.unused() + splits.same()
    return parts


def folders_to_evaluate(folder: Path) -> Parts:
    """Raises UserError where there are only training and test pictures; see `FolderPictures`."""
    splits = Splits(folder)
    if splits.val is not None:
        return Parts(None, FolderPictures(splits.val), splits.unused())
    there = [path for path in (splits.train, splits.test) if path and parted(path)]
    if there:
        raise UserError(
            f"{folder} has no validation pictures in val/; name {' or '.join(map(str, there))} to "
            "evaluate on those"
        )
    return Parts(None, FolderPictures(folder))


# --- folders of pictures, whatever their folders are called -------------------------------------


def pictures_to_train(folder: Path) -> Parts:
    """Raises UserError where there is nothing to train on; see `UnlabelledPictures`."""
    splits = Splits(folder)
    if splits.train is None and splits.val is not None and parted(splits.val):
        raise UserError(
            f"{folder} has {splits.val.name}/ and nothing to train on; put the training pictures "
            "into train/"
        )
    place = splits.train or folder
    parts = Parts(UnlabelledPictures(place))
    if place.is_dir() and why_unlabelled(place) is None:
        parts.notes.append(unused_labels(str(place)))
    if splits.train is None:
        parts.notes.append(f"{NO_VALIDATION}: {folder} has no train/ and val/")
        return parts
    return _with_val(parts, splits, UnlabelledPictures)


def unlabelled(data: str) -> bool:
    """Whether it is a folder of pictures whose training part is no class folders."""
    folder = Path(data)
    if not folder.is_dir() or is_sharded(folder):
        return False
    place = Splits(folder).train or folder
    return why_unlabelled(place) is not None and bool(pictures_below(place).names)


def unused_labels(data: str) -> str:
    """The line on labels that nobody asked for."""
    return f"{data} has labels, which are not used"


# --- folders of shards --------------------------------------------------------------------------


class _ShardFolder:
    """The shards of a folder by split: those of its parts' folders, and its own by their names.

    Args:
        names: what their labels mean, in place of `classes.txt`.
        own_first: a `classes.txt` that is there counts more than `names`.
        labelled: see `ShardPictures`.
    """

    def __init__(
        self, folder: Path, names: Sequence[str] | None, own_first: bool, labelled: bool = True
    ) -> None:
        self.names, self.own_first, self.labelled = names, own_first, labelled
        self.splits = Splits(folder)
        self.folder = folder
        self.found: dict[str, tuple[Path, list[Path]]] = {}
        self.notes: list[str] = []
        self.single: str | None = None  # its own shards are all of that split, and the only ones
        for split, place in (("train", self.splits.train), ("val", self.splits.val)):
            if place and (paths := shards_in(place)):
                self._take(split, place, paths)
        own = by_split(folder)
        if len(own) == 1 and not self.found:
            self.single = next(iter(own))
        for name, paths in own.items():
            split = name or "train"
            if split in self.found:
                self._leave(paths, f"beside {self.found[split][0]}")
            elif split == "test" and not self.single:
                self._leave(paths, "whose names say that they are for testing")
            else:
                self._take(split, folder, paths)
        self.notes += self._beside()

    def _take(self, split: str, place: Path, paths: list[Path]) -> None:
        self.found[split] = place, paths
        odd = [p.name for p in paths if place != self.folder and split_of(p.name) != split]
        if odd := [name for name in odd if split_of(name)]:
            self.notes.append(
                f"{place} holds shards that are named after another part, such as {odd[0]}; they "
                f"are taken for {split} all the same"
            )

    def _leave(self, paths: list[Path], why: str) -> None:
        many = f", … {len(paths)} in all" if len(paths) > 1 else ""
        self.notes.append(f"not used: shards of {self.folder} {why} ({paths[0].name}{many})")

    def _beside(self) -> list[str]:
        """A line each for what lies beside the shards and is no shard."""
        places = {place for place, _ in self.found.values()}
        lines = []
        for place in {self.folder, *places}:
            if compressed := compressed_in(place):
                lines.append(f"not read: compressed shards in {place}, such as {compressed[0]} "
                             f"({len(compressed)} in all); unpack them to .tar files")  # fmt: skip
        read = [path.name for path in shards_in(self.folder)] + compressed_in(self.folder)
        lines += self.splits.unused(*places, read=(*read, "classes.txt"))
        for place in places - {self.folder}:
            inner = sorted(p.name for p in place.iterdir() if p.is_dir() and p.name[0] != ".")
            if inner:
                lines.append(f"not read: {len(inner)} folders beside the shards of {place}, such "
                             f"as {inner[0]}")  # fmt: skip
        return sorted(lines)

    def pictures(self, split: str) -> ShardPictures | None:
        if split not in self.found:
            return None
        place, paths = self.found[split]
        own = self.own_first and names_file(place) is not None
        return ShardPictures(place, paths, None if own else self.names, self.labelled)


def shards_to_train(
    folder: Path, names: Sequence[str] | None = None, labelled: bool = True
) -> Parts:
    """`names` stand in place of `classes.txt`; without `labelled`, a line says where labels are.

    Raises:
        UserError: there is nothing to train on; see `ShardPictures`.
    """
    found = _ShardFolder(folder, names, own_first=False, labelled=labelled)
    if found.single in ("val", "test"):
        note = f"the shards of {folder} are trained on, and their names say {found.single}"
        parts = Parts(found.pictures(found.single), None, [note, *found.notes, NO_VALIDATION])
    elif "train" not in found.found:
        raise UserError(f"{folder} holds no shards to train on; put some into train/")
    else:
        parts = Parts(found.pictures("train"), found.pictures("val"), found.notes)
        if parts.val is None:
            parts.notes.append(
                f"{NO_VALIDATION}: {folder} has no shards in val/, and none named so"
            )
    if not labelled and parts.train is not None and parts.train.passed_over[".cls"]:
        parts.notes.append(unused_labels(str(folder)))
    return parts


def shards_to_evaluate(folder: Path, names: Sequence[str] | None = None) -> Parts:
    """`names` are those of the labels where there is no `classes.txt`.

    Raises:
        UserError: there are only shards to train on; see `ShardPictures`.
    """
    found = _ShardFolder(folder, names, own_first=True)
    if found.single in ("train", "test"):
        note = f"the shards of {folder} are evaluated on, and their names say {found.single}"
        return Parts(None, found.pictures(found.single), [note, *found.notes])
    if "val" in found.found:
        return Parts(None, found.pictures("val"), found.notes)
    place, _ = found.found["train"]
    if place != folder:
        raise UserError(f"{folder} has shards in train/ alone; name {place} to evaluate on those")
    return Parts(None, found.pictures("train"), found.notes)
