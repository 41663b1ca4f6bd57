"""`asvit-deploy check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.cli import options
from asvit_deploy.errors import CheckFailed, UserError

if TYPE_CHECKING:
    from asvit_deploy.artefacts.engine_file import EngineSession
    from asvit_deploy.artefacts.onnx_file import Session
    from asvit_deploy.parity import Parity
    from asvit_deploy.runners.base import Reference, Runner
    from asvit_deploy.runners.trt_plan import Allowed

    # artefact, reference, runner of each way
    Opened = tuple[Session | EngineSession, Reference, dict[str, Runner]]

_BATCH = 8  # what a dynamic-batch model is also run with
_LISTED = 20


@click.command()
@options.models
@options.images
@click.option("--limit", type=click.IntRange(1), default=200, show_default=True,
              help="Use at most so many pictures.")  # fmt: skip
@options.skip_limit
@click.option("--reference", type=options.PATH,
              help="Another ONNX artefact to compare with [default: PyTorch].")  # fmt: skip
@options.library
@options.engine_code
@options.as_json
def command(
    models: tuple[Path, ...],
    images: Path | None,
    limit: int,
    skip_limit: int,
    reference: Path | None,
    library: Path | None,
    allowed: Allowed,
    as_json: bool,
) -> None:
    """Compare logits, top-1 and kept tokens with PyTorch; exit 1 when they do not agree.

    Without MODELS, every ONNX artefact in the current folder. Each is run with its function and,
    where the op's library is built, with that; a dynamic-batch model also in batches of 8. An
    engine, or a bucketed folder of them, runs on this machine's GPU, with and without CUDA graphs
    where its mode allows both.

    \b
    asvit-deploy check as_deit_s.onnx
    asvit-deploy check --reference as_deit_s.onnx as_deit_s.int8.onnx

    With --reference, a model may be a file that another tool made from it (quantised, simplified,
    without its sidecar): what it does not say is taken from the reference.
    """
    from asvit_deploy.artefacts.onnx_file import find_op_library

    found = find_op_library(library)
    paths = options.artefacts(models, "onnx", several=True)
    # A bad one is refused before the first has run for minutes; each is let go again, so that
    # never more than one is in memory.
    for path in paths[1:]:
        _open(path, reference, found, allowed)
    results: list[dict[str, Any]] = []
    for path in paths:
        results += _check(_open(path, reference, found, allowed), images, limit, skip_limit)
    if as_json:
        click.echo(json.dumps([{**r, "parity": r["parity"].as_dict()} for r in results], indent=2))
    else:
        _print(results)
    failed = [r for r in results if not r["parity"].passed]
    if failed:
        reasons = "; ".join(f"{r['model']} ({r['run']}): {f}" for r in failed
                            for f in r["parity"].failures)  # fmt: skip
        raise CheckFailed(reasons)


def _open(path: Path, other: Path | None, library: Path | None, allowed: Allowed) -> Opened:
    """Everything that checking `path` needs, loaded: what cannot be loaded is refused here."""
    from asvit_deploy.artefacts.engine_file import EngineSession, is_engine
    from asvit_deploy.artefacts.onnx_file import Session
    from asvit_deploy.runners.pytorch import TorchRunner

    reference: Reference
    if is_engine(path):
        engine = EngineSession(path, allowed)
        if other is not None:
            raise UserError(f"{path} is an engine, which is compared with PyTorch; leave "
                            "--reference out")  # fmt: skip
        ways: dict[str, Runner] = {"engine": engine.runner()}
        if engine.graphs:
            ways["engine, CUDA graph"] = engine.runner(graph=True)
        return engine, TorchRunner(engine.reference), ways
    if other is None:
        session = Session(path, library)
        reference = TorchRunner(session.reference)
    else:
        theirs = Session(other, library)
        session = Session(path, library, theirs)
        if session.borrowed:
            options.status(f"{path}: {session.borrowed}; preprocessing, stages and thresholds are "
                           f"those of {other}; judged as {session.parity}")  # fmt: skip
        reference = theirs.runner(next(iter(theirs.libraries().values())))
    return session, reference, {w: session.runner(lib) for w, lib in session.libraries().items()}


def _check(
    opened: Opened, images: Path | None, limit: int, skip_limit: int
) -> list[dict[str, Any]]:
    from tqdm import tqdm

    from asvit_deploy.data.images import open_images
    from asvit_deploy.parity import compare

    session, reference, runners = opened
    pictures = open_images(images, session.config, limit, skip_limit, options.status)
    loaded, names = pictures.loaded()
    options.status(f"{session.path}: {len(loaded)} images ({pictures.source})")
    batches = (1, _BATCH) if session.fields["batch"] == "dynamic" else (1,)
    runs = [(way, batch) for way in runners for batch in batches]
    results = []
    for way, batch in tqdm(runs, desc="check", disable=None, leave=False):
        parity = compare(
            reference, runners[way], loaded, names, session.fields["thresholds"],
            session.parity, batch,
        )  # fmt: skip
        results.append({"model": str(session.path), "run": f"{way}, batch {batch}",
                        "images": pictures.source, **pictures.account,
                        "reference": reference.describe(), "parity": parity})  # fmt: skip
    return results


def _print(results: list[dict[str, Any]]) -> None:
    from asvit_deploy.evaluation.report import table

    def row(model: str, run: str, p: Parity) -> list[str]:
        borderline = sum(flip.borderline for flip in p.flips)
        ties = sum(change.borderline for change in p.top1_changes)
        moved = [f"{theirs - ours:+.1f}" for ours, theirs in zip(p.mean_kept, p.candidate_kept)]
        return [
            model, run, str(p.images), f"{p.equal_sets}/{p.images}",
            f"{len(p.flips)} ({borderline} borderline)",
            f"{p.top1_equal}/{p.images}" + (f" ({ties} near ties)" if ties else ""),
            f"{p.logit_error:.1e}", f"{max(p.noise):.1e}" if p.noise else "-",
            " ".join(f"{k:.1f}" for k in p.mean_kept) or "-",
            " ".join(moved) if any(float(change) for change in moved) else "-",
            "ok" if p.passed else "FAILED",
        ]  # fmt: skip

    headers = ["model", "op, batch", "images", "same tokens", "flips", "same top-1", "logit error",
               "score noise", "kept per stage", "moved by", "verdict"]  # fmt: skip
    click.echo(table(headers, [row(r["model"], r["run"], r["parity"]) for r in results]))
    for source in dict.fromkeys(r["images"] for r in results if r["skipped"]):
        click.echo(f"images: {source}")
    for r in results:
        _print_differences(r["parity"])


def _print_differences(parity: Parity) -> None:
    """The flips and changes of top-1, the worst first, and how many more there are."""
    flips = sorted(parity.flips, key=lambda flip: flip.allowed - flip.margin)
    for flip in flips[:_LISTED]:
        click.echo(
            f"flip: {flip.image} stage {flip.stage} token {flip.token}: score {flip.score:.8f}, "
            f"threshold {flip.threshold:.8f}, margin {flip.margin:.1e}"
            + ("" if flip.borderline else f" BEYOND ROUNDING ({flip.allowed:.1e})")
        )
    if len(flips) > _LISTED:
        click.echo(f"and {len(flips) - _LISTED} more flips (--json lists them all)")
    changes = sorted(parity.top1_changes, key=lambda change: -change.margin)
    for change in changes[:_LISTED]:
        click.echo(
            f"top-1: {change.image}: class {change.candidate} for {change.reference}, whose logit "
            f"is higher by {change.margin:.1e} of the largest"
            + ("" if change.borderline else " BEYOND ROUNDING")
        )
    if len(changes) > _LISTED:
        click.echo(f"and {len(changes) - _LISTED} more changes of top-1 (--json lists them all)")
