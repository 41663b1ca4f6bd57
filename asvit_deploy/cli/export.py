"""`asvit-deploy export`."""

from __future__ import annotations

from typing import Any

import click

from asvit_deploy.cli import options


@click.command()
@options.checkpoint
@click.option(
    "-o", "--output", type=options.PATH, help="ONNX file [default: stem of --ckpt, here]."
)
@click.option(
    "--method", metavar="NAME",
    help="For dense weights: size-passing, tome, topk-nearest, evit, bat, …; counts are fixed.",
)  # fmt: skip
@click.option("--budget", type=float, help="Of --method: MACs as a fraction of the dense [0.65].")
@options.method
@click.option("--image-size", type=int, help="Another image size; position embeddings are resized.")
@click.option("--arch", help="Settle the architecture where the checkpoint is ambiguous.")
@click.option(
    "--batch", type=click.Choice(["1", "dynamic", "packed"]), default="1", show_default=True,
    help="One image; any batch, padded and masked; or any, its linear layers on all images' rows.",
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
@click.option(
    "--int8", is_flag=False, flag_value="dynamic", type=click.Choice(["dynamic", "static"]),
    help="Int8 linear layers: dynamic [the default] for CPUs, static as Q/DQ for other runtimes.",
)  # fmt: skip
@options.ema
@options.facts
@options.images
@options.skip_limit
@options.classes
@options.force
def command(**chosen: Any) -> None:
    """Write one ONNX file and its sidecar, after comparing it with PyTorch.

    \b
    asvit-deploy export --ckpt as_deit_s.pt
    asvit-deploy export --ckpt deit_small.pth --dense
    asvit-deploy export --ckpt deit_small.pth --method size-passing --budget 0.65
    asvit-deploy export --ckpt as_deit_s.pt --int8
    """
    import asvit_deploy

    options.echo(asvit_deploy.export(**chosen, say=options.status).output)
