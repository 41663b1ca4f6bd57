"""`bench` of an ONNX file: speed, agreement, latency over kept tokens, sweeps."""

from __future__ import annotations

from typing import Any

from asvit_deploy.page.facts import (
    Cell,
    Cloud,
    Facts,
    Figure,
    Histograms,
    Lines,
    Mood,
    Series,
    Spans,
    Table,
    Timed,
)
from asvit_deploy.page.schema import (
    ACCOUNT,
    AGREEMENT,
    COMMON,
    INTERVAL,
    count,
    each,
    flag,
    long_text,
    named,
    number,
    one_of,
    pair,
    positive,
    record,
    share,
    text,
)
from asvit_deploy.page.wording import (
    NONE,
    agreed,
    agreement_figure,
    kept,
    ms,
    percent,
    several,
    signed,
    times,
)

_LINE = record(
    {"ms_per_token": number, "ms_at_none": number},
    {"r2": number, "pictures": count, "points": each(pair(positive))},
)
_TIMES = {"p50_ms": positive, "p90_ms": positive, "p99_ms": positive}
_ROW = record({"name": text, "runtime": text, "adaptive": flag, **_TIMES}, {
    "precision": text, "way": text, "speedup": INTERVAL, "share_of_macs_ratio": INTERVAL,
    "over_others": named(INTERVAL), "over_kept": _LINE, "first_ms": positive,
    "memory_mib": record({"opened": positive, "peak": positive}),
})  # fmt: skip
MACS = record({}, {
    "dense_gmacs": positive, "adaptive_gmacs": positive, "ratio": positive,
    "mean_kept": each(positive, 200), "image_tokens": count, "share": positive, "asked": positive,
})  # fmt: skip
_SWEEP_ROW = record(
    {"name": text, "runtime": text, "kind": one_of("dense", "adaptive", "static"),
     "p50_ms": positive},
    {"singly": flag, "precision": text, "speedup": INTERVAL, "share_of_macs_ratio": INTERVAL,
     "over_static": INTERVAL},
)  # fmt: skip
_POINT = record({"at": positive, "rows": each(_SWEEP_ROW, 200)},
                {"runs": count, "macs": MACS, "notes": each(text, 200), "busy": text})  # fmt: skip
_SWEEP = record({"over": one_of("batch", "budget", "size"), "points": each(_POINT, 100)},
                {"notes": each(text, 200), "verdict": each(text, 100)})  # fmt: skip
_PROFILE = record({"scoring": share, "compaction": share, "both": share}, {"op": text})

SCHEMA = record({"kind": text, "model": long_text}, {
    **COMMON, **ACCOUNT, "arch": text, "threads": count, "warmup": count, "runs": count,
    "images": text, "image_count": count, "macs": MACS, "rows": each(_ROW, 200),
    "agreement": AGREEMENT, "profile": each(_PROFILE, 20), "notes": each(text, 200), "busy": text,
    "verdict": text, "sweeps": each(_SWEEP, 10), "histogram_kept": each(each(count, 20_000), 200),
    "methods": named(record({}, {"macs_share": share, "agreement": AGREEMENT}), 100),
})  # fmt: skip


def tell(report: dict[str, Any]) -> Facts:
    threads = report["threads"]
    label = several(threads, "thread") if threads else "threads not said"
    facts = Facts(report["model"], f"bench, {label}", report["sha256"],
                  command=report["command"], machine=report["machine"])  # fmt: skip
    rows = report["rows"] or []
    _variants(facts, report, rows, label)
    if best := _best(rows):
        facts.figures.append(_speed(best, rows, label, report))
    if figure := agreement_figure(report["agreement"], report["image_count"], 2):
        facts.figures.append(figure)
    facts.timed = _timed(report, rows)
    _over_kept(facts, rows, label)
    macs = report["macs"]
    if report["histogram_kept"]:
        facts.histograms = Histograms(
            f"{report['images'] or 'pictures of the bench'}",
            [(f"after stage {stage}", counts)
             for stage, counts in enumerate(report["histogram_kept"], 1)],
        )  # fmt: skip
    for sweep in report["sweeps"] or []:
        _sweep(facts, sweep, label)
    facts.notes = [*(report["notes"] or []), *([report["busy"]] if report["busy"] else [])]
    facts.missing = _missing(report, rows, macs)
    return facts


def _missing(
    report: dict[str, Any], rows: list[dict[str, Any]], macs: dict[str, Any] | None
) -> list[str]:
    lacks = []
    if not rows:
        lacks.append("no variant was timed, so there is no latency and no speed-up")
    elif not any(row["speedup"] for row in rows):
        lacks.append("no runtime ran both the dense and the adaptive network: no speed-up")
    if macs is None:
        lacks.append("no MACs")
    if report["agreement"] is None and any(row["adaptive"] for row in rows):
        lacks.append("no agreement with the dense network")
    return lacks


def _best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest row of the model itself that has a dense one beside it."""
    own = [row for row in rows if row["speedup"] and row["way"]]
    return min(own or [row for row in rows if row["speedup"]], key=lambda row: row["p50_ms"],
               default=None)  # fmt: skip


def _speed(
    best: dict[str, Any], rows: list[dict[str, Any]], label: str, report: dict[str, Any]
) -> Figure:
    gain = best["speedup"]
    beside = [row for row in rows if not row["adaptive"] and row["runtime"] == best["runtime"]
              and row["precision"] == best["precision"]]  # fmt: skip
    took = f"; {ms(best['p50_ms'])} ms"
    took += f" in place of {ms(beside[0]['p50_ms'])} ms" if beside else ""
    rounds = f", {several(report['runs'], 'round')}" if report["runs"] else ""
    return speed_figure(
        gain, best["p50_ms"], f"in {best['runtime']}", f"{took}, {label}{rounds}",
        _rival(best["over_others"] or {}),
    )  # fmt: skip


def _rival(others: dict[str, dict[str, float]]) -> str:
    """The dense network elsewhere that is faster for certain, or nothing."""
    ahead = {name: gain for name, gain in others.items() if gain["high"] < 1}
    return min(ahead, key=lambda name: ahead[name]["value"]) if ahead else ""


def speed_figure(
    gain: dict[str, float], rank: float, where: str, more: str, rival: str = ""
) -> Figure:
    """A speed-up over dense.

    Args:
        rank: of several the fastest counts, so its milliseconds.
        rival: the dense network in another runtime, where that is faster.
    """
    mood: Mood = "good" if gain["low"] > 1 else "bad" if gain["high"] < 1 else "even"
    clause = {
        "good": f"{gain['value']:.2f} times as fast as dense {where}",
        "bad": f"dense is faster {where}, the adaptive network runs at {gain['value']:.2f} of its "
               "speed",
        "even": f"as fast as dense {where}, as far as the interval tells",
    }[mood]  # fmt: skip
    if mood == "good" and rival:
        mood, clause = "even", f"{clause}, but {rival} is faster still"
    return Figure("speed", rank, f"{gain['value']:.2f}×",
                  f"95 % interval {gain['low']:.2f}–{gain['high']:.2f}{more}",
                  f"the speed of the dense network {where}", clause, mood)  # fmt: skip


def gain_cell(gain: dict[str, float] | None) -> Cell:
    if gain is None:
        return Cell(NONE)
    mood: Mood = "good" if gain["low"] > 1 else "bad" if gain["high"] < 1 else ""
    return Cell(times(gain), mood)


def _variants(facts: Facts, report: dict[str, Any], rows: list[dict[str, Any]], label: str) -> None:
    if not rows:
        return
    memory = any(row["memory_mib"] for row in rows)
    heads = ["variant", "p50 ms", "p90 ms", "p99 ms", "GMACs", "speed-up over dense (95 %)",
             "share of the MACs ratio", *(["MiB at most"] if memory else [])]  # fmt: skip
    macs, body = report["macs"] or {}, []
    for place, row in enumerate(rows, 1):
        gmacs = macs.get("adaptive_gmacs" if row["adaptive"] else "dense_gmacs")
        body.append([
            Cell(row["name"], number=str(place)),
            *(ms(row[clock]) for clock in ("p50_ms", "p90_ms", "p99_ms")),
            NONE if gmacs is None else f"{gmacs:.3f}",
            gain_cell(row["speedup"]) if row["adaptive"] else "1",
            times(row["share_of_macs_ratio"]),
            *([f"{row['memory_mib']['peak']:,.0f}" if row["memory_mib"] else NONE] if memory
              else []),
        ])  # fmt: skip
    facts.add("variants", Table(f"batch 1, {label}", heads, body, _costs(report)))
    if report["verdict"]:
        facts.add("variants", Lines([f"Verdict of the bench: {report['verdict']}."]))


def _costs(report: dict[str, Any]) -> str:
    """What stands below the table."""
    said, macs = [], report["macs"]
    pictures = several(report["image_count"], "picture") if report["image_count"] else ""
    if report["images"]:
        said.append(f"{pictures}{': ' * bool(pictures)}{report['images']}")
    if report["skipped"]:
        said.append(f"{report['skipped']:,} unreadable ones skipped")
    if report["runs"]:
        said.append(f"{several(report['runs'], 'round')}, {report['warmup'] or 0} untimed before")
    if macs and macs["mean_kept"]:
        said.append(f"tokens kept per stage: {kept(macs['mean_kept'], macs['image_tokens'])}")
    for part in report["profile"] or []:
        of = f" ({part['op']})" if part["op"] else ""
        said.append(f"scoring takes {percent(part['scoring'], 2)} of the run and compaction "
                    f"{percent(part['compaction'], 2)}{of}")  # fmt: skip
    return "; ".join(said)


def _timed(report: dict[str, Any], rows: list[dict[str, Any]]) -> list[Timed]:
    """Rows whose agreement with the dense network is known, or may be."""
    images = report["image_count"]
    own = agreed(report["agreement"], images)
    same = {"value": 1.0, "low": 1.0, "high": 1.0}
    methods = {name: agreed(beside["agreement"], images)
               for name, beside in (report["methods"] or {}).items()}  # fmt: skip
    found = []
    for place, row in enumerate(rows, 1):
        agreement, full = None, row["precision"] in (None, "float32")
        if row["way"] and row["adaptive"]:
            agreement = own
        elif not row["adaptive"]:
            agreement = same if full else None
        else:
            named_last = row["name"].split(", ")
            agreement = next((methods[one] for one in named_last if one in methods), None)
        role = "dense" if not row["adaptive"] else "own" if row["way"] else "other"
        found.append(Timed(place, row["name"], row["p50_ms"], role, agreement))  # type: ignore[arg-type]
    return found


def _over_kept(facts: Facts, rows: list[dict[str, Any]], label: str) -> None:
    series, said = list[Series](), list[list[str]]()
    for row in rows:
        if not (line := row["over_kept"]):
            continue
        said.append(_line_cells(f"{row['name']}, {label}", line))
        if line["points"]:
            line_through = line["ms_per_token"], line["ms_at_none"]
            series.append(Series(row["name"], line["points"], line_through))
    if series:
        facts.add("kept", Cloud(f"batch 1, {label}: a point for each picture",
                                "image tokens, mean over the blocks", "ms", series))  # fmt: skip
    if said:
        heads = [
            "latency as a line",
            "ms without a token",
            "µs a token",
            "of the difference between pictures",
        ]
        facts.add("kept", Table("over the image tokens that its blocks see", heads, said))


def _line_cells(name: str, line: dict[str, Any]) -> list[str]:
    explained = NONE if line["r2"] is None else percent(min(max(line["r2"], 0.0), 1.0), 0)
    return [name, signed(line["ms_at_none"], 2), signed(1e3 * line["ms_per_token"], 1), explained]


def _sweep(facts: Facts, sweep: dict[str, Any], label: str) -> None:
    over = sweep["over"]
    by_runtime: dict[str, list[tuple[float, float, float, float]]] = {}
    body: list[list[Cell | str]] = []
    for point in sweep["points"]:
        for runtime in dict.fromkeys(row["runtime"] for row in point["rows"]):
            best: dict[str, dict[str, Any]] = {}
            for row in sorted(point["rows"], key=lambda row: -row["p50_ms"]):
                if row["runtime"] == runtime:
                    best[row["kind"]] = row
            own = best.get("adaptive")
            if own and (gain := own["speedup"]):
                by_runtime.setdefault(runtime, []).append(
                    (point["at"], gain["value"], gain["low"], gain["high"])
                )
            share_of = point["macs"]["share"] if point["macs"] else None
            body.append([
                f"{over} {point['at']:g}, {runtime}",
                NONE if share_of is None else f"{share_of:.3f}",
                *(ms(best[kind]["p50_ms"]) if kind in best else NONE
                  for kind in ("dense", "adaptive", "static")),
                gain_cell(own and own["speedup"]), gain_cell(own and own["over_static"]),
            ])  # fmt: skip
        notes = [*(point["notes"] or []), *([point["busy"]] if point["busy"] else [])]
        facts.notes += [f"{over} {point['at']:g}: {note}" for note in notes]
    facts.notes += sweep["notes"] or []
    unit = " in px" if over == "size" else ""
    if any(len(spans) > 1 for spans in by_runtime.values()):
        facts.add("sweeps", Spans(f"sweep over {over}, {label}", f"{over}{unit}",
                                  "speed-up over dense", list(by_runtime.items())))  # fmt: skip
    if sweep["verdict"]:
        facts.add("sweeps", Lines([f"{line}." for line in sweep["verdict"]]))
    if body:
        facts.add("sweeps", Table(
            f"sweep over {over}, {label}: ms per picture, the fastest row of each kind",
            ["at", "share of the MACs", "dense", "adaptive", "static", "speed-up over dense (95 %)",
             "over static (95 %)"], body,
        ))  # fmt: skip
