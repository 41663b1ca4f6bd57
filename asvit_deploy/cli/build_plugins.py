"""`asvit-deploy build-plugins`."""

from __future__ import annotations

from pathlib import Path

import click

from asvit_deploy.cli import options
from asvit_deploy.errors import UserError


@click.command()
@click.argument("targets", nargs=-1, type=click.Choice(["ort", "trt"]))
@click.option(
    "--headers", type=options.PATH,
    help="Folder of ONNX Runtime's C++ headers [default: ORT_INCLUDE_DIR, or found].",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Compile again what the cache holds.")
def command(targets: tuple[str, ...], headers: Path | None, force: bool) -> None:
    """Compile the C++ libraries into the user cache and print their paths.

    Headers that the system lacks are taken from Debian with its own apt; no root needed.
    """
    if "trt" in targets:
        raise UserError(
            "the TensorRT plugin is not part of this version yet; `asvit-deploy build-plugins ort` "
            "builds the ONNX Runtime library"
        )
    from asvit_deploy.ops.library import build_ort

    click.echo(build_ort(headers, force, options.status))
