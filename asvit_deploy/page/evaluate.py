"""`evaluate`: accuracy or agreement over a set of pictures, MACs and kept tokens."""

from __future__ import annotations

from typing import Any

from asvit_deploy.page.facts import Accuracy, Facts, Figure, Histograms, Table
from asvit_deploy.page.schema import (
    ACCOUNT,
    COMMON,
    INTERVAL,
    count,
    each,
    long_text,
    named,
    number,
    one_of,
    positive,
    record,
    text,
)
from asvit_deploy.page.wording import (
    NONE,
    agreement_figure,
    base_name,
    interval_percent,
    percent,
    shares,
)

_AGREEMENT = record(
    {"cosine": number}, {"low": number, "high": number, "p10": number, "neighbour": INTERVAL}
)
_KNN = record({"neighbours": count}, {"model": INTERVAL, "dense": INTERVAL})
_ROW = record({"batch_size": count, "images": count}, {
    "top1": INTERVAL, "top5": INTERVAL, "num_classes": count, "agreement": _AGREEMENT, "knn": _KNN,
    "gmacs": positive, "macs_share": positive, "mean_kept": each(positive, 200),
    "histogram_kept": each(each(count, 20_000), 200), "image_tokens": count,
})  # fmt: skip

SCHEMA = record({"kind": text, "model": long_text}, {
    **COMMON, **ACCOUNT, "data": text, "batch_rule": text, "arch": text,
    "output": one_of("logits", "embedding"), "runner": named(text, 20), "rows": each(_ROW, 100),
    "seen": count, "taken": count,
})  # fmt: skip


def tell(report: dict[str, Any]) -> Facts:
    data = report["data"] or "data not said"
    facts = Facts(report["model"], f"evaluate on {data}", report["sha256"],
                  command=report["command"], machine=report["machine"])  # fmt: skip
    rows = report["rows"] or []
    if not rows:
        facts.missing.append("no batch was run to its end, so there is no accuracy")
        return facts
    first = rows[0]
    _figures(facts, report, first, data)
    facts.add("accuracy", _table(report, rows, data))
    if any(map(sum, first["histogram_kept"] or [])):
        stages = enumerate(first["histogram_kept"], 1)
        facts.histograms = Histograms(
            data, [(f"after stage {stage}", counts) for stage, counts in stages]
        )
    return facts


def _figures(facts: Facts, report: dict[str, Any], row: dict[str, Any], data: str) -> None:
    images = row["images"]
    if row["top1"]:
        dense = row["mean_kept"] == []
        facts.accuracy = Accuracy(data, images, report["arch"], dense, row["top1"])
        facts.figures.append(Figure(
            "loss", 5, percent(row["top1"]["value"], 2),
            f"95 % interval {interval_percent(row['top1'])}, {images:,} pictures of {data}",
            "top-1; nothing dense beside it on the same pictures",
            f"top-1 {percent(row['top1']['value'], 2)} on {data}",
        ))  # fmt: skip
    elif row["agreement"]:
        agreement = {**row["agreement"], "top1": None, "score_error": None}
        if figure := agreement_figure(agreement, images, 1):
            facts.figures.append(figure)


def _table(report: dict[str, Any], rows: list[dict[str, Any]], data: str) -> Table:
    shown: list[tuple[str, list[str]]] = [("pictures", [f"{row['images']:,}" for row in rows])]
    if any(row["top1"] for row in rows):
        shown.append(("top-1 (95 %)", [shares(row["top1"]) for row in rows]))
    if any(row["top5"] and (row["num_classes"] or 6) > 5 for row in rows):
        shown.append(("top-5 (95 %)", [shares(row["top5"]) for row in rows]))
    if any(row["agreement"] for row in rows):
        agreements = [row["agreement"] or {} for row in rows]
        shown.append(("cosine with dense",
                      [f"{a['cosine']:.4f}" if a else NONE for a in agreements]))  # fmt: skip
        shown.append(("same neighbour (95 %)", [shares(a.get("neighbour")) for a in agreements]))
    if any(row["knn"] for row in rows):
        for whose, name in (("model", "k-NN (95 %)"), ("dense", "k-NN of dense (95 %)")):
            shown.append((name, [shares((row["knn"] or {}).get(whose)) for row in rows]))
    shown += [
        ("GMACs", [_digits(row["gmacs"], 3) for row in rows]),
        ("share of the MACs", [_digits(row["macs_share"], 4) for row in rows]),
        ("kept per stage", [" ".join(f"{k:.1f}" for k in row["mean_kept"] or []) or "all"
                            for row in rows]),
    ]  # fmt: skip
    runner = (report["runner"] or {}).get("backend")
    said = [f"run by {runner}"] if runner else []
    if report["skipped"]:
        said.append(f"{report['skipped']:,} unreadable ones skipped")
    body = [[f"{'dense' if row['mean_kept'] == [] else 'adaptive'}, batch {row['batch_size']}",
             *(column[place] for _, column in shown)]
            for place, row in enumerate(rows)]  # fmt: skip
    rule = f", {report['batch_rule']} tokens" if report["batch_rule"] else ""
    heads = ["network", *(head for head, _ in shown)]
    return Table(f"{base_name(report['model'])} on {data}{rule}", heads, body, "; ".join(said))


def _digits(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
