"""Text of others in lines of ours: nothing in it steers a terminal, and it has an end."""

from __future__ import annotations

import unicodedata

MOST_LINE = 1000  # characters of a line; the longest of ours, with two paths, has some 600
_MOST_NAME = 300  # of a path or a name in it
# Controls, halves of characters (bytes of a file's name that are no text), characters that mean
# what a font says, and separators of lines.
# Of what has no width only the joiners stay, which words of some scripts and emoji are made with:
# the others turn the direction of what follows, or hide.
_STEERING = frozenset(("Cc", "Cs", "Co", "Zl", "Zp"))
_JOINERS = "\u200c\u200d"


def _steers(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind in _STEERING or (kind == "Cf" and character not in _JOINERS)


def printable(text: str, keep: str = "") -> str:
    """The text with whatever would steer a terminal written out, as `\\x1b`.

    Args:
        keep: characters that stay nevertheless.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if c not in keep and _steers(c) else c for c in text)


def shortened(name: object, most: int = _MOST_NAME) -> str:
    """A path or a name as a message shows it: `printable`, and of a long one both ends."""
    text = str(name)
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-most // 4 :]}"
    return printable(text)


def one_line(text: str, most: int = MOST_LINE) -> str:
    """What a message says, in one line that any terminal shows; of a long one both ends."""
    # More than that is cut away, also before each character is looked at.
    if len(text) > 4 * most:
        text = f"{text[: 2 * most]}…{text[-2 * most :]}"
    line = printable(" ".join(text.replace("\t", " ").splitlines()))
    if len(line) > most:
        line = f"{line[: most * 3 // 5]}…{line[-most // 3 :]}"
    return line
