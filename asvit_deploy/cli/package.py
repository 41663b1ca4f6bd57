"""`asvit-deploy package`."""

from __future__ import annotations

from typing import Any

import click

from asvit_deploy.cli import options


@click.command()
@click.argument("model", type=options.PATH)
@click.option("--triton", metavar="DIR", required=True, type=options.PATH,
              help="The model repository to write into.")  # fmt: skip
@click.option("--backend", type=click.Choice(["onnxruntime", "tensorrt", "python"]),
              help="What runs it [default: by the kind of file].")  # fmt: skip
@click.option("--name", help="What clients call it [default: the file's name].")
@click.option("--max-batch", type=click.IntRange(1), metavar="N",
              help="Pictures in a batch of the server's [default: 8; an engine's most]."
              )  # fmt: skip
@click.option("--library", type=options.PATH,
              help="The op's library, to go along [default: the file's function].")  # fmt: skip
@click.option("--plugin", type=options.PATH,
              help="The op's TensorRT library, self-registering [default: built].")  # fmt: skip
@options.force
def command(**chosen: Any) -> None:
    """An ONNX file or an engine in a Triton model repository, with its preprocessing.

    Clients send pictures as files. The server makes batches; the input is made by this package in
    the server's Python.

    \b
    asvit-deploy package as_deit_s.onnx --triton models
    """
    import asvit_deploy

    options.echo(asvit_deploy.package(**chosen, say=options.status))
