"""Class names from files: text, JSON, and the `config.json` of transformers and timm."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asvit_deploy.bounded import MOST_TEXT, parse_json, read_bounded
from asvit_deploy.classes import imagenet
from asvit_deploy.classes.order import number_of
from asvit_deploy.errors import UserError

MAX_NAME = 1000  # characters
_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of surrogate pairs, line ends
_PLACEHOLDER = re.compile(r"LABEL_\d+")


class Unusable(UserError):
    """A file is what it should be, but its names are not: two alike, no text."""


class _Pairs(dict):
    """A JSON object; `twice` is a key that it has twice, which a dict would hide."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.twice = None
        if len(self) < len(pairs):
            self.twice = Counter(key for key, _ in pairs).most_common(1)[0][0]


def read_names(path: Path, least: int = 1) -> list[str]:
    """The names of a network's outputs, in their order.

    Args:
        path: UTF-8 text with a name a line; or JSON: a list, an object from number to name or
            from name to number, or a `config.json` with `id2label`, `label2id` or `label_names`.
        least: fewer names are refused.

    Raises:
        UserError: it is none of these, holds a name twice, or is not to be read; ImageNet-1k's own
            doubles get their WordNet ids.
    """
    text = _text_of(path)
    listed = _listed_json(path, text) if _is_json(path, text) else _lines(path, text)
    names = _checked(path, listed)
    if len(names) < least:
        raise UserError(f"{path} holds {len(names)} class name; write at least {least} into it")
    return names


def names_of_config(path: Path) -> list[str] | None:
    """The names that a `config.json` gives, or None where it gives none.

    Raises:
        UserError: as `read_names`.
    """
    content = _parsed(path, _text_of(path))
    found = _of_config(path, content) if isinstance(content, dict) else None
    return None if found is None else _checked(path, found)


def names_in_config(content: dict[str, Any]) -> list[str] | None:
    """As `names_of_config`, of a config in memory."""
    path = Path("config")
    found = _of_config(path, content)
    return None if found is None else _checked(path, found)


def _text_of(path: Path) -> str:
    try:
        text = read_bounded(path, MOST_TEXT, "file of class names").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text; write a class name a line into it") from None
    if not text.strip():
        raise UserError(f"{path} is empty; write a class name a line into it")
    return text


def _is_json(path: Path, text: str) -> bool:
    """By its ending, or as it begins: with a bracket, then a string or the line's end."""
    return path.suffix.lower() == ".json" or bool(re.match(r'\s*[\[{]\s*("|$)', text, re.M))


def _lines(path: Path, text: str) -> list[str]:
    # Not splitlines: it takes a dozen other characters for line ends.
    names = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    while not names[-1]:
        names.pop()
    if "" in names:
        raise UserError(
            f"{path} must hold a class name a line and no empty line between them; line "
            f"{names.index('') + 1} is empty"
        )
    return names


def _parsed(path: Path, text: str) -> Any:
    try:
        return parse_json(text, object_pairs_hook=_Pairs)
    except ValueError as error:
        raise UserError(f"{path} is no whole JSON file: {error}; copy or write it again") from None


def _listed_json(path: Path, text: str) -> list[Any]:
    content = _parsed(path, text)
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no class names; write a list of them into it")
    named = _of_config(path, content)
    if named is not None:
        return named
    if any(key in content for key in ("id2label", "label2id", "label_names")):
        raise UserError(
            f"{path} holds only placeholders such as LABEL_0; write the real class names into it"
        )
    if content and all(type(number) is int for number in content.values()):
        return _by_id(path, "the file", _turned(path, "the file", content))  # name to number
    if not content or not any(number_of(key) for key in content):
        raise UserError(
            f"{path} has none of id2label, label2id and label_names, and its keys are no numbers; "
            "name a file of class names"
        )
    return _by_id(path, "the file", content)


def _of_config(path: Path, content: dict[str, Any]) -> list[Any] | None:
    """`id2label` before `label2id` before timm's `label_names`; None where all are placeholders."""
    inner = content.get("pretrained_cfg")
    places = [content, inner if isinstance(inner, dict) else {}]
    for key in ("id2label", "label2id", "label_names"):
        for place in places:
            found = place.get(key)
            if found is None:
                continue
            if key == "label2id":
                found = _turned(path, key, found)
            listed = found if isinstance(found, list) else _by_id(path, key, found)
            if listed and not all(_PLACEHOLDER.fullmatch(str(name)) for name in listed):
                return listed
    return None


def _turned(path: Path, key: str, found: Any) -> Any:
    """Name to number as number to name."""
    if not isinstance(found, dict):
        return found
    if len({str(i) for i in found.values()}) < len(found):
        raise UserError(f"{path}: {key} gives one number to several names; correct it")
    return _Pairs([(str(i), name) for name, i in found.items()])


def _by_id(path: Path, key: str, found: Any) -> list[Any]:
    """The values of an object whose keys are 0, 1, …, in that order."""
    if not isinstance(found, dict):
        raise UserError(f"{path}: {key} is no list, nor an object from number to name; correct it")
    if (twice := getattr(found, "twice", None)) is not None:
        raise UserError(f"{path}: {key} names number {twice} twice; correct it")
    numbers = {}
    for text, name in found.items():
        number = number_of(text)
        if number is None:
            raise UserError(f"{path}: {key} has {_short(text)} where a number is due; correct it")
        if number in numbers:
            raise UserError(f"{path}: {key} names number {number} twice; correct it")
        numbers[number] = name
    for i in range(len(numbers)):
        if str(i) not in numbers:
            raise UserError(
                f"{path}: {key} has {len(numbers)} names but none for number {i}; number them from "
                "0 without gaps"
            )
    return [numbers[str(i)] for i in range(len(numbers))]


def _checked(path: Path, names: Sequence[Any]) -> list[str]:
    """Real names, all different."""
    if not names:
        raise Unusable(f"{path} holds no class name; write them into it")
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise Unusable(f"{path}: the name of class {i} is {_short(name)}, no text; correct it")
        if len(name) > MAX_NAME:
            raise Unusable(
                f"{path}: the name of class {i} has {len(name):,} characters; name a file of class "
                "names"
            )
        if any(unicodedata.category(c) in _NO_TEXT for c in name.strip()):
            raise Unusable(
                f"{path}: the name of class {i}, {_short(name)}, is no plain text; correct it"
            )
    unique = imagenet.distinct([name.strip() for name in names])
    seen: dict[str, int] = {}
    for i, name in enumerate(unique):
        if name in seen:
            raise Unusable(
                f"{path} holds the class {_short(name)} twice, as number {seen[name]} and {i}; "
                "make the names differ"
            )
        seen[name] = i
    return unique


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 40 else f"{text[:40]}…")
