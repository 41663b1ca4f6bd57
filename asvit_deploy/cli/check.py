"""`asvit-deploy check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from asvit_deploy.cli import options
from asvit_deploy.errors import CheckFailed

if TYPE_CHECKING:
    from asvit_deploy.evaluation.checking import Comparison
    from asvit_deploy.models.config import Output
    from asvit_deploy.parity import Parity

_LISTED = 20


@click.command()
@options.models
@options.images
@click.option("--limit", type=click.IntRange(1), default=200, show_default=True,
              help="Use at most so many pictures.")  # fmt: skip
@options.skip_limit
@click.option("--reference", type=options.PATH,
              help="Another ONNX artefact to compare with [default: PyTorch].")  # fmt: skip
@click.option(
    "--method", metavar="NAME",
    help="Method that MODELS must be of [default: what each says of itself].",
)  # fmt: skip
@options.method
@options.checked_runtimes
@options.choice
@options.library
@options.engine_code
@options.as_json
@click.option("-o", "--output", type=options.PATH, help="Also write the JSON here.")
@options.html
@options.force
def command(
    models: tuple[Path, ...],
    images: Path | None,
    limit: int,
    skip_limit: int,
    reference: Path | None,
    method: str | None,
    cuts: tuple[int, ...] | None,
    max_kept: int | None,
    runtime: tuple[str, ...],
    choice: Path | None,
    library: Path | None,
    plugin: Path | None,
    allow_engine_code: bool,
    as_json: bool,
    output: Path | None,
    html: Path | None,
    force: bool,
) -> None:
    """Compare outputs, top-1 and kept tokens with PyTorch; exit 1 when they do not agree.

    Without MODELS, every ONNX artefact in the current folder. Each is run with its function and,
    where the op's library is built, with that; a dynamic-batch model also in batches of 8. An
    engine, or a bucketed folder of them, runs on this machine's GPU, with and without CUDA graphs
    where its mode allows both.

    \b
    asvit-deploy check as_deit_s.onnx
    asvit-deploy check --reference as_deit_s.onnx as_deit_s.int8.onnx

    With --method, --cuts or --max-kept, what a model says of itself must be what these make of its
    checkpoint.

    With --reference, a model may be a file that another tool made from it (quantised, simplified,
    without its sidecar): what it does not say is taken from the reference.
    """
    from asvit_deploy.evaluation.checking import as_json as text
    from asvit_deploy.evaluation.checking import check

    comparisons = check(
        models, images=images, limit=limit, skip_limit=skip_limit, reference=reference,
        method=method, cuts=cuts, max_kept=max_kept, runtime=runtime, choice=choice,
        library=library, plugin=plugin, allow_engine_code=allow_engine_code, output=output,
        html=html, force=force, say=options.status,
    )  # fmt: skip
    if as_json:
        options.echo_json(text(comparisons))
    else:
        _print(comparisons)
    if failed := [comparison for comparison in comparisons if not comparison.passed]:
        reasons = "; ".join(f"{c.model} ({c.run}): {failure}" for c in failed
                            for failure in c.parity.failures)  # fmt: skip
        raise CheckFailed(reasons)


def _print(comparisons: list[Comparison]) -> None:
    from asvit_deploy.models.config import OUTPUTS

    for output in OUTPUTS:
        if chosen := [c for c in comparisons if c.parity.output == output]:
            options.echo(_table(chosen, output))
    for source in dict.fromkeys(c.images for c in comparisons if c.account["skipped"]):
        options.echo(f"images: {source}")
    for comparison in comparisons:
        _print_differences(comparison.parity)


def _table(comparisons: list[Comparison], output: Output) -> str:
    """One row each, of networks with the same kind of output."""
    from asvit_deploy.evaluation.report import table

    def row(model: str, run: str, p: Parity) -> list[str]:
        borderline = sum(flip.borderline for flip in p.flips)
        moved = [f"{theirs - ours:+.1f}" for ours, theirs in zip(p.mean_kept, p.candidate_kept)]
        return [
            model, run, str(p.images), f"{p.equal_sets}/{p.images}",
            f"{len(p.flips)} ({borderline} borderline)", *_of_output(p),
            f"{max(p.noise):.1e}" if p.noise else "-",
            " ".join(f"{k:.1f}" for k in p.mean_kept) or "-",
            " ".join(moved) if any(float(change) for change in moved) else "-",
            "ok" if p.passed else "FAILED",
        ]  # fmt: skip

    own = {"logits": ["same top-1", "logit error"], "embedding": ["same neighbour", "1 - cosine"]}
    headers = ["model", "op, batch", "images", "same tokens", "flips", *own[output], "score noise",
               "kept per stage", "moved by", "verdict"]  # fmt: skip
    return table(headers, [row(c.model, c.run, c.parity) for c in comparisons])


def _of_output(p: Parity) -> tuple[str, str]:
    """How many have the same best class or nearest neighbour, and the largest error."""
    from asvit_deploy.parity import CHOICE

    changes = p.top1_changes if p.output == "logits" else p.neighbour_changes
    ties = sum(change.borderline for change in changes)
    near = f" ({ties} near ties)" if ties else ""
    if p.output == "logits":
        return f"{p.top1_equal}/{p.images}{near}", f"{p.logit_error:.1e}"
    if p.images < CHOICE:
        return "-", f"{p.cosine_error:.1e}"
    return f"{p.neighbours_equal}/{p.images}{near}", f"{p.cosine_error:.1e}"


def _print_differences(parity: Parity) -> None:
    """The flips and changes of top-1 or neighbour, the worst first, and how many more there are."""
    flips = sorted(parity.flips, key=lambda flip: flip.allowed - flip.margin)
    for flip in flips[:_LISTED]:
        options.echo(
            f"flip: {flip.image} stage {flip.stage} token {flip.token}: score {flip.score:.8f}, "
            f"threshold {flip.threshold:.8f}, margin {flip.margin:.1e}"
            + ("" if flip.borderline else f" BEYOND ROUNDING ({flip.allowed:.1e})")
        )
    if len(flips) > _LISTED:
        options.echo(f"and {len(flips) - _LISTED} more flips (--json lists them all)")
    changes = sorted(parity.top1_changes, key=lambda change: -change.margin)
    for change in changes[:_LISTED]:
        options.echo(
            f"top-1: {change.image}: class {change.candidate} for {change.reference}, whose logit "
            f"is higher by {change.margin:.1e} of the largest"
            + ("" if change.borderline else " BEYOND ROUNDING")
        )
    if len(changes) > _LISTED:
        options.echo(f"and {len(changes) - _LISTED} more changes of top-1 (--json lists them all)")
    near = sorted(parity.neighbour_changes, key=lambda change: -change.margin)
    for neighbour in near[:_LISTED]:
        options.echo(
            f"neighbour: {neighbour.image}: {neighbour.candidate} for {neighbour.reference}, whose "
            f"cosine is higher by {neighbour.margin:.1e}"
            + ("" if neighbour.borderline else " BEYOND ROUNDING")
        )
    if len(near) > _LISTED:
        options.echo(f"and {len(near) - _LISTED} more changes of neighbour (--json lists them all)")
