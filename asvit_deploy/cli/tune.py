"""`asvit-deploy tune`."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from asvit_deploy.cli import options
from asvit_deploy.cli.sweeps import interval_text


@click.command()
@options.checkpoint
@click.option("--images", type=options.PATH, help="Folder of pictures, or `digits` [default: "
              "photographs of scikit-image].")  # fmt: skip
@click.option("--labels", is_flag=True, help="Folders of --images are classes: judge accuracy.")
@click.option("--max-drop", type=float, default=0.5, show_default=True, metavar="POINTS",
              help="Of accuracy, or of pictures whose top-1 changes, lost at most.")  # fmt: skip
@click.option("--min-cosine", type=float, default=0.95, show_default=True,
              help="Of embeddings, the least mean cosine with the dense network's.")  # fmt: skip
@click.option("--methods", metavar="A,B,...",
              help="Try these [default: size-passing, tome, topk-nearest].")  # fmt: skip
@click.option("--batch", default="1", show_default=True, metavar="B,B,...",
              help="Pictures at a time; the verdict is of the first.")  # fmt: skip
@options.runtimes
@click.option("--precision", multiple=True, metavar="A,B,...",
              help="Of float32, fp16 (engines), int8, bf16 [default: at hand].")  # fmt: skip
@click.option("--minutes", type=float, help="Take so long at most; what is left out is said.")
@click.option("-o", "--output", type=options.PATH,
              help="Folder [default: stem of --ckpt and `.tune`, here].")  # fmt: skip
@click.option("--image-size", type=int, help="Another image size; position embeddings are resized.")
@click.option("--arch", help="Settle the architecture where the checkpoint is ambiguous.")
@options.ema
@options.facts
@options.classes
@options.limit
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
              help="Of which pictures calibrate and which judge.")  # fmt: skip
@click.option("--threads", type=click.IntRange(0), default=1, show_default=True,
              help="Of every runtime; 0: every core.")  # fmt: skip
@options.skip_limit
@options.force
@options.as_json
def command(as_json: bool, **chosen: Any) -> None:
    """Is it worth it here, and what is lost? A go with its model, or a no-go.

    \b
    asvit-deploy tune --ckpt deit_small.pth --images DIR
    asvit-deploy predict deit_small.tune/deit_small.tuned.onnx --runtime auto PICTURE

    Some pictures fit methods to budgets, all others judge what comes of it; what keeps within
    --max-drop by a one-sided 95 % bound is timed beside dense and static networks, in every runtime
    and precision at hand. The first adaptive candidate that does not pass ends the tests, so that
    any passes falsely with a chance of 5 % in all; dense int8, bf16 and engines are tested beside
    them. On a GPU TensorRT engines are built, judged and timed too, with and without CUDA graphs.
    A run that was stopped is taken up where it was.

    Exit code 0: go; 3: no go; 4: not shown.
    """
    import asvit_deploy

    found = asvit_deploy.tune(**chosen, say=options.status)
    if as_json:
        options.echo_json(json.dumps(found.report, indent=2))
    else:
        options.echo(f"{text(found.report)}\n\n{found.output}")
    sys.exit(found.verdict["exit_code"])


def text(report: dict[str, Any]) -> str:
    """A run for people: what was judged, the frontier of each batch, the verdict."""
    shown = report["pictures"]
    lines = [f"{report['arch']}, {report['image_size']} px; {shown['source']}: "
             f"{shown['calibrating']} calibrate, {shown['judging']} others judge"]  # fmt: skip
    if report["sequence"]:
        lines += ["", _sequence(report)]
    for timing in report["latency"]:
        lines += ["", _latency(timing, report)]
    lines += [f"note: {note}" for note in report["notes"]]
    for timing in report["latency"]:
        lines += [f"note: batch {timing['batch']}: {note}"
                  for note in [*timing["notes"], *filter(None, [timing["busy"]])]]  # fmt: skip
    lines += [f"left out: {line}" for line in report["left_out"]]
    if (promise := report["promise"]) is not None:
        lines += ["", _promise(promise)]
    return "\n".join([*lines, "", f"verdict: {report['verdict']['sentence']}"])


def _sequence(report: dict[str, Any]) -> str:
    from asvit_deploy.evaluation.report import table

    embeds = report["demand"]["task"] == "embeddings"
    heads = ["candidate, in the order tested", "MACs",
             "cosine (95 %)" if embeds else "top-1 as dense (95 %)",
             "at least" if embeds else "lost at most", ""]  # fmt: skip
    rows = []
    for test in report["sequence"]:
        row = [test["name"], f"{test['macs_share']:.3f}"]
        if not test["tested"]:
            rows.append([*row, "-", "-", "not tested"])
            continue
        values = [test[key] for key in ("agreement", "agreement_low", "agreement_high")]
        agreed = "{:.4f} ({:.4f}-{:.4f})" if embeds else "{:.2%} ({:.2%}-{:.2%})"
        bound = 1 - test["loss_bound"] if embeds else test["loss_bound"]
        rows.append([*row, agreed.format(*values), f"{bound:.4f}" if embeds else f"{bound:.2f}",
                     "passes" if test["passed"] else "does not pass"])  # fmt: skip
    return table(heads, rows)


def _latency(timing: dict[str, Any], report: dict[str, Any]) -> str:
    from asvit_deploy.evaluation.report import table

    certified = {(row["name"], row["batch"]) for row in report["frontier"] if row["certified"]}
    rows = []
    for row in timing["rows"]:
        mark = " *" if (row["name"], row["batch"]) in certified else ""
        rows.append([f"{row['name']}{mark}", f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}",
                     interval_text(row.get("speedup")) if "speedup" in row else "1",
                     interval_text(row.get("speedup_p99")),
                     interval_text(row.get("over_static"))])  # fmt: skip
    plural = "s" * (report["threads"] != 1)
    count = "all" if report["threads"] == 0 else report["threads"]
    head = (f"batch {timing['batch']}, {count} thread{plural}, {timing['runs']} rounds, ms per "
            "picture; * meets the demand")  # fmt: skip
    heads = ["variant", "p50 ms", "p99 ms", "over dense at p50 (95 %)", "at p99", "over static"]
    return f"{head}\n{table(heads, rows)}"


def _promise(promise: dict[str, Any]) -> str:
    return (
        f"promised: {promise['ratio']:.2f}x ({promise['low']:.2f} to {promise['high']:.2f}) as "
        f"fast as {promise['over']}; agreement {promise['agreement']:.4f} "
        f"({promise['agreement_low']:.4f} to {promise['agreement_high']:.4f}), on "
        f"{promise['pictures']} other pictures {promise['expected_low']:.4f} to "
        f"{promise['expected_high']:.4f}"
    )
