"""The ways in which a command, or its function, ends badly on purpose."""

from __future__ import annotations

from asvit_deploy.text import MOST_LINE, one_line, shortened

__all__ = ["CheckFailed", "Interrupted", "UserError", "shortened"]


class _OneLine(Exception):
    """Says one line, whatever names and values it quotes: see `text.one_line`."""

    most = MOST_LINE

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message, self.most))


class UserError(_OneLine):
    """Bad input: one line that names the thing, what is wrong and what to do. Exit code 2."""


class CheckFailed(_OneLine):
    """A check ran to its end and did not pass. Exit code 1."""

    most = 4 * MOST_LINE  # it may list several reasons


class Interrupted(_OneLine):
    """A training run was asked to stop; its state is saved. Exit code 130."""
