"""`asvit-deploy evaluate`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from asvit_deploy.cli import options
from asvit_deploy.errors import UserError
from asvit_deploy.requirements import pip_install

if TYPE_CHECKING:
    from accelerate import Accelerator

    from asvit_deploy.checkpoints.facts import Given
    from asvit_deploy.checkpoints.load import Checkpoint
    from asvit_deploy.classes.network import ClassNames
    from asvit_deploy.data.skips import Skips
    from asvit_deploy.evaluation.accuracy import Batch
    from asvit_deploy.models.config import ArchConfig
    from asvit_deploy.models.vit import BatchRule
    from asvit_deploy.runners.base import Runner

_T = TypeVar("_T")
_NAMED = 5  # classes without a picture


@click.command()
@click.argument("model", type=options.CheckpointPath())
@click.option(
    "--data",
    required=True,
    help="Folder of class folders or of shards (of its val/ where it has one), or `digits`.",
)
@click.option("--batch-size", "batches", type=click.IntRange(1), multiple=True, default=(1,),
              show_default=True, help="Images at a time; repeatable.")  # fmt: skip
@click.option(
    "--batch-rule", type=click.Choice(["exact", "mean-k"]), default="exact", show_default=True,
    help="mean-k is the paper's: a batch shares one count.",
)  # fmt: skip
@click.option("--dense", is_flag=True, help="Run the checkpoint without its thresholds.")
@options.ema
@options.facts
@options.classes
@options.limit
@options.skip_limit
@options.library
@options.as_json
@click.option("-o", "output", type=options.PATH, help="Also write the JSON here.")
@options.force
def command(
    model: Path,
    data: str,
    batches: tuple[int, ...],
    batch_rule: BatchRule,
    dense: bool,
    ema: bool,
    classes: Path | None,
    limit: int | None,
    skip_limit: int,
    library: Path | None,
    as_json: bool,
    output: Path | None,
    force: bool,
    known: Given,
) -> None:
    """Top-1 and top-5, MACs and kept tokens over labelled pictures.

    MODEL is an ONNX artefact (run by ONNX Runtime) or a checkpoint (run by PyTorch).

    \b
    asvit-deploy evaluate as_deit_s.onnx --data imagenet/val
    asvit-deploy evaluate as_deit_s.pt --data imagenet --batch-rule mean-k --batch-size 32

    Started with `torchrun --nproc-per-node 8 -m asvit_deploy evaluate ...`, each process takes its
    share of the pictures. A checkpoint runs on a GPU where there is one.
    """
    import torch

    from asvit_deploy.artefacts.sidecar import sidecar_path
    from asvit_deploy.claims import claimed
    from asvit_deploy.data.skips import Skips
    from asvit_deploy.evaluation.accuracy import joined, score, summarise
    from asvit_deploy.evaluation.machine import machine
    from asvit_deploy.files import check_writable, write_text
    from asvit_deploy.training.recipe import memory_failures

    def check() -> None:
        if output is not None:
            check_writable(output, force, model, sidecar_path(model), classes)

    check()
    of_checkpoints = known.options() + ["--ema"] * ema
    if model.suffix == ".onnx" and of_checkpoints:
        raise UserError(
            f"{model} is an ONNX file, whose sidecar says what it was exported with; leave "
            f"{' and '.join(of_checkpoints)} out, or export its checkpoint again with them"
        )
    torch.set_num_threads(1)
    place = _Place.here()
    if output is not None and not place.rank:
        options.within(claimed(output, force, check))
    load = partial(_load, model, ema, known, place.say)
    runner, config, found = _open(model, batch_rule, dense, library, place, classes, load)
    if config.num_classes == 1:
        raise UserError(
            f"{model} has one output, a score and no class, so there is no top-1; see the scores "
            "with `asvit-deploy predict`"
        )
    skips = Skips(skip_limit, options.status)
    labelled = _Labelled(model, data, config, found, skips, place.say)
    for note in labelled.source.notes:
        place.say(note)
    rows: list[dict[str, Any]] = []
    for size in batches:
        with memory_failures(size):
            own = score(runner, labelled.batches(size, limit, place), config)
        parts = place.gathered((own, skips.reasons, labelled.counts))
        for _, reasons, _ in parts:
            skips.merge(reasons)
        scored = joined([part for part, _, _ in parts])
        rows.append({"batch_size": size, **summarise(scored, config)})
    if place.rank:
        return
    report = {"model": str(model), "data": data, "batch_rule": batch_rule, "arch": config.name,
              "classes_from": found.origin if found else None,
              "processes": place.world, "runner": runner.describe(), "rows": rows,
              **labelled.account([counts for _, _, counts in parts]),
              "machine": machine()}  # fmt: skip
    text = json.dumps(report, indent=2) + "\n"
    if output is not None:
        write_text(output, text)
    click.echo(text.rstrip()) if as_json else _print(report)


@dataclass(frozen=True)
class _Place:
    """This process among those of `torchrun` or `accelerate launch`, or alone."""

    rank: int
    world: int
    device: str
    accelerator: Accelerator | None = None

    @staticmethod
    def here() -> _Place:
        """Raises UserError where there are several and accelerate is not installed."""
        if os.environ.get("WORLD_SIZE", "1") == "1":
            import torch

            return _Place(0, 1, "cuda" if torch.cuda.is_available() else "cpu")
        try:
            from asvit_deploy.training.processes import accelerator_for
        except ModuleNotFoundError as error:
            if error.name != "accelerate":
                raise
            raise UserError(
                f"several processes need accelerate; {pip_install('accelerate')}"
            ) from error
        found = accelerator_for()
        return _Place(found.process_index, found.num_processes, str(found.device), found)

    def say(self, text: str) -> None:
        """A status line, once and not in every process."""
        if not self.rank:
            options.status(text)

    def gathered(self, own: _T) -> list[_T]:
        """What every process has, in each of them."""
        if self.accelerator is None:
            return [own]
        from accelerate.utils import gather_object

        from asvit_deploy.training.processes import lost_peers

        with lost_peers(self.accelerator):
            return gather_object([own])


def _load(path: Path, ema: bool, known: Given, say: Callable[[str], None]) -> Checkpoint:
    from asvit_deploy.checkpoints.load import load_checkpoint

    checkpoint = load_checkpoint(path, ema=ema, given=known)
    options.tell(checkpoint, say)
    return checkpoint


def _open(
    path: Path, batch_rule: BatchRule, dense: bool, library: Path | None, place: _Place,
    classes: Path | None, load: Callable[[], Checkpoint],
) -> tuple[Runner, ArchConfig, ClassNames | None]:  # fmt: skip
    """The runner, the architecture, and the classes where they are known."""
    from asvit_deploy.classes.network import of_checkpoint, of_fields

    if path.suffix == ".onnx":
        from asvit_deploy.artefacts.onnx_file import Session, find_op_library

        if batch_rule != "exact" or dense:
            raise UserError(f"{path} is an ONNX file, which runs as it is; for --batch-rule mean-k "
                            "or --dense name its checkpoint")  # fmt: skip
        session = Session(path, find_op_library(library))
        found = of_fields(path, session.fields, classes, place.say)
        return session.runner(session.library), session.config, found
    from asvit_deploy.checkpoints.load import build_model
    from asvit_deploy.runners.pytorch import TorchRunner

    checkpoint = load()
    network = build_model(checkpoint, dense=dense or not checkpoint.adaptive).to(place.device)
    found = of_checkpoint(checkpoint, classes, place.say)
    return TorchRunner(network, batch_rule), checkpoint.config, found


class _Labelled:
    """The data with the model's own class numbers, and an account of it.

    Attributes:
        counts: pictures of each class of the data that this process has scored in its last pass.
    """

    def __init__(
        self, model: Path, data: str, config: ArchConfig, found: ClassNames | None, skips: Skips,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        from asvit_deploy.classes.matching import label_map
        from asvit_deploy.data.shards import GIVEN
        from asvit_deploy.data.sources import open_labelled

        ours, firm = (found.names, found.firm) if found else (None, True)
        # Labels of shards are numbers: where nothing names them, the network's own names do.
        self.source = open_labelled(data, config, skips, ours)
        if self.source.classes_from == GIVEN:
            say(f"{data} has no classes.txt: its labels are taken as numbers of the outputs")
        self.counts: list[int] = []
        self._skips = skips
        try:
            self._numbers = label_map(self.source.classes, ours, config.num_classes, firm, say)
        except UserError as error:
            raise UserError(f"{model} cannot be evaluated on {data}: {error}") from error

    def batches(self, size: int, limit: int | None, place: _Place) -> Iterator[Batch]:
        """Batches of NumPy arrays, under a progress bar."""
        import numpy as np
        from tqdm import tqdm

        seen = np.zeros(len(self.source.classes), np.int64)
        shared = self.source.validation(size, limit, place.rank, place.world)
        bar = tqdm(shared, desc=f"evaluate, batch {size}", disable=True if place.rank else None,
                   leave=False, unit="batch")  # fmt: skip
        for images, labels, _ in bar:
            if len(labels):  # or every one of them was skipped
                seen += np.bincount(labels.numpy(), minlength=len(seen))
                yield images.numpy(), self._numbers[labels.numpy()]
        self.counts = seen.tolist()

    def account(self, counts: list[list[int]]) -> dict[str, Any]:
        """What was seen against what was taken, for JSON.

        Args:
            counts: every process's.
        """
        per_class = [sum(own) for own in zip(*counts)]
        names = self.source.classes
        return {
            "seen": self.source.held_out,
            "taken": sum(per_class),
            "skipped": len(self._skips),
            "skipped_by_reason": self._skips.by_reason(),
            "passed_over": dict(self.source.passed_over),
            "classes": len(names),
            "classes_without_pictures": [n for n, count in zip(names, per_class) if not count],
        }


def _print(report: dict[str, Any]) -> None:
    from asvit_deploy.evaluation.report import table

    def interval(share: dict[str, float]) -> str:
        return f"{share['value']:.2%} ({share['low']:.2%}-{share['high']:.2%})"

    def five(row: dict[str, Any]) -> str:
        few = row["num_classes"] <= 5  # then every class is among the five best
        return f"- ({row['num_classes']} classes)" if few else interval(row["top5"])

    rows = [
        [str(row["batch_size"]), str(row["images"]), interval(row["top1"]), five(row),
         f"{row['gmacs']:.3f}", f"{row['macs_share']:.4f}",
         " ".join(f"{k:.1f}" for k in row["mean_kept"]) or "all"]
        for row in report["rows"]
    ]  # fmt: skip
    click.echo(f"\n{report['model']} on {report['data']}, {report['batch_rule']} tokens")
    headers = ["batch", "images", "top-1 (95 %)", "top-5 (95 %)", "GMACs", "share of MACs",
               "kept per stage"]  # fmt: skip
    click.echo(table(headers, rows))
    _print_account(report)
    first = report["rows"][0]
    for stage, (low, p5, middle, p95, high) in enumerate(first["quantiles_kept"]):
        click.echo(f"stage {stage}: median {middle:.0f} of {first['image_tokens']} tokens, "
                   f"90 % of the images {p5:.0f}-{p95:.0f}, all {low:.0f}-{high:.0f}")  # fmt: skip


def _print_account(report: dict[str, Any]) -> None:
    """How many pictures there were and how many were taken; which classes have none."""
    from asvit_deploy.data.listing import others

    of = "" if report["seen"] is None else f" of {report['seen']:,}"
    parts = [f"pictures: {report['taken']:,}{of} taken"]
    if report["skipped"]:
        reasons = ", ".join(f"{why} {count}" for why, count in report["skipped_by_reason"].items())
        parts.append(f"{report['skipped']:,} skipped ({reasons})")
    if passed := others(report["passed_over"]):
        parts.append(passed)
    if without := report["classes_without_pictures"]:
        more = ", …" if len(without) > _NAMED else ""
        parts.append(f"{len(without):,} of {report['classes']:,} classes without a picture "
                     f"({', '.join(without[:_NAMED])}{more})")  # fmt: skip
    click.echo("; ".join(parts))
