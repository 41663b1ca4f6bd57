"""Where the command begins: `asvit-deploy`, or `python -m asvit_deploy`."""

from __future__ import annotations

import sys


def main() -> None:
    """As `asvit_deploy.cli.main.main`, and an interrupt while that is imported ends alike."""
    try:
        from asvit_deploy.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; nothing was changed.\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
