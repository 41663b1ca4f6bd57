"""`asvit-deploy build-engine`."""

from __future__ import annotations

from pathlib import Path

import click

from asvit_deploy.cli import options
from asvit_deploy.errors import UserError


@click.command()
@click.option("--onnx", "model", type=options.PATH, help="ONNX artefact [default: the one here].")
@click.option("--fp16", is_flag=True, help="Half-precision weights and activations.")
def command(model: Path | None, fp16: bool) -> None:
    """ONNX to a TensorRT engine. Not part of this version: it says so and changes nothing."""
    path = options.artefacts((model,) if model else (), "onnx")[0]
    raise UserError(
        f"no engine for {path}: the TensorRT plugin is not part of asvit-deploy yet; "
        "`asvit-deploy bench` runs the ONNX file as it is"
    )
