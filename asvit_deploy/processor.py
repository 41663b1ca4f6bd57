"""The processor that this process runs on."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from asvit_deploy.errors import UserError
from asvit_deploy.text import shortened


def cpu_name() -> str:
    """As the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def processes_here() -> int:
    """How many processes a launcher says that it started on this machine, this one among them.

    Raises:
        UserError: LOCAL_WORLD_SIZE is no such number.
    """
    said = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not (said.isascii() and said.isdecimal() and int(said[:9]) > 0):
        raise UserError(
            f"LOCAL_WORLD_SIZE is {shortened(repr(said), 60)}, and not how many processes run on "
            "this machine; start them with torchrun, or unset it"
        )
    return int(said[:9])


def require_threads(threads: int) -> int:
    """The number itself, once so many threads have a core each; 0 leaves the choice to a runtime.

    Raises:
        UserError: it is negative, or there are fewer cores.
    """
    cores = usable_cores()
    if not 0 <= threads <= cores:
        has = f"this machine has {cores} core{'s' * (cores > 1)} for this process"
        raise UserError(f"threads is {threads}; {has}: give 1 to {cores}, or 0 for all")
    return threads


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """PyTorch computes in so many threads meanwhile; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
