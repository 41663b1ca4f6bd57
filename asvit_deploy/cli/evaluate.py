"""`asvit-deploy evaluate`."""

from __future__ import annotations

import json
from typing import Any

import click

from asvit_deploy.cli import options
from asvit_deploy.status import first_process

_NAMED = 5  # classes without a picture


@click.command()
@click.argument("model", type=options.CheckpointPath())
@click.option(
    "--data",
    required=True,
    help="Folder of class folders or of shards (of its val/ where it has one), or `digits`; for "
    "embeddings, any folder of pictures.",
)
@click.option("--batch-size", type=click.IntRange(1), multiple=True, default=(1,),
              show_default=True, help="Images at a time; repeatable.")  # fmt: skip
@click.option(
    "--batch-rule", type=click.Choice(["exact", "mean-k"]), default="exact", show_default=True,
    help="mean-k is the paper's: a batch shares one count.",
)  # fmt: skip
@click.option("--dense", is_flag=True, help="Run the checkpoint without its thresholds.")
@click.option(
    "--method", metavar="NAME", help="Of dense weights, as in `export`; counts are fixed."
)
@click.option("--budget", type=float, help="Of --method: MACs as a fraction of the dense [0.65].")
@options.method
@options.ema
@options.facts
@options.classes
@click.option("--neighbours", type=click.IntRange(1),
              help="k of the k-NN accuracy of embeddings [default: 5].")  # fmt: skip
@options.limit
@options.skip_limit
@options.one_runtime
@options.choice
@options.library
@options.as_json
@click.option("-o", "--output", "output", type=options.PATH, help="Also write the JSON here.")
@options.html
@options.force
def command(as_json: bool, **chosen: Any) -> None:
    """Top-1 and top-5, MACs and kept tokens over labelled pictures.

    Of embeddings: agreement with the dense twin, and k-NN accuracy where the pictures are labelled.

    MODEL is an ONNX artefact (run by ONNX Runtime) or a checkpoint (run by PyTorch).

    \b
    asvit-deploy evaluate as_deit_s.onnx --data imagenet/val
    asvit-deploy evaluate as_deit_s.pt --data imagenet --batch-rule mean-k --batch-size 32

    Started with `torchrun --nproc-per-node 8 -m asvit_deploy evaluate ...`, each process takes its
    share of the pictures. A checkpoint runs on a GPU where there is one.
    """
    import asvit_deploy

    report = asvit_deploy.evaluate(**chosen, say=options.status).as_dict()
    if first_process():
        options.echo_json(json.dumps(report, indent=2)) if as_json else _print(report)


def _print(report: dict[str, Any]) -> None:
    from asvit_deploy.evaluation.report import table

    columns = _embedding_columns if report["output"] == "embedding" else _class_columns
    headers, cells = columns(report["rows"])
    rows = [
        [str(row["batch_size"]), str(row["images"]), *own, f"{row['gmacs']:.3f}",
         f"{row['macs_share']:.4f}", " ".join(f"{k:.1f}" for k in row["mean_kept"]) or "all"]
        for row, own in zip(report["rows"], cells)
    ]  # fmt: skip
    options.echo(f"\n{report['model']} on {report['data']}, {report['batch_rule']} tokens")
    headers = ["batch", "images", *headers, "GMACs", "share of MACs", "kept per stage"]
    options.echo(table(headers, rows))
    _print_account(report)
    first = report["rows"][0]
    for stage, (low, p5, middle, p95, high) in enumerate(first["quantiles_kept"]):
        options.echo(f"stage {stage}: median {middle:.0f} of {first['image_tokens']} tokens, "
                   f"90 % of the images {p5:.0f}-{p95:.0f}, all {low:.0f}-{high:.0f}")  # fmt: skip


def _share(share: dict[str, float] | None) -> str:
    if share is None:  # too few pictures
        return "-"
    return f"{share['value']:.2%} ({share['low']:.2%}-{share['high']:.2%})"


# Of each row what only networks with its kind of output have, and what stands above.
_Columns = tuple[list[str], list[list[str]]]


def _class_columns(rows: list[dict[str, Any]]) -> _Columns:
    def five(row: dict[str, Any]) -> str:
        few = row["num_classes"] <= 5  # then every class is among the five best
        return f"- ({row['num_classes']} classes)" if few else _share(row["top5"])

    headers = ["top-1 (95 %)", "top-5 (95 %)"]
    return headers, [[_share(row["top1"]), five(row)] for row in rows]


def _embedding_columns(rows: list[dict[str, Any]]) -> _Columns:
    headers, cells = list[str](), [list[str]() for _ in rows]
    if rows[0]["agreement"]:
        headers += ["cosine with dense (95 %)", "10th percentile", "same neighbour (95 %)"]
        for own, agreed in zip(cells, (row["agreement"] for row in rows)):
            own += [f"{agreed['cosine']:.4f} ({agreed['low']:.4f}-{agreed['high']:.4f})",
                    f"{agreed['p10']:.4f}", _share(agreed["neighbour"])]  # fmt: skip
    if rows[0]["knn"]:
        shown = {"model": f"{rows[0]['knn']['neighbours']}-NN accuracy (95 %)"}
        if rows[0]["knn"]["dense"]:
            shown["dense"] = "of dense (95 %)"
        headers += shown.values()
        for own, knn in zip(cells, (row["knn"] for row in rows)):
            own += [_share(knn[whose]) for whose in shown]
    return headers, cells


def _print_account(report: dict[str, Any]) -> None:
    """How many pictures there were and how many were taken; which classes have none."""
    from asvit_deploy.data.listing import others

    of = "" if report["seen"] is None else f" of {report['seen']:,}"
    parts = [f"pictures: {report['taken']:,}{of} taken"]
    if report["skipped"]:
        reasons = ", ".join(f"{why} {count}" for why, count in report["skipped_by_reason"].items())
        parts.append(f"{report['skipped']:,} skipped ({reasons})")
    if passed := others(report["passed_over"]):
        parts.append(passed)
    if without := report["classes_without_pictures"]:
        more = ", …" if len(without) > _NAMED else ""
        parts.append(f"{len(without):,} of {report['classes']:,} classes without a picture "
                     f"({', '.join(without[:_NAMED])}{more})")  # fmt: skip
    options.echo("; ".join(parts))
