"""One row of the diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "missing", "clash", "broken"]


@dataclass(frozen=True)
class Finding:
    """One row: what it is, how it stands, the version or the trouble, and the remedy.

    `core` marks what no command of the main path can do without.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""
    core: bool = False

    @property
    def fatal(self) -> bool:
        """Whether the main path suffers."""
        return self.core and self.status != "ok"
