"""How long a run has, how much of it is left, and what was left out for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from asvit_deploy.status import Say, hide_bar


class OutOfTime(Exception):
    """`--minutes` ended before what a verdict needs was measured."""


class Clock:
    """A deadline, and what was dropped for it.

    Args:
        minutes: None: no end.

    Attributes:
        left_out: what was not measured, and why: a line each.
    """

    def __init__(self, minutes: float | None, say: Say) -> None:
        self.started = time.monotonic()
        self.end = None if minutes is None else self.started + 60 * minutes
        self.minutes, self.say, self.left_out = minutes, say, list[str]()

    @property
    def spent(self) -> float:
        """Seconds."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.end is None else self.end - time.monotonic()

    def require(self) -> None:
        """Raises OutOfTime once there is no time left."""
        if self.left <= 0:
            raise OutOfTime

    def allows(self, seconds: float, what: str, reserve: float = 0.0) -> bool:
        """Whether there is time for something that can be left out; if not, that is noted.

        Args:
            seconds: that it would take.
            reserve: seconds that what comes after needs.
        """
        if seconds + reserve <= self.left:
            return True
        self.leave_out(f"{what}: about {seconds:.0f} s more than --minutes {self.minutes:g} has")
        return False

    def leave_out(self, line: str) -> None:
        self.left_out.append(line)
        self.say(f"left out: {line}")


class Steps:
    """One progress bar for all steps, in seconds of work as they are estimated."""

    def __init__(self, say: Say) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=1.0, desc="tune", disable=hide_bar(say), leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left",
        )  # fmt: skip

    @contextmanager
    def step(self, name: str, share: float, total: int) -> Iterator[Callable[[], None]]:
        """A step that takes about this share of the run, in `total` ticks."""
        begin, ticks = self._bar.n, 0
        self._bar.set_description_str(f"tune: {name}", refresh=True)

        def tick() -> None:
            nonlocal ticks
            ticks += 1
            self._bar.update(begin + share * min(1.0, ticks / max(total, 1)) - self._bar.n)

        yield tick
        self._bar.update(begin + share - self._bar.n)

    def close(self) -> None:
        self._bar.close()
