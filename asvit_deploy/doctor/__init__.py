"""What is installed, what clashes, what works, and what to do about the rest.

Whether a library works is found out by using it, in a child process (see `installation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from asvit_deploy.doctor import machine, packages
from asvit_deploy.doctor.finding import Finding
from asvit_deploy.doctor.installation import Installation
from asvit_deploy.errors import UserError

__all__ = ["Finding", "diagnose"]

Check = Callable[[Installation], list[Finding]]


def diagnose(path: Sequence[str] | None = None) -> list[Finding]:
    """Look at everything; nothing is installed, downloaded or changed.

    `path` stands in for `sys.path`, as the place where packages are looked up.
    """
    installation = Installation.of(path)
    checks = (*packages.CHECKS, *machine.CHECKS)
    with ThreadPoolExecutor(max_workers=max(2, machine.usable_cores() // 2)) as pool:
        groups = pool.map(lambda check: _careful(check, installation), checks)
        return [finding for group in groups for finding in group]


def _careful(check: Check, installation: Installation) -> list[Finding]:
    """A check that fails itself costs its own line, not the others'."""
    try:
        return check(installation)
    except UserError as error:
        detail, _, remedy = str(error).partition("; ")
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        detail, remedy = (
            f"could not be looked at ({said})",
            "report this as a fault of asvit-deploy",
        )
    name = check.__name__.replace("_", " ")
    return [Finding(name, "broken", detail, remedy, check in packages.CORE)]
