"""`tune`: the verdict, what the judging pictures showed, and every variant that was timed."""

from __future__ import annotations

from typing import Any

from asvit_deploy.page.bench import gain_cell, speed_figure
from asvit_deploy.page.facts import Cell, Facts, Lines, Table
from asvit_deploy.page.schema import (
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

SCHEMA = record({"kind": text, "model": long_text}, {
    "demand": record({}, {"task": text, "max_drop_points": positive, "min_cosine": number}),
    "pictures": record({}, {"source": text, "calibrating": count, "judging": count}),
    "verdict": record({}, {"go": flag, "sentence": long_text, "why": text}), "promise": _PROMISE,
    "sequence": each(_TEST, 500), "latency": each(_TIMING, 100), "notes": each(long_text, 500),
    "left_out": each(long_text, 500),
})  # fmt: skip


def tell(report: dict[str, Any]) -> Facts:
    facts = Facts(report["model"], "tune")
    verdict, promise = report["verdict"] or {}, report["promise"]
    embeds = (report["demand"] or {}).get("task") == "embeddings"
    if verdict.get("sentence"):
        facts.add("tune", Lines([f"Verdict: {verdict['sentence']}."],
                                "" if verdict["go"] else "bad"))  # fmt: skip
    if promise:
        _promised(facts, promise, embeds)
    if shown := report["pictures"]:
        facts.add("tune", Lines([
            f"Pictures: {shown['source'] or 'not said'}; {shown['calibrating'] or 0:,} "
            f"calibrated, {shown['judging'] or 0:,} others judged."
        ]))  # fmt: skip
    if report["sequence"]:
        facts.add("tune", _sequence(report["sequence"], embeds))
    for timing in report["latency"] or []:
        facts.add("tune", _latency(timing))
        facts.notes += [*(timing["notes"] or []), *filter(None, [timing["busy"]])]
    facts.notes += report["notes"] or []
    facts.notes += [f"left out: {line}" for line in report["left_out"] or []]
    return facts


def _promised(facts: Facts, promise: dict[str, Any], embeds: bool) -> None:
    """The winner's figures."""
    span = {"value": promise["ratio"], "low": promise["low"], "high": promise["high"]}
    if None not in span.values():
        where = f"in {promise['runtime'] or 'its runtime'}"
        more = "" if promise["p50_ms"] is None else f"; {ms(promise['p50_ms'])} ms"
        facts.figures.append(speed_figure(span, promise["p50_ms"] or 0.0, where, more))
    own = {"cosine": promise["agreement"] if embeds else None, "score_error": None,
           "top1": None if embeds else promise["agreement"], "low": promise["agreement_low"],
           "high": promise["agreement_high"]}  # fmt: skip
    if promise["agreement"] is not None:
        figure = agreement_figure(own, promise["pictures"], 1)
        facts.figures += [figure] if figure else []
    if None not in (promise["expected_low"], promise["expected_high"]):
        low, high = promise["expected_low"], promise["expected_high"]
        said = f"{low:.4f} to {high:.4f}" if embeds else f"{percent(low, 2)} to {percent(high, 2)}"
        facts.add("tune", Lines([
            f"Promised of {promise['candidate'] or 'the winner'}: {times(span)} times as fast as "
            f"{promise['over'] or 'dense'}; on as many other pictures an agreement of {said}."
        ]))  # fmt: skip


def _sequence(tests: list[dict[str, Any]], embeds: bool) -> Table:
    heads = ["tested in this order", "share of the MACs",
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
