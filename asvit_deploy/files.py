"""Files that are whole or absent, their fingerprints, and reading that comes to an end."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from asvit_deploy.errors import UserError

# What the system says where a disk, a quota or a file-size limit is at its end.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Sidecars, manifests, configs and lists of class names: 22,000 names take 2 MiB, and a JSON parser
# makes up to 20 bytes of one.
MOST_TEXT = 16 << 20
_MOST_DIGITS = 4300  # of a number: what Python 3.11 allows, as its time grows with the square


def open_regular(path: Path, what: str = "file") -> BinaryIO:
    """`open` for reading, of nothing that would be waited for or that has no end.

    Args:
        what: how messages call what was expected there.

    Raises:
        UserError: it is a pipe, a socket or a device.
        OSError: as `open`.
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
        return os.fdopen(number, "rb")
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
        told = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read: {told}; name a {what}") from None
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


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes.

    Raises:
        UserError, OSError: as `open_regular`.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _no_folder(path: Path) -> UserError:
    return UserError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")


def unwritten(path: Path, error: OSError) -> UserError:
    """What the system said when `path` was written, in one line."""
    mend = "; free space, then run it again" * (error.errno in FULL)
    return UserError(f"cannot write {path}: {error.strerror or error}{mend}")


def check_parent(path: Path) -> None:
    """Find out before the work whether anything could be put at `path` at all.

    Raises:
        UserError: its folder does not exist or cannot be written.
    """
    folder = path.parent
    if not folder.is_dir():
        raise _no_folder(path)
    # Before anything is asked about `path`: in a folder that may not be searched that fails too.
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: no permission to write in {folder.resolve()}")


def check_writable(path: Path, force: bool, *sources: Path | None) -> None:
    """Find out before the work whether its result could be put at `path`.

    Raises:
        UserError: `path` exists and `force` is off, is a folder, is one of the work's own
            `sources`, or cannot be written.
    """
    check_parent(path)
    for source in sources:
        if source is not None and path.exists() and source.exists() and path.samefile(source):
            raise UserError(f"{path} is the input itself; name another output")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    if os.path.lexists(path) and not force:  # a link that leads nowhere would be replaced too
        raise UserError(f"{path} exists already; pass --force to replace it")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# By folder: when it last changed, as far as we know by our own hand, and the temporaries in it. To
# list a folder for each of many files would cost the square of their number.
_seen: dict[str, tuple[int, list[str]]] = {}


def _temporaries(folder: Path) -> list[str]:
    """Names of temporary files in a folder, listed again where others have changed it."""
    key, changed = os.path.abspath(folder), folder.stat().st_mtime_ns
    if _seen.get(key, (None,))[0] != changed:
        _seen[key] = changed, [name for name in os.listdir(folder) if name.endswith(".tmp")]
    return _seen[key][1]


def _changed_by_us(folder: Path) -> None:
    key = os.path.abspath(folder)
    if key in _seen:
        _seen[key] = folder.stat().st_mtime_ns, _seen[key][1]


def _sweep(path: Path) -> None:
    """Remove what killed runs left beside `path`."""
    pattern = re.compile(re.escape(f".{path.name}.") + r"(\d+)(\.old)?\.tmp$")
    for name in _temporaries(path.parent):
        match = pattern.match(name)
        if match and not _alive(int(match[1])):
            _remove(path.with_name(name))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place only if the block succeeds.

    The replacement is one rename of a synced file: a reader, or a run that is killed at any
    moment, sees the old file or the new one, whole.

    Raises:
        UserError: the folder does not exist or cannot be written.
    """
    with atomic_together(path) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_together(*paths: Path) -> Iterator[list[Path]]:
    """As `atomic`, for several files: all are whole on disk before the first takes its place.

    They take their places in the order given.
    """
    for path in paths:
        if not path.parent.is_dir():
            raise _no_folder(path)
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; name a file")
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths}
    current = paths[0]
    try:
        for current in paths:
            _sweep(current)
            temporary[current].touch()
            _changed_by_us(current.parent)
        yield list(temporary.values())
        for current in paths:
            with open(temporary[current], "rb") as file:
                os.fsync(file.fileno())
        for current in paths:
            os.replace(temporary[current], current)
            _changed_by_us(current.parent)
    except OSError as error:
        raise unwritten(current, error) from error
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):
                leftover.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place only if the block succeeds.

    A folder that is at `path` already is moved away first and then removed: a run that is killed
    between the two renames leaves no folder there, never a part of one.

    Raises:
        UserError: the parent folder does not exist or cannot be written.
    """
    if not path.parent.is_dir():
        raise _no_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    try:
        _sweep(path)
        for leftover in (temporary, old):  # of a killed run that had our number
            _remove(leftover)
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        try:
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        except BaseException:  # Ctrl-C too: what was there comes back
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    except OSError as error:
        raise unwritten(path, error) from error
    finally:
        for leftover in (temporary, old) if path.exists() else (temporary,):
            with contextlib.suppress(OSError):
                _remove(leftover)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_bytes(path, text.encode())


def cache_dir() -> Path:
    """The user's cache folder of asvit-deploy, which may not exist yet.

    Raises:
        UserError: the user has no home and no XDG_CACHE_HOME.
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(root):  # the XDG rule: anything else is ignored
        return Path(root) / "asvit-deploy"
    try:
        return Path.home() / ".cache" / "asvit-deploy"
    except RuntimeError:
        raise UserError("there is no home folder; set XDG_CACHE_HOME to a folder") from None


def cached(pattern: str) -> list[Path]:
    """What the cache folder holds under names of a pattern; nothing where the user has none."""
    try:
        return list(cache_dir().glob(pattern))
    except UserError:
        return []


def make_cache_dir(name: str = "") -> Path:
    """The cache folder, or one in it, made where it is missing.

    Raises:
        UserError: it cannot be made, or not be written in.
    """
    folder = cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {folder} ({error.strerror}); set XDG_CACHE_HOME to a writable folder"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} may not be written; set XDG_CACHE_HOME to a folder that may")
    return folder
