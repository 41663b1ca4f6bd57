"""The two ways a command can end badly on purpose."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one line that names the thing, what is wrong and the mend. Exit code 2."""


class CheckFailed(Exception):
    """A check ran to its end and did not pass. Exit code 1."""
