"""Status lines: one way for all rooms to say what they do, silent unless somebody listens."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

Say = Callable[[str], None]


def silent(text: str) -> None:
    """The default of every `say`: no line is printed, and no progress bar is shown."""


def first_process() -> bool:
    """Whether this process speaks for all that `torchrun` or `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def hide_bar(say: Say) -> bool | None:
    """tqdm's `disable`: True where nobody listens or stderr is closed, else None, which shows a bar
    on a terminal."""
    return True if say is silent or sys.stderr is None else None
