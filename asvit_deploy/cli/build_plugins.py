"""`asvit-deploy build-plugins`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from asvit_deploy.cli import options


def _capability(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> Any:
    for sm in value:
        if sm != "all" and not (sm.isdigit() and 2 <= len(sm) <= 3):
            raise click.BadParameter(f"{sm!r} is no compute capability such as 86, nor `all`")
    return value


@click.command()
@click.argument("targets", nargs=-1, type=click.Choice(["ort", "trt"]))
@click.option(
    "--headers", type=options.PATH,
    help="Folder of ONNX Runtime's C++ headers [default: ORT_INCLUDE_DIR, or found].",
)  # fmt: skip
@click.option(
    "--target-sm", "target_sms", multiple=True, callback=_capability, metavar="SM",
    help="Compile the TensorRT plugin for this GPU generation, such as 86, or `all`; may be given "
    "several times [default: the GPUs here; without one, code that the driver compiles].",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Compile again what the cache holds.")
def command(
    targets: tuple[str, ...], headers: Path | None, target_sms: tuple[str, ...], force: bool
) -> None:
    """Compile the C++ libraries into the user cache and print their paths.

    `ort`, the default, is the ONNX Runtime library; headers that the system lacks are taken from
    Debian with its own apt, no root needed. `trt` is the TensorRT plugin: it needs CUDA's nvcc, and
    takes TensorRT's headers from TensorRT_ROOT, the system, or a Python package.
    """
    if "ort" in targets or not targets:
        from asvit_deploy.ops.library import build_ort

        click.echo(build_ort(headers, force, options.status))
    if "trt" in targets:
        from asvit_deploy.ops.trt_library import build_trt

        click.echo(build_trt(sms=target_sms, force=force, say=options.status))
