"""`asvit-deploy build-engine`."""

from __future__ import annotations

from typing import Any

import click

from asvit_deploy.api.build_engine import FLAVOURS, MODES
from asvit_deploy.cli import options


@click.command(cls=options.ListsTargets)
@click.option("--onnx", type=options.PATH, help="ONNX artefact [default: the one here].")
@click.option(
    "-o", "--output", type=options.PATH,
    help="Engine file [default: stem of --onnx, with precision and mode, here].",
)  # fmt: skip
@click.option("--fp16", is_flag=True, help="Half-precision weights and activations.")
@click.option("--bf16", is_flag=True, help="The same in bfloat16.")
@click.option(
    "--flavour", type=click.Choice(FLAVOURS), default="auto",
    show_default=True, help="TensorRT, or TensorRT-RTX, which builds without a GPU.",
)  # fmt: skip
@click.option(
    "--mode", type=click.Choice(MODES), default="dynamic",
    show_default=True,
    help="Tokens really leave; stay and are masked (a portable reference); leave, and what stays "
    "fills a bucket (one engine per stage).",
)  # fmt: skip
@click.option(
    "--buckets", metavar="auto|N,N,...",
    help="Rows that bucketed stages take, class token included [default: multiples of 16].",
)  # fmt: skip
@click.option(
    "--compact-at", metavar="auto|all|B,B,...",
    help="Blocks at which rows of a dynamic engine really leave; hidden at other cuts [default: "
    "where it pays].",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(1), nargs=3, metavar="MIN OPT MAX",
    help="Batch range of a dynamic-batch model [default: 1 4 8].",
)  # fmt: skip
@options.target_sm("GPU generations, such as 86 89 120; RTX only [default: its own list].")
@click.option("--workspace", type=click.IntRange(1), metavar="MIB", help="Builder's memory limit.")
@click.option("--level", type=click.IntRange(0, 5), help="Builder's optimisation level.")
@click.option(
    "--plugin", type=options.PATH,
    help="The op's TensorRT library [default: the one `build-plugins trt` makes].",
)  # fmt: skip
@click.option("--embed-plugin", is_flag=True, help="Put the library into the engine file.")
@click.option(
    "--layers", type=options.PATH,
    help="Write the engine's layers as JSON; enterprise TensorRT only.",
)  # fmt: skip
@click.option(
    "--version-compatible", is_flag=True,
    help="For later TensorRT versions too; enterprise TensorRT only.",
)  # fmt: skip
@click.option(
    "--hardware-compatible", is_flag=True,
    help="For every GPU from Ampere on; enterprise TensorRT only.",
)  # fmt: skip
@options.images
@click.option(
    "--limit", type=click.IntRange(1), default=64, show_default=True,
    help="Compare on at most so many pictures; the verdict does not depend on their number.",
)  # fmt: skip
@options.skip_limit
@click.option(
    "--no-check", is_flag=True,
    help="Do not compare the graph with PyTorch first; the sidecar says so.",
)  # fmt: skip
@options.force
def command(**chosen: Any) -> None:
    """ONNX to a TensorRT engine, after comparing its graph with PyTorch.

    \b
    asvit-deploy build-engine --fp16
    asvit-deploy build-engine --fp16 --flavour tensorrt-rtx --target-sm 86 89 120
    asvit-deploy build-engine --fp16 --mode bucketed --buckets 64,128,197
    """
    import asvit_deploy

    options.echo(asvit_deploy.build_engine(**chosen, say=options.status).output)
