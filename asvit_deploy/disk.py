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
NO_TEMPORARY = (
    "no folder takes temporary files: those of TMPDIR, /tmp, /var/tmp and the current folder are "
    "full or may not be written; free space there, or set TMPDIR to a folder on another disk, then "
    "run it again"
)
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


def require_room(folder: Path) -> None:
    """Find out whether a program that failed may have had no room, in the folder that it wrote to
    or in the system's for temporary files.

    Raises:
        UserError: one of them is full.
    """
    for place in (folder, require_temporary_folder()):
        if is_full(place):
            raise unfitting(place)


def temporary_folder() -> Path | None:
    """The system's folder for temporary files; None where none of its candidates takes any."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:  # what `tempfile` makes of disks that are full or read-only
        return None


def require_temporary_folder() -> Path:
    """The system's folder for temporary files.

    Raises:
        UserError: none of its candidates takes any: their disks are full, or may not be written.
    """
    folder = temporary_folder()
    if folder is None:
        raise UserError(NO_TEMPORARY)
    return folder


def lacks_temporary(error: OSError) -> bool:
    """Whether it is `tempfile`'s own, of a search that found no folder: it names no file."""
    said = str(error.strerror)
    return error.filename is None and said.startswith("No usable temporary directory")


def _advice(path: Path, number: int | None) -> str:
    if number == errno.EFBIG:
        return "; a limit on file sizes is set here (ulimit -f): raise it, then run it again"
    folder = temporary_folder()
    temporary = folder is not None and _inside(path, folder)
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
