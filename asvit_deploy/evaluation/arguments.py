"""Arguments of the functions here that are the commands' options too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from asvit_deploy.errors import UserError
from asvit_deploy.status import hide_bar


def path_of(value: str | Path | None) -> Path | None:
    """A path, or None."""
    return None if value is None else Path(value)


def require_least(least: int, **values: int) -> None:
    """Raise UserError for the first of these that is smaller."""
    for name, value in values.items():
        if value < least:
            raise UserError(f"{name} is {value}; give {least} or more")


def bar(say: Callable[[str], None], **options: Any) -> Any:
    """A progress bar on a terminal's stderr, for whoever does not want silence."""
    from tqdm import tqdm

    return tqdm(disable=hide_bar(say), leave=False, **options)
