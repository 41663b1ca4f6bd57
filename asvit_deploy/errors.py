"""The ways in which a command, or its function, ends badly on purpose."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one line that names the thing, what is wrong and what to do. Exit code 2."""


class CheckFailed(Exception):
    """A check ran to its end and did not pass. Exit code 1."""


class Interrupted(Exception):
    """A training run was asked to stop; its state is saved. Exit code 130."""


def shortened(name: object, most: int = 300) -> str:
    """A path or a name as a message shows it: of one that no file can have, both ends."""
    text = str(name)
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 4 :]}"
