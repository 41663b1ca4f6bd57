"""Where the command begins: `asvit-deploy`, or `python -m asvit_deploy`."""

from __future__ import annotations

import contextlib
import os
import sys


def open_all_streams() -> None:
    """Let /dev/null stand in for standard streams that whoever started this closed: a file opened
    later would get such a number, and what libraries print."""
    with contextlib.suppress(OSError):  # such as a root without /dev
        while (null := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(null, True)
        os.close(null)
        if sys.stderr is None:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def main() -> None:
    """As `asvit_deploy.cli.main.main`, and an interrupt while that is imported ends alike."""
    try:
        open_all_streams()
        from asvit_deploy.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; nothing was changed.\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
