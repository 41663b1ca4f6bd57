"""`asvit-deploy calibrate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.api.calibrate import LARGEST_SEED
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
@options.force
@options.as_json
def command(as_json: bool, **chosen: Any) -> None:
    """Find thresholds that meet a MACs budget on pictures, without training.

    \b
    asvit-deploy calibrate --ckpt deit_small.pth --images DIR --budget 0.65
    asvit-deploy export --ckpt deit_small.calibrated.safetensors

    Splits of the reduction between the stages are tried; the one that agrees best with the dense
    network on these pictures wins. The table says how well, beside chance with the same counts.
    """
    import asvit_deploy

    result = asvit_deploy.calibrate(**chosen, say=options.status)
    if as_json:
        click.echo(json.dumps({"output": str(result.output), **result.report}, indent=2))
    else:
        click.echo(f"{_tables(result.report, result.config)}\n\n{result.output}")


def _tables(report: dict[str, Any], config: ArchConfig) -> str:
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
