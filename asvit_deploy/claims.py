"""Claims: one run at a time makes an output, by a lock on a hidden file beside it.

The lock is the system's own (`flock`) and ends with its process at the latest. Its file,
`.NAME.lock`, goes with the claim; one that a killed run left blocks nothing and goes with the next
claim. On a file system without locks a claim holds nothing, and all else goes on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from asvit_deploy.errors import UserError

_PAUSE = 0.01  # seconds between two looks at a lock that is waited for


@dataclass(frozen=True)
class Claim:
    """What a claim says of the files that it is for.

    Attributes:
        replace: whether they may take the place of others.
        check: raises UserError where they may not be written; asked again before they take their
            places.
    """

    key: tuple[int, str]
    replace: bool
    check: Callable[[], object]


_held = threading.local()  # the claims of a thread: another one of this process has to wait too


def _own() -> list[Claim]:
    if not hasattr(_held, "claims"):
        _held.claims = []
    return _held.claims


def _key(path: Path) -> tuple[int, str]:
    """By process too: a forked one holds no claim of its parent's."""
    return os.getpid(), os.path.join(os.path.realpath(path.parent), path.name)


def claim_on(path: Path) -> Claim | None:
    """The claim on `path` that this thread holds."""
    key = _key(path)
    return next((claim for claim in _own() if claim.key == key), None)


@contextlib.contextmanager
def claimed(
    path: Path,
    replace: bool = True,
    check: Callable[[], object] = lambda: None,
    wait: float = 0,
) -> Iterator[None]:
    """No other run makes `path` meanwhile; within a claim on it that this thread holds, that one.

    Args:
        replace, check: see `Claim`; `check` is asked before and after the lock is taken, too.
        wait: seconds to wait for another run.

    Raises:
        UserError: another run has the claim, `check` says no, or the lock's file is no file.
    """
    if claim_on(path) is not None:
        yield
        return
    check()
    with _lock(path, wait):
        check()  # whoever had the lock before may have written it
        claim = Claim(_key(path), replace, check)
        _own().append(claim)
        try:
            yield
        finally:
            _own().remove(claim)


@contextlib.contextmanager
def _lock(path: Path, wait: float) -> Iterator[None]:
    file = path.with_name(f".{path.name}.lock")
    until, owner = time.monotonic() + wait, os.getpid()
    while (handle := _locked(file, path)) is None:
        if time.monotonic() >= until:
            raise UserError(f"another run is making {path}; wait for it, or name another output")
        time.sleep(_PAUSE)
    try:
        yield
    finally:
        if os.getpid() == owner:
            with contextlib.suppress(OSError):
                # Still locked: whoever opened it meanwhile will find that it is not the file here.
                if same(handle, file):
                    os.unlink(file)
            os.close(handle)


def _locked(file: Path, path: Path) -> int | None:
    """A handle that has the lock, or None where another run has it."""
    while True:
        handle = _open(file, path)
        try:
            if not try_lock(handle):
                os.close(handle)
                return None
            if same(handle, file):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last owner has removed it


def _open(file: Path, path: Path) -> int:
    """Open the lock's file, which is never a link's target."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except PermissionError:  # another user's; where it may be read it may be locked
            handle = os.open(file, os.O_RDONLY | flags)
    except OSError as error:
        if not os.path.lexists(file):
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise UserError(f"cannot access {file}: {why}; remove it, or name another output") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"cannot access {file}: it is no file; remove it, or name another output")
    return handle


def try_lock(handle: int) -> bool:
    """Take the lock of an open file or folder, unless another has it.

    Returns:
        False where another has it; True on file systems without locks, too.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def same(handle: int, path: Path) -> bool:
    """Whether an open file or folder still is what stands at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
