"""What a bulk run has done so far: a file for each part, and what the run is of."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asvit_deploy.bounded import open_regular, parse_json
from asvit_deploy.bulk.pictures import Part
from asvit_deploy.claims import claimed
from asvit_deploy.disk import unwritten
from asvit_deploy.errors import UserError
from asvit_deploy.files import atomic, write_text
from asvit_deploy.sealed import SEAL, check_seal, seal
from asvit_deploy.text import shortened

_WAIT = 60  # seconds for another process that begins the same run
# Fields of `run.json`, and what a run is of where they differ.
_OTHER = {
    "model": "another model",
    "classes": "other names of the classes",
    "runtime": "another runtime",
    "way": "another way of its runtime",
    "precision": "another precision",
    "library": "another library of the op",
    "engine": "another engine",
    "threads": "another number of threads",
    "batch": "batches of another size",
    "parts": "other pictures",
}


_FILE = r"(?:\d{6,}\.part|\d+of\d+\.here|run\.json)"
# And what stopped runs leave of them: locks and folders of temporary files.
_OURS = re.compile(rf"{_FILE}|\.{_FILE}\.(?:lock|[0-9a-f]{{14}}\.tmp)")


@dataclass(frozen=True)
class Share:
    """Which of the processes of a run this one is.

    Attributes:
        rank, world: its number, and how many there are.
        launch: what those that were started together have in common; empty where only their
            numbers are known, and any of them may have been started again by itself.
    """

    rank: int = 0
    world: int = 1
    launch: str = ""


@dataclass(frozen=True)
class Account:
    """Of a part that is done: how many pictures it has, and which were skipped and why, by name
    and number."""

    pictures: int
    skipped: Mapping[str, str]


class Store:
    """The folder `OUTPUT.parts`.

    Args:
        output: the file that the parts become.
        run: what the run is of, by the names of this module.
        own: the parts of this process.
        force: what was done before goes: of another run all of it, of this one the parts of this
            process.

    Attributes:
        accounts: of its own parts, None where one is not done.

    Raises:
        UserError: the folder is of another run, holds what is not ours, or cannot be written.
    """

    def __init__(
        self, output: Path, run: Mapping[str, Any], share: Share, own: Sequence[Part], force: bool
    ) -> None:
        self.folder = output.with_name(f"{output.name}.parts")
        self._about, self._share = self.folder / "run.json", share
        with claimed(self.folder, wait=_WAIT):
            try:
                self._begin(dict(run), force)
                self._leave(own if force else ())
            except OSError as error:
                raise unwritten(self.folder, error) from error
        self.accounts = [self.account(part) for part in own]
        # Only now: once all have come, whoever finds no part missing takes the folder away.
        write_text(self._mark(share.rank), share.launch)

    def _begin(self, run: dict[str, Any], force: bool) -> None:
        if self.folder.is_symlink():
            raise UserError(f"{self.folder} is a link; remove it, or name another output")
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; remove it, or name another output")
        if self.folder.is_dir():
            names = self._names()
            if (said := self._said()) == run:
                return
            if not force and said is not None:
                other = next(
                    (_OTHER[key] for key in _OTHER if said.get(key) != run[key]), "another run"
                )
                raise UserError(
                    f"{self.folder} holds what a run of {other} has done; finish that one, name "
                    "another output, or pass --force to start anew"
                )
            if not force and any(name.endswith(".part") for name in names):
                raise UserError(
                    f"{self.folder} has parts and no run.json that can be read, which says what "
                    "they are of; remove it, name another output, or pass --force to start anew"
                )
            self.remove()
        self.folder.mkdir()
        write_text(self._about, json.dumps(run))

    def _names(self) -> list[str]:
        """Of all in the folder, `run.json` last.

        Raises:
            UserError: one looks as if we had not written it.
        """
        names = sorted(os.listdir(self.folder))
        if odd := [name for name in names if not _OURS.fullmatch(name)]:
            raise UserError(
                f"{self.folder} holds files that no bulk run wrote ({shortened(odd[0], 60)}); move "
                "them away, or name another output"
            )
        return names

    def _said(self) -> dict[str, Any] | None:
        """What is there is of; None where that is gone or cannot be read."""
        try:
            with open_regular(self._about) as file:
                found = parse_json(file.read())
        except (OSError, ValueError, UserError):
            return None
        return found if isinstance(found, dict) else None

    def _mark(self, rank: int) -> Path:
        """What says that a process has come."""
        return self.folder / f"{rank}of{self._share.world}.here"

    def _leave(self, parts: Sequence[Part]) -> None:
        """Begin as one who has not come yet, with none of these parts done.

        Where all are started together and this one was here before, so were all others.
        """
        mark = self._mark(self._share.rank)
        again = self._has_come(self._share.rank) and (self._share.launch or parts)
        for path in self.folder.glob("*.here") if again else (mark,):
            path.unlink(missing_ok=True)
        for part in parts:
            self.path(part).unlink(missing_ok=True)

    def come(self, count: int) -> bool:
        """Whether the first `count` processes have all come."""
        return all(map(self._has_come, range(count)))

    def _has_come(self, rank: int) -> bool:
        launch = self._share.launch.encode(errors="surrogateescape")
        try:
            with open_regular(self._mark(rank)) as file:
                return file.read(len(launch) + 1) == launch
        except (OSError, UserError):  # not there, or not one that a process of ours wrote
            return False

    def path(self, part: Part) -> Path:
        """Where a part stands once it is done."""
        return self.folder / f"{part.number:06}.part"

    def account(self, part: Part) -> Account | None:
        """Of a part that is done; None where it is not, or was damaged since."""
        try:
            (last,) = deque(self._lines(part), maxlen=1)
            said = json.loads(last)
            return Account(int(said["pictures"]), dict(said["skipped"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def lines(self, part: Part) -> Iterator[bytes]:
        """The records of a part that is done, a line each."""
        last = None
        for line in self._lines(part):
            if last is not None:
                yield last
            last = line

    def _lines(self, part: Part) -> Iterator[bytes]:
        path = self.path(part)
        check_seal(path)
        left = path.stat().st_size - SEAL
        with open_regular(path) as file:
            while left > 0 and (line := file.readline(left)):
                left -= len(line)
                yield line

    def write(self, part: Part, records: Iterable[tuple[str, str | None, dict[str, Any]]]) -> None:
        """Put a part in its place.

        Args:
            records: of each picture what no other is called, why it was skipped or None, and its
                line.

        Raises:
            UserError: another run is making that part, or it cannot be written.
        """
        skipped, count = {}, 0
        with claimed(self.path(part)), atomic(self.path(part)) as temporary:
            with open(temporary, "wb") as file:
                for name, reason, record in records:
                    count += 1
                    if reason is not None:
                        skipped[name] = reason
                    file.write(_line(record))
                file.write(_line({"pictures": count, "skipped": skipped}))
            seal(temporary)

    def remove(self) -> None:
        """Take the folder away, with what stopped runs left in it; no process needs it.

        Raises:
            UserError: it holds what is not ours, or cannot be removed.
        """
        try:
            for path in map(self.folder.joinpath, self._names()):
                if path.suffix == ".tmp":  # holds the one file that was to take its place
                    with contextlib.suppress(FileNotFoundError):  # its process may be at it, too
                        (path / path.name[1:-19]).unlink(missing_ok=True)
                        path.rmdir()
                else:
                    path.unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError as error:
            raise UserError(
                f"{shortened(self.folder)} cannot be removed ({error.strerror}); remove it"
            ) from None


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
