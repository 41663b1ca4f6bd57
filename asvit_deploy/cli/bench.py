"""`asvit-deploy bench`."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy import files, trusted
from asvit_deploy.cli import options
from asvit_deploy.errors import UserError

if TYPE_CHECKING:
    from asvit_deploy.artefacts.onnx_file import Session
    from asvit_deploy.data.images import ImageSet
    from asvit_deploy.evaluation.bench import Variant
    from asvit_deploy.models.config import ArchConfig
    from asvit_deploy.runners.trt_plan import Allowed


@click.command()
@options.models
@options.images
@click.option("--limit", type=click.IntRange(1), default=64, show_default=True,
              help="Use at most so many pictures.")  # fmt: skip
@options.skip_limit
@click.option("--runs", type=click.IntRange(10), default=200, show_default=True,
              help="Timed rounds; each runs every variant once.")  # fmt: skip
@click.option("--warmup", type=click.IntRange(0), default=50, show_default=True,
              help="Untimed rounds first.")  # fmt: skip
@click.option("--threads", type=click.Choice(["1", "all", "both"]), default="both",
              show_default=True, help="One thread, every core, or both in turn.")  # fmt: skip
@options.library
@options.engine_code
@options.as_json
@click.option("-o", "--output", type=options.PATH, help="Also write the JSON report here.")
@options.force
def command(
    models: tuple[Path, ...],
    images: Path | None,
    limit: int,
    skip_limit: int,
    runs: int,
    warmup: int,
    threads: str,
    library: Path | None,
    allowed: Allowed,
    as_json: bool,
    output: Path | None,
    force: bool,
) -> None:
    """Latency at batch 1, MACs and kept tokens, beside the dense model.

    One process, all variants interleaved in random order, on real pictures; the ratio of medians
    is what counts. Without MODELS, the adaptive artefact that the current folder's sidecars name,
    and on a machine with a GPU the engines that were built from it.
    """
    from asvit_deploy.artefacts.engine_file import is_engine
    from asvit_deploy.artefacts.onnx_file import find_op_library
    from asvit_deploy.artefacts.sidecar import sidecar_path
    from asvit_deploy.claims import claimed

    if output is not None:
        chosen = [path for path in models if path.is_file()]
        inputs = [*chosen, *map(sidecar_path, chosen)]
        options.within(claimed(output, force, lambda: files.check_writable(output, force, *inputs)))
    counts = {"1": [1], "all": [0], "both": [1, 0]}[threads]
    found = find_op_library(library)
    reading = partial(_pictures, images, limit, skip_limit)
    reports: list[dict[str, Any]] = []
    failures: list[UserError] = []
    for path in _chosen(models):
        try:
            if is_engine(path):
                reports.append(_bench_engine(path, reading, runs, warmup, allowed))
            else:
                reports += _bench(path, reading, runs, warmup, counts, found)
        except UserError as error:
            if models:
                raise
            options.status(f"not run: {error}")
            failures.append(error)
    if failures and not reports:
        raise failures[0]
    text = json.dumps(reports, indent=2)
    if output is not None:
        files.write_text(output, text + "\n")
    if as_json:
        click.echo(text)
    else:
        for report in reports:
            _print_engine(report) if report["kind"] == "engine" else _print(report)


def _chosen(models: tuple[Path, ...]) -> list[Path]:
    """What to bench: the models named, else the one adaptive artefact of the folder."""
    from asvit_deploy.artefacts import sidecar as artifact

    if models:
        return list(models)
    found = options.artefacts((), "onnx", several=True)
    readable = {path: fields for path in found if (fields := _fields(path, len(found) > 1))}
    adaptive = [path for path, fields in readable.items() if fields["adaptive"]] or list(readable)
    if not adaptive:
        artifact.read(found[0])  # raises: none of them can be read
    if len(adaptive) > 1:
        names = ", ".join(map(str, adaptive))
        raise UserError(f"several artefacts here, name the ones to bench: {names}")
    return [*adaptive, *_engines_beside(adaptive[0])]


def _fields(path: Path, several: bool) -> dict[str, Any] | None:
    """A sidecar; of several, one that cannot be read costs a line and no more."""
    from asvit_deploy.artefacts import sidecar as artifact

    try:
        return artifact.read(path)
    except UserError as error:
        if not several:
            raise
        options.status(f"not run: {error}")
        return None


def _engines_beside(onnx: Path) -> list[Path]:
    """The engines here that were built from `onnx`, where they can run."""
    import torch

    from asvit_deploy.artefacts.engine_file import engines_of

    engines = engines_of(Path(), onnx, lambda reason: options.status(f"not run: {reason}"))
    if engines and not torch.cuda.is_available():
        names = ", ".join(map(str, engines))
        options.status(f"not run, for want of an NVIDIA GPU that PyTorch sees: {names}")
        return []
    return engines


def _pictures(
    images: Path | None, limit: int, skip_limit: int, path: Path, config: ArchConfig
) -> ImageSet:
    """What an artefact is run on."""
    from asvit_deploy.data.images import open_images

    pictures = open_images(images, config, limit, skip_limit, options.status).readable()
    options.status(f"{path}: {len(pictures)} images ({pictures.source})")
    return pictures


def _bench(
    path: Path, reading: Callable[[Path, ArchConfig], ImageSet], runs: int, warmup: int,
    counts: list[int], library: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    from asvit_deploy.artefacts.onnx_file import Session

    session = Session(path, library)
    pictures = reading(path, session.config)
    return [_measure(session, pictures, runs, warmup, count) for count in counts]


def _measure(
    session: Session, pictures: ImageSet, runs: int, warmup: int, threads: int
) -> dict[str, Any]:
    import numpy as np
    import torch
    from tqdm import tqdm

    from asvit_deploy.evaluation import bench, profile
    from asvit_deploy.evaluation.machine import machine
    from asvit_deploy.models.macs import dense_macs

    cores = machine()["cores"]
    torch.set_num_threads(threads or cores)
    variants, notes = _variants(session, threads)
    loaded = [pictures[i] for i in range(len(pictures))]
    label = f"{threads or cores} thread{'s' * ((threads or cores) > 1)}"
    with tqdm(total=warmup + runs, desc=f"bench, {label}", disable=None, leave=False) as bar:
        seconds = bench.interleave(
            variants, loaded, warmup, runs, progress=lambda: bar.update() and None
        )
    lengths = np.empty((len(loaded), 0), np.int64)
    ways = session.libraries()
    if session.adaptive:
        lengths = bench.kept_per_image(session.runner(next(iter(ways.values()))), loaded)
    else:
        lengths = np.full(
            (len(loaded), len(session.config.stages)), session.config.image_tokens + 1
        )
    macs = bench.macs_summary(session.config, lengths, runs)
    ratios = dense_macs(session.config) / bench.macs_by_round(session.config, lengths, runs)
    rows = bench.summarise(variants, seconds, ratios)
    profiles = []
    if threads == 1 and session.adaptive:
        profiles = [profile.shares(session.path, loaded, lib) for lib in ways.values()]
    return {
        "kind": "model", "model": str(session.path), "arch": session.fields["arch"],
        "threads": threads or cores, "warmup": warmup, "runs": runs,
        "images": pictures.source, "image_count": len(loaded), **pictures.account,
        "macs": macs, "rows": rows, "profile": profiles, "notes": notes,
        "verdict": bench.verdict(rows), "machine": machine(),
    }  # fmt: skip


def _bench_engine(
    path: Path, reading: Callable[[Path, ArchConfig], ImageSet], runs: int, warmup: int,
    allowed: Allowed,
) -> dict[str, Any]:  # fmt: skip
    import tempfile

    import torch
    from tqdm import tqdm

    from asvit_deploy.artefacts.engine_file import EngineSession
    from asvit_deploy.evaluation import bench, engine_bench
    from asvit_deploy.evaluation.machine import machine
    from asvit_deploy.runners.pytorch import TorchRunner
    from asvit_deploy.runners.trt_plan import require_allowed, require_gpu

    trusted.require_temporary()  # engines are built there, and run
    session = EngineSession(path, allowed)
    require_allowed(session.fields, str(path), allowed)
    require_gpu(str(path))
    pictures = reading(path, session.config)
    loaded = [pictures[i] for i in range(len(pictures))]
    # The reference's counts: what `check` proves the engine to keep.
    lengths = bench.kept_per_image(TorchRunner(session.reference), loaded)
    with tempfile.TemporaryDirectory(prefix="asvit-bench-") as folder:
        variants = engine_bench.variants_of(session, pictures, lengths, Path(folder))
        with tqdm(total=warmup + runs, desc="bench", disable=None, leave=False) as bar:
            times = engine_bench.measure(
                variants, loaded, warmup, runs, progress=lambda: bar.update() and None
            )
    rows = engine_bench.summarise(variants, times)
    return {
        "kind": "engine", "model": str(path), "arch": session.fields["arch"],
        "flavour": session.fields["flavour"], "version": session.fields["flavour_version"],
        "precision": session.fields["precision"], "mode": session.fields["mode"],
        "gpu": torch.cuda.get_device_name(), "warmup": warmup, "runs": runs,
        "images": pictures.source, "image_count": len(loaded), **pictures.account,
        "macs": bench.macs_summary(session.config, lengths, runs) if session.adaptive else None,
        "rows": rows, "against_kept": engine_bench.against_kept(variants, times, lengths),
        "verdict": engine_bench.verdict(rows), "machine": machine(),
    }  # fmt: skip


def _skipped(report: dict[str, Any]) -> str:
    return f" ({report['skipped']} unreadable ones skipped)" if report.get("skipped") else ""


def _print_engine(report: dict[str, Any]) -> None:
    from asvit_deploy.evaluation.report import table

    rows = []
    for row in report["rows"]:
        gain = row.get("speedup")
        clocks = [
            f"{row[f'{c}_ms'][p]:.3f}" if f"{c}_ms" in row else "-"
            for c, p in (
                ("gpu", "p50"),
                ("wall", "p50"),
                ("wall", "p90"),
                ("wall", "p99"),
                ("enqueue", "p50"),
            )
        ]
        said = f"{gain['value']:.2f} ({gain['low']:.2f}-{gain['high']:.2f})" if gain else "1"
        rows.append([row["name"], *clocks, said])  # fmt: skip
    click.echo(f"\n{report['model']}: {report['flavour']} {report['version']}, "
               f"{report['precision']}, batch 1, {report['gpu']}, {report['runs']} rounds over "
               f"{report['image_count']} images{_skipped(report)}")  # fmt: skip
    click.echo(table(["engine", "GPU p50 ms", "wall p50 ms", "p90", "p99", "enqueue p50 ms",
                      "speed-up over dense (95 %)"], rows))  # fmt: skip
    click.echo(f"verdict: {report['verdict']}")


def _variants(session: Session, threads: int) -> tuple[list[Variant], list[str]]:
    """The rows that can be run here, and why the others cannot."""
    from asvit_deploy.evaluation.bench import Variant
    from asvit_deploy.exporting.to_onnx import to_onnx
    from asvit_deploy.ops import onnx_op
    from asvit_deploy.runners.onnx_runtime import OrtRunner
    from asvit_deploy.runners.pytorch import TorchRunner

    variants, notes = [], []
    try:
        dense = session.dense_reference
        variants.append(Variant("torch eager, dense", "torch", False, TorchRunner(dense)))
        if session.adaptive:
            variants.append(
                Variant("torch eager, adaptive", "torch", True, TorchRunner(session.reference))
            )
            twin = OrtRunner(to_onnx(dense), threads=threads, record=False)
            variants.append(Variant("onnxruntime, dense", "onnxruntime", False, twin))
    except UserError as error:
        notes.append(f"no torch and no dense rows: {error}")
    for way, lib in session.libraries().items():
        name = "onnxruntime, dense" if way == "dense" else f"onnxruntime, adaptive ({way})"
        runner = session.runner(lib, threads, record=False)
        variants.append(Variant(name, "onnxruntime", session.adaptive, runner))
    if session.library is None and onnx_op.nodes_of(session.model.graph):
        notes.append("no row with the op's library: `asvit-deploy build-plugins ort` makes it")
    return variants, notes


def _print(report: dict[str, Any]) -> None:
    from asvit_deploy.evaluation.report import table

    def interval(estimate: dict[str, float]) -> str:
        return f"{estimate['value']:.2f} ({estimate['low']:.2f}-{estimate['high']:.2f})"

    macs, rows = report["macs"], []
    for row in report["rows"]:
        gain = row.get("speedup")
        rows.append([
            row["name"], f"{row['p50_ms']:.2f}", f"{row['p90_ms']:.2f}", f"{row['p99_ms']:.2f}",
            f"{macs['adaptive_gmacs' if row['adaptive'] else 'dense_gmacs']:.3f}",
            interval(gain) if gain else "1",
            interval(row["share_of_macs_ratio"]) if gain else "-",
        ])  # fmt: skip
    plural = "s" * (report["threads"] > 1)
    click.echo(f"\n{report['model']}: batch 1, {report['threads']} thread{plural}, "
               f"{report['runs']} rounds over {report['image_count']} images"
               f"{_skipped(report)}")  # fmt: skip
    headers = ["variant", "p50 ms", "p90 ms", "p99 ms", "GMACs", "speed-up over dense (95 %)",
               "share of MACs ratio"]  # fmt: skip
    click.echo(table(headers, rows))
    kept = ", ".join(f"{k:.1f}" for k in macs["mean_kept"])
    click.echo(f"kept tokens per stage: {kept} of {macs['image_tokens']}; "
               f"MACs ratio {macs['ratio']:.3f}")  # fmt: skip
    for share in report["profile"]:
        click.echo(
            f"of the run ({share['op']}): scoring {share['scoring']:.2%}, "
            f"compaction {share['compaction']:.2%}, together {share['both']:.2%}"
        )
    for note in report["notes"]:
        click.echo(f"note: {note}")
    click.echo(f"verdict: {report['verdict']}")
