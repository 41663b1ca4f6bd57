"""A limit of memory for work on files of others."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Memory:
    """Lowers what the process may take while any block of it is open; blocks may overlap."""

    def __init__(self) -> None:
        self._lock, self._open, self._before = threading.Lock(), 0, (0, 0)

    @contextlib.contextmanager
    def within(self, more: int) -> Iterator[None]:
        """Let this process take `more` bytes beside what it has (Linux)."""
        import resource

        with self._lock:
            if self._open == 0 and (used := _used()) is not None:
                self._before = resource.getrlimit(resource.RLIMIT_DATA)
                soft, hard = self._before
                top = used + more
                resource.setrlimit(
                    resource.RLIMIT_DATA,
                    (top if soft == resource.RLIM_INFINITY else min(soft, top), hard),
                )
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if self._open == 0 and self._before != (0, 0):
                    resource.setrlimit(resource.RLIMIT_DATA, self._before)


def _used() -> int | None:
    """Bytes of private memory that the process may write to; None where no system says so."""
    try:
        with open("/proc/self/status") as status:
            lines = dict(line.partition(":")[::2] for line in status)
        return int(lines["VmData"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


memory = _Memory()
