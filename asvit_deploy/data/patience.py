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

SECONDS = 10  # of this thread's own time; pictures of 100 million pixels take two
MOST_SCANNED = 1_500_000_000  # pixels of all scans of a JPEG; progressive ones have up to 14


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


class _File(_Patience, io.BufferedReader):
    pass


class _Bytes(_Patience, io.BytesIO):
    pass


def patient(file: Path | io.BytesIO, stop: Callable[[], Exception]) -> _File | _Bytes:
    """The file, opened; what `stop` makes is raised where it is read for too long.

    Raises:
        UserError, OSError: see `files.open_regular`.
    """
    opened: _File | _Bytes
    if isinstance(file, Path):
        opened = _File(open_regular(file, "picture").detach())  # type: ignore[attr-defined]
    else:
        opened = _Bytes(file.getbuffer())
    opened.start(stop)
    return opened


def scans(file: io.BufferedIOBase) -> int:
    """How often a JPEG's pixels are gone through; each time may take two bytes of the file."""
    file.seek(0)
    count, last = 0, b""
    while part := file.read(1 << 20):
        count += part.count(b"\xff\xda") + (last + part[:1] == b"\xff\xda")
        last = part[-1:]
    file.seek(0)
    return count
