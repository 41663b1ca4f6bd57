"""The order of class folders: by number where all are numbers, else by text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from asvit_deploy.errors import UserError


def number_of(name: str) -> str | None:
    """A name of digits alone without its leading zeros, or None: "002" -> "2", "000" -> "0"."""
    # Not int(): it refuses thousands of digits, and str.isdigit takes other scripts' and "²".
    return (name.lstrip("0") or "0") if name.isascii() and name.isdigit() else None


def in_order(names: Iterable[str], where: Path) -> list[str]:
    """Class folders in the order of their labels: "2" before "10", "002" among them as 2.

    Where a single one is no number, all go by text, as image folders are read everywhere.

    Args:
        where: what messages call their folder.

    Raises:
        UserError: two names are the same number.
    """
    ordered = sorted(names)
    numbers = [number_of(name) for name in ordered]
    if None in numbers:
        return ordered
    by_number = sorted(zip(numbers, ordered), key=lambda pair: (len(pair[0] or ""), pair))
    for (one, first), (other, second) in pairwise(by_number):
        if one == other:
            raise UserError(
                f"{where} has the class folders {first} and {second}, which are the same number; "
                "rename or join them"
            )
    return [name for _, name in by_number]


def orders_differ(names: Iterable[str]) -> bool:
    """Whether these class names, in order, would stand otherwise as mere text."""
    listed = list(names)
    return listed != sorted(listed)
