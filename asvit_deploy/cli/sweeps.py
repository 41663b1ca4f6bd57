"""A sweep of `bench` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asvit_deploy.evaluation.sweep_types import Sweep, SweepPoint
    from asvit_deploy.evaluation.timing import Interval

_HEADERS = ["variant", "p50 ms", "GMACs", "speed-up over dense (95 %)", "share of MACs ratio",
            "over static (95 %)"]  # fmt: skip


def sweep_text(sweep: Sweep) -> str:
    """The table of its points, notes and verdicts; an empty line comes first."""
    from asvit_deploy.evaluation.report import table

    over, rows = sweep["over"], list[list[str]]()
    notes = [f"note: {note}" for note in sweep["notes"]]
    for point in sweep["points"]:
        rows += _rows(point)
        notes += [f"note: at {over} {point['at']:g}: {note}" for note in point["notes"]]
    spans = [f"{point['runs']} rounds at {point['at']:g}" for point in sweep["points"]]
    said = [f"\nsweep over {over}, times and MACs per picture: {', '.join(spans)}",
            table([over, "share of MACs", *_HEADERS], rows)]  # fmt: skip
    return "\n".join([*said, *notes, *(f"verdict: {line}" for line in sweep["verdict"])])


def _rows(point: SweepPoint) -> list[list[str]]:
    """Value and share of the MACs stand in a point's first row alone."""
    rows = []
    for i, row in enumerate(point["rows"]):
        at = ["", ""] if i else [f"{point['at']:g}", f"{point['macs']['share']:.3f}"]
        share = row.get("share_of_macs_ratio")
        rows.append([
            *at, row["name"], f"{row['p50_ms']:.2f}", f"{row['gmacs']:.3f}",
            _interval(row.get("speedup"), "1" if row["kind"] == "dense" else "-"),
            _interval(share, "-"), _interval(row.get("over_static"), "-"),
        ])  # fmt: skip
    return rows


def _interval(found: Interval | None, otherwise: str) -> str:
    if found is None:
        return otherwise
    return f"{found['value']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
