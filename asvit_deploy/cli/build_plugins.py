"""`asvit-deploy build-plugins`."""

from __future__ import annotations

from pathlib import Path

import click

from asvit_deploy.cli import options


@click.command(cls=options.ListsTargets)
@click.argument("targets", nargs=-1, type=click.Choice(["ort", "trt"]))
@click.option(
    "--headers", type=options.PATH,
    help="Folder of ONNX Runtime's C++ headers [default: ORT_INCLUDE_DIR, or found].",
)  # fmt: skip
@click.option(
    "--cuda/--no-cuda", default=None,
    help="ONNX Runtime's library with kernels for its CUDA provider beside the CPU's "
    "[default: where nvcc is found].",
)  # fmt: skip
@options.target_sm(
    "Compile the TensorRT plugin for these GPU generations, such as 86 89 120, or `all` "
    "[default: the GPUs here; without one, code that the driver compiles].",
    all_too=True,
)
@click.option("--force", is_flag=True, help="Compile again what the cache holds.")
def command(
    targets: tuple[str, ...],
    headers: Path | None,
    cuda: bool | None,
    target_sm: tuple[str, ...],
    force: bool,
) -> None:
    """Compile the C++ libraries into the user cache and print their paths.

    `ort`, the default, is the ONNX Runtime library; headers that the system lacks are taken from
    Debian with its own apt, no root needed. Where nvcc is, it has CUDA kernels too. `trt` is the
    TensorRT plugin: it needs CUDA's nvcc, and takes TensorRT's headers from TensorRT_ROOT, the
    system, or a Python package.
    """
    if "ort" in targets or not targets:
        from asvit_deploy.ops.library import build_ort

        options.echo(build_ort(headers, force, options.status, cuda))
    if "trt" in targets:
        from asvit_deploy.ops.trt_library import build_trt

        options.echo(build_trt(sms=target_sm, force=force, say=options.status))
