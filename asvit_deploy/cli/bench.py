"""`asvit-deploy bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.cli import options
from asvit_deploy.cli.sweeps import interval_text, sweep_text

if TYPE_CHECKING:
    from asvit_deploy.evaluation.engine_bench import EngineBench
    from asvit_deploy.evaluation.model_bench import ModelBench


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
@click.option("--methods", metavar="A,B,...",
              help="Also time these methods, fixed counts at the same mean MACs.")  # fmt: skip
@click.option("--memory", is_flag=True,
              help="Also measure what each ONNX model takes, in a process of its own.")  # fmt: skip
@click.option("--sweep-batch", metavar="B,B,...",
              help="Also time these batches, beside dense and fixed counts.")  # fmt: skip
@click.option("--sweep-budget", metavar="F,F,...",
              help="Likewise these shares of the dense MACs.")  # fmt: skip
@click.option("--sweep-size", metavar="PX,PX,...", help="Likewise these image sizes.")
@options.runtimes
@options.library
@options.engine_code
@options.as_json
@click.option("-o", "--output", type=options.PATH, help="Also write the JSON report here.")
@options.html
@click.option("--save-choice", metavar="FILE", type=options.PATH,
              help="Write what ran fastest; `--runtime auto` reads MODEL.choice.json.")  # fmt: skip
@options.force
def command(
    models: tuple[Path, ...],
    images: Path | None,
    limit: int,
    skip_limit: int,
    runs: int,
    warmup: int,
    threads: str,
    methods: str | None,
    memory: bool,
    sweep_batch: str | None,
    sweep_budget: str | None,
    sweep_size: str | None,
    runtime: tuple[str, ...],
    library: Path | None,
    plugin: Path | None,
    allow_engine_code: bool,
    as_json: bool,
    output: Path | None,
    html: Path | None,
    save_choice: Path | None,
    force: bool,
) -> None:
    """Latency at batch 1, MACs and kept tokens, beside the dense model.

    One process, all variants interleaved in random order, on real pictures; the ratio of medians
    is what counts. Without MODELS, the adaptive artefact that the current folder's sidecars name,
    and on a machine with a GPU the engines that were built from it.
    """
    from asvit_deploy.evaluation import bench

    reports = bench.bench(
        models, images=images, limit=limit, skip_limit=skip_limit, runs=runs, warmup=warmup,
        threads=threads, methods=methods, memory=memory, sweep_batch=sweep_batch,
        sweep_budget=sweep_budget, sweep_size=sweep_size, runtime=runtime, library=library,
        plugin=plugin, allow_engine_code=allow_engine_code, output=output, html=html,
        save_choice=save_choice, force=force, say=options.status,
    )  # fmt: skip
    if as_json:
        options.echo_json(bench.as_json(reports))
        return
    for report in reports:
        _print_engine(report) if report.kind == "engine" else _print(report)  # type: ignore[arg-type]


def _skipped(report: ModelBench | EngineBench) -> str:
    skipped = report.account["skipped"]
    return f" ({skipped} unreadable ones skipped)" if skipped else ""


# Columns of an engine's table.
_CLOCKS = (
    ("gpu", "p50"), ("wall", "p50"), ("wall", "p90"), ("wall", "p99"), ("enqueue", "p50"),
)  # fmt: skip


def _print_engine(report: EngineBench) -> None:
    from asvit_deploy.evaluation.report import table

    rows = []
    for row in report.rows:
        gain = row.get("speedup")
        clocks = [
            f"{row[f'{clock}_ms'][percentile]:.3f}" if f"{clock}_ms" in row else "-"
            for clock, percentile in _CLOCKS
        ]
        said = f"{gain['value']:.2f} ({gain['low']:.2f}-{gain['high']:.2f})" if gain else "1"
        rows.append([row["name"], *clocks, said])
    options.echo(f"\n{report.model}: {report.flavour} {report.version}, "
               f"{report.precision}, batch 1, {report.gpu}, {report.runs} rounds over "
               f"{report.image_count} images{_skipped(report)}")  # fmt: skip
    options.echo(table(["engine", "GPU p50 ms", "wall p50 ms", "p90", "p99", "enqueue p50 ms",
                      "speed-up over dense (95 %)"], rows))  # fmt: skip
    _print_agreement(report)
    options.echo(f"verdict: {report.verdict}")


def _print_agreement(report: ModelBench | EngineBench) -> None:
    """What the tokens that left cost in quality: one line."""
    if report.agreement is not None:
        said = _agreement(report.agreement)
        options.echo(f"agreement with dense on {report.image_count} images: {said}")


def _agreement(agreed: dict[str, Any]) -> str:
    if "cosine" in agreed:
        said = (f"cosine {agreed['cosine']:.4f} ({agreed['low']:.4f}-{agreed['high']:.4f}), "
                f"10th percentile {agreed['p10']:.4f}")  # fmt: skip
        if "neighbour" in agreed:
            said += f", same neighbour {agreed['neighbour']:.1%}"
    elif "score_error" in agreed:
        said = f"mean error of the score {agreed['score_error']:.3g}"
    else:
        said = f"top-1 {agreed['top1']:.1%}"
    return said


def _print_details(report: ModelBench) -> None:
    """What the fastest row gains over dense ones elsewhere; latency over kept tokens, and memory:
    one line for each row that has it."""
    ahead = [row for row in report.rows if "over_others" in row and "way" in row]
    if ahead:
        fastest = min(ahead, key=lambda row: row["p50_ms"])
        said = "; ".join(f"{interval_text(r)} over {n}" for n, r in fastest["over_others"].items())
        options.echo(f"{fastest['name']}: {said}")
    for row in report.rows:
        if "over_kept" in row:
            line = row["over_kept"]
            options.echo(
                f"{row['name']}: {line['ms_at_none']:.2f} ms and {1e3 * line['ms_per_token']:.1f} "
                f"us a kept token, as a mean over the blocks (r2 {line['r2']:.3f})"
            )
    for row in report.rows:
        if "memory_mib" in row:
            taken = row["memory_mib"]
            options.echo(f"memory of {row['name']}: {taken['peak']:.0f} MiB at most as it runs, "
                       f"{taken['opened']:.0f} once open")  # fmt: skip


def _print(report: ModelBench) -> None:
    from asvit_deploy.evaluation.report import table

    macs, rows = report.macs, []
    for row in report.rows:
        gain = row.get("speedup")
        rows.append([
            row["name"], f"{row['p50_ms']:.2f}", f"{row['p90_ms']:.2f}", f"{row['p99_ms']:.2f}",
            f"{macs['adaptive_gmacs' if row['adaptive'] else 'dense_gmacs']:.3f}",
            interval_text(gain) if gain else "1",
            interval_text(row["share_of_macs_ratio"]) if gain else "-",
        ])  # fmt: skip
    plural = "s" * (report.threads > 1)
    options.echo(f"\n{report.model}: batch 1, {report.threads} thread{plural}, "
               f"{report.runs} rounds over {report.image_count} images"
               f"{_skipped(report)}")  # fmt: skip
    headers = ["variant", "p50 ms", "p90 ms", "p99 ms", "GMACs", "speed-up over dense (95 %)",
               "share of MACs ratio"]  # fmt: skip
    options.echo(table(headers, rows))
    kept = ", ".join(f"{k:.1f}" for k in macs["mean_kept"])
    options.echo(f"kept tokens per stage: {kept} of {macs['image_tokens']}; "
               f"MACs ratio {macs['ratio']:.3f}")  # fmt: skip
    _print_agreement(report)
    for name, beside in report.methods.items():
        said = _agreement(beside["agreement"])
        options.echo(f"{name} at {beside['macs_share']:.4f} of the dense MACs: {said}")
    for share in report.profile:
        options.echo(
            f"of the run ({share['op']}): scoring {share['scoring']:.2%}, "
            f"compaction {share['compaction']:.2%}, together {share['both']:.2%}"
        )
        staged = ", ".join(f"{ms:.2f}" for ms in share["stages_ms"])
        options.echo(f"kernel time between cuts ({share['op']}), ms: {staged}")
    _print_details(report)
    for row in report.rows:
        if "first_ms" in row:
            options.echo(f"{row['name']}: {row['first_ms']:.2f} ms at p50 on images that it had "
                         f"not seen, before the rounds above")  # fmt: skip
    for note in [*report.notes, *([report.busy] if report.busy else [])]:
        options.echo(f"note: {note}")
    options.echo(f"verdict: {report.verdict}")
    for sweep in report.sweeps:
        options.echo(sweep_text(sweep))
