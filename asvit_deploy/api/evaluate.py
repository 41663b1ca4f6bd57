"""`asvit_deploy.evaluate`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

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
from asvit_deploy.errors import UserError
from asvit_deploy.requirements import pip_install
from asvit_deploy.status import Say, first_process, hide_bar, silent

if TYPE_CHECKING:
    from accelerate import Accelerator

    from asvit_deploy.checkpoints.facts import Given
    from asvit_deploy.classes.network import ClassNames
    from asvit_deploy.data.skips import Skips
    from asvit_deploy.evaluation.accuracy import LabelledArrays
    from asvit_deploy.models.config import ArchConfig
    from asvit_deploy.models.vit import BatchRule
    from asvit_deploy.runners.base import Runner

_T = TypeVar("_T")


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a labelled set; every process of several has the whole of it.

    Attributes:
        runner: what ran it.
        rows: for each batch size the figures of `evaluation.accuracy.summarise`: `top1` and `top5`
            with their 95 % intervals, `gmacs`, `macs_share` of the dense network's, `mean_kept`
            image tokens a stage, and so on.
        account: pictures seen, taken, skipped and passed over, and classes without a picture.
        machine: where it ran.
    """

    model: str
    data: str
    batch_rule: str
    arch: str
    classes_from: str | None
    processes: int
    runner: dict[str, str]
    rows: list[dict[str, Any]]
    account: dict[str, Any]
    machine: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """What `asvit-deploy evaluate --json` prints."""
        fields = {k: v for k, v in vars(self).items() if k not in ("account", "machine")}
        return {**fields, **self.account, "machine": self.machine}


def evaluate(
    model: PathLike, *, data: PathLike, batch_size: int | Sequence[int] = (1,),
    batch_rule: Literal["exact", "mean-k"] = "exact", dense: bool = False, ema: bool = False,
    mean: Channels | None = None, std: Channels | None = None, crop_pct: float | None = None,
    interpolation: str | None = None, heads: int | None = None,
    activation: str | None = None, classes: PathLike | None = None,
    limit: int | None = None, skip_limit: int = 0, library: PathLike | None = None,
    output: PathLike | None = None, force: bool = False, say: Say = silent,
) -> Evaluation:  # fmt: skip
    """Top-1 and top-5, MACs and kept tokens over labelled pictures.

    The options are those of `asvit-deploy evaluate`. Among the processes of `torchrun` each takes
    its share of the pictures.

    Args:
        model: an ONNX artefact, or a checkpoint (on a GPU where there is one).
        data: a folder of class folders or of shards, or "digits".
        batch_size: images at a time; of several sizes each is a row.
        output: the report is written here too, as JSON.
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
    require_at_least(1, limit=limit)
    require_at_least(0, skip_limit=skip_limit)
    known = given_facts(mean, std, crop_pct, interpolation, heads, activation)
    names = optional_path(classes)
    path = checkpoint_path(model, say if first_process() else silent)
    if path.suffix == ".onnx" and (asked := known.options() + ["--ema"] * ema):
        raise UserError(
            f"{path} is an ONNX file, whose sidecar says what it was exported with; leave "
            f"{' and '.join(asked)} out, or export its checkpoint again with them"
        )
    written = optional_path(output)
    with _claimed(written, force, checkpoint_files(path), names) as place, _one_thread():
        opened = _open(path, batch_rule, dense, ema, known, optional_path(library), place, names,
                       place.first(say))  # fmt: skip
        report = _evaluate(path, os.fspath(data), opened, batch_rule, sizes, limit, skip_limit,
                           place, say)  # fmt: skip
        if written is not None and not place.rank:
            from asvit_deploy.files import write_text

            write_text(written, json.dumps(report.as_dict(), indent=2) + "\n")
    return report


@contextlib.contextmanager
def _claimed(
    output: Path | None, force: bool, model: tuple[Path, ...], classes: Path | None
) -> Iterator[_Place]:
    """This process's place among several, the first of which alone writes the report."""
    from asvit_deploy.claims import claimed
    from asvit_deploy.files import check_writable
    from asvit_deploy.sidecar import sidecar_path

    def check() -> None:
        if output is not None:
            check_writable(output, force, *model, sidecar_path(model[0]), classes)

    check()
    place = _Place.here()
    with contextlib.ExitStack() as stack:
        if output is not None and not place.rank:
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

    def first(self, say: Say) -> Say:
        """`say`, once and not in every process."""
        return silent if self.rank else say

    def gathered(self, own: _T) -> list[_T]:
        """What every process has, in each of them."""
        if self.accelerator is None:
            return [own]
        from accelerate.utils import gather_object

        from asvit_deploy.training.processes import lost_peers

        with lost_peers(self.accelerator):
            return gather_object([own])


# How to run a model, its architecture, its classes where they are known, and its cuts where they
# are not those of the architecture's stages.
_Opened = tuple["Runner", "ArchConfig", "ClassNames | None", "tuple[int, ...] | None"]


def _open(
    path: Path, batch_rule: BatchRule, dense: bool, ema: bool, known: Given,
    library: Path | None, place: _Place, classes: Path | None, say: Say,
) -> _Opened:  # fmt: skip
    from asvit_deploy.classes.network import of_checkpoint, of_fields

    if path.suffix == ".onnx":
        from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library

        if batch_rule != "exact" or dense:
            raise UserError(f"{path} is an ONNX file, which runs as it is; for --batch-rule mean-k "
                            "or --dense name its checkpoint")  # fmt: skip
        session = OnnxArtefact(path, find_op_library(library))
        found = of_fields(path, session.fields, classes, say)
        return session.runner(session.library), session.config, found, session.cuts
    from asvit_deploy.checkpoints.load import build_model, load_checkpoint
    from asvit_deploy.runners.pytorch import TorchRunner

    checkpoint = load_checkpoint(path, ema=ema, given=known)
    say_load(checkpoint, say)
    network = build_model(checkpoint, dense=dense or not checkpoint.adaptive).to(place.device)
    found = of_checkpoint(checkpoint, classes, say)
    cuts = network.cuts if checkpoint.reduction else None
    return TorchRunner(network, batch_rule), checkpoint.config, found, cuts or None


def _evaluate(
    model: Path, data: str, opened: _Opened, batch_rule: str, sizes: Sequence[int],
    limit: int | None, skip_limit: int, place: _Place, say: Say,
) -> Evaluation:  # fmt: skip
    from asvit_deploy.data.skips import Skips
    from asvit_deploy.evaluation.accuracy import joined, score, summarise
    from asvit_deploy.evaluation.machine import machine
    from asvit_deploy.training.recipe import memory_failures

    runner, config, found, cuts = opened
    if config.num_classes == 1:
        raise UserError(
            f"{model} has one output, a score and no class, so there is no top-1; see the scores "
            "with `asvit-deploy predict`"
        )
    skips = Skips(skip_limit, say)  # each process reads others
    say = place.first(say)
    labelled = _Labelled(model, data, config, found, skips, say)
    for note in labelled.source.notes:
        say(note)
    rows, counts = list[dict[str, Any]](), list[list[int]]()
    for size in sizes:
        with memory_failures(size):
            own = score(runner, labelled.batches(size, limit, place, say), config, cuts)
        parts = place.gathered((own, skips.reasons, labelled.counts))
        for _, reasons, _ in parts:
            skips.merge(reasons)
        scored = joined([part for part, _, _ in parts])
        rows.append({"batch_size": size, **summarise(scored, config)})
        counts = [per_class for _, _, per_class in parts]
    return Evaluation(
        str(model), data, batch_rule, config.name, found.origin if found else None, place.world,
        runner.describe(), rows, labelled.account(counts), machine(),
    )  # fmt: skip


class _Labelled:
    """The data with the model's own class numbers, and an account of it.

    Attributes:
        counts: pictures of each class of the data that this process has scored in its last pass.
    """

    def __init__(
        self, model: Path, data: str, config: ArchConfig, found: ClassNames | None, skips: Skips,
        say: Say,
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

    def batches(
        self, size: int, limit: int | None, place: _Place, say: Say
    ) -> Iterator[LabelledArrays]:
        """Batches of NumPy arrays, under a progress bar."""
        import numpy as np
        from tqdm import tqdm

        seen = np.zeros(len(self.source.classes), np.int64)
        shared = self.source.validation(size, limit, place.rank, place.world)
        bar = tqdm(shared, desc=f"evaluate, batch {size}", disable=hide_bar(say), leave=False,
                   unit="batch")  # fmt: skip
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
