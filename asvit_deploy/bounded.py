"""Reading files that may be anything: nothing is waited for, and everything has an end."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from asvit_deploy.errors import UserError

# Sidecars, manifests, configs and lists of class names: 22,000 names take 2 MiB, and a JSON parser
# makes up to 20 bytes of one.
MOST_TEXT = 16 << 20
# Checkpoints, engines and whatever else is read from end to end: DeiT-B takes 1.4 GB with its
# moving average and its optimiser's two.
MOST_BYTES = 4 << 30
MOST_ONNX = 2**31 - 1  # protobuf's own limit; a graph is handed on as one message
# What the system says where a disk or a server does not give what lies on it.
UNREADABLE = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO)
_BUFFER = 1 << 17  # bytes; each filling goes through Python
_MOST_DIGITS = 4300  # of a number: what Python 3.11 allows, as its time grows with the square


class _Named(io.FileIO):
    """A file whose name stands in what the system says of reading it, as in what it says of
    opening it."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(number, "rb")
        self._path = path

    def readinto(self, buffer: Any) -> int:
        with named(self._path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with named(self._path):
            return super().readall()


@contextlib.contextmanager
def named(path: Path | str) -> Iterator[None]:
    """Give the file's name to an OSError that has none: reads and writes know only a number."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def open_regular(path: Path, what: str = "file") -> BinaryIO:
    """`open` for reading, of nothing that would be waited for or that has no end.

    Args:
        what: how messages call what was expected there.

    Raises:
        UserError: it is a pipe, a socket or a device.
        OSError: as `open`; those of reading what is returned have the file's name, too.
    """
    odd = UserError(f"{path} is no regular file but a pipe, a socket or a device; name a {what}")
    try:
        # Asked of what was opened: a name may come to mean something else meanwhile. To open a pipe
        # waits for its writer but for O_NONBLOCK, which regular files know nothing of.
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise odd from None
        raise
    mode = os.fstat(number).st_mode
    if stat.S_ISREG(mode):
        return io.BufferedReader(_Named(number, path), _BUFFER)
    os.close(number)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise odd


def read_bounded(path: Path, most: int, what: str) -> bytes:
    """All of a small file.

    Args:
        most: bytes; of a larger file nothing is read.
        what: how messages call what was expected there.

    Raises:
        UserError: it is missing, larger, no regular file or may not be read.
    """
    try:
        with open_regular(path, what) as file:
            size = os.fstat(file.fileno()).st_size
            data = b"" if size > most else file.read(most + 1)  # which may have grown meanwhile
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name a {what}") from None
    except PermissionError:
        raise UserError(f"{path} may not be read; check its permissions") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read: {reason}; name a {what}") from None
    if (size := max(size, len(data))) > most:
        raise UserError(
            f"{path} has {size:,} bytes, too many for a {what}, which has {most:,} at most; name "
            "another"
        )
    return data


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def parse_json(data: bytes | str, **options: Any) -> Any:
    """`json.loads` of a foreign file, which ends on long numbers and deep brackets as well.

    Raises:
        ValueError: it is no JSON, or such a one.
    """
    try:
        return json.loads(data, parse_int=_whole, **options)
    except RecursionError:
        raise ValueError("brackets too deep") from None
