"""`calibrate`: what was chosen without training, beside what else was tried and beside chance."""

from __future__ import annotations

from typing import Any

from asvit_deploy.page.facts import Facts, Lines, Table
from asvit_deploy.page.schema import (
    ACCOUNT,
    AGREEMENT,
    COMMON,
    Reader,
    count,
    each,
    long_text,
    named,
    number,
    positive,
    record,
    text,
)
from asvit_deploy.page.wording import NONE, agreement_figure, kept, percent

_SPREAD = record({"mean": number, "low": number, "high": number})
_TRIED = {"macs_ratio": positive, "distance": _SPREAD, "behind_chosen": _SPREAD,
          "agreement": AGREEMENT}  # fmt: skip
_KEPT = record({"mean": positive}, {"min": positive, "max": positive})


def _thresholds(value: object, at: str) -> Any:
    """Of AS-ViT's own method a number each; of others what thresholds would bring."""
    reader: Reader = each(number, 200)
    if isinstance(value, dict):
        reader = record({}, {**_TRIED, "gain": _SPREAD, "drift": number})
    return reader(value, at)


SCHEMA = record({"kind": text, "output": long_text}, {
    **COMMON, **ACCOUNT, "arch": text, "method": text, "why": text, "budget": positive,
    "macs_ratio": positive, "pictures": text, "images": count, "choosing_images": count,
    "judging_images": count, "agreement": AGREEMENT, "random": AGREEMENT, "measure": text,
    "kept_tokens": each(_KEPT, 200), "methods": named(record({}, _TRIED), 100),
    "thresholds": _thresholds, "no_thresholds": text, "blocks": each(count, 200),
    "out_of_reach": named(text, 100),
})  # fmt: skip


def tell(report: dict[str, Any]) -> Facts:
    method = report["method"] or "method not said"
    facts = Facts(report["output"], f"calibrate, {method}", report["sha256"],
                  command=report["command"], machine=report["machine"])  # fmt: skip
    images = report["judging_images"] or report["images"]
    agreement = report["agreement"] or ((report["methods"] or {}).get(method) or {}).get(
        "agreement"
    )
    if figure := agreement_figure(agreement, images, 3):
        facts.figures.append(figure)
    facts.add("calibration", Lines(_said(report, method)))
    if report["methods"]:
        facts.add("calibration", _methods(report, method))
    elif agreement:
        facts.add("calibration", _beside_chance(report, agreement))
    if agreement is None:
        facts.missing.append("no agreement with the dense network")
    return facts


def _said(report: dict[str, Any], method: str) -> list[str]:
    lines = [f"Method {method}" + (f"; {report['why']}." if report["why"] else ".")]
    if report["macs_ratio"] is not None:
        budget = f" (budget {report['budget']:g})" if report["budget"] is not None else ""
        stay = kept([one["mean"] for one in report["kept_tokens"] or []], None)
        lines.append(f"{report['macs_ratio']:.4f} of the dense MACs{budget}; tokens kept: {stay}.")
    if report["pictures"]:
        split = ""
        if report["choosing_images"] and report["judging_images"]:
            split = (f"; {report['choosing_images']:,} chose, {report['judging_images']:,} others "
                     "judged")  # fmt: skip
        lines.append(f"Pictures: {report['pictures']}{split}.")
    thresholds = report["thresholds"]
    if isinstance(thresholds, dict) and thresholds["gain"]:
        lines.append(f"A count of its own for each picture changes {report['measure'] or 'it'} by "
                     f"{_spread(thresholds['gain'])} at the same mean MACs.")  # fmt: skip
    if report["no_thresholds"]:
        lines.append(f"No thresholds beside it: {report['no_thresholds']}.")
    return [*lines, *(f"Not tried: {why}." for why in (report["out_of_reach"] or {}).values())]


def _methods(report: dict[str, Any], method: str) -> Table:
    rows = [
        [f"{name} (chosen)" if name == method else name,
         NONE if row["macs_ratio"] is None else f"{row['macs_ratio']:.4f}",
         _spread(row["distance"]), _spread(row["behind_chosen"]), *_agreed(row["agreement"])]
        for name, row in report["methods"].items()
    ]  # fmt: skip
    measure = report["measure"] or "distance"
    heads = ["method", "share of the MACs", f"{measure} (95 %)", f"minus that of {method}",
             "agreement with dense"]  # fmt: skip
    return Table("methods tried on some of the pictures, judged on the others", heads, rows)


def _beside_chance(report: dict[str, Any], agreement: dict[str, Any]) -> Table:
    rows = [["these thresholds", *_agreed(agreement)]]
    if report["random"]:
        rows.append(["chance, same counts", *_agreed(report["random"])])
    return Table("agreement with the dense network", ["tokens chosen by", "agreement"], rows)


def _spread(found: dict[str, float] | None) -> str:
    if found is None:
        return NONE
    return f"{found['mean']:.3g} ({found['low']:.3g} to {found['high']:.3g})"


def _agreed(agreement: dict[str, Any] | None) -> list[str]:
    if not agreement:
        return [NONE]
    if agreement["cosine"] is not None:
        return [f"cosine {agreement['cosine']:.4f}"]
    if agreement["score_error"] is not None:
        return [f"error of the score {agreement['score_error']:.3g}"]
    return [NONE if agreement["top1"] is None else f"top-1 {percent(agreement['top1'])}"]
