"""`asvit-deploy export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from asvit_deploy.cli import options

if TYPE_CHECKING:
    from asvit_deploy.checkpoints.facts import Given


@click.command()
@options.checkpoint
@click.option(
    "-o", "--output", type=options.PATH, help="ONNX file [default: stem of --ckpt, here]."
)
@click.option("--image-size", type=int, help="Another image size; position embeddings are resized.")
@click.option("--arch", help="Settle the architecture where the checkpoint is ambiguous.")
@click.option(
    "--batch", type=click.Choice(["1", "dynamic"]), default="1", show_default=True,
    help="One image, or any batch (rows padded to the batch's maximum, masked).",
)  # fmt: skip
@click.option(
    "--ops", type=click.Choice(["auto", "custom", "standard"]), default="auto", show_default=True,
    help="Custom node with its function, node alone, or standard ops only.",
)  # fmt: skip
@click.option(
    "--opset", type=int, metavar="N", help="Version of the standard ops, 18 to 25 [default: 20]."
)
@click.option("--stage-outputs", is_flag=True, help="Make index_0, index_1, … graph outputs.")
@click.option("--dense", is_flag=True, help="Export the dense twin, without the stages.")
@options.ema
@options.facts
@options.images
@options.skip_limit
@options.classes
@options.force
def command(
    ckpt: Path,
    output: Path | None,
    image_size: int | None,
    arch: str | None,
    batch: str,
    ops: str,
    opset: int | None,
    stage_outputs: bool,
    dense: bool,
    ema: bool,
    images: Path | None,
    skip_limit: int,
    classes: Path | None,
    force: bool,
    known: Given,
) -> None:
    """Write one ONNX file and its sidecar, after comparing it with PyTorch.

    \b
    asvit-deploy export --ckpt as_deit_s.pt
    asvit-deploy export --ckpt deit_small.pth --dense
    """
    from asvit_deploy.artefacts import sidecar as artifact
    from asvit_deploy.checkpoints.load import load_checkpoint
    from asvit_deploy.classes.network import named, of_checkpoint
    from asvit_deploy.data.images import open_images
    from asvit_deploy.exporting.export import default_output, export, require_adaptive
    from asvit_deploy.exporting.to_onnx import OPSET, check_opset
    from asvit_deploy.runners.onnx_runtime import import_onnxruntime

    import_onnxruntime()
    opset = OPSET if opset is None else opset
    check_opset(opset)
    checkpoint = load_checkpoint(ckpt, image_size, arch, ema, known)
    checkpoint = named(checkpoint, of_checkpoint(checkpoint, classes, options.status))
    if not dense:
        require_adaptive(checkpoint)
    target = output or default_output(ckpt, dense)
    options.within(artifact.claimed(target, "onnx", force, ckpt, classes))
    pictures = open_images(images, checkpoint.config, 16, skip_limit, options.status)
    config = checkpoint.config
    kind = "dense" if dense else "adaptive"
    options.tell(checkpoint)
    options.status(f"{ckpt}: {kind} {config.name}, {config.image_size} px ({checkpoint.format})")
    parity = export(checkpoint, target, pictures, batch, ops, dense, stage_outputs, ema, opset)
    for name, result in parity.items():
        kept = ", ".join(f"{k:.1f}" for k in result.mean_kept)
        options.status(
            f"agrees with PyTorch at {name} on {result.images} images ({pictures.source})"
            + (f"; kept tokens per stage: {kept} of {config.image_tokens}" if kept else "")
        )
    click.echo(target)
