"""Files that are whole or absent, their fingerprints, and reading that comes to an end.

Somewhat over 400 lines: a write, its temporary and the sweeping of those that were left share how
temporaries are named.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from asvit_deploy import trusted
from asvit_deploy.bounded import MOST_BYTES, named, open_regular
from asvit_deploy.claims import claim_on, same, try_lock
from asvit_deploy.disk import FULL, is_full, require_temporary_folder, unfitting, unwritten
from asvit_deploy.errors import UserError

_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)
_ABANDONED = 3600  # seconds after which a temporary that nobody changed is nobody's


def sha256(path: Path, most: int = MOST_BYTES) -> str:
    """Hex digest of a file's bytes.

    Args:
        most: bytes; of a larger file nothing is read.

    Raises:
        UserError: it is larger; or as `open_regular`.
        OSError: as `open_regular`.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise UserError(
                f"{path} has {size:,} bytes, more than the {most:,} of any such file; name another"
            )
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _no_folder(path: Path) -> UserError:
    there = next(place for place in path.parents if os.path.lexists(place) or place == place.parent)
    if not there.is_dir():
        return UserError(f"cannot write {path}: {there} is no folder; name another place")
    return UserError(f"cannot write {path}: the folder {path.parent} does not exist; make it first")


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
        raise _exists(path)


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


def _kernel() -> str:
    """Four hex digits that name this kernel, as it runs now, among others that share a volume."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:4]


_KERNEL = _kernel()


def _sweep(path: Path) -> None:
    """Remove what killed runs left beside `path`."""
    # The second form is that of versions before, by process number.
    pattern = re.escape(f".{path.name}.") + r"(?:([0-9a-f]{4})[0-9a-f]{10}|\d+(?:\.old)?)\.tmp"
    for name in _temporaries(path.parent):
        if match := re.fullmatch(pattern, name):
            with contextlib.suppress(OSError):
                _sweep_one(path.with_name(name), match[1] == _KERNEL)


def _sweep_one(left: Path, here: bool) -> None:
    """Remove a temporary of ours that nobody holds.

    Args:
        here: whether it was made under this kernel, whose locks hold then; what another machine
            made, and what stands where there are no locks, goes once it has not changed for long.
    """
    status = os.lstat(left)
    if status.st_uid != os.geteuid() or not (
        stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)
    ):
        return
    handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            here = False
        if same(handle, left) and (here or time.time() - _changed(left) > _ABANDONED):
            _remove(left)
    finally:
        os.close(handle)


def _changed(path: Path) -> float:
    return max(os.lstat(file).st_mtime for file in (path, *path.rglob("*")))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _new_folder(path: Path) -> tuple[Path, int]:
    """A folder beside `path` under a name that nobody could know, and a handle that has its lock.

    Only we may enter it: what is made in it is no link of another's.
    """
    while True:
        folder = path.with_name(f".{path.name}.{_KERNEL}{secrets.token_hex(5)}.tmp")
        try:
            folder.mkdir(0o700)
        except FileExistsError:
            continue
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another run's sweep took it for one that was left: it had no lock yet
        if try_lock(handle) and same(handle, folder):
            return folder, handle
        os.close(handle)  # a sweep found it before we had the lock


@contextlib.contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """A folder of ours beside `path`, which no sweep takes for one that was left."""
    _sweep(path)
    folder, handle = _new_folder(path)
    _changed_by_us(path.parent)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            if same(handle, folder):
                _clear(folder, path.name)
        os.close(handle)
        with contextlib.suppress(OSError):
            _changed_by_us(path.parent)


def _clear(folder: Path, name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(folder / name)
    try:
        os.rmdir(folder)  # nearly always: and it lists nothing
    except OSError:
        shutil.rmtree(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _asked_again(paths: Sequence[Path]) -> bool:
    """Whether claims allow that files there are replaced, once these are sure that it may be."""
    claims = [claim for claim in map(claim_on, paths) if claim is not None]
    for claim in claims:
        claim.check()
    return all(claim.replace for claim in claims)


def _exists(path: Path) -> UserError:
    return UserError(f"{path} exists already; pass --force to replace it")


def _place(temporary: Path, path: Path, replace: bool) -> None:
    """Give a file its name; without `replace`, only a name that is free at that moment."""
    if replace:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path, follow_symlinks=False)
    except FileExistsError:
        raise _exists(path) from None
    except OSError:  # no hard links here
        if os.path.lexists(path):
            raise _exists(path) from None
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file that takes its place at `path` only if the block succeeds.

    The replacement is one rename of a synced file: a reader, or a run that is killed at any
    moment, sees the old file or the new one, whole. Within a claim on `path` that allows no
    replacement, a file that has come there meanwhile stays.

    Raises:
        UserError: the folder does not exist or cannot be written, or the claim says no.
    """
    with atomic_together(path) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_together(*paths: Path) -> Iterator[list[Path]]:
    """As `atomic`, for several files: all are whole on disk before the first takes its place.

    They take their places in the order given. A claim on one of them speaks for all.
    """
    for path in paths:
        if not path.parent.is_dir():
            raise _no_folder(path)
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; name a file")
    current, temporary = paths[0], dict[Path, Path]()
    try:
        with contextlib.ExitStack() as stack:
            for current in paths:
                file = stack.enter_context(_workspace(current)) / current.name
                os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
                temporary[current] = file
            yield list(temporary.values())
            for current in paths:
                _sync(temporary[current])
            replace, placed = _asked_again(paths), list[Path]()
            try:
                for current in paths:
                    _place(temporary[current], current, replace)
                    placed.append(current)
            except BaseException:
                for path in (
                    () if replace else placed
                ):  # where not all names were free, none is ours
                    path.unlink()
                raise
    except OSError as error:
        # Of several, the block knows which it was filling, see `put`.
        filled = [path for path, file in temporary.items() if str(file) == str(error.filename)]
        raise unwritten(filled[0] if filled else current, error) from error


def _place_folder(temporary: Path, path: Path, replace: bool) -> None:
    """Give a folder its name; what another run puts there at that moment is replaced, or stays."""
    for number in itertools.count():
        old = temporary.with_name(f"{path.name}.old{number}")
        try:
            if replace and path.exists():
                with contextlib.suppress(FileNotFoundError):  # another run has moved it away
                    path.rename(old)
            temporary.rename(path)
            return
        except BaseException as error:  # Ctrl-C too: what was there comes back
            if old.exists() and not path.exists():
                old.rename(path)
            if not isinstance(error, OSError) or error.errno not in _OCCUPIED:
                raise
            if not replace:
                raise _exists(path) from None


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes its place at `path` only if the block succeeds.

    A folder that is at `path` already is moved away first and then removed: a run that is killed
    between the two renames leaves no folder there, never a part of one.

    Raises:
        UserError: the parent folder does not exist or cannot be written, or a claim on `path` says
            no.
    """
    if not path.parent.is_dir():
        raise _no_folder(path)
    try:
        with _workspace(path) as workspace:
            temporary = workspace / path.name
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    _sync(file)
            if not (replace := _asked_again([path])) and os.path.lexists(path):
                raise _exists(path)
            _place_folder(temporary, path, replace)
    except OSError as error:
        raise unwritten(path, error) from error


def no_link(path: str, flags: int) -> int:
    """An `opener` for `open` that refuses a link at the path itself."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def put(path: Path, data: bytes | memoryview | str) -> None:
    """Fill a file; what the system says of that names it, which a mere write leaves out.

    Raises:
        OSError: it cannot be written.
    """
    with named(path):
        path.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def scratch(purpose: str, place: Path | None = None) -> Iterator[Path]:
    """A folder of ours for temporary files, which goes with the block.

    What killed runs left of the same purpose is removed, as beside outputs.

    Args:
        purpose: a word for its name.
        place: where it is made; by default the system's folder for temporary files.

    Raises:
        UserError: the disk is full: whatever fails in the block then fails of that, for programs
            that are not ours blame something else. Or there is no folder for temporary files.
    """
    place = require_temporary_folder() if place is None else place
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_workspace(place / f"asvit-{purpose}"))
        except OSError as error:
            raise unwritten(error.filename or place, error) from error
        try:
            yield folder
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise unwritten(error.filename or folder, error) from error
        except Exception as error:
            if not is_full(folder):
                raise
            last = max(folder.rglob("*"), key=os.path.getmtime, default=folder)
            raise unfitting(last) from error


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically, see `atomic`."""
    with atomic(path) as temporary:
        put(temporary, data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, see `atomic`."""
    write_bytes(path, text.encode())


def _cache_place() -> Path:
    root = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(root):  # the XDG rule: anything else is ignored
        return Path(root) / "asvit-deploy"
    try:
        return Path.home() / ".cache" / "asvit-deploy"
    except RuntimeError:
        raise UserError("there is no home folder; set XDG_CACHE_HOME to a folder") from None


def cache_dir() -> Path:
    """The user's cache folder of asvit-deploy, which may not exist yet; only we and root write it.

    Raises:
        UserError: the user has no home and no XDG_CACHE_HOME, or others may write in the folder or
            exchange it.
    """
    folder = _cache_place()
    trusted.require_folder(folder)
    return folder


def cached(pattern: str) -> list[Path]:
    """What the cache folder holds under names of a pattern; nothing where the user has none.

    Raises:
        UserError: others may write in the folder or exchange it.
    """
    try:
        folder = _cache_place()
    except UserError:
        return []
    trusted.require_folder(folder)
    return list(folder.glob(pattern))


def make_cache_dir(name: str = "") -> Path:
    """The cache folder, or one in it, made where it is missing; what is made is for us alone.

    Raises:
        UserError: it cannot be made, or not be written in, or others may write in it.
    """
    folder = cache_dir() / name
    try:
        for place in reversed((folder, *folder.parents)):
            if not place.is_dir():
                # Not mkdir's `parents`: those would be open to whomever the umask lets in.
                place.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make {folder} ({error.strerror}); set XDG_CACHE_HOME to a writable folder"
        ) from None
    trusted.require_folder(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} may not be written; set XDG_CACHE_HOME to a folder that may")
    return folder
