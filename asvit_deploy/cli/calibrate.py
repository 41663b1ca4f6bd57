"""`asvit-deploy calibrate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.api.calibrate import LARGEST_SEED
from asvit_deploy.api.methods import THRESHOLD
from asvit_deploy.cli import options

if TYPE_CHECKING:
    from asvit_deploy.models.config import ArchConfig


@click.command()
@options.checkpoint
@options.images
@click.option(
    "--budget", type=float, default=0.65, show_default=True,
    help="MACs as a fraction of the dense.",
)  # fmt: skip
@click.option(
    "--method", metavar="NAME",
    help="auto (the best of size-passing, tome and topk-nearest), threshold (AS-ViT's), or one of "
    "them, topk-scalar, topk, topk-attention, evit, bat, min-k, random [default: auto for dense "
    "weights].",
)  # fmt: skip
@click.option("--per-picture", is_flag=True, help="Thresholds in place of fixed counts.")
@options.method
@click.option(
    "--budget-by", type=click.Choice(["executed", "release"]), default="executed",
    show_default=True, help="Count MACs as carried out, or as the AS-ViT release does.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=options.PATH,
    help="`.safetensors` [default: stem of --ckpt and `.calibrated`, here].",
)  # fmt: skip
@click.option("--image-size", type=int, help="Another image size; position embeddings are resized.")
@click.option("--arch", help="Settle the architecture where the checkpoint is ambiguous.")
@options.ema
@options.facts
@click.option(
    "--limit", type=click.IntRange(1),
    help="Use at most so many pictures [default: 256 of --images, else 64].",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(0, LARGEST_SEED), default=0, help="Of the random comparison."
)
@options.skip_limit
@options.html
@options.force
@options.as_json
def command(as_json: bool, **chosen: Any) -> None:
    """Make a network's tokens leave on a MACs budget, without training.

    \b
    asvit-deploy calibrate --ckpt deit_small.pth --images DIR --budget 0.65
    asvit-deploy export --ckpt deit_small.calibrated.safetensors

    Methods are tried on some of the pictures and judged on the others, by how well they agree with
    the dense network; the table shows each beside chance. --method threshold finds AS-ViT's
    thresholds instead: splits of the reduction between its stages are tried.
    """
    import asvit_deploy

    result = asvit_deploy.calibrate(**chosen, say=options.status)
    if as_json:
        options.echo_json(json.dumps(result.as_dict(), indent=2))
    else:
        tables = _splits if result.method == THRESHOLD else _methods
        options.echo(f"{tables(result.report, result.config)}\n\n{result.output}")


def _splits(report: dict[str, Any], config: ArchConfig) -> str:
    """The stages, the agreement with the dense network, and the splits that were tried."""
    from asvit_deploy.evaluation.report import table

    stages = [
        [f"before block {block}", f"{theta:.6g}", f"{k['mean']:.1f}", f"{k['min']}", f"{k['max']}"]
        for block, theta, k in zip(config.stages, report["thresholds"], report["kept_tokens"])
    ]
    rows = [("these thresholds", report["agreement"]), ("chance, same counts", report["random"])]
    split = "/".join(f"{part:.2f}" for part in report["split"])
    measure, name = _measure(config)
    found = [candidate["agreement"][measure] for candidate in report["candidates"]]
    return "\n".join(
        [
            f"{config.name}: {report['macs_ratio']:.4f} of the dense MACs on {report['images']} "
            f"images (budget {report['budget']:g})",
            f"pictures: {report['pictures']}",
            "",
            table(["stage", "threshold", f"kept of {config.image_tokens}", "min", "max"], stages),
            "",
            _agreement_table(rows, config),
            "",
            f"split {split} of the reduction, the best of {len(found)} ({name} {min(found):.3g} to "
            f"{max(found):.3g} on {report['choosing_images']} images)",
        ]
    )


def _methods(report: dict[str, Any], config: ArchConfig) -> str:
    """The method, what others reach, and what thresholds would bring."""
    from asvit_deploy.evaluation.report import table

    rows = [
        [f"{name} *" if name == report["method"] else name, f"{row['macs_ratio']:.4f}",
         _interval(row["distance"]), _interval(row["behind_chosen"]),
         *_agreed(row["agreement"], config)]
        for name, row in report["methods"].items()
    ]  # fmt: skip
    thresholds = report["thresholds"]
    if thresholds is not None:
        rows.append(
            [f"{report['method']}, per picture", f"{thresholds['macs_ratio']:.4f}",
             _interval(thresholds["distance"]), _interval(thresholds["behind_chosen"]),
             *_agreed(thresholds["agreement"], config)]
        )  # fmt: skip
    measure = report["measure"]
    heads = ["method", "MACs", f"{measure} (95 %)", f"minus that of {report['method']}",
             *_agreement_heads(config)]  # fmt: skip
    kept = [f"{k['mean']:g}" for k in report["kept_tokens"]]
    lines = [
        f"{config.name}: {report['method']}"
        + (", a threshold at each cut" if report["per_picture"] else ", as many of every picture")
        + f"; {report['why']}",
        f"pictures: {report['pictures']}; {report['choosing_images']} choose, "
        f"{report['judging_images']} others judge",
        f"{report['macs_ratio']:.4f} of the dense MACs (budget {report['budget']:g}); in blocks "
        f"{', '.join(map(str, report['blocks']))} there stay {', '.join(kept)} of "
        f"{config.image_tokens} tokens",
        "",
        table(heads, rows),
    ]
    if thresholds is not None:
        lines += ["", _adaptive_line(thresholds, measure)]
    if report["no_thresholds"] is not None:
        lines += ["", f"no thresholds beside it: {report['no_thresholds']}"]
    lines += [f"not tried: {reason}" for reason in report["out_of_reach"].values()]
    return "\n".join(lines)


def _adaptive_line(thresholds: dict[str, Any], measure: str) -> str:
    """What being adaptive brought, in words."""
    gain, drift = thresholds["gain"], thresholds["drift"]
    if gain["low"] > 0:
        said = "brings something"
    else:
        said = "costs something" if gain["high"] < 0 else "brings nothing that can be told"
    return (
        f"a count of its own for each picture {said}: {measure} falls by {_interval(gain)} at the "
        f"same mean MACs; on the pictures that judge it took {drift:+.1%} of the budget"
    )


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.3g} ({figure['low']:.3g} to {figure['high']:.3g})"


def _agreement_heads(config: ArchConfig) -> list[str]:
    if config.output == "embedding":
        return ["cosine", "10th percentile", "same neighbour"]
    return [] if config.num_classes == 1 else ["top-1 as dense"]


def _agreed(agreed: dict[str, float], config: ArchConfig) -> list[str]:
    if config.output == "embedding":
        neighbour = f"{agreed['neighbour']:.1%}" if "neighbour" in agreed else "-"
        return [f"{agreed['cosine']:.4f}", f"{agreed['p10']:.4f}", neighbour]
    return [] if config.num_classes == 1 else [f"{agreed['top1']:.1%}"]


def _measure(config: ArchConfig) -> tuple[str, str]:
    """What tells the splits apart, and its name."""
    if config.output == "embedding":
        return "cosine", "cosine"
    # One output is a score: there is no top-1, and KL would be 0 whatever it says.
    return ("score_error", "error") if config.num_classes == 1 else ("kl", "KL")


def _agreement_table(rows: list[tuple[str, dict[str, float]]], config: ArchConfig) -> str:
    from asvit_deploy.evaluation.report import table

    classes = config.num_classes
    if config.output == "embedding":
        return table(
            ["agreement with dense", "cosine (95 %)", "10th percentile", "same neighbour"],
            [[name, f"{a['cosine']:.4f} ({a['low']:.4f}-{a['high']:.4f})", f"{a['p10']:.4f}",
              f"{a['neighbour']:.1%}"] for name, a in rows],
        )  # fmt: skip
    if classes == 1:
        headers = ["agreement with dense", "mean error of the score"]
        return table(headers, [[name, f"{a['score_error']:.3g}"] for name, a in rows])

    def five(agreed: dict[str, float]) -> str:
        return f"{agreed['top5']:.1%}" if classes > 5 else f"- ({classes} classes)"

    return table(
        ["agreement with dense", "top-1", "top-5 overlap", "KL"],
        [[name, f"{a['top1']:.1%}", five(a), f"{a['kl']:.3g}"] for name, a in rows],
    )
