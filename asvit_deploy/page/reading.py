"""Reports as they come in: files or dicts, each checked once against the schema of its kind."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asvit_deploy import sidecar
from asvit_deploy.bounded import MOST_TEXT, parse_json, read_bounded
from asvit_deploy.errors import UserError, shortened
from asvit_deploy.page.kinds import KINDS, VISUALIZE
from asvit_deploy.page.schema import Refused, clean

_MOST_BYTES = 2 * MOST_TEXT  # a check that failed lists every flip
_MOST_REPORTS = 60
_DEEPEST = 40  # brackets in each other; a report has eight
_NOUN = "JSON report"


@dataclass(frozen=True)
class Report:
    """One report, clean: what its kind's schema has, and nothing else.

    Attributes:
        folder: where the files lie that it names; None where it came without one.
    """

    kind: str
    fields: dict[str, Any]
    folder: Path | None


def read_files(paths: Sequence[Path]) -> list[Report]:
    """The reports of JSON files, in their order.

    Raises:
        UserError: there is none, one is named twice or says what another says, cannot be read, or
            is no report of this tool.
    """
    if not paths:
        raise UserError("no JSON file to make a page of; name what `bench -o` and others wrote")
    _refuse_twins(paths)
    found: list[Report] = []
    seen: dict[str, Path] = {}
    for path in paths:
        values = _values(path)
        for value in values:
            text = json.dumps(value, sort_keys=True)
            if text in seen:
                raise UserError(f"{path} says what {seen[text]} says already; leave it out")
            seen[text] = path
        found += [_report(value, str(path), path.parent) for value in values]
    return _few(found)


def of_dicts(reports: Sequence[dict[str, Any]]) -> list[Report]:
    """Reports as commands make them, before they are JSON.

    Raises:
        UserError: as `read_files`.
    """
    # As if it had been written and read: the page is the same either way.
    return _few([_report(value, "the report", None) for value in json.loads(json.dumps(reports))])


def _few(reports: list[Report]) -> list[Report]:
    if len(reports) > _MOST_REPORTS:
        raise UserError(
            f"{len(reports)} reports are too many for one page, which has {_MOST_REPORTS} at most; "
            "join fewer"
        )
    return reports


def _refuse_twins(paths: Sequence[Path]) -> None:
    seen = set[str]()
    for path in paths:
        place = os.path.realpath(path)
        if place in seen:
            raise UserError(f"{path} is named twice; name it once")
        seen.add(place)


def _values(path: Path) -> list[object]:
    """What a file holds: one report, or a list of some."""
    data = read_bounded(path, _MOST_BYTES, _NOUN)
    try:
        value = parse_json(data)
        _require_flat(value)
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{path} is no whole JSON ({reason}); it may be of a run that was cut off: name what "
            "`bench -o`, `check --json` and others wrote"
        ) from None
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"{path} holds no report; its list is empty")
    if any(isinstance(one, dict) and one.get("kind") == VISUALIZE for one in values):
        sidecar.read_signed(path, "list of drawings", path.parent.name, "kind")
    return values


def _require_flat(value: object) -> None:
    """Raises ValueError for brackets so deep that looking at them takes too many calls."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for one in level if isinstance(one, (dict, list))
                 for inner in (one.values() if isinstance(one, dict) else one)]  # fmt: skip
        if not level:
            return
    raise ValueError("brackets too deep")


def _report(value: object, name: str, folder: Path | None) -> Report:
    commands = ", ".join(dict.fromkeys(kind.command for kind in KINDS.values()))
    made_by = f"reports come from {commands}"
    if not isinstance(value, dict) or "kind" not in value:
        raise UserError(f"{name} is no report of this tool: it has no kind; {made_by}")
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        said = clean(shortened(kind, 60))
        raise UserError(f"{name} is of kind {said!r}, which no page shows; {made_by}")
    try:
        return Report(kind, KINDS[kind].schema(value, ""), folder)
    except Refused as error:
        raise UserError(
            f"{name}: {error}; make it again with `asvit-deploy {KINDS[kind].command}`"
        ) from None
