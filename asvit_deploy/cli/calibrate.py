"""`asvit-deploy calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.cli import options

if TYPE_CHECKING:
    from asvit_deploy.checkpoints.facts import Given
    from asvit_deploy.models.registry import ArchConfig


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
# The draws take this seed and the two after it; a generator's end at 2^63.
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 4), default=0, help="Of the random comparison."
)
@options.force
@options.as_json
def command(
    ckpt: Path,
    images: Path | None,
    budget: float,
    output: Path | None,
    image_size: int | None,
    arch: str | None,
    ema: bool,
    limit: int | None,
    seed: int,
    force: bool,
    as_json: bool,
    known: Given,
) -> None:
    """Find thresholds that meet a MACs budget on pictures, without training.

    \b
    asvit-deploy calibrate --ckpt deit_small.pth --images DIR --budget 0.65
    asvit-deploy export --ckpt deit_small.calibrated.safetensors

    Splits of the reduction between the stages are tried; the one that agrees best with the dense
    network on these pictures wins. The table says how well, beside chance with the same counts.
    """
    import json

    from tqdm import tqdm

    from asvit_deploy.artifact import check_target, provenance
    from asvit_deploy.checkpoints.reading import stem_of
    from asvit_deploy.files import sha256
    from asvit_deploy.images import open_images
    from asvit_deploy.models.checkpoint import build_model, load_checkpoint, save_checkpoint
    from asvit_deploy.training.calibrate import calibrate, with_thresholds

    target = output or Path(f"{stem_of(ckpt)}.calibrated.safetensors")
    check_target(target, "checkpoint", force, ckpt)
    checkpoint = load_checkpoint(ckpt, image_size, arch, ema, known)
    config = checkpoint.config
    options.tell(checkpoint)
    pictures = open_images(images, config, limit or (256 if images else 64))
    options.status(f"{ckpt}: {config.name}, {config.image_size} px; {pictures.source}")
    with tqdm(desc="calibrate", unit="pass", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update()

        model = build_model(checkpoint, dense=True)
        result = calibrate(model, pictures, budget, seed, progress)
    report = {"arch": config.name, "image_size": config.image_size, **result.report}
    report |= {"pictures": pictures.source, "source_sha256": sha256(ckpt)}
    metadata = {
        **checkpoint.metadata,
        **checkpoint.told.metadata(),
        "budget": str(budget),
        "calibration": json.dumps(report),
        "source_sha256": report["source_sha256"],
        "provenance": json.dumps(provenance(["torch"])),
    }
    save_checkpoint(target, with_thresholds(checkpoint, result.thresholds), metadata)
    if as_json:
        click.echo(json.dumps({"output": str(target), **report}, indent=2))
    else:
        click.echo(f"{_tables(report, config)}\n\n{target}")


def _tables(report: dict[str, Any], config: ArchConfig) -> str:
    """The stages, the agreement with the dense network, and the splits that were tried."""
    from asvit_deploy.evaluate.report import table

    stages = [
        [f"before block {block}", f"{theta:.6g}", f"{k['mean']:.1f}", f"{k['min']}", f"{k['max']}"]
        for block, theta, k in zip(config.stages, report["thresholds"], report["kept_tokens"])
    ]
    rows = [("these thresholds", report["agreement"]), ("chance, same counts", report["random"])]
    split = "/".join(f"{part:.2f}" for part in report["split"])
    kls = [candidate["agreement"]["kl"] for candidate in report["candidates"]]
    return "\n".join(
        [
            f"{config.name}: {report['macs_ratio']:.4f} of the dense MACs on {report['images']} "
            f"images (budget {report['budget']:g})",
            "",
            table(["stage", "threshold", f"kept of {config.image_tokens}", "min", "max"], stages),
            "",
            table(
                ["agreement with dense", "top-1", "top-5 overlap", "KL"],
                [[n, f"{a['top1']:.1%}", f"{a['top5']:.1%}", f"{a['kl']:.3g}"] for n, a in rows],
            ),
            "",
            f"split {split} of the reduction, the best of {len(kls)} (KL {min(kls):.3g} to "
            f"{max(kls):.3g} on {report['choosing_images']} images)",
        ]
    )
