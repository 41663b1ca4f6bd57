"""Whether a place is ours alone: what another user may have written is never loaded.

Names in the user's cache can be computed by anyone. So before anything there is loaded or compiled
against, each folder on the way to it is looked at, and the file through the descriptor that reads
it. Where nobody else may write, nobody can exchange between the look and the use.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from asvit_deploy.errors import UserError

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_MOST_LINKS = 40  # as the kernel's own limit
_CACHE = "XDG_CACHE_HOME"

Step = tuple[Path, os.stat_result]


def require_folder(folder: Path, variable: str = _CACHE, sticky: bool = False) -> None:
    """Refuse a folder in which another user may write, or that another user can exchange.

    Each folder on the way from the root, and each link, has to be ours or root's. A sticky folder
    such as /tmp may lie on the way: there nobody can rename what is ours. What does not exist yet
    is judged as far as it exists.

    Args:
        variable: the environment's variable that names another folder, for the message.
        sticky: the folder itself may be a sticky one.

    Raises:
        UserError: it names the first such place and the remedy.
    """
    if not hasattr(os, "geteuid"):  # Windows: a profile's folders have lists of their own
        return
    steps, whole = _steps(folder)
    for number, (place, status) in enumerate(steps):
        last = whole and number == len(steps) - 1
        _require(place, status, variable, sticky or not last)


def require_tree(folder: Path) -> None:
    """As `require_folder`, and the same of all that it holds: folders and plain files, no links.

    Raises:
        UserError: it names the first place that is not ours alone, and the remedy.
    """
    require_folder(folder)
    for parent, folders, names in os.walk(folder, onerror=_unreadable):
        for name in (*folders, *names):
            place = Path(parent, name)
            status = place.lstat()
            if stat.S_ISDIR(status.st_mode):
                _require(place, status, _CACHE, False)
            else:
                _require_file(place, status)


def require_temporary() -> None:
    """Refuse the system's folder for temporary files where others may exchange what is ours there.

    Compilers and engine builders put files there that become code.

    Raises:
        UserError: it names the place and the remedy.
    """
    from asvit_deploy.disk import require_temporary_folder

    require_folder(require_temporary_folder().absolute(), "TMPDIR", sticky=True)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A plain file, opened to be read, that nobody but we and root may write.

    Only the file is looked at; its folder is `require_folder`'s.

    Raises:
        UserError: it is a link, no plain file, not ours, or may not be read.
        FileNotFoundError: it is not there.
    """
    # Without NONBLOCK a pipe would be waited for.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _no_plain_file(path, "a link") from None
        if error.errno in (errno.EISDIR, errno.ENXIO):  # a folder; a socket
            raise _no_plain_file(path) from None
        raise UserError(
            f"{path} may not be read ({error.strerror}); remove it or correct its permissions"
        ) from None
    with file:
        _require_file(path, os.fstat(file.fileno()))
        yield file


def close_tree(folder: Path) -> None:
    """Take from others the right to write in a folder and all that it holds, whatever the umask."""
    for place in (folder, *folder.rglob("*")):
        if not place.is_symlink():
            place.chmod(stat.S_IMODE(place.stat().st_mode) & ~_OTHERS)


def _steps(path: Path) -> tuple[list[Step], bool]:
    """Every folder, link and file from the root to `path`, and whether `path` is there itself.

    Links are followed by hand, so that each folder on the way is seen under its real path.
    """
    path = path.absolute()
    here = Path(path.anchor)
    steps = [(here, here.lstat())]
    todo, links = list(reversed(path.parts[1:])), 0
    while todo:
        part = todo.pop()
        if part == "..":
            here = here.parent
            continue
        place = here / part
        try:
            status = place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return steps, False
        except OSError as error:
            raise UserError(f"{here} may not be read ({error.strerror}); check its permissions, "
                            f"or set {_CACHE} to a folder of your own") from None  # fmt: skip
        steps.append((place, status))
        if not stat.S_ISLNK(status.st_mode):
            here = place
            continue
        links += 1
        if links > _MOST_LINKS:
            raise UserError(f"{path} leads through too many links; remove {place}")
        target = Path(os.readlink(place))
        if target.is_absolute():
            here = Path(target.anchor)
        todo.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
    return steps, True


def _require(place: Path, status: os.stat_result, variable: str, sticky: bool) -> None:
    """Refuse one folder or link."""
    other = f"set {variable} to a folder of your own"
    if status.st_uid not in (0, os.geteuid()):
        raise UserError(
            f"{place} belongs to {_name(status.st_uid)}, so nothing in it is trusted; {other}"
        )
    if stat.S_ISLNK(status.st_mode) or not _others_write(status):
        return
    if not (sticky and status.st_mode & stat.S_ISVTX):
        raise UserError(
            f"others may write in {place}, so nothing in it is trusted; run `chmod go-w "
            f"{shlex.quote(str(place))}` once all in it is yours, or {other}"
        )


def _require_file(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise _no_plain_file(path, "a link")
    if not stat.S_ISREG(status.st_mode):
        raise _no_plain_file(path)
    if not hasattr(os, "geteuid"):
        return
    if status.st_uid not in (0, os.geteuid()):
        raise UserError(
            f"{path} belongs to {_name(status.st_uid)} and is not trusted; remove it with "
            f"`rm {shlex.quote(str(path))}`"
        )
    if _others_write(status):
        raise UserError(
            f"others may write {path}, so it is not trusted; remove it with "
            f"`rm {shlex.quote(str(path))}`, or run `chmod go-w` on it if you know what it holds"
        )


def _no_plain_file(path: Path, what: str = "no plain file") -> UserError:
    return UserError(
        f"{path} is {what} and is not trusted; remove it with `rm -r {shlex.quote(str(path))}`"
    )


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename} may not be read ({error.strerror}); remove it") from None


def _others_write(status: os.stat_result) -> bool:
    """Whether anyone but the owner may write; a group of nobody but us is no other."""
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _ours_alone(status.st_gid)


def _ours_alone(group: int) -> bool:
    """Whether a group is this user's private one, as systems with umask 002 make for each user.

    It bears the user's name, is the user's primary group, and no other user is in it. Root's is
    none: containers put arbitrary users into it.
    """
    import grp
    import pwd

    user = os.geteuid()
    try:
        me, found = pwd.getpwuid(user), grp.getgrgid(group)
    except KeyError:
        return False
    return (
        user != 0
        and (me.pw_gid, me.pw_name) == (group, found.gr_name)
        and set(found.gr_mem) <= {me.pw_name}
        and all(one.pw_uid == user for one in pwd.getpwall() if one.pw_gid == group)
    )


def _name(user: int) -> str:
    import pwd

    try:
        return f"user {pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"user {user}"
