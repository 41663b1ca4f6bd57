"""What `bench` reports, and tables for people; JSON goes out as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

from asvit_deploy import sidecar


class Report:
    """What a bench of one artefact found; its fields, in order, are those of the JSON."""

    kind: ClassVar[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the entries of `account` stand beside the others, and what was called."""
        said: dict[str, Any] = {"kind": self.kind}
        for item in fields(self):  # type: ignore[arg-type]  # each kind is a dataclass
            value = getattr(self, item.name)
            said |= value if item.name == "account" else {item.name: value}
        return {**said, "command": sidecar.command_line()}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table; the first column left, the others right."""
    cells = [list(headers), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]

    def line(row: Sequence[str]) -> str:
        padded = [row[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), "| " + " | ".join(rule) + " |", *map(line, cells[1:])])
