"""`asvit_deploy.evaluate`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from asvit_deploy.api.inputs import (
    Channels,
    PathLike,
    checkpoint_files,
    checkpoint_path,
    given_facts,
    optional_path,
    require_at_least,
    require_one_of,
    say_load,
)
from asvit_deploy.api.methods import EXECUTED, with_method
from asvit_deploy.api.place import Place
from asvit_deploy.api.runner import runner_of
from asvit_deploy.errors import UserError
from asvit_deploy.runtimes import TORCH, chosen_one, require_auto, require_library_used
from asvit_deploy.status import Say, first_process, silent

if TYPE_CHECKING:
    from asvit_deploy.checkpoints.facts import Given
    from asvit_deploy.checkpoints.load import Checkpoint
    from asvit_deploy.classes.network import ClassNames
    from asvit_deploy.data.skips import Skips
    from asvit_deploy.evaluation.accuracy import LabelledArrays
    from asvit_deploy.evaluation.pictures import EvaluationPictures
    from asvit_deploy.models.config import ArchConfig, Output
    from asvit_deploy.models.macs import Cuts
    from asvit_deploy.models.vit import BatchRule, ViT
    from asvit_deploy.runners.base import Runner


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a labelled set; every process of several has the whole of it.

    Attributes:
        runner: what ran it.
        output: "logits", or "embedding".
        rows: for each batch size the figures of `evaluation.accuracy.summarise`: `top1` and `top5`
            with their 95 % intervals, `gmacs`, `macs_share` of the dense network's, `mean_kept`
            image tokens a stage, and so on; of embeddings those of
            `evaluation.embedding.summarise`: `agreement` with the dense twin and `knn` accuracy in
            place of `top1` and `top5`.
        account: pictures seen, taken, skipped and passed over, and classes without a picture.
        machine: where it ran.
        sha256: of an ONNX file.
    """

    model: str
    data: str
    batch_rule: str
    arch: str
    output: Output
    classes_from: str | None
    processes: int
    runner: dict[str, str]
    rows: list[dict[str, Any]]
    account: dict[str, Any]
    machine: dict[str, Any]
    sha256: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """What `asvit-deploy evaluate --json` prints."""
        from asvit_deploy.sidecar import command_line

        fields = {k: v for k, v in vars(self).items() if k not in ("account", "machine")}
        return {"kind": "evaluate", **fields, **self.account, "machine": self.machine,
                "command": command_line()}  # fmt: skip


def evaluate(
    model: PathLike, *, data: PathLike, batch_size: int | Sequence[int] = (1,),
    batch_rule: Literal["exact", "mean-k"] = "exact", dense: bool = False,
    method: str | None = None, budget: float | None = None, cuts: Sequence[int] | None = None,
    max_kept: int | None = None, ema: bool = False,
    mean: Channels | None = None, std: Channels | None = None, crop_pct: float | None = None,
    interpolation: str | None = None, heads: int | None = None,
    activation: str | None = None, classes: PathLike | None = None,
    neighbours: int | None = None, limit: int | None = None, skip_limit: int = 0,
    library: PathLike | None = None, output: PathLike | None = None,
    html: PathLike | None = None, force: bool = False,
    runtime: str | None = None, choice: PathLike | None = None, say: Say = silent,
) -> Evaluation:  # fmt: skip
    """Top-1 and top-5, MACs and kept tokens over labelled pictures; of embeddings, agreement with
    the dense twin, and k-NN accuracy where the pictures are labelled.

    The options are those of `asvit-deploy evaluate`. Among the processes of `torchrun` each takes
    its share of the pictures.

    Args:
        model: an ONNX artefact, or a checkpoint (on a GPU where there is one).
        data: a folder of class folders or of shards, or "digits"; for embeddings any folder of
            pictures.
        method, budget, cuts, max_kept: of a checkpoint, as `asvit_deploy.export` has them.
        neighbours: k of the k-NN accuracy, by default 5.
        batch_size: images at a time; of several sizes each is a row.
        output: the report is written here too, as JSON.
        html: and a page of it here, as `asvit_deploy.report` makes one.
        runtime: what runs an ONNX artefact: onnxruntime, openvino, openvino-bf16, or torch, which
            runs its checkpoint; or auto, what `bench(save_choice=...)` found fastest.
        choice: what auto reads, by default `MODEL.choice.json`.
        say: gets status lines; a progress bar goes with them.

    Raises:
        UserError: bad input, classes that cannot be matched, more unreadable pictures than
            `skip_limit`, or an output that cannot be written or is there without `force`.
    """
    require_one_of("batch_rule", batch_rule, ("exact", "mean-k"))
    sizes = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size)
    if not sizes:
        raise UserError("batch_size is empty; pass one size or more")
    for size in sizes:
        require_at_least(1, batch_size=size)
    require_at_least(1, limit=limit, neighbours=neighbours)
    require_at_least(0, skip_limit=skip_limit)
    known = given_facts(mean, std, crop_pct, interpolation, heads, activation)
    names = optional_path(classes)
    chosen, chosen_by = chosen_one(runtime), optional_path(choice)
    require_auto(chosen_by, (chosen or "",))
    require_library_used(library, (chosen,) if chosen else ())
    path = checkpoint_path(model, say if first_process() else silent)
    if path.suffix != ".onnx" and chosen not in (None, TORCH):
        raise UserError(f"{path} is no ONNX file, and {chosen} runs nothing else here; name one "
                        "that `asvit-deploy export` made, or runtime torch")  # fmt: skip
    require_library_used(library, () if path.suffix == ".onnx" else (TORCH,))
    of_method = {"--method": method, "--budget": budget, "--cuts": cuts, "--max-kept": max_kept}
    given = [option for option, value in of_method.items() if value is not None]
    if dense and given:
        raise UserError(f"--dense has no method; drop it, or {given[0]}")
    if path.suffix == ".onnx" and (asked := known.options() + ["--ema"] * ema + given):
        raise UserError(
            f"{path} is an ONNX file, whose sidecar says what it was exported with; leave "
            f"{' and '.join(asked)} out, or export its checkpoint again with them"
        )
    written, shown = optional_path(output), optional_path(html)
    with _claimed(written, shown, force, checkpoint_files(path), names) as place, _one_thread():
        change = partial(with_method, method=method, budget=budget, cuts=cuts, max_kept=max_kept)
        opened = _open(path, batch_rule, dense, ema, known, optional_path(library), place, names,
                       change, place.first(say), chosen, chosen_by)  # fmt: skip
        if max_kept is not None:  # then fewer stay than where it was calibrated
            opened = replace(opened, aim=None)
        report = _evaluate(path, os.fspath(data), opened, batch_rule, sizes, limit, skip_limit,
                           neighbours, place, say)  # fmt: skip
        if written is not None and not place.rank:
            from asvit_deploy.files import write_text

            write_text(written, json.dumps(report.as_dict(), indent=2) + "\n")
        if shown is not None and not place.rank:
            from asvit_deploy.page.writing import write

            write([report.as_dict()], shown, force)
    return report


@contextlib.contextmanager
def _claimed(
    output: Path | None, html: Path | None, force: bool, model: tuple[Path, ...],
    classes: Path | None,
) -> Iterator[Place]:  # fmt: skip
    """This process's place among several, the first of which alone writes the report."""
    from asvit_deploy.claims import claimed
    from asvit_deploy.files import check_writable
    from asvit_deploy.page.writing import claimed_page
    from asvit_deploy.sidecar import sidecar_path

    sources = (*model, sidecar_path(model[0]), classes)

    def check() -> None:
        if output is not None:
            check_writable(output, force, *sources)

    check()
    place = Place.here()
    with contextlib.ExitStack() as stack:
        if not place.rank:
            stack.enter_context(claimed_page(html, force, *sources, other=output))
            if output is not None:
                stack.enter_context(claimed(output, force, check))
        yield place


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch computes in one thread meanwhile, so that figures do not depend on the machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Opened:
    """A model to evaluate.

    Attributes:
        names: of its classes, where they are known.
        cuts: its method, where that is another than AS-ViT's own: see `macs.Cuts`.
        twin: the dense one of a network that gives embeddings, or why there is none.
        aim: the budget that its thresholds were calibrated to, in MACs as they are carried out.
        sha256: of an ONNX file.
    """

    runner: Runner
    config: ArchConfig
    names: ClassNames | None
    cuts: Cuts
    twin: Runner | str
    aim: float | None = None
    sha256: str | None = None


def _open(
    path: Path, batch_rule: BatchRule, dense: bool, ema: bool, known: Given,
    library: Path | None, place: Place, classes: Path | None,
    change: Callable[[Checkpoint], Checkpoint], say: Say, runtime: str | None,
    choice: Path | None,
) -> _Opened:  # fmt: skip
    from asvit_deploy.classes.network import of_checkpoint, of_fields

    if path.suffix == ".onnx":
        from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library

        if batch_rule != "exact" or dense:
            raise UserError(f"{path} is an ONNX file, which runs as it is; for --batch-rule mean-k "
                            "or --dense name its checkpoint")  # fmt: skip
        session = OnnxArtefact(path, find_op_library(library))
        found = of_fields(path, session.fields, classes, say)
        twin = _twin(session.config, session.adaptive, lambda: session.dense_reference, place)
        runner = runner_of(session, runtime, choice, say)
        fields, adapts = session.fields, bool(session.fields["thresholds"])
        aim = fields.get("budget") if adapts and fields.get("budget_by") == EXECUTED else None
        return _Opened(runner, session.config, found, session.method, twin, aim,
                       fields.get("sha256"))  # fmt: skip
    from asvit_deploy.checkpoints.load import build_model, load_checkpoint
    from asvit_deploy.runners.pytorch import TorchRunner

    checkpoint = change(load_checkpoint(path, ema=ema, given=known))
    say_load(checkpoint, say)
    network = build_model(checkpoint, dense=dense or not checkpoint.adaptive).to(place.device)
    found = of_checkpoint(checkpoint, classes, say)
    cuts = network.reduction if checkpoint.reduction else None
    twin = _twin(checkpoint.config, network.adaptive, lambda: network.with_reduction(None), place)
    kept = checkpoint.metadata
    aim = None
    if network.threshold_values() and kept.get("budget_by") == EXECUTED and "budget" in kept:
        aim = float(kept["budget"])
    eager = TorchRunner(network, batch_rule)
    return _Opened(eager, checkpoint.config, found, cuts, twin, aim)


def _twin(
    config: ArchConfig, adaptive: bool, make: Callable[[], ViT], place: Place
) -> Runner | str:  # fmt: skip
    from asvit_deploy.runners.pytorch import TorchRunner

    if config.output != "embedding":
        return "its classes are compared with the labels"
    if not adaptive:
        return "it is dense itself"
    try:
        return TorchRunner(make().to(place.device))
    except UserError as error:
        return str(error)


# What runs the batches of one process, and what makes a row of what all processes have run.
_Task = tuple["Callable[[Iterable[LabelledArrays]], Any]", "Callable[[list[Any]], dict[str, Any]]"]


def _evaluate(
    model: Path, data: str, opened: _Opened, batch_rule: str, sizes: Sequence[int],
    limit: int | None, skip_limit: int, neighbours: int | None, place: Place, say: Say,
) -> Evaluation:  # fmt: skip
    from asvit_deploy.data.skips import Skips
    from asvit_deploy.evaluation.machine import machine
    from asvit_deploy.evaluation.pictures import labelled_pictures
    from asvit_deploy.training.recipe import memory_failures

    config, found = opened.config, opened.names
    skips = Skips(skip_limit, say)  # each process reads others
    say = place.first(say)
    if config.output == "embedding":
        pictures = _any_pictures(model, data, opened, skips, say)
        run, row = _embedding_task(model, opened, neighbours, say)
    else:
        if neighbours is not None:
            say(f"{model} has classes: --neighbours, which is for embeddings, is not looked at")
        pictures = labelled_pictures(model, data, config, opened.names, skips, say)
        run, row = _class_task(opened)
    for note in pictures.source.notes:
        say(note)
    rows, counts = list[dict[str, Any]](), list[list[int]]()
    for size in sizes:
        with memory_failures(size):
            own = run(pictures.batches(size, limit, place.rank, place.world, say))
        parts = place.gathered((own, skips.reasons, pictures.counts))
        for _, reasons, _ in parts:
            skips.merge(reasons)
        rows.append({"batch_size": size, **row([part for part, _, _ in parts])})
        _say_drift(model, rows[-1]["macs_share"], opened.aim, say)
        counts = [per_class for _, _, per_class in parts]
    return Evaluation(
        str(model), data, batch_rule, config.name, config.output, found.origin if found else None,
        place.world, opened.runner.describe(), rows, pictures.account(counts), machine(),
        opened.sha256,
    )  # fmt: skip


_DRIFT = 0.02  # of the budget


def _say_drift(model: Path, share: float, aim: float | None, say: Say) -> None:
    """Thresholds keep what their calibration kept on pictures like those alone."""
    if aim is not None and abs(share / aim - 1) > _DRIFT:
        say(
            f"{model} takes {share:.3f} of the dense MACs here and was calibrated to {aim:g}: "
            "these pictures keep other counts than those that calibrated; calibrate on some of them"
        )


def _class_task(opened: _Opened) -> _Task:
    from asvit_deploy.evaluation.accuracy import joined, score, summarise

    config = opened.config
    return (
        lambda batches: score(opened.runner, batches, config, opened.cuts),
        lambda parts: summarise(joined(parts), config),
    )


def _embedding_task(model: Path, opened: _Opened, neighbours: int | None, say: Say) -> _Task:
    from asvit_deploy.evaluation.embedding import NEIGHBOURS, embed, joined, summarise

    config, count = opened.config, neighbours or NEIGHBOURS
    twin = None if isinstance(opened.twin, str) else opened.twin
    said = set[str]()

    def once(line: str) -> None:  # each batch size comes to the same
        if line not in said:
            say(line)
        said.add(line)

    return (
        lambda batches: embed(opened.runner, twin, batches, config),
        lambda parts: summarise(joined(list(chain(*parts))), config, opened.cuts, count, str(model),
                                once),
    )  # fmt: skip


def _any_pictures(
    model: Path, data: str, opened: _Opened, skips: Skips, say: Say
) -> EvaluationPictures:
    """The data with its own class numbers, where it has classes."""
    from asvit_deploy.data.sources import open_pictures
    from asvit_deploy.evaluation.pictures import EvaluationPictures

    source = open_pictures(data, opened.config, skips, say)
    if isinstance(opened.twin, str):
        if not source.classes:
            raise UserError(
                f"{model} has no dense twin to agree with ({opened.twin}) and {data} has no "
                "classes: there is nothing to evaluate; name an adaptive model, or a folder of "
                "class folders"
            )
        say(f"{model} has no dense twin to agree with: {opened.twin}")
    return EvaluationPictures(source, skips)
