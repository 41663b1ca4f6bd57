"""`asvit-deploy build-engine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from asvit_deploy.cli import options
from asvit_deploy.errors import UserError

if TYPE_CHECKING:
    from asvit_deploy.engine.build import Built, Options
    from asvit_deploy.runners.trt_flavour import Flavour


@click.command(cls=options.ListsTargets)
@click.option("--onnx", "model", type=options.PATH, help="ONNX artefact [default: the one here].")
@click.option(
    "-o", "--output", type=options.PATH,
    help="Engine file [default: stem of --onnx, with precision and mode, here].",
)  # fmt: skip
@click.option("--fp16", is_flag=True, help="Half-precision weights and activations.")
@click.option("--bf16", is_flag=True, help="The same in bfloat16.")
@click.option(
    "--flavour", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto",
    show_default=True, help="TensorRT, or TensorRT-RTX, which builds without a GPU.",
)  # fmt: skip
@click.option(
    "--mode", type=click.Choice(["dynamic", "padded", "bucketed"]), default="dynamic",
    show_default=True,
    help="Tokens really leave; stay and are masked (a portable reference); leave, and what stays "
    "fills a bucket (one engine per stage).",
)  # fmt: skip
@click.option(
    "--buckets", metavar="auto|N,N,...",
    help="Rows that bucketed stages take, class token included [default: multiples of 16].",
)  # fmt: skip
@click.option(
    "--batch", type=click.IntRange(1), nargs=3, metavar="MIN OPT MAX",
    help="Batch range of a dynamic-batch model [default: 1 4 8].",
)  # fmt: skip
@options.target_sms("GPU generations, such as 86 89 120; RTX only [default: its own list].")
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
def command(
    model: Path | None,
    output: Path | None,
    fp16: bool,
    bf16: bool,
    flavour: str,
    mode: str,
    buckets: str | None,
    batch: tuple[int, int, int] | None,
    target_sms: tuple[str, ...],
    workspace: int | None,
    level: int | None,
    plugin: Path | None,
    embed_plugin: bool,
    layers: Path | None,
    version_compatible: bool,
    hardware_compatible: bool,
    images: Path | None,
    limit: int,
    skip_limit: int,
    no_check: bool,
    force: bool,
) -> None:
    """ONNX to a TensorRT engine, after comparing its graph with PyTorch.

    \b
    asvit-deploy build-engine --fp16
    asvit-deploy build-engine --fp16 --flavour tensorrt-rtx --target-sm 86 89 120
    asvit-deploy build-engine --fp16 --mode bucketed --buckets 64,128,197
    """
    from asvit_deploy.artefacts import bundle
    from asvit_deploy.artefacts import sidecar as artifact
    from asvit_deploy.claims import claimed
    from asvit_deploy.files import check_writable

    path = options.artefacts((model,) if model else (), "onnx")[0]
    if fp16 and bf16:
        raise UserError("--fp16 and --bf16 exclude each other; pass one of them")
    if buckets is not None and mode != "bucketed":
        raise UserError("--buckets needs --mode bucketed")
    from asvit_deploy.runners.trt_flavour import find_flavour

    found = find_flavour(flavour)

    from asvit_deploy.engine.bucketed import build_bucketed
    from asvit_deploy.engine.buckets import parse_buckets
    from asvit_deploy.engine.build import (
        Options,
        build_engine,
        default_output,
        refuse_misfits,
    )
    from asvit_deploy.engine.source import open_source

    wanted = Options(
        "fp16" if fp16 else "bf16" if bf16 else None,
        mode, batch, target_sms, workspace, level, plugin, embed_plugin, layers,
        version_compatible, hardware_compatible, images, limit, not no_check,
        None if buckets is None else parse_buckets(buckets), skip_limit,
    )  # fmt: skip
    refuse_misfits(found, wanted)
    target = output or default_output(path, wanted)
    if mode == "bucketed":
        options.within(bundle.claimed(target, "bucketed", force))
    else:
        options.within(artifact.claimed(target, "engine", force, path))
    if layers is not None:
        options.within(claimed(layers, force, lambda: check_writable(layers, force)))
    source = open_source(path)
    if source.session is None:
        options.status(f"{path} is not an artefact of ours: built as it is, compared with nothing")
    if source.adaptive and mode == "dynamic":
        wanted = _with_plugin(wanted, found)
    build = build_bucketed if mode == "bucketed" else build_engine
    with _Bar() as bar:
        built = build(source, target, found, wanted, bar.update, options.status)
    _report(built, found.title)
    click.echo(target)


def _with_plugin(wanted: Options, flavour: Flavour) -> Options:
    """The options with the op's library: the one named, the one built before, or built now."""
    from dataclasses import replace

    from asvit_deploy.ops.trt_library import build_trt, find_trt_plugin, runs_on_gpus

    if wanted.plugin is not None:
        if not wanted.plugin.is_file():
            raise UserError(
                f"{wanted.plugin} does not exist; `asvit-deploy build-plugins trt` makes the plugin"
            )
        if (flavour.enterprise or wanted.embed_plugin) and not runs_on_gpus(wanted.plugin):
            why = "--embed-plugin" if wanted.embed_plugin else flavour.title
            raise UserError(
                f"{wanted.plugin} holds no CUDA code (a host twin, for building only) and {why} "
                "needs it; `asvit-deploy build-plugins trt` makes a plugin that has it"
            )
        return wanted
    if found := find_trt_plugin():
        return replace(wanted, plugin=found)
    try:
        return replace(wanted, plugin=build_trt())
    except UserError:
        # RTX never runs the kernel while it builds, so the plugin's host twin will do there.
        if flavour.enterprise or wanted.embed_plugin:
            raise
        twin = build_trt(twin=True)
        options.status("no CUDA compiler here: built with the plugin's host twin; to run the "
                       "engine, `asvit-deploy build-plugins trt` where there is one")  # fmt: skip
        return replace(wanted, plugin=twin)


class _Bar:
    """TensorRT's progress on a terminal's stderr."""

    def __enter__(self) -> _Bar:
        from tqdm import tqdm

        self._bar = tqdm(desc="build", disable=None, leave=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, phase: str, done: int, of: int) -> None:
        self._bar.set_description(phase, refresh=False)
        self._bar.total, self._bar.n = of, done
        self._bar.refresh()


def _report(built: Built, title: str) -> None:
    """What was built, and every warning that is not known to be harmless."""
    fields = built.fields
    for warning in built.warnings:
        options.status(f"TensorRT warns: {warning}")
    sms = ", ".join(f"SM{sm}" for sm in fields["target_sms"])
    options.status(
        f"{title} {fields['flavour_version']}: {fields['mode']}"
        + (f", {fields['precision']}" if fields["precision"] else "")
        + (f", for {sms}" if sms else "")
        + (f", buckets {', '.join(map(str, fields['buckets']))}" if "buckets" in fields else "")
        + f", {fields['plugin_layers']} plugin layers, {fields['build_seconds']} s"
    )
