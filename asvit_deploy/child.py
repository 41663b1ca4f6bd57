"""Python children that import nothing from the folder in which the user happens to stand."""

from __future__ import annotations

import sys
from pathlib import Path

# `-c` and `-m` look in the current folder first, where any file may bear a library's name. `-P` is
# Python 3.11's, and `-I` would lose PYTHONPATH. Nothing is imported before: sys is built in.
_START = "import sys; sys.path[:] = [entry for entry in sys.path if entry]; sys.path.append({!r})\n"


def command(code: str, *arguments: str) -> list[str]:
    """The command line of a child that runs `code`, with `arguments` from `sys.argv[1]` on.

    The package itself is found wherever it was found here, also in a checkout.
    """
    package = Path(__file__).resolve().parent.parent
    return [sys.executable, "-c", _START.format(str(package)) + code, *arguments]
