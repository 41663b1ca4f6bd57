"""`asvit-deploy evaluate`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.cli import options
from asvit_deploy.errors import UserError
from asvit_deploy.requirements import pip_install

if TYPE_CHECKING:
    from accelerate import Accelerator

    from asvit_deploy.evaluate.accuracy import Scored
    from asvit_deploy.models.registry import ArchConfig
    from asvit_deploy.models.vit import BatchRule
    from asvit_deploy.runners.base import Runner


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
@options.limit
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
    limit: int | None,
    library: Path | None,
    as_json: bool,
    output: Path | None,
    force: bool,
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

    from asvit_deploy.artifact import sidecar_path
    from asvit_deploy.evaluate.accuracy import joined, score, summarise
    from asvit_deploy.evaluate.machine import machine
    from asvit_deploy.files import check_writable, write_text
    from asvit_deploy.training.recipe import memory_failures

    if output is not None:
        check_writable(output, force, model, sidecar_path(model))
    torch.set_num_threads(1)
    place = _Place.here()
    runner, config, classes = _open(model, batch_rule, dense, library, place.device)
    rows = []
    for size in batches:
        labelled = _batches(model, data, config, classes, size, limit, place)
        with memory_failures(size):
            own = score(runner, labelled, config)
        scored = joined(place.gathered(own))
        rows.append({"batch_size": size, **summarise(scored, config)})
    if place.rank:
        return
    report = {"model": str(model), "data": data, "batch_rule": batch_rule, "arch": config.name,
              "processes": place.world, "runner": runner.describe(), "rows": rows,
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

    def gathered(self, scored: Scored) -> list[Scored]:
        """The rows of every process, in each of them."""
        if self.accelerator is None:
            return [scored]
        from accelerate.utils import gather_object

        from asvit_deploy.training.processes import lost_peers

        with lost_peers(self.accelerator):
            return gather_object([scored])


def _open(
    path: Path, batch_rule: BatchRule, dense: bool, library: Path | None, device: str
) -> tuple[Runner, ArchConfig, list[str] | None]:
    """The runner, the architecture, and the classes where they are known."""
    if path.suffix == ".onnx":
        from asvit_deploy.evaluate.session import Session, find_op_library

        if batch_rule != "exact" or dense:
            raise UserError(f"{path} is an ONNX file, which runs as it is; for --batch-rule mean-k "
                            "or --dense name its checkpoint")  # fmt: skip
        session = Session(path, find_op_library(library))
        return session.runner(session.library), session.config, session.fields["classes"]
    from asvit_deploy.models.checkpoint import build_model, load_checkpoint
    from asvit_deploy.runners.pytorch import TorchRunner

    checkpoint = load_checkpoint(path)
    network = build_model(checkpoint, dense=dense or not checkpoint.adaptive).to(device)
    classes = json.loads(checkpoint.metadata.get("classes", "null"))
    return TorchRunner(network, batch_rule), checkpoint.config, classes


def _batches(
    model: Path, data: str, config: ArchConfig, classes: list[str] | None, size: int,
    limit: int | None, place: _Place,
) -> Any:  # fmt: skip
    """Batches of NumPy arrays with the model's own class numbers, under a progress bar."""
    from tqdm import tqdm

    from asvit_deploy.evaluate.accuracy import label_map
    from asvit_deploy.training.data import open_labelled

    source = open_labelled(data, config)
    try:
        numbers = label_map(source.classes, classes, config.num_classes)
    except UserError as error:
        raise UserError(f"{model} cannot be evaluated on {data}: {error}") from error
    shared = source.validation(size, limit, place.rank, place.world)
    bar = tqdm(shared, desc=f"evaluate, batch {size}", disable=True if place.rank else None,
               leave=False, unit="batch")  # fmt: skip
    for images, labels, _ in bar:
        yield images.numpy(), numbers[labels.numpy()]


def _print(report: dict[str, Any]) -> None:
    from asvit_deploy.evaluate.report import table

    def interval(share: dict[str, float]) -> str:
        return f"{share['value']:.2%} ({share['low']:.2%}-{share['high']:.2%})"

    rows = [
        [str(row["batch_size"]), str(row["images"]), interval(row["top1"]), interval(row["top5"]),
         f"{row['gmacs']:.3f}", f"{row['macs_share']:.4f}",
         " ".join(f"{k:.1f}" for k in row["mean_kept"]) or "all"]
        for row in report["rows"]
    ]  # fmt: skip
    click.echo(f"\n{report['model']} on {report['data']}, {report['batch_rule']} tokens")
    headers = ["batch", "images", "top-1 (95 %)", "top-5 (95 %)", "GMACs", "share of MACs",
               "kept per stage"]  # fmt: skip
    click.echo(table(headers, rows))
    first = report["rows"][0]
    for stage, (low, p5, middle, p95, high) in enumerate(first["quantiles_kept"]):
        click.echo(f"stage {stage}: median {middle:.0f} of {first['image_tokens']} tokens, "
                   f"90 % of the images {p5:.0f}-{p95:.0f}, all {low:.0f}-{high:.0f}")  # fmt: skip
