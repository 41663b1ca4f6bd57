"""Files that are whole or absent, and their fingerprints."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from asvit_deploy.errors import UserError

# What the system says where a disk, a quota or a file-size limit is at its end.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(path: Path, force: bool, source: Path | None = None) -> None:
    """Find out before the work whether its result could be put at `path`.

    Raises:
        UserError: `path` exists and `force` is off, is a folder, is the work's own `source`, or
            cannot be written.
    """
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"cannot write {path}: the folder {folder} does not exist")
    # Before anything is asked about `path`: in a folder that may not be searched that fails too.
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: no permission to write in {folder.resolve()}")
    if source is not None and path.exists() and source.exists() and path.samefile(source):
        raise UserError(f"{path} is the input itself; name another output")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    if path.exists() and not force:
        raise UserError(f"{path} exists already; pass --force to replace it")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sweep(path: Path) -> None:
    """Remove what killed runs left beside `path`."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.tmp$")
    for other in path.parent.iterdir():
        match = pattern.match(other.name)
        if match and not _alive(int(match[1])):
            other.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only if the block succeeds.

    The replacement is one rename of a synced file: a reader, or a run that is killed at any
    moment, sees the old file or the new one, whole.

    Raises:
        UserError: the folder does not exist or cannot be written.
    """
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _sweep(path)
        temporary.touch()
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_bytes(path, text.encode())
