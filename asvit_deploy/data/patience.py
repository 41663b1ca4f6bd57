"""Picture files that are read for so long and no longer.

What Pillow parses in Python (markers, chunks, numbers written out) takes a microsecond a byte, and
nothing bounds how many there are. Whoever parses reads, and so is stopped there.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asvit_deploy.bounded import open_regular

SECONDS = 8  # of this thread's own time; pictures of 100 million pixels take two


class _Patience:
    """Mixed into a file: raises what `stop` makes once its time is over."""

    stop: Callable[[], Exception]
    until: float

    def start(self, stop: Callable[[], Exception]) -> None:
        self.stop, self.until = stop, time.thread_time() + SECONDS

    def read(self, *args: Any) -> bytes:
        if time.thread_time() > self.until:
            raise self.stop()
        return super().read(*args)  # type: ignore[misc]


class PatientFile(_Patience, io.BufferedReader):
    pass


class PatientBytes(_Patience, io.BytesIO):
    @classmethod
    def like(cls, other: _Patience, data: bytes) -> PatientBytes:
        """Bytes instead of another file, with what is left of its time."""
        new = cls(data)
        new.stop, new.until = other.stop, other.until
        return new


def patient(file: Path | io.BytesIO, stop: Callable[[], Exception]) -> PatientFile | PatientBytes:
    """The file, opened; what `stop` makes is raised where it is read for too long.

    Raises:
        UserError, OSError: see `files.open_regular`.
    """
    opened: PatientFile | PatientBytes
    if isinstance(file, Path):
        opened = PatientFile(open_regular(file, "picture").detach())  # type: ignore[attr-defined]
    else:
        opened = PatientBytes(file.getvalue())  # which shares the bytes
    opened.start(stop)
    return opened
