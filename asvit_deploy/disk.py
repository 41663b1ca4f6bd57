"""Disks that are full: which one it is, and what did not fit."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from asvit_deploy.errors import UserError
from asvit_deploy.text import shortened

# What the system says where a disk, a quota or a file-size limit is at its end.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOM = 1 << 16  # bytes; a disk that has no more is full for whatever is written here


def unwritten(path: Path | str, error: OSError) -> UserError:
    """What the system said when `path` was written, in one line; of a full disk, which it is."""
    said = f"cannot write {path}: {error.strerror or error}"
    return UserError(said + _advice(Path(path), error.errno) * (error.errno in FULL))


def unfitting(path: Path | str) -> UserError:
    """As `unwritten`, where a program that is not ours wrote it and only its failure is known."""
    return unwritten(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def is_full(path: Path | str) -> bool:
    """Whether nothing more can be written on the disk of `path`."""
    try:
        found = os.statvfs(_there(Path(path)))
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < _ROOM


def _advice(path: Path, number: int | None) -> str:
    if number == errno.EFBIG:
        return "; a limit on file sizes is set here (ulimit -f): raise it, then run it again"
    temporary = _inside(path, Path(tempfile.gettempdir()))
    other = ", or set TMPDIR to a folder on another" if temporary else ""
    if number == errno.EDQUOT:
        return f" on {_disk(path)}; remove files of yours there{other}, then run it again"
    return f" on {_disk(path)}; free space there{other}, then run it again"


def _there(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = Path(os.path.abspath(path))
    return next((place for place in (path, *path.parents) if os.path.exists(place)), Path("/"))


def _inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder, on the same disk."""
    real = Path(os.path.realpath(path))
    below = Path(os.path.realpath(folder)) in (real, *real.parents)
    return below and os.stat(_there(path)).st_dev == os.stat(folder).st_dev


def _disk(path: Path) -> str:
    """The disk that a path lies on, by where it is mounted."""
    place = Path(os.path.realpath(_there(path)))
    try:
        while not os.path.ismount(place) and place != place.parent:
            place = place.parent
    except OSError:
        pass
    return f"the disk of {shortened(place)}"
