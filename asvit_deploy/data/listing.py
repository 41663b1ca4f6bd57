"""What lies in a folder: its pictures, and an account of everything that is not taken."""

from __future__ import annotations

import errno
import heapq
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from asvit_deploy.data.decode import SUFFIXES
from asvit_deploy.errors import UserError, shortened

_SHOWN = 8  # endings in one line, and folders
_LONGEST = 12  # what is longer is no ending but a part of a name
_LONG_PATH = 400  # characters of one in a message
LOST = "link that leads nowhere"
SPECIAL = "device, pipe or socket"
HIDDEN = "hidden"
ARCHIVE = "__MACOSX folder"  # what macOS puts into zip files: halves of files, named as pictures
BEHIND = "file with data behind the end of its archive"
LOOSE = "picture outside the class folders"
_PLURALS = {
    LOST: "links that lead nowhere",
    SPECIAL: "devices, pipes or sockets",
    ARCHIVE: "__MACOSX folders",
    BEHIND: "files with data behind the ends of their archives",
    LOOSE: "pictures outside the class folders",
}


@dataclass
class Passed:
    """What was seen and not taken.

    Attributes:
        endings: files by ending in lower case, "" for none.
        kinds: what is no file that could be read, by one of this module's words.
        examples: one name of each kind that deserves one.
        again: a line each for folders that were reached before.
    """

    endings: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a file by its ending."""
        self.endings[ending_of(name)] += 1

    def add_kind(self, kind: str, name: str) -> None:
        self.kinds[kind] += 1
        self.examples.setdefault(kind, name)

    def update(self, other: Passed, prefix: str = "") -> None:
        """Add another account, whose names begin at `prefix`."""
        self.endings.update(other.endings)
        self.kinds.update(other.kinds)
        for kind, name in other.examples.items():
            self.examples.setdefault(kind, prefix + name)
        self.again += other.again

    def counts(self) -> dict[str, int]:
        """By ending or kind, most first, for JSON."""
        named = {ending or "no ending": n for ending, n in self.endings.most_common()}
        return named | dict(self.kinds.most_common())

    def summary(self, what: str = "file") -> str:
        """Such as `12 files (.txt 10, .heic 2), 3 hidden`; empty where nothing was passed over."""
        parts = []
        if count := sum(self.endings.values()):
            parts.append(f"{count:,} {what}{'s' * (count != 1)} ({_listed(self.endings)})")
        for kind, count in self.kinds.items():
            named = ""
            if kind in (LOST, SPECIAL, LOOSE) and kind in self.examples:
                named = f" ({shortened(self.examples[kind])})"
            parts.append(f"{count:,} {kind if count == 1 else _PLURALS.get(kind, kind)}{named}")
        return ", ".join(parts)

    def lines(self, place: object) -> list[str]:
        """For stderr: what was passed over in `place`, and the folders reached again."""
        rest = self.summary()
        lines = [f"passed over in {place}: {rest}"] if rest else []
        lines += self.again[:_SHOWN]
        if more := len(self.again) - _SHOWN:
            lines += [f"… and {more} more folders reached again"] if more > 0 else []
        return lines


def _listed(endings: Counter[str]) -> str:
    by_count = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{ending or 'no ending'} {count:,}" for ending, count in by_count[:_SHOWN]]
    if rest := by_count[_SHOWN:]:
        parts.append(f"{len(rest)} other endings {sum(count for _, count in rest):,}")
    return ", ".join(parts)


def others(counts: Mapping[str, int]) -> str:
    """Such as `3 other entries passed over`, of `Passed.counts`; empty for none."""
    count = sum(counts.values())
    return f"{count:,} other entr{'y' if count == 1 else 'ies'} passed over" if count else ""


def ending_of(name: str) -> str:
    """The ending in lower case, with its dot; "" where there is none worth the name."""
    dot = name.rfind(".")
    ending = name[dot:].lower() if 0 < dot < len(name) - 1 else ""
    return ending if len(ending) <= _LONGEST and ending.isprintable() else ""


@dataclass
class Listing:
    """The pictures below a folder, as sorted paths from it, and what else lies there."""

    names: list[str]
    passed: Passed


class Seen:
    """Folders by what they are, not by what they are called, so that none is read twice."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], str] = {}

    def enter(self, path: str) -> str | None:
        """Note a folder; where it was noted before, by which name."""
        status = os.stat(path)
        key = (status.st_dev, status.st_ino)
        before = self._names.get(key)
        self._names.setdefault(key, path)
        return before


def scanned(folder: str) -> Iterator[os.DirEntry[str]]:
    """Entries of a folder as the system has them.

    Raises:
        UserError: it may not be read.
    """
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise UserError(
            f"the image folder {_short(error.filename or folder)} cannot be read: "
            f"{error.strerror}; {_mend(error)}"
        ) from None


def kind_of(entry: os.DirEntry[str]) -> str:
    """`file`, `folder`, `LOST` or `SPECIAL`, behind any links; asks the system only about links,
    where the folder's own entries say what they are."""
    try:
        if entry.is_file():
            return "file"
        if entry.is_dir():
            return "folder"
    except OSError as error:
        # What is behind a link may not be asked about: the one who reads it says so.
        return "file" if error.errno == errno.EACCES else LOST
    return LOST if entry.is_symlink() and not os.path.exists(entry.path) else SPECIAL


def stays_out(name: str) -> str | None:
    """Why an entry of this name is never looked at, if so."""
    return HIDDEN if name[0] == "." else ARCHIVE if name == "__MACOSX" else None


def pictures_below(folder: Path, seen: Seen | None = None) -> Listing:
    """Pictures of a folder and its subfolders by their endings, links followed; nothing hidden.

    A folder is read once, by the name without a link where it has one: one that links lead back
    to, or that was `seen` before, is passed over with a line. `folder` itself is always read.

    Raises:
        UserError: the folder, or one in it, may not be read.
    """
    root, seen = str(folder), seen or Seen()
    found: list[str] = []
    passed = Passed()
    folders, links = [""], list[str]()  # from the root, each with a slash at its end
    while folders or links:
        # What is there by itself goes before what only a link leads to.
        place = folders.pop() if folders else heapq.heappop(links)
        path = os.path.join(root, place)
        if (before := _entered(seen, path.rstrip("/") or "/")) and place:
            passed.again.append(_again(path.rstrip("/"), before))
            continue
        for entry in scanned(path):
            name = entry.name
            if name[0] == "." or name == "__MACOSX":
                passed.add_kind(stays_out(name) or HIDDEN, place + name)
                continue
            kind = kind_of(entry)
            if kind == "file":
                dot = name.rfind(".")
                if dot > 0 and name[dot:].lower() in SUFFIXES:
                    found.append(place + name)
                else:
                    passed.add(name)
            elif kind == "folder" and entry.is_symlink():
                heapq.heappush(links, f"{place}{name}/")
            elif kind == "folder":
                folders.append(f"{place}{name}/")
            else:
                passed.add_kind(kind, place + name)
    return Listing(sorted(found), passed)


def _entered(seen: Seen, path: str) -> str | None:
    try:
        return seen.enter(path)
    except OSError as error:
        raise UserError(
            f"the image folder {_short(path)} cannot be read: {error.strerror}; {_mend(error)}"
        ) from None


def _short(path: str) -> str:
    return path if len(path) <= _LONG_PATH else f"{path[:_LONG_PATH]}…"


def _mend(error: OSError) -> str:
    long = error.errno == errno.ENAMETOOLONG
    return "move what is in it further up" if long else "check its permissions"


def _again(path: str, before: str) -> str:
    if path.startswith(before.rstrip("/") + "/"):
        return f"passed over {path}: a link that leads back to {before}"
    return f"passed over {path}: the same folder as {before}"
