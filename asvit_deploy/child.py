"""Python children that import nothing from the folder in which the user happens to stand."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from asvit_deploy.disk import is_full, require_temporary_folder, unfitting, unwritten

PATIENCE = 15  # seconds, for a library that is tried; most of the second that it takes is imports
_MOST_SAID = 1 << 20  # bytes that it may write into any file

# `-c` and `-m` look in the current folder first, where any file may bear a library's name. `-P` is
# Python 3.11's, and `-I` would lose PYTHONPATH. Nothing is imported before: sys is built in.
_START = """import sys; sys.path[:] = [entry for entry in sys.path if entry]; sys.path.append({!r})
if sys.platform == "linux":
    import ctypes, os, signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: goes with its parent
    if os.getppid() != {}:  # which went before that was said
        os._exit(1)
"""


def command(code: str, *arguments: str) -> list[str]:
    """The command line of a child that runs `code`, with `arguments` from `sys.argv[1]` on.

    A child of this process: it ends when this one does (Linux), in whatever way.

    The package itself is found wherever it was found here, also in a checkout.
    """
    package = Path(__file__).resolve().parent.parent
    return [sys.executable, "-c", _START.format(str(package), os.getpid()) + code, *arguments]


def tried(
    code: str, *arguments: str, given: bytes = b"", wait: float | None = None
) -> tuple[int, str, str] | str:
    """Run code that may crash or never end, such as another's library as it is loaded.

    Args:
        given: its stdin.
        wait: seconds, by default `PATIENCE`.

    Returns:
        Exit code, stdout and stderr; or in one line why it came to none.

    Raises:
        UserError: the disk of the temporary files is full, or no folder takes any.
    """
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({_MOST_SAID},) * 2)\n"
    seconds = PATIENCE if wait is None else wait
    with contextlib.ExitStack() as stack:
        place = require_temporary_folder()
        try:
            stdin, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            stdin.write(given)
            stdin.seek(0)
        except OSError as error:
            raise unwritten(place, error) from error
        process = subprocess.Popen(
            command(limit + code, *arguments), stdin=stdin, stdout=out, stderr=err,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"loading it does not end within {seconds} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what the library started
                process.wait()
        if process.returncode and is_full(place):  # what it said did not fit, or its own files
            raise unfitting(place)
        if process.returncode < 0:
            return f"loading it ends the process ({signal.Signals(-process.returncode).name})"
        for file in (out, err):
            file.seek(0)
        said, complained = (file.read().decode(errors="replace") for file in (out, err))
        return process.returncode, said, complained
