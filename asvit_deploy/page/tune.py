"""`tune`: the verdict, what the judging pictures showed, and every variant that was timed."""

from __future__ import annotations

import re
from typing import Any

from asvit_deploy.page.bench import gain_cell
from asvit_deploy.page.facts import Cell, Facts, Figure, Lines, Mood, Ruling, Table
from asvit_deploy.page.schema import (
    COMMON,
    count,
    each,
    flag,
    long_text,
    number,
    positive,
    record,
    text,
)
from asvit_deploy.page.wording import NONE, agreement_figure, ms, percent, several, times

_SPAN = record({"value": positive, "low": positive, "high": positive})
_TEST = record({"name": text, "macs_share": positive, "tested": flag}, {
    "agreement": number, "agreement_low": number, "agreement_high": number, "loss_bound": number,
    "passed": flag, "pictures": count,
})  # fmt: skip
_ROW = record({"name": text, "kind": text, "p50_ms": positive, "p99_ms": positive}, {
    "speedup": _SPAN, "speedup_p99": _SPAN, "over_static": _SPAN,
})  # fmt: skip
_TIMING = record({"batch": count, "runs": count, "rows": each(_ROW, 500)}, {
    "notes": each(text, 500), "busy": text,
})  # fmt: skip
_PROMISE = record({}, {
    "ratio": positive, "low": positive, "high": positive, "agreement": number,
    "expected_low": number, "expected_high": number, "agreement_low": number,
    "agreement_high": number, "pictures": count, "p50_ms": positive, "runtime": text, "over": text,
    "candidate": text,
})  # fmt: skip

_POINT = record({"name": text}, {
    "agreement": number, "agreement_low": number, "agreement_high": number, "pictures": count,
    "loss": number, "loss_bound": number, "certified": flag,
})  # fmt: skip

SCHEMA = record({"kind": text, "model": long_text}, {
    **COMMON,
    "demand": record({}, {"task": text, "max_drop_points": positive, "min_cosine": number}),
    "pictures": record({}, {"source": text, "calibrating": count, "judging": count}),
    "verdict": record({}, {
        "go": flag, "sentence": long_text, "why": text, "winner": text, "nearest": text,
        "over_fastest_dense": _SPAN, "fastest_dense": text,
    }),
    "promise": _PROMISE, "frontier": each(_POINT, 5000),
    "sequence": each(_TEST, 500), "latency": each(_TIMING, 100), "notes": each(long_text, 500),
    "left_out": each(long_text, 500),
})  # fmt: skip


_RULINGS: dict[bool | None, tuple[str, Mood]] = {
    True: ("Worth it here", "good"), False: ("Not worth it here", "bad"),
    None: ("Not shown yet", "even"),
}  # fmt: skip


def tell(report: dict[str, Any]) -> Facts:
    facts = Facts(report["model"], "tune", report["sha256"], command=report["command"],
                  machine=report["machine"])  # fmt: skip
    verdict, promise = report["verdict"] or {}, report["promise"]
    embeds = (report["demand"] or {}).get("task") == "embeddings"
    if sentence := verdict.get("sentence"):
        lead, mood = _RULINGS[verdict["go"]]
        rest = re.sub("^(?:go|no go|not shown): ", "", sentence)
        facts.ruling = Ruling(lead, rest, mood)
        facts.figures += _first_screen(report, verdict)
    if promise:
        _promised(facts, promise, embeds)
    if report["sequence"]:
        facts.add("tune", _sequence(report["sequence"], embeds))
    for timing in report["latency"] or []:
        facts.add("variants", _latency(timing))
        facts.notes += [*(timing["notes"] or []), *filter(None, [timing["busy"]])]
    facts.add("parity", Lines(["What was judged and timed were the files themselves, each in the "
                               "runtime that its row names."]))  # fmt: skip
    facts.notes += report["notes"] or []
    facts.notes += [f"left out: {line}" for line in report["left_out"] or []]
    return facts


def _first_screen(report: dict[str, Any], verdict: dict[str, Any]) -> list[Figure]:
    """Of the winner, or of what came nearest to one."""
    found = []
    name = verdict["winner"] or verdict["nearest"]
    if (over := verdict["over_fastest_dense"]) is not None:
        beside = f"of {verdict['fastest_dense'] or 'dense'}, the fastest that may be taken"
        mood: Mood = "good" if over["low"] > 1 else "bad" if over["high"] < 1 else "even"
        found.append(Figure("speed", -1, f"{over['value']:.2f}×",
                            f"95 % interval {over['low']:.2f}–{over['high']:.2f}; {name}",
                            f"the speed {beside}", "", mood))  # fmt: skip
    rows = [row for row in report["frontier"] or [] if row["name"] == name]
    if rows and (figure := _lost(rows[0], report["demand"] or {})) is not None:
        found.append(figure)
    if (shown := report["pictures"]) and shown["judging"]:
        said = f"{shown['source'] or 'pictures'}; {several(shown['calibrating'] or 0, 'other')} "
        found.append(Figure("proof", 10, f"{shown['judging']:,}", f"{said}calibrated",
                            "pictures judged, by exact bounds that hold for all like them", "",
                            "good"))  # fmt: skip
    return found


def _lost(row: dict[str, Any], demand: dict[str, Any]) -> Figure | None:
    """What was demanded and judged: accuracy, top-1 or cosine, with `tune`'s own bounds."""
    task, value = demand.get("task"), row["agreement"]
    low, high = row["agreement_low"], row["agreement_high"]
    if value is None or low is None or high is None:
        return None
    sample = f", {several(row['pictures'], 'picture')}" if row["pictures"] else ""
    if task == "embeddings":
        return agreement_figure({"cosine": value, "top1": None, "score_error": None, "low": low,
                                 "high": high}, row["pictures"], -1)  # fmt: skip
    mood: Mood = "good" if row["certified"] else "even"
    if task == "labels":
        loss, bound = row["loss"], row["loss_bound"]
        if loss is None or bound is None:
            return None
        lost = f"{loss:.2f}".replace("-", "−")
        return Figure("loss", -1, f"{lost} points",
                      f"at most {bound:.2f} by the one-sided 95 % bound{sample}",
                      "of accuracy lost beside the dense network",
                      f"{lost} points less accuracy than dense", mood)  # fmt: skip
    changed = {"value": 1 - value, "low": 1 - high, "high": 1 - low}
    share = percent(changed["value"], 2)
    clause = f"another top-1 than dense on {share} of the pictures"
    if value == 1:
        clause = "the same top-1 as dense on every picture"
    span = f"{percent(changed['low'], 2)} to {percent(changed['high'], 2)}"
    return Figure("loss", -1, share, f"95 % interval {span}{sample}",
                  "of the pictures get another top-1 than from the dense network", clause,
                  mood)  # fmt: skip


def _promised(facts: Facts, promise: dict[str, Any], embeds: bool) -> None:
    """What a later measurement of the winner should find."""
    span = {"value": promise["ratio"], "low": promise["low"], "high": promise["high"]}
    low, high = promise["expected_low"], promise["expected_high"]
    if None in (*span.values(), low, high):
        return
    said = f"{low:.4f} to {high:.4f}" if embeds else f"{percent(low, 2)} to {percent(high, 2)}"
    facts.add("tune", Lines([
        f"Promised of {promise['candidate'] or 'the winner'}: {times(span)} times as fast as "
        f"{promise['over'] or 'dense'}; on as many other pictures an agreement of {said}."
    ]))  # fmt: skip


def _sequence(tests: list[dict[str, Any]], embeds: bool) -> Table:
    heads = ["candidate, in the order tested", "share of the MACs",
             "cosine (95 %)" if embeds else "top-1 as dense (95 %)",
             "at least" if embeds else "points lost at most", ""]  # fmt: skip
    rows: list[list[Cell | str]] = []
    for test in tests:
        row: list[Cell | str] = [test["name"], f"{test['macs_share']:.3f}"]
        values = [test[key] for key in ("agreement", "agreement_low", "agreement_high")]
        if not test["tested"] or None in values or test["loss_bound"] is None:
            rows.append([*row, NONE, NONE, "not tested"])
            continue
        value, *span = (f"{one:.4f}" if embeds else percent(one, 2) for one in values)
        bound = 1 - test["loss_bound"] if embeds else test["loss_bound"]
        said = Cell("passes", "good") if test["passed"] else Cell("does not pass", "bad")
        digits = 4 if embeds else 2
        rows.append([*row, f"{value} ({'–'.join(span)})", f"{bound:.{digits}f}", said])
    return Table("what the judging pictures show", heads, rows,
                 "The first that does not pass ends the tests.")  # fmt: skip


def _latency(timing: dict[str, Any]) -> Table:
    heads = ["variant", "p50 ms", "p99 ms", "speed-up over dense (95 %)", "at p99", "over static"]
    rows: list[list[Cell | str]] = [
        [row["name"], ms(row["p50_ms"]), ms(row["p99_ms"]),
         "1" if row["kind"] == "dense" else gain_cell(row["speedup"]),
         times(row["speedup_p99"]), times(row["over_static"])]
        for row in timing["rows"]
    ]  # fmt: skip
    rounds = several(timing["runs"], "round")
    return Table(f"batch {timing['batch']}, {rounds}, per picture", heads, rows)
