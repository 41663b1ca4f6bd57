"""What a bulk run has done so far: a file for each part, and what the run is of."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
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
    "batch": "batches of another size",
    "parts": "other pictures",
}


@dataclass(frozen=True)
class Account:
    """Of a part that is done: how many pictures it has, and which were skipped and why."""

    pictures: int
    skipped: Mapping[str, str]


class Store:
    """The folder `OUTPUT.parts`.

    Args:
        output: the file that the parts become.
        run: what the run is of, by the names of this module.
        force: what a run of something else has done may go.

    Raises:
        UserError: the folder is of another run, holds what is not ours, or cannot be written.
    """

    def __init__(self, output: Path, run: Mapping[str, Any], force: bool) -> None:
        self.folder = output.with_name(f"{output.name}.parts")
        self._about = self.folder / "run.json"
        with claimed(self.folder, wait=_WAIT):
            try:
                self._begin(dict(run), force)
            except OSError as error:
                raise unwritten(self.folder, error) from error

    def _begin(self, run: dict[str, Any], force: bool) -> None:
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise UserError(f"{self.folder} is no folder; remove it, or name another output")
        if self.folder.is_dir():
            if not self._ours():
                raise UserError(
                    f"{self.folder} holds files that no bulk run wrote; move them away, or name "
                    "another output"
                )
            if (said := self._said()) == run:
                return
            other = next(
                (_OTHER[key] for key in _OTHER if said.get(key) != run[key]), "another run"
            )
            if said and not force:
                raise UserError(
                    f"{self.folder} holds what a run of {other} has done; finish that one, name "
                    "another output, or pass --force to start anew"
                )
            self.remove()
        self.folder.mkdir()
        write_text(self._about, json.dumps(run))

    def _ours(self) -> bool:
        """Whether all in the folder looks as if we had written it."""
        names = [name for name in os.listdir(self.folder) if not name.startswith(".")]
        return all(name == self._about.name or name.endswith(".part") for name in names)

    def _said(self) -> dict[str, Any]:
        """What is there is of; empty where that is gone, and then nothing there counts."""
        try:
            with open_regular(self._about) as file:
                found = parse_json(file.read())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def path(self, part: Part) -> Path:
        """Where a part stands once it is done."""
        return self.folder / f"{part.number:06}.part"

    def account(self, part: Part) -> Account | None:
        """Of a part that is done; None where it is not, or was damaged since."""
        try:
            *_, last = self._lines(part)
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
            records: of each picture its name, why it was skipped or None, and its line.

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
        """Take the folder away, with what stopped runs left in it; no process needs it."""
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            raise UserError(
                f"{shortened(self.folder)} cannot be removed ({error.strerror}); remove it"
            ) from None


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"
