"""What is installed, what clashes, what works, and what to do about the rest.

Whether a library works is found out by using it, in a child process (see `installation.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from asvit_deploy.doctor import machine, packages
from asvit_deploy.doctor.finding import Finding
from asvit_deploy.doctor.installation import Installation

__all__ = ["Finding", "diagnose"]


def diagnose(path: Sequence[str] | None = None) -> list[Finding]:
    """Look at everything; nothing is installed, downloaded or changed.

    `path` stands in for `sys.path`, as the place where packages are looked up.
    """
    installation = Installation.of(path)
    checks = (*packages.CHECKS, *machine.CHECKS)
    with ThreadPoolExecutor(max_workers=max(2, machine.usable_cores() // 2)) as pool:
        groups = pool.map(lambda check: check(installation), checks)
        return [finding for group in groups for finding in group]
