"""`asvit-deploy predict`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.cli import options
from asvit_deploy.text import shortened

if TYPE_CHECKING:
    from asvit_deploy.api.predict import Prediction


@click.command()
@click.argument("model", type=options.PATH)
@click.argument("pictures", metavar="IMAGE...", nargs=-1, required=True, type=options.PATH)
@options.skip_limit
@options.classes
@options.one_runtime
@options.choice
@options.library
@click.option("--save", metavar="DIR", type=options.PATH,
              help="Draw which tokens stay, as `visualize` does, into this folder.")  # fmt: skip
@options.force
@options.as_json
def command(as_json: bool, **chosen: Any) -> None:
    """Top-5, or the score of a network with one output, and kept tokens of each picture.

    Of a network that gives embeddings: width, norm, and the nearest of the other pictures; the
    numbers themselves with --json.

    \b
    asvit-deploy predict as_deit_s.onnx cat.jpg dog.jpg
    """
    import asvit_deploy

    results = asvit_deploy.predict(**chosen, say=options.status)
    if as_json:
        options.echo_json(json.dumps([result.as_dict() for result in results], indent=2))
    else:
        for result in results:
            _print(result)


def _print(result: Prediction) -> None:
    if result.skipped is not None:
        options.echo(f"{shortened(result.image)}: skipped ({result.skipped})")
        return
    options.echo(shortened(result.image))
    for guess in result.top:
        options.echo(f"  {guess.probability:7.2%}  {shortened(guess.label)}")
    if result.score is not None:
        of = f"  {shortened(result.label)}" if result.label else ""
        options.echo(f"  score {result.score:.6g}{of}")
    if result.embedding is not None:
        options.echo(f"  embedding of {len(result.embedding)} numbers, norm {result.norm:.6g}")
        if result.nearest:
            near = f"{shortened(result.nearest.image)} (cosine {result.nearest.cosine:.4f})"
            options.echo(f"  nearest: {near}")
        elif not result.norm:
            options.echo("  nearest: none, for a norm of 0 has no direction")
    if result.kept:
        kept = ", ".join(str(len(stage)) for stage in result.kept)
        options.echo(f"  kept tokens per stage: {kept} of {result.image_tokens}")
    if result.drawn:
        options.echo(f"  drawn: {shortened(result.drawn)}")
