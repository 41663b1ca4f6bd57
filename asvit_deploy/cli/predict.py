"""`asvit-deploy predict`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.cli import options
from asvit_deploy.text import shortened

if TYPE_CHECKING:
    from asvit_deploy.answers import Prediction
    from asvit_deploy.bulk.running import Written


@click.command()
@click.argument("model", type=options.PATH)
@click.argument("pictures", metavar="IMAGE...", nargs=-1, type=options.PATH)
@click.option("--data", type=options.PATH,
              help="In their place: a folder of pictures or of shards, or a shard.")  # fmt: skip
@click.option("-o", "--output", metavar="FILE", type=options.PATH,
              help="Where those of --data go: .jsonl, or .npz of embeddings.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1), metavar="N",
              help="Pictures at a time, of --data [default: 16 if packed, else 1].")  # fmt: skip
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

    A run over --data that was stopped goes on when it is started again, and several processes
    share it under torchrun.

    \b
    asvit-deploy predict as_deit_s.onnx cat.jpg dog.jpg
    asvit-deploy predict as_deit_s.onnx --data photos -o photos.jsonl
    """
    import asvit_deploy

    results = asvit_deploy.predict(**chosen, say=options.status)
    if results is None:
        return
    if not isinstance(results, list):
        _print_written(results, as_json)
    elif as_json:
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


def _print_written(written: Written, as_json: bool) -> None:
    if as_json:
        options.echo_json(json.dumps(written.as_dict(), indent=2))
        return
    skipped = ", ".join(f"{reason} {n}" for reason, n in written.skipped_by_reason.items())
    rest = f", {written.skipped:,} skipped ({skipped})" if written.skipped else ""
    options.echo(f"{shortened(written.output)}: {written.pictures:,} pictures{rest}")
