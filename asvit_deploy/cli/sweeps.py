"""A sweep of `bench` for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asvit_deploy.evaluation.sweep_types import Sweep, SweepPoint, SweepRow
    from asvit_deploy.evaluation.timing import Interval

_SINGLY, _PACKED = "*", "+"
_HEADERS = ["share of MACs", "dense p50 ms", "adaptive", "static", "speed-up over dense (95 %)",
            "share of MACs ratio", "over static (95 %)"]  # fmt: skip


def sweep_text(sweep: Sweep) -> str:
    """A line for each point and runtime, of the fastest rows there are, with notes and verdicts;
    an empty line comes first."""
    from asvit_deploy.evaluation.report import table

    over, rows = sweep["over"], list[list[str]]()
    notes = [f"note: {note}" for note in sweep["notes"]]
    for point in sweep["points"]:
        for runtime in dict.fromkeys(row["runtime"] for row in point["rows"]):
            rows.append(_line(over, point, runtime))
        own = [*point["notes"], *([point["busy"]] if point["busy"] else [])]
        notes += [f"note: {over} {point['at']:g}: {note}" for note in own]
    rounds = [f"{point['runs']} at {point['at']:g}" for point in sweep["points"]]
    said = [f"\nsweep over {over}, ms per picture; rounds: {', '.join(rounds)}",
            table([f"{over}, runtime", *_HEADERS], rows)]  # fmt: skip
    if any(_SINGLY in cell for row in rows for cell in row):
        said.append(f"{_SINGLY} one picture after the other, which is faster here than the batch")
    if any(cell.endswith(_PACKED) for row in rows for cell in row):
        said.append(f"{_PACKED} packed: linear layers on the rows of all pictures, no padding")
    return "\n".join([*said, *notes, *(f"verdict: {line}" for line in sweep["verdict"])])


def _line(over: str, point: SweepPoint, runtime: str) -> list[str]:
    fastest: dict[str, SweepRow] = {}
    for row in sorted(point["rows"], key=lambda row: -row["p50_ms"]):
        if row["runtime"] == runtime:
            fastest[row["kind"]] = row
    precision = fastest["adaptive"]["precision"]
    name = f"{over} {point['at']:g}, {runtime}" + f", {precision}" * (precision != "float32")
    times = [_time(fastest.get(kind)) for kind in ("dense", "adaptive", "static")]
    own = fastest["adaptive"]
    ratios = (own.get("speedup"), own.get("share_of_macs_ratio"), own.get("over_static"))
    return [name, f"{point['macs']['share']:.3f}", *times, *map(interval_text, ratios)]


def _time(row: SweepRow | None) -> str:
    if row is None:
        return "-"
    return f"{row['p50_ms']:.2f}{_SINGLY * row['singly']}{_PACKED * row['packed']}"


def interval_text(found: Interval | None) -> str:
    """A figure with its interval; a dash where there is none."""
    if found is None:
        return "-"
    return f"{found['value']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
