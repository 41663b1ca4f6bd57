"""The log of a run: JSON lines beside its output."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asvit_deploy.files import check_writable, write_text


def log_path(output: Path) -> Path:
    """The JSON-lines log of the run that makes `output`."""
    return output.with_suffix(".log.jsonl")


class Log:
    """JSON lines beside the output, one object each; a resumed run drops what it will repeat.

    The file is touched only when there is something to write, and its first line tells the run.

    Args:
        known: what decides the run's result; a log of the same is this run's own.
        step: where the run goes on, 0 for a new one.
        force: replace a log that is not this run's own.

    Raises:
        UserError: another file is in its place and `force` is off.
    """

    def __init__(self, path: Path, known: dict[str, Any], step: int, force: bool) -> None:
        start = {"event": "start", "run": _digest(known)}
        before = list(_events(path)) if step else []
        own = before[:1] == [start]
        check_writable(path, force or own)
        kept = [event for event in before[1:] if event.get("step", math.inf) <= step]
        self._path = path
        self._head: list[dict[str, Any]] | None = [start, *(kept if own else [])]

    def write(self, figures: dict[str, Any]) -> None:
        rounded = json.loads(json.dumps(figures), parse_float=lambda x: float(f"{float(x):.6g}"))
        if self._head is not None:
            write_text(self._path, "".join(json.dumps(event) + "\n" for event in self._head))
            self._head = None
        with open(self._path, "a") as file:
            file.write(json.dumps(rounded) + "\n")


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines; a killed run may leave half a line."""
    text = path.read_text(errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


def _digest(known: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
