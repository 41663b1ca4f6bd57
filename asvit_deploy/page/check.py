"""`check`: parity with PyTorch, its flips, and what else differs."""

from __future__ import annotations

from typing import Any

from asvit_deploy.intervals import wilson
from asvit_deploy.page.facts import Cell, Facts, Figure, Lines, Table
from asvit_deploy.page.schema import (
    ACCOUNT,
    COMMON,
    any_number,
    count,
    each,
    flag,
    long_text,
    named,
    one_of,
    record,
    text,
)
from asvit_deploy.page.wording import base_name, interval_percent, several, small

_LISTED = 12  # flips and changes of a kind
_FLIP = record(
    {"image": text, "stage": count, "token": count, "score": any_number, "threshold": any_number,
     "margin": any_number, "allowed": any_number, "borderline": flag},
    {"turned": flag},
)  # fmt: skip
_TOP1 = record({"image": text, "reference": count, "candidate": count, "margin": any_number,
                "borderline": flag})  # fmt: skip
_NEIGHBOUR = record({"image": text, "reference": text, "candidate": text, "margin": any_number,
                     "borderline": flag})  # fmt: skip
_PARITY = record({"images": count, "passed": flag}, {
    "precision": text, "output": one_of("logits", "embedding"), "equal_sets": count,
    "explained": count, "judged": count, "top1_equal": count, "logit_error": any_number,
    "neighbours_equal": count, "cosine_error": any_number, "noise": each(any_number, 200),
    "mean_kept": each(any_number, 200), "candidate_kept": each(any_number, 200),
    "flips": each(_FLIP), "turns": each(_FLIP), "top1_changes": each(_TOP1),
    "neighbour_changes": each(_NEIGHBOUR), "failures": each(text, 200),
})  # fmt: skip

SCHEMA = record({"kind": text, "model": long_text}, {
    **COMMON, **ACCOUNT, "run": text, "images": text, "reference": named(text, 20),
    "parity": _PARITY,
})  # fmt: skip


def tell(report: dict[str, Any]) -> Facts:
    run = report["run"] or "way not said"
    facts = Facts(report["model"], f"check, {run}", report["sha256"],
                  command=report["command"], machine=report["machine"])  # fmt: skip
    parity = report["parity"]
    if parity is None:
        facts.missing.append("no comparison, so nothing says whether it computes what it should")
        return facts
    facts.figures.append(_figure(parity, run))
    facts.add("parity", _table(report, parity, run))
    if parity["failures"]:
        facts.add("parity", Lines(
            [f"{run}: {failure}." for failure in parity["failures"]], "bad"
        ))  # fmt: skip
    _flips(facts, parity, run)
    _changes(facts, parity, run)
    return facts


def _figure(parity: dict[str, Any], run: str) -> Figure:
    images, same = parity["images"], parity["equal_sets"]
    if not parity["passed"]:
        said = f"parity with PyTorch failed ({run})"
        return Figure("proof", 0, "Failed", f"{run}, {several(images, 'picture')}",
                      "parity with PyTorch", said, "bad")  # fmt: skip
    if same is None or not images:
        return Figure("proof", 3, "Passed", f"{run}, {several(images, 'picture')}",
                      "parity with PyTorch", "parity with PyTorch holds", "good")  # fmt: skip
    same = min(same, images)
    span = f"95 % interval {interval_percent(wilson(same, images))}; {run}"
    clause = "PyTorch keeps the same tokens " + (
        f"on all of {several(images, 'picture')}" if same == images
        else f"on {same} of {several(images, 'picture')}, and rounding explains the others"
    )  # fmt: skip
    # Of several ways the one in which the most differs.
    return Figure("proof", 1 + same / images, f"{same:,}/{images:,}", span,
                  "pictures keep the tokens that PyTorch keeps", clause, "good")  # fmt: skip


def _table(report: dict[str, Any], parity: dict[str, Any], run: str) -> Table:
    """One row; the page joins those of one model."""
    flips = parity["flips"] or []
    wrong = sum(not flip["borderline"] for flip in flips)
    images = parity["images"]
    embeds = parity["output"] == "embedding"
    equal = parity["neighbours_equal"] if embeds else parity["top1_equal"]
    error = parity["cosine_error"] if embeds else parity["logit_error"]
    noise = max(parity["noise"] or [], default=None)
    cells: list[Cell | str] = [
        run,
        Cell("passed", "good") if parity["passed"] else Cell("FAILED", "bad"),
        _of(parity["equal_sets"], images),
        f"{len(flips) - wrong:,}",
        Cell(f"{wrong:,}", "bad" if wrong else ""),
        _of(equal, images),
        "–" if error is None else small(error),
        "–" if noise is None else small(noise),
    ]
    heads = ["way, batch", "verdict", "same tokens", "flips: near ties", "flips: wrong",
             "same neighbour" if embeds else "same top-1",
             "1 − cosine" if embeds else "logit error", "score noise"]  # fmt: skip
    against = (report["reference"] or {}).get("backend")
    said = [f"against {against}" if against else "", report["images"] or ""]
    if report["skipped"]:
        said.append(f"{report['skipped']:,} unreadable ones skipped")
    return Table(base_name(report["model"]), heads, [cells], "; ".join(filter(None, said)))


def _of(part: int | None, whole: int) -> str:
    return "–" if part is None else f"{part:,}/{whole:,}"


def _flips(facts: Facts, parity: dict[str, Any], run: str) -> None:
    flips = [*(parity["flips"] or []), *(parity["turns"] or [])]
    for borderline, name in ((False, "that rounding does not explain"), (True, "at near ties")):
        some = [flip for flip in flips if flip["borderline"] is borderline]
        if not some:
            continue
        # Of wrong ones the worst first; NaN is the worst of all.
        some.sort(key=lambda flip: -_excess(flip))
        rows = [
            [flip["image"], str(flip["stage"]), str(flip["token"]),
             f"{flip['score']:.6g}", f"{flip['threshold']:.6g}", small(flip["margin"]),
             small(flip["allowed"])]
            for flip in some[:_LISTED]
        ]  # fmt: skip
        title, note = f"{run}: {several(len(some), 'flip')} {name}", _more(len(some))
        table = Table(title, ["picture", "stage", "token", "score", "threshold", "margin",
                              "explained up to"], rows, note,
                      folded=title if borderline else "")  # fmt: skip
        facts.add("parity", table)


def _excess(flip: dict[str, Any]) -> float:
    over = flip["margin"] - flip["allowed"]
    return over if over == over else float("inf")


def _more(number: int) -> str:
    return f"and {number - _LISTED:,} more, in the JSON" if number > _LISTED else ""


def _changes(facts: Facts, parity: dict[str, Any], run: str) -> None:
    for name, field in (("top-1", "top1_changes"), ("nearest neighbour", "neighbour_changes")):
        changes = parity[field] or []
        if not changes:
            continue
        wrong = sum(not change["borderline"] for change in changes)
        changes = sorted(changes, key=lambda change: (change["borderline"], change["image"]))
        rows = [
            [change["image"], str(change["reference"]), str(change["candidate"]),
             small(change["margin"]), Cell("near tie") if change["borderline"]
             else Cell("wrong", "bad")]
            for change in changes[:_LISTED]
        ]  # fmt: skip
        title = f"{run}: {several(len(changes), 'change')} of {name}, {wrong:,} of them wrong"
        heads = ["picture", "PyTorch", "here", "margin", "what it is"]
        folded = "" if wrong else title
        facts.add("parity", Table(title, heads, rows, _more(len(changes)), folded))
