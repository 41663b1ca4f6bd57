"""The ways in which a command, or its function, ends badly on purpose."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: one line that names the thing, what is wrong and what to do. Exit code 2."""


class CheckFailed(Exception):
    """A check ran to its end and did not pass. Exit code 1."""


class Interrupted(Exception):
    """A training run was asked to stop; its state is saved. Exit code 130."""
