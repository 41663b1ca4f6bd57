"""Arguments as people write them, turned into what the rooms below take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asvit_deploy.errors import UserError
from asvit_deploy.status import Say, silent

if TYPE_CHECKING:
    from asvit_deploy.checkpoints.facts import Given
    from asvit_deploy.checkpoints.load import Checkpoint

PathLike = str | os.PathLike[str]
# A number for each of red, green and blue, or one for all.
Channels = float | Sequence[float]


def path_of(value: PathLike) -> Path:
    """Raises UserError for an empty text, which would silently be the current folder."""
    if os.fspath(value) == "":
        raise UserError("an empty path names nothing; name a file or a folder")
    return Path(value)


def optional_path(value: PathLike | None) -> Path | None:
    """As `path_of`; None stays."""
    return None if value is None else path_of(value)


def checkpoint_path(value: PathLike, say: Say = silent) -> Path:
    """Where a checkpoint lies: a file or a folder; the word `default` names the one that the
    package carries, and `hf-hub:NAME` a repository, which is downloaded where it must be.

    Args:
        say: gets a line on what of the hub was taken.

    Raises:
        UserError: an empty text, an installation without that checkpoint, or as `hub.folder_of`.
    """
    text = os.fspath(value)
    if text == "default" and not Path(text).exists():
        from asvit_deploy.checkpoints import default_checkpoint

        return default_checkpoint()
    if text.startswith("hf-hub:"):
        from asvit_deploy.checkpoints import hub

        if hub.is_name(text):
            return hub.folder_of(text, say)
    return path_of(text)


def checkpoint_files(path: Path) -> tuple[Path, ...]:
    """The files that a checkpoint is read from, which no output may replace.

    Raises:
        UserError: a folder without weights, or an index whose shards are missing.
    """
    from asvit_deploy.checkpoints.places import files_of

    return files_of(path)


def require_one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises UserError for a value that the option of that name does not have."""
    if value not in allowed:
        raise UserError(f"{name}={value!r} cannot be used; pass one of {', '.join(allowed)}")


def require_whole(**numbers: Any) -> None:
    """Raises UserError for a value, by its argument's name, that is neither None nor a whole
    number."""
    for name, value in numbers.items():
        if value is not None and not _is_whole(value):
            raise UserError(f"{name}={value!r} cannot be used; pass a whole number")


def require_at_least(least: int, **numbers: Any) -> None:
    """As `require_whole`, for numbers that must not be smaller than that either."""
    for name, value in numbers.items():
        if value is not None and not (_is_whole(value) and value >= least):
            raise UserError(
                f"{name}={value!r} cannot be used; pass a whole number of at least {least}"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def require_numbers(values: Mapping[str, Any]) -> None:
    """Raises UserError for a value, by its argument's name, that is neither None nor a number."""
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{name}={value!r} cannot be used; pass a number")


def given_facts(
    mean: Channels | None, std: Channels | None, crop_pct: float | None,
    interpolation: str | None, heads: int | None, activation: str | None,
) -> Given:  # fmt: skip
    """What the weights cannot tell and the caller does.

    Raises:
        UserError: one of them is not what it must be.
    """
    from asvit_deploy.checkpoints.facts import Given

    return Given(_three(mean), _three(std), crop_pct, interpolation, heads, activation)


def _three(value: Channels | None) -> Any:
    """One number for each channel; `Given` refuses what is no number."""
    if isinstance(value, (int, float)):
        return (value,) * 3
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def say_load(checkpoint: Checkpoint, say: Say) -> None:
    """What a load took, from where, and what it left out."""
    for line in checkpoint.lines:
        say(line)
