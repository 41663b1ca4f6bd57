"""Labelled pictures in WebDataset shards: tar files, read by number without unpacking them.

    DIR/train/*.tar  DIR/val/*.tar   (or DIR/*.tar, distinguished by name, or to train on)
    DIR/classes.txt                  a class name a line, in the order of the labels
    a member KEY.jpg (or whatever Pillow reads) and a member KEY.cls, its label in decimal, side by
    side; other members are counted and passed over

Tar files that were joined with `cat` are read to the end, which tar itself does only when asked to
(`--ignore-zeros`); what stands behind an archive's end and is none is passed over with a line.

A run is resumed, and its batches are shared out, by the numbers of its pictures, so what reads a
shard must give picture i without having read those before it. webdataset itself streams: where a
reader stands, and what its shuffle buffer holds, is state; its indexed reader (wids) is not in
webdataset 1.0 any more. Hugging Face `datasets` either streams likewise or copies everything into
Arrow files first. But a tar file is its own store: this module notes once where each picture lies
(18 bytes a picture, in the user's cache), and from then on one `pread` fetches it. Behind those
records stand, as JSON, what else the shard holds and the names that are not in their headers.

Shards may be of any size, and lie on any mounted file system; none is ever held in memory or
unpacked. Only headers, pictures and labels are read; nothing in a shard is run or unpickled.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import random
import shutil
import stat
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from asvit_deploy import trusted
from asvit_deploy.bounded import open_regular, parse_json
from asvit_deploy.data.decode import SUFFIXES, Reduction, decode_picture
from asvit_deploy.data.limits import MAX_FILE
from asvit_deploy.data.listing import BEHIND, HIDDEN, Passed, ending_of
from asvit_deploy.data.shard_folders import class_names, shards_in
from asvit_deploy.data.tar_members import Member, Members
from asvit_deploy.disk import require_temporary_folder
from asvit_deploy.errors import UserError, shortened
from asvit_deploy.files import atomic, cache_dir, make_cache_dir
from asvit_deploy.sealed import SEAL, check_seal, seal
from asvit_deploy.text import one_line

# Where a sample has one of these, other pictures of it (a mask, a depth map) are not meant.
_USUAL = frozenset((".jpeg", ".jpg", ".png", ".webp"))
_FORMAT = 5  # of the index; part of its name
_ENTRY = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<u2")])
_MAX_LABEL = 2**16 - 1  # ImageNet-21k has 21,841 classes
GIVEN = "the list of class names"  # in place of `classes.txt`
_BLOCK = 512  # bytes: tar's unit


# --- the index ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A tar file and where its index is; both are looked at only when a picture is asked for."""

    path: Path
    index: Path
    size: int  # bytes of the tar file, and its time of change, when it was indexed
    changed: int

    @staticmethod
    def at(path: Path, cache: Path, labelled: bool = True) -> Shard:
        """Raises UserError where there is no such file."""
        try:
            status = path.stat()
        except OSError as error:
            raise UserError(f"cannot read the shard {path}: {error.strerror}") from None
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise UserError(f"cannot read the shard {path}: it is a device, a pipe or a socket")
        endings = ",".join(sorted(SUFFIXES))  # another Pillow may read others
        key = f"{_FORMAT}\0{endings}\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
        key += "" if labelled else "\0without labels"
        name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]
        return Shard(path, cache / f"{name}.npy", status.st_size, status.st_mtime_ns)

    def entries(self) -> NDArray:
        """A record (offset, size, label) for each picture, mapped from the index."""
        return _mapped(self.index, self.size)

    def passed(self) -> Passed:
        """What the shard holds beside pictures and labels.

        Raises:
            UserError: as `entries`.
        """
        endings, kinds, _ = _noted(self.index, self.size)
        return Passed(Counter(endings), Counter(kinds))

    def member(self, offset: int, header: bytes) -> str:
        """The whole name of the member whose data lies there, behind that header.

        Raises:
            UserError: as `entries`.
        """
        if (name := _noted(self.index, self.size)[2].get(str(offset))) is not None:
            return name
        try:
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (tarfile.TarError, ValueError):  # what its index says stands there does not
            return "a member without a header"

    def bytes_at(self, offset: int, count: int) -> bytes:
        """Part of the tar file.

        Raises:
            UserError: it cannot be read, or is another file than the one indexed.
        """
        try:
            # Opened each time: no handle to share among threads, or to carry through a fork.
            with open_regular(self.path, "shard") as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != (self.size, self.changed):
                    raise UserError(f"the shard {self.path} was changed meanwhile; start again")
                parts = list(_pread(file, offset, count))
        except OSError as error:
            raise UserError(f"cannot read the shard {self.path}: {error.strerror}") from None
        return b"".join(parts)


def _is_count(found: object) -> bool:
    """Whether it says how many there are of what, as `Passed` does."""
    return isinstance(found, dict) and all(
        type(count) is int and 0 <= count < 2**53 for count in found.values()
    )


@functools.lru_cache(maxsize=64)
def _noted(index: Path, size: int) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """What else a shard of so many bytes holds, by ending and by kind; names by place of data."""
    entries = _mapped(index, size)
    try:
        with open_regular(index, "shard's index") as file:
            file.seek(entries.offset + entries.nbytes)  # type: ignore[attr-defined]
            endings, kinds, names = parse_json(file.read()[:-SEAL])
    except (ValueError, TypeError, OSError):
        raise _damaged(index) from None
    texts = isinstance(names, dict) and all(type(name) is str for name in names.values())
    if not (texts and _is_count(endings) and _is_count(kinds)):
        raise _damaged(index)
    return endings, kinds, names


def _within(entries: NDArray, size: int) -> bool:
    """Whether all pictures lie in the shard, each behind a header."""
    offset, length = entries["offset"], entries["size"]
    inside = (offset >= _BLOCK) & (offset <= size) & (length >= 0) & (length <= size)
    return bool(np.all(inside & (offset <= size - np.where(inside, length, 0))))


def _damaged(index: Path) -> UserError:
    return UserError(f"the index {index} is gone or damaged; delete it, start again")


def _pread(file: BinaryIO, offset: int, count: int) -> Iterator[bytes]:
    """A system may give less than was asked for."""
    while count and (part := os.pread(file.fileno(), count, offset)):
        yield part
        offset, count = offset + len(part), count - len(part)


@functools.lru_cache(maxsize=64)
def _mapped(index: Path, size: int) -> NDArray:
    """The records of a shard of so many bytes."""
    try:
        with trusted.opened(index):  # where others could write, one may have been planted
            pass
        check_seal(index)
        found = np.load(index, mmap_mode="r", allow_pickle=False)
        # A digest shows damage, not what somebody else wrote and signed.
        if found.ndim != 1 or found.dtype != _ENTRY or not _within(found, size):
            raise ValueError("no records of this shard")
        return found
    except UserError:
        raise
    except Exception as error:  # numpy reads the header with Python's own parser
        raise _damaged(index) from error


@functools.cache
def _temporary_cache(why: str) -> Path:
    """A folder that goes with this process."""
    folder, owner = tempfile.mkdtemp("", "asvit-shards-", require_temporary_folder()), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not where a forked worker ends
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    print(one_line(f"the shards' index is kept for this run only: {why}"), file=sys.stderr)
    return Path(folder)


def indexed(paths: Sequence[Path], labelled: bool = True) -> list[Shard]:
    """These tar files with their indices made, in the order given; a bar on stderr meanwhile.

    Where the user's cache cannot be written, the indices are made for this run alone.

    Args:
        labelled: a picture has its label beside it; otherwise labels are members as others are.

    Raises:
        UserError: a shard is damaged, or its members are not what this module's heading says.
    """
    # By host: nodes that share a home folder must not take one another's temporary files for dead.
    name = f"shards/{platform.node() or 'host'}"
    with contextlib.suppress(UserError):  # a cache that may only be read may hold them all
        cache = cache_dir() / name
        trusted.require_folder(cache)
        shards = [Shard.at(path, cache, labelled) for path in paths]
        if all(shard.index.is_file() for shard in shards):
            return shards
    try:
        cache = make_cache_dir(name)
    except UserError as error:
        cache = _temporary_cache(str(error))
    shards = [Shard.at(path, cache, labelled) for path in paths]
    missing = [shard for shard in shards if not shard.index.exists()]
    # Processes that start together each begin elsewhere, and so share the work.
    random.Random(os.getpid()).shuffle(missing)
    bar = tqdm(missing, desc="index shards", unit="shard", disable=sys.stderr is None or None,
               leave=False)  # fmt: skip
    for shard in bar:
        if not shard.index.exists():
            passed, names = Passed(), dict[int, str]()
            entries = np.array(list(_scan(shard.path, passed, labelled, names)), _ENTRY)
            with atomic(shard.index) as temporary, open(temporary, "wb") as file:
                np.save(file, entries, allow_pickle=False)
                file.write(json.dumps([passed.endings, passed.kinds, names]).encode())
                file.flush()
                seal(temporary)
                temporary.chmod(0o644)  # whatever the umask: what others may write is not read
    return shards


@dataclass
class _Sample:
    """What was seen of one key; members of a key stand side by side."""

    key: str
    archive: int = 0  # of several that were joined, the number
    picture: tuple[int, int] | None = None  # offset, size
    suffix: str = ""  # the picture's
    label: int | None = None


def _scan(
    path: Path, passed: Passed, labelled: bool, names: dict[int, str]
) -> Iterator[tuple[int, int, int]]:
    """Offset, size and label of each picture of a tar file, from its headers and labels alone.

    Args:
        passed: gets the members that are neither.
        labelled: as `indexed`; the label is 0 where it is not looked at.
        names: gets those of pictures that are not in their headers, by the place of their data.
    """
    sample = _Sample("")
    try:
        with open_regular(path, "shard") as file:
            members = Members(file)
            for member in members:
                key, suffix = _split(member.name)
                if member.folder:
                    continue
                if not member.plain:
                    passed.add_kind("link or special member", member.name)
                    continue
                if not key:
                    passed.add_kind(HIDDEN, member.name)
                    continue
                if (key, members.archive) != (sample.key, sample.archive):
                    yield from _finished(path, sample, labelled)
                    sample = _Sample(key, members.archive)
                _note(path, file, member, suffix, sample, passed, labelled)
                if member.apart and sample.picture == (member.offset, member.size):
                    names[member.offset] = member.name
            yield from _finished(path, sample, labelled)
            if members.rest:
                passed.add_kind(BEHIND, path.name)
    except (tarfile.TarError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"the shard {path} is damaged or no tar file ({reason}); make or copy it again"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read the shard {path}: {error.strerror or error}") from None


def _split(name: str) -> tuple[str, str]:
    """Key and suffix as WebDataset has them: parted at the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem if stem else ""), (dot + suffix).lower()


def _note(
    path: Path, file: BinaryIO, member: Member, suffix: str, sample: _Sample,
    passed: Passed, labelled: bool,
) -> None:  # fmt: skip
    if suffix in SUFFIXES:
        if sample.picture is not None and (sample.suffix in _USUAL) == (suffix in _USUAL):
            raise UserError(f"the shard {path} has two pictures {sample.key}; rename one of them")
        if sample.suffix in _USUAL:
            passed.add(member.name)
            return
        if sample.picture is not None:
            passed.add(f"x{sample.suffix}")
        sample.picture, sample.suffix = (member.offset, member.size), suffix
    elif suffix == ".cls" and labelled:
        file.seek(member.offset)
        raw = file.read(min(member.size, 20))
        if len(raw) < min(member.size, 20):
            raise EOFError("it ends within a label")
        text = raw.strip()
        if not text.isdigit() or member.size > 20 or int(text) > _MAX_LABEL:
            raise UserError(
                f"{path}: {member.name} is no label; write a number from 0 to {_MAX_LABEL} into it"
            )
        if sample.label is not None:
            raise UserError(
                f"the shard {path} has two labels {sample.key}; take one of them out, or rename it"
            )
        sample.label = int(text)
    else:
        passed.endings[suffix if ending_of(f"x{suffix}") else ""] += 1


def _finished(path: Path, sample: _Sample, labelled: bool) -> Iterator[tuple[int, int, int]]:
    """The sample's entry; none for members that are neither picture nor label."""
    if sample.picture is None and sample.label is None:
        return
    if sample.picture is not None and not labelled:
        yield (*sample.picture, 0)
        return
    if sample.picture is None or sample.label is None:
        lacks = "picture" if sample.picture is None else ".cls"
        raise UserError(
            f"{path}: {sample.key} has no {lacks} beside it; a sample is KEY.jpg (or .png and so "
            "on) and KEY.cls, one after the other"
        )
    yield (*sample.picture, sample.label)


# --- pictures by number -------------------------------------------------------------------------


class ShardPictures:
    """The pictures of some shards, by number.

    Args:
        folder: holds the tar files.
        paths: those of them that are meant; by default all.
        names: of the labels, in place of `classes.txt`.
        labelled: as `indexed`; there are no classes where labels are not looked at.

    Raises:
        UserError: see `class_names` and `indexed`; no picture at all; a label that `classes.txt`
            has no name for.
    """

    def __init__(
        self, folder: Path, paths: Sequence[Path] | None = None,
        names: Sequence[str] | None = None, labelled: bool = True,
    ) -> None:  # fmt: skip
        self.classes = list(names or ()) if names or not labelled else class_names(folder)
        self.classes_from = ("classes.txt" if names is None else GIVEN) if labelled else "none"
        self._shards = indexed(shards_in(folder) if paths is None else paths, labelled)
        counts, passed = [], Passed()
        for shard in self._shards:
            entries = shard.entries()
            passed.update(shard.passed())
            counts.append(len(entries))
            worst = int(entries["label"].max()) if labelled and len(entries) else -1
            if worst >= len(self.classes):
                raise UserError(
                    f"the shard {shard.path} holds label {worst}, and {self.classes_from} names "
                    f"{len(self.classes)} classes, 0 to {len(self.classes) - 1}; correct one of "
                    "them"
                )
        self.counts = tuple(counts)
        self._ends = np.cumsum(counts)
        rest = passed.summary("member")
        if not sum(counts):
            only = f", only {rest}" if rest else ""
            raise UserError(f"the shards in {folder} hold no picture{only}; add some")
        self.passed_over = Counter(passed.counts())
        plural = "s" * (len(counts) != 1)
        self.notes = [f"passed over in {len(counts)} shard{plural} of {folder}: {rest}"] * bool(
            rest
        )
        self.names = [f"{s.path.name}:{s.size}:{n}" for s, n in zip(self._shards, counts)]
        # Where they lie, too, and when they were written.
        self.identities = [f"{s.path.resolve()}:{s.size}:{s.changed}" for s in self._shards]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, number: int) -> tuple[Shard, np.void]:
        place = int(np.searchsorted(self._ends, number, "right"))
        start = int(self._ends[place]) - self.counts[place]
        shard = self._shards[place]
        return shard, shard.entries()[number - start]

    def label(self, number: int) -> int:
        """The class of a picture."""
        return int(self._find(number)[1]["label"])

    def load(self, number: int, reduction: Reduction | None = None) -> Image.Image:
        """A picture, as `load_picture` gives it.

        Raises:
            UserError: as `load_picture`, naming shard and member; see `Shard.bytes_at`.
        """
        shard, entry = self._find(number)
        # With the header that stands before it, for its name.
        size = min(int(entry["size"]), MAX_FILE + 1)  # of which `decode_picture` says what is wrong
        data = shard.bytes_at(int(entry["offset"]) - _BLOCK, _BLOCK + size)
        name = shortened(self._name(shard, entry, data))
        file = io.BytesIO(memoryview(data)[_BLOCK:])
        del data  # before the pixels come
        return decode_picture(file, name, ending_of(name), reduction)

    def name(self, number: int) -> str:
        """Shard and member, whose name is whole."""
        shard, entry = self._find(number)
        return self._name(shard, entry, shard.bytes_at(int(entry["offset"]) - _BLOCK, _BLOCK))

    @staticmethod
    def _name(shard: Shard, entry: np.void, header: bytes) -> str:
        return f"{shard.path}:{shard.member(int(entry['offset']), header[:_BLOCK])}"
