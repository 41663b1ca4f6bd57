"""`asvit-deploy visualize`."""

from __future__ import annotations

from typing import Any

import click

from asvit_deploy.cli import options


@click.command()
@click.argument("model", type=options.PATH)
@options.images
@click.option(
    "-o", "--output", type=options.PATH,
    help="Folder of the drawings [default: stem of MODEL and `.visualized`, here].",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), default=64, show_default=True,
              help="Use at most so many pictures.")  # fmt: skip
@options.skip_limit
@click.option(
    "--panels", type=click.IntRange(1), default=6, show_default=True,
    help="Cuts that a drawing shows at most, the first and the last among them.",
)  # fmt: skip
@options.classes
@options.one_runtime
@options.choice
@options.library
@options.engine_code
@options.force
def command(**chosen: Any) -> None:
    """Draw which tokens stay, cut by cut.

    A PNG for each picture, gallery.png with easy, normal and hard ones (by the tokens that they
    keep), and kept.json with the numbers of the tokens. Tokens that have gone are pale or, where a
    method hands on what they carry, in the colour of the token that took them, which has a frame of
    that colour.

    \b
    asvit-deploy visualize as_deit_s.onnx --images photos -o drawings
    """
    import asvit_deploy

    options.echo(asvit_deploy.visualize(**chosen, say=options.status).output)
