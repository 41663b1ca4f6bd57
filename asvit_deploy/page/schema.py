"""What a foreign JSON value must be, in plain code: looked at once, where it comes in.

A reader takes a value and the place that it stands at, and returns it clean: numbers are finite and
of a size that something real has, texts are short and hold nothing that steers a terminal or turns
a line around. What is not in a schema is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from asvit_deploy.text import printable

Reader = Callable[[object, str], Any]

LONGEST = 300  # characters of a text that are shown
_LARGEST = 1e15  # of any number that is measured or counted here
_MOST = 200_000  # entries of one list


class Refused(ValueError):
    """One line on what stands where, and what belongs there."""


def _refuse(value: object, at: str, wanted: str) -> Refused:
    shown = f"a {type(value).__name__}" if isinstance(value, (dict, list)) else _shown(value)
    return Refused(f"{at or 'it'} is {shown}, where {wanted} belongs")


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]  # type: ignore[index]
    said = repr(clean(value)) if isinstance(value, str) else str(value)
    return said if len(said) <= 40 else f"{said[:38]}…"


def clean(text: str, most: int = LONGEST) -> str:
    """A text as a page may show it: one line, its middle left out where it is long, what cannot be
    seen (control characters, marks that turn a line around, lone surrogates) as Python escapes it.
    """
    if len(text) > most:
        text = f"{text[: most * 2 // 3]}…{text[-(most // 3) :]}"
    return printable(" ".join(text.split()))


def text(value: object, at: str) -> str:
    if not isinstance(value, str):
        raise _refuse(value, at, "a text")
    return clean(value)


def long_text(value: object, at: str) -> str:
    """A command line or a path, of which no more is left out than must be."""
    if not isinstance(value, str):
        raise _refuse(value, at, "a text")
    return clean(value, 4000)


def flag(value: object, at: str) -> bool:
    if not isinstance(value, bool):
        raise _refuse(value, at, "true or false")
    return value


def number(value: object, at: str) -> float:
    """A finite number of a size that something measured has."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _refuse(value, at, "a number")
    if not abs(value) <= _LARGEST:  # NaN too
        raise _refuse(value, at, f"a finite number up to {_LARGEST:.0e}")
    return float(value)


def any_number(value: object, at: str) -> float:
    """A number that a broken network may have made NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return number(value, at)


def positive(value: object, at: str) -> float:
    found = number(value, at)
    if found < 0:
        raise _refuse(value, at, "no negative number")
    return found


def share(value: object, at: str) -> float:
    found = number(value, at)
    if not -1e-9 <= found <= 1 + 1e-9:
        raise _refuse(value, at, "a share from 0 to 1")
    return min(max(found, 0.0), 1.0)


def count(value: object, at: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refuse(value, at, "a whole number")
    if not 0 <= value <= _LARGEST:
        raise _refuse(value, at, f"a whole number from 0 to {_LARGEST:.0e}")
    return value


def one_of(*known: str) -> Reader:
    def read(value: object, at: str) -> str:
        if value not in known:
            raise _refuse(value, at, f"one of {', '.join(known)}")
        return str(value)

    return read


def plain_name(value: object, at: str) -> str:
    """The name of a file in the folder of the JSON itself, which leads nowhere else; as it is."""
    if not isinstance(value, str):
        raise _refuse(value, at, "the name of a file")
    odd = not value or value in (".", "..") or any(c in value for c in "/\\\0")
    if odd or clean(value) != value or len(value.encode("utf-8", "replace")) > 255:
        raise _refuse(value, at, "the plain name of a file in the same folder")
    return value


def maybe(reader: Reader) -> Reader:
    """None where there is none."""
    return lambda value, at: None if value is None else reader(value, at)


def each(reader: Reader, most: int = _MOST) -> Reader:
    """A list, all of one kind."""

    def read(value: object, at: str) -> list[Any]:
        if not isinstance(value, list):
            raise _refuse(value, at, "a list")
        if len(value) > most:
            raise Refused(f"{at} has {len(value):,} entries, where {most:,} is the most")
        return [reader(one, f"{at}[{place}]") for place, one in enumerate(value)]

    return read


def pair(reader: Reader) -> Reader:
    """A list of exactly two, as a tuple."""

    def read(value: object, at: str) -> tuple[Any, Any]:
        if not isinstance(value, list) or len(value) != 2:
            raise _refuse(value, at, "a list of two")
        return reader(value[0], f"{at}[0]"), reader(value[1], f"{at}[1]")

    return read


def named(reader: Reader, most: int = 1000) -> Reader:
    """An object of any names, all of one kind."""

    def read(value: object, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refuse(value, at, "an object")
        if len(value) > most:
            raise Refused(f"{at} has {len(value):,} entries, where {most:,} is the most")
        return {clean(name): reader(one, f"{at}.{clean(name, 60)}") for name, one in value.items()}

    return read


def record(needed: Mapping[str, Reader], other: Mapping[str, Reader] | None = None) -> Reader:
    """An object with these fields; of `other` ones, those that are not there or null are None."""
    readers = {**needed, **{name: maybe(reader) for name, reader in (other or {}).items()}}

    def read(value: object, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refuse(value, at, "an object")
        for name in needed:
            if name not in value:
                raise Refused(f"{at or 'it'} has no {name!r}")
        dot = f"{at}." if at else ""
        return {name: read_one(value.get(name), dot + name) for name, read_one in readers.items()}

    return read


INTERVAL = record({"value": number, "low": number, "high": number})
MACHINE = record({}, {
    "cpu": text, "cores": count, "system": text, "python": text, "versions": named(text, 40),
})  # fmt: skip
ACCOUNT = {
    "skipped": count, "skipped_by_reason": named(count), "passed_over": named(count),
}  # fmt: skip
# How outputs agree with the dense network's: of classes, of embeddings, of one score.
AGREEMENT = record({}, {
    "top1": share, "top5": share, "kl": number, "cosine": number, "low": number, "high": number,
    "p10": number, "neighbour": share, "score_error": number,
})  # fmt: skip
# What every report may say of itself.
COMMON = {"command": long_text, "machine": MACHINE, "sha256": text}
