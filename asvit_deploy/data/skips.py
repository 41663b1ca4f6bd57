"""Unreadable pictures: how many may be passed over, and which were."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from asvit_deploy.data.decode import PictureError
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say

_NAMED = 10  # on stderr, one by one


def too_many(first: str, count: int, limit: int) -> UserError:
    """What ends a command, after what it says of one of those pictures."""
    return UserError(
        f"{first}, which makes {count} where --skip-limit allows {limit}; repair it, or raise the "
        "limit"
    )


@dataclass
class Skips:
    """What `--skip-limit` counts, across every pass over the same pictures.

    Attributes:
        limit: so many different pictures may be unreadable.
        say: gets a line on each of the first few, and one where there are more.
        reasons: why, by the name of the picture.
    """

    limit: int = 0
    say: Say | None = None
    reasons: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reasons)

    def __contains__(self, name: object) -> bool:
        return name in self.reasons

    def add(self, name: str, error: PictureError) -> None:
        """Pass a picture over; one that was passed over before costs nothing.

        Raises:
            UserError: `error` itself where none may be, or that it is one too many.
        """
        if name in self.reasons:
            return
        if self.limit == 0:
            raise error
        self.reasons[name] = error.reason
        if len(self) > self.limit:
            raise too_many(str(error), len(self), self.limit)
        if self.say and len(self) <= _NAMED:
            self.say(f"skipped: {error}")
        elif self.say and len(self) == _NAMED + 1:
            self.say("skipped: more, which are counted and not named")

    def merge(self, reasons: dict[str, str]) -> None:
        """Count those that other processes passed over too.

        Raises:
            UserError: together they are more than the limit.
        """
        self.reasons |= reasons
        if len(self) > self.limit:
            raise too_many(f"cannot read {min(self.reasons)}", len(self), self.limit)

    def by_reason(self) -> dict[str, int]:
        """How many for which reason, most first."""
        return dict(Counter(self.reasons.values()).most_common())

    def summary(self) -> str:
        """Such as `3 skipped (empty 2, broken 1)`; empty where none was."""
        parts = ", ".join(f"{reason} {count}" for reason, count in self.by_reason().items())
        return f"{len(self)} skipped ({parts})" if self.reasons else ""
