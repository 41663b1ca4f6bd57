"""`bench` of an engine: GPU and wall time beside dense and static top-k ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

from asvit_deploy.page.bench import MACS, gain_cell, speed_figure
from asvit_deploy.page.facts import Cell, Cloud, Facts, Histograms, Lines, Series, Table, Timed
from asvit_deploy.page.schema import (
    ACCOUNT,
    AGREEMENT,
    COMMON,
    INTERVAL,
    count,
    each,
    long_text,
    named,
    one_of,
    positive,
    record,
    text,
)
from asvit_deploy.page.wording import NONE, agreed, agreement_figure, kept, ms, several

_CLOCK = record({"p50": positive}, {"p90": positive, "p99": positive})
_ROW = record(
    {"name": text, "kind": one_of("adaptive", "dense", "top-k"), "wall_ms": _CLOCK},
    {"gpu_ms": _CLOCK, "enqueue_ms": _CLOCK, "speedup": INTERVAL},
)
_POINT = record({"kept": each(count, 200)}, {"gpu_ms": positive, "wall_ms": positive})

SCHEMA = record({"kind": text, "model": long_text}, {
    **COMMON, **ACCOUNT, "arch": text, "flavour": text, "version": text, "precision": text,
    "mode": text, "gpu": text, "warmup": count, "runs": count, "images": text,
    "image_count": count, "macs": MACS, "agreement": AGREEMENT, "rows": each(_ROW, 200),
    "against_kept": named(each(_POINT), 50), "verdict": text,
})  # fmt: skip


def tell(report: dict[str, Any]) -> Facts:
    machine = dict(report["machine"] or {})
    if report["gpu"]:
        machine["gpu"] = report["gpu"]
    facts = Facts(report["model"], "bench of an engine", report["sha256"],
                  command=report["command"], machine=machine or None)  # fmt: skip
    rows = report["rows"] or []
    best = min((row for row in rows if row["kind"] == "adaptive" and row["speedup"]),
               key=lambda row: row["wall_ms"]["p50"], default=None)  # fmt: skip
    if best:
        rounds = f", {several(report['runs'], 'round')}" if report["runs"] else ""
        where = f"on {report['gpu']}" if report["gpu"] else "on the GPU"
        facts.figures.append(speed_figure(
            best["speedup"], best["wall_ms"]["p50"], where,
            f"; {ms(best['wall_ms']['p50'])} ms{rounds}",
        ))  # fmt: skip
    if figure := agreement_figure(report["agreement"], report["image_count"], 2):
        facts.figures.append(figure)
    _variants(facts, report, rows)
    own = agreed(report["agreement"], report["image_count"])
    same = {"value": 1.0, "low": 1.0, "high": 1.0}
    roles: dict[str, tuple[Any, dict[str, float] | None]] = {
        "adaptive": ("own", own), "dense": ("dense", same), "top-k": ("other", None),
    }  # fmt: skip
    facts.timed = [Timed(place, row["name"], row["wall_ms"]["p50"], *roles[row["kind"]])
                   for place, row in enumerate(rows, 1)]  # fmt: skip
    _over_kept(facts, report)
    if not rows:
        facts.missing.append("no variant was timed, so there is no latency and no speed-up")
    return facts


def _variants(facts: Facts, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    body: list[list[Cell | str]] = []
    for place, row in enumerate(rows, 1):
        wall = row["wall_ms"]
        clocks = [wall["p50"], wall["p90"], wall["p99"]]
        others = [row[clock] and row[clock]["p50"] for clock in ("gpu_ms", "enqueue_ms")]
        body.append([
            Cell(row["name"], number=str(place)), *(NONE if one is None else ms(one)
                                         for one in (*clocks, *others)),
            "1" if row["kind"] == "dense" else gain_cell(row["speedup"]),
        ])  # fmt: skip
    made = " ".join(filter(None, (report["flavour"], report["version"], report["precision"])))
    said = [part for part in (report["gpu"], report["images"]) if part]
    if (macs := report["macs"]) and macs["mean_kept"]:
        said.append(f"tokens kept per stage: {kept(macs['mean_kept'], macs['image_tokens'])}")
    facts.add("variants", Table(
        f"batch 1, {made}" if made else "batch 1",
        ["engine", "wall p50 ms", "p90 ms", "p99 ms", "GPU p50 ms", "enqueue p50 ms",
         "speed-up over dense (95 %)"], body, "; ".join(said),
    ))  # fmt: skip
    if report["verdict"]:
        facts.add("variants", Lines([f"Verdict of the bench: {report['verdict']}."]))


def _over_kept(facts: Facts, report: dict[str, Any]) -> None:
    series = []
    points: list[dict[str, Any]] = []
    for name, found in (report["against_kept"] or {}).items():
        points = found or points
        placed = [(sum(one["kept"]) / len(one["kept"]), one["wall_ms"]) for one in found
                  if one["kept"] and one["wall_ms"] is not None]  # fmt: skip
        if placed:
            series.append(Series(name, placed))
    if series:
        facts.add("kept", Cloud("batch 1, wall time: a point for each picture",
                                "image tokens, mean over the stages", "ms", series))  # fmt: skip
    stages = min((len(point["kept"]) for point in points), default=0)
    tokens = (report["macs"] or {}).get("image_tokens")
    if stages and tokens:
        counts = [Counter(point["kept"][stage] for point in points) for stage in range(stages)]
        facts.histograms = Histograms(
            report["images"] or "pictures of the bench",
            [(f"after stage {stage}", [found[k] for k in range(min(tokens, 20_000) + 1)])
             for stage, found in enumerate(counts, 1)],
        )  # fmt: skip
