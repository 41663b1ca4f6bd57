"""Libraries that were built into the user's cache: kept with their sha256, looked at before use.

A library that is cut or damaged ends the process by a signal when it is loaded. So `X.so.sha256`
stands beside `X.so`, in the form of sha256sum, and a library that it does not vouch for is as good
as not built.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from asvit_deploy import files, trusted
from asvit_deploy.errors import UserError
from asvit_deploy.text import one_line

_LONGEST_WAIT = 5.0  # seconds; whoever may read the folder could hold its lock for ever


def digest_path(library: Path) -> Path:
    """`X.so` -> `X.so.sha256`."""
    return library.with_name(f"{library.name}.sha256")


def complain(reason: str) -> None:
    """What was passed over and why, one line on stderr."""
    print(one_line(f"passed over: {reason}"), file=sys.stderr)


def usable(library: Path, remedy: str, say: Callable[[str], None] = complain) -> bool:
    """Whether a library in the cache is there, ours alone, and as it was built.

    Args:
        remedy: what to do about a damaged one.
        say: called with a line on why one that is there is not usable.
    """
    if not os.path.lexists(library):
        return False
    if reason := _trouble(library, remedy):
        say(reason)
    return reason is None


def differs(library: Path) -> str | None:
    """Why a library that the user names is damaged, where a sha256 of ours is beside it."""
    try:
        recorded = _recorded(library)
    except (UserError, OSError):
        return None
    if recorded is None or recorded == files.sha256(library):
        return None
    return "it is damaged (its sha256 is not the one beside it)"


def usable_tree(folder: Path, say: Callable[[str], None] = complain) -> bool:
    """Whether a folder of headers in the cache, all of it, is ours alone."""
    try:
        trusted.require_tree(folder)
    except UserError as error:
        say(str(error))
        return False
    return True


@contextlib.contextmanager
def building(library: Path) -> Iterator[Path]:
    """A temporary path to build a library at; it takes its place, with its sha256, as `atomic`.

    The sha256 is first: a process that is killed between the two leaves one that vouches for
    nothing, and the library is built again.
    """
    with _Lock(library.parent) as lock, files.atomic(library) as temporary:
        temporary.unlink()  # else the linker writes into a file of whatever the umask allows
        yield temporary
        mode = stat.S_IMODE(temporary.stat().st_mode)
        temporary.chmod(mode & ~(stat.S_IWGRP | stat.S_IWOTH))
        with open(temporary, "rb") as built:
            os.fsync(built.fileno())  # here, so that the lock is held for a moment only
        line = f"{files.sha256(temporary)}  {library.name}\n"
        lock.take(shared=False)
        with files.atomic(digest_path(library)) as digest:
            digest.write_text(line)
            digest.chmod(0o644)


def _trouble(library: Path, remedy: str) -> str | None:
    try:
        trusted.require_folder(library.parent)
        with _Lock(library.parent) as lock:
            lock.take(shared=True)
            with trusted.opened(library) as file:
                found = hashlib.sha256(file.read()).hexdigest()
            wanted = _recorded(library)
    except UserError as error:
        return str(error)
    except FileNotFoundError:
        return f"{library} has no {digest_path(library).name} beside it; {remedy}"
    except OSError as error:
        return f"{library} cannot be read ({error.strerror}); {remedy}"
    if wanted != found:
        return f"{library} is damaged (its sha256 is not the one beside it); {remedy}"
    return None


def _recorded(library: Path) -> str | None:
    with trusted.opened(digest_path(library)) as file:
        match = re.match(rb"([0-9a-f]{64})\s", file.read(100))
    return match[1].decode() if match else None


class _Lock:
    """A folder's lock, so that nobody looks or writes between a library's and its sha256's rename.

    Where there are no locks (Windows, some network folders), one that looks just then takes a good
    library for a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._descriptor = folder, -1

    def __enter__(self) -> _Lock:
        return self

    def take(self, shared: bool) -> None:
        try:
            import fcntl

            self._descriptor = os.open(self.folder, os.O_RDONLY)
        except (ImportError, OSError):
            return
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        end = time.monotonic() + _LONGEST_WAIT
        while True:
            try:
                return fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    return
                time.sleep(0.002)
            except OSError:
                return

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
