"""Training: a dense network from scratch, or an adaptive one from a dense one, to a budget.

One process, or as many as `accelerate launch` or `torchrun` start. Whatever a step does follows
from the options and its number, so a run that was stopped, at any moment and in any way, continues
from its last state as if nothing had happened. What a run is fed with stands in `feed`, how it
starts, stops and goes on in `lifecycle`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from asvit_deploy.checkpoints.beside import backbone_beside
from asvit_deploy.checkpoints.load import Checkpoint, save_checkpoint, with_head
from asvit_deploy.data.batches import Batch
from asvit_deploy.data.sources import Source
from asvit_deploy.errors import UserError
from asvit_deploy.fitting import Fit
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import Selector, ViT
from asvit_deploy.sidecar import provenance
from asvit_deploy.training.feed import Skipped, batches, share
from asvit_deploy.training.lifecycle import (
    Progress,
    average_path,
    claims,
    interrupted,
    kept_when_stopped,
    stop_signals,
)
from asvit_deploy.training.log import Log
from asvit_deploy.training.processes import accelerator_for, lost_peers, together, total
from asvit_deploy.training.recipe import (
    DEFAULT_RUNNING,
    FIT,
    Recipe,
    Running,
    check_memory,
    memory_failures,
)
from asvit_deploy.training.start import adaptive_start, dense_start, load_teacher, settled
from asvit_deploy.training.state import state_path
from asvit_deploy.training.trainer import Trainer
from asvit_deploy.training.validation import land_on_budget, start_on_budget, validate


@dataclass(frozen=True)
class Trained:
    """How a run ended.

    Attributes:
        output: the checkpoint; its sidecar lies beside it.
        validation: `validate`'s figures.
        fit: how the thresholds met the budget; None where there is none.
        average: the same of the moving average, where one is kept.
        skipped: pictures that no process could read.
        backbone: the network's file, beside which the output must stay; None: it holds all.
    """

    output: Path
    validation: dict[str, Any]
    fit: Fit | None
    average: Trained | None = None
    skipped: tuple[str, ...] = ()
    backbone: Path | None = None


@dataclass
class _Means:
    """Means of a step's figures since they were last taken."""

    steps: int = 0
    sums: dict[str, Any] = field(default_factory=dict)

    def add(self, figures: dict[str, Any]) -> None:
        self.steps += 1
        for name, value in figures.items():
            values = value if isinstance(value, list) else [value]
            before = self.sums.get(name, [0.0] * len(values))
            self.sums[name] = [a + b for a, b in zip(before, values)]

    def take(self) -> dict[str, Any]:
        means = {name: [v / self.steps for v in sums] for name, sums in self.sums.items()}
        self.steps, self.sums = 0, {}
        return {name: v if len(v) > 1 else v[0] for name, v in means.items()}


# --- the loop -----------------------------------------------------------------------------------


def train(
    trainer: Trainer,
    source: Source,
    output: Path,
    identity: dict[str, Any],
    skipped: Skipped,
    resume: bool = False,
    running: Running = DEFAULT_RUNNING,
    force: bool = False,
) -> Log:
    """Run all the steps, from the start or from the saved state.

    Nothing is trained on a batch with more unreadable pictures than may be, nor once a stop is
    asked for: the state that is left goes on with that very batch.

    Args:
        skipped: gets the names of pictures that could not be read.
        identity: what else decides the result (data, starting weights); a state that was saved
            under another identity is refused.
        force: replace a log that is there and not this run's own.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM, after saving.
        UserError: the loss diverged, too many pictures cannot be read, the batch does not divide
            among the processes, there is nothing to resume, or the log would replace another file.
    """
    part = share(trainer.accelerator, trainer.recipe)
    progress = Progress(trainer, output, identity, resume, running, force)
    fit_first = trainer.recipe.thresholds == FIT and not resume
    if fit_first:
        start_on_budget(trainer, source, progress.log, skipped, running)
    loop = _Loop(trainer, source, progress, skipped, running, changed=fit_first)
    with stop_signals() as signals, loop.bar:
        first, recipe = progress.first, trainer.recipe
        for step, batch in batches(source, first, recipe, part, running.workers):
            loop.step(step, loop.admitted(step, batch, len(signals)))
    return progress.log


class _Loop:
    """The steps of a run, with the figures, states and ends of epochs between them.

    Args:
        changed: the network is not as it started, even before the first step.
    """

    def __init__(
        self, trainer: Trainer, source: Source, progress: Progress, skipped: Skipped,
        running: Running, changed: bool,
    ) -> None:  # fmt: skip
        self._trainer, self._source, self._progress = trainer, source, progress
        self._skipped, self._running, self._changed = skipped, running, changed
        self._means, self._started = _Means(), time.monotonic()
        size = trainer.recipe.batch_size
        shown = running.bars and trainer.accelerator.is_main_process and sys.stderr is not None
        self.bar = tqdm(
            total=trainer.recipe.steps * size, initial=progress.first * size, unit="img",
            file=sys.stderr, mininterval=1.0, disable=not shown,
        )  # fmt: skip

    def admitted(self, step: int, batch: Batch | UserError, signals: int) -> Batch:
        """The batch that comes next, unless the run ends before it, its state saved.

        Args:
            signals: how many times this process was asked to stop.

        Raises:
            Interrupted, UserError: see `train`; in all processes alike.
        """
        skipped, accelerator = self._skipped, self._trainer.accelerator
        refused = isinstance(batch, UserError)
        skipped.names.update(() if isinstance(batch, UserError) else batch.skipped)
        stopped, failed, fresh = total(accelerator, signals, refused, skipped.fresh())
        if stopped or failed or (fresh and skipped.too_many()):
            if stopped or step > self._progress.first or self._changed:
                self._progress.save(step)
            with together(accelerator):
                if isinstance(batch, UserError):
                    raise batch
            skipped.check()
        if stopped:
            raise interrupted(step, self._progress.output)
        assert isinstance(batch, Batch)  # a refusal has ended the run
        return batch

    def step(self, step: int, batch: Batch) -> None:
        """Train on a batch, and do what is due after it."""
        recipe, running = self._trainer.recipe, self._running
        figures = self._trainer.step(step, batch)
        done, size = step + 1, recipe.batch_size
        self._means.add(figures)
        self.bar.update(size)
        last = done == recipe.steps
        if done % running.log_every == 0 or last:
            self._log(done, figures)
        epoch = done * size // self._source.epoch
        ended = epoch > step * size // self._source.epoch
        if ended:
            paused = time.monotonic()
            self._end_epoch(epoch, done)
            self._started += time.monotonic() - paused  # a speed is that of training alone
        if ended or done % running.save_every == 0 or last:
            self._progress.save(done)
        if ended:
            self._skipped.check()

    def _log(self, done: int, figures: dict[str, Any]) -> None:
        trained = (done - self._progress.first) * self._trainer.recipe.batch_size
        speed = trained / (time.monotonic() - self._started)
        self._progress.log.write({"step": done, **figures, "images_per_s": speed})
        shown = {k: figures[k] for k in ("loss", "top1", "macs") if k in figures}
        self.bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()})

    def _end_epoch(self, epoch: int, done: int) -> None:
        """Log the epoch's means (since a resumed run went on) and what validation says."""
        steps, figures, trainer = self._means.steps, self._means.take(), self._trainer
        for name in ("lr", "thresholds"):  # where they are now says more than where they were
            figures.pop(name, None)
        running, names = self._running, self._skipped.names
        held_out = validate(trainer.model, self._source, running.validation_limit,
                            trainer.accelerator, names, running.bars, trainer.judge)  # fmt: skip
        unreadable = len(self._skipped.everywhere())
        self._progress.log.write({
            "event": "epoch", "epoch": epoch, "step": done, "steps": steps, **figures,
            "skipped": unreadable, "thresholds": trainer.model.threshold_values(),
            "validation": held_out,
        })  # fmt: skip


# --- the whole run ------------------------------------------------------------------------------


def _start(
    config: ArchConfig, pretrained: Checkpoint | None, teacher: Checkpoint | None, recipe: Recipe,
    accelerator: Accelerator,
) -> tuple[ViT, ViT | None]:  # fmt: skip
    """The network to train and its teacher, once it is sure that the run can be made."""
    # Training works every row out, and its budget is the paper's.
    config = config.released()
    if pretrained is not None:
        pretrained = replace(pretrained, config=pretrained.config.released())
    if pretrained is not None and pretrained.headless and recipe.labels == "data":
        pretrained = with_head(pretrained, config.num_classes, recipe.seed)
    if accelerator.device.type == "cpu":  # a GPU says itself when it is full
        check_memory(config, recipe.batch_size, accelerator.num_processes)
    if recipe.budget is None:
        return dense_start(config, pretrained, recipe.seed), None
    if pretrained is None:
        raise UserError("adaptive training starts from dense weights; pass --pretrained")
    student, own = adaptive_start(config, pretrained, recipe)
    if not recipe.distill_weight:
        if teacher is not None:
            raise UserError("--distill-weight 0 needs no teacher; drop one of it and --teacher")
        return student, None
    return student, own if teacher is None else load_teacher(config, teacher)


def finetune(
    config: ArchConfig,
    source: Source,
    pretrained: Checkpoint | None,
    recipe: Recipe,
    output: Path,
    identity: dict[str, Any],
    resume: bool = False,
    running: Running = DEFAULT_RUNNING,
    force: bool = False,
    teacher: Checkpoint | None = None,
    selector: Selector | None = None,
) -> Trained:
    """Train and write `output`, whole, and only at the end.

    Args:
        config: with the data's number of classes.
        pretrained: starting weights; needed where the recipe has a budget.
        identity, force: see `train`; the data's own identity is added.
        teacher: dense weights to learn from; by default those it starts from.
        selector: see `Trainer`; the thresholds are then left as they are.

    Raises:
        Interrupted, UserError: see `train`; a budget out of reach; a batch that does not fit into
            memory; a teacher of another kind.
    """
    accelerator, recipe = accelerator_for(recipe.amp), settled(config, pretrained, recipe)
    model, mentor = _start(config, pretrained, teacher, recipe, accelerator)
    identity = {**source.identity, **identity}
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_failures(recipe.batch_size))
        stack.enter_context(lost_peers(accelerator))
        trainer = Trainer(
            model, mentor, recipe, from_scratch=pretrained is None, accelerator=accelerator,
            selector=selector,
        )  # fmt: skip
        stack.enter_context(claims(output, trainer, force or resume, (pretrained, teacher)))
        skipped = Skipped(accelerator, running.skip_limit)
        log = train(trainer, source, output, identity, skipped, resume, running, force)
        stack.enter_context(kept_when_stopped(output, recipe.steps))
        facts = pretrained.origins.metadata() if pretrained else {}
        if pretrained and recipe.labels == "none":  # the outputs mean what they meant
            known = {key: pretrained.metadata.get(key) for key in ("classes", "classes_from")}
            facts |= {key: value for key, value in known.items() if value is not None}
        beside = None
        if pretrained and recipe.train == "thresholds":
            beside = backbone_beside(output, model, pretrained)
        end = _End(trainer, source, log, skipped, running, identity, facts,
                   fit=selector is None, backbone=beside)  # fmt: skip
        averaged = None
        if (average := trainer.averaged()) is not None:
            averaged = end.finished(average_path(output), average, " of the average")
        result = replace(end.finished(output, model, ""), average=averaged)
        result = replace(result, skipped=tuple(sorted(skipped.everywhere())), backbone=beside)
        if accelerator.is_main_process:
            state_path(output).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return result


@dataclass(frozen=True)
class _End:
    """What becomes of a network once its steps are done.

    Attributes:
        facts: where those of its start came from.
        fit: bring the thresholds onto the budget.
        backbone: the file that holds the network's weights, beside which a method's own will do.
    """

    trainer: Trainer
    source: Source
    log: Log
    skipped: Skipped
    running: Running
    identity: dict[str, Any]
    facts: dict[str, str]
    fit: bool
    backbone: Path | None = None

    def finished(self, path: Path, network: ViT, of: str) -> Trained:
        """Thresholds onto the budget, held-out figures, and the file."""
        trainer, running, fit = self.trainer, self.running, None
        if self.fit:
            what, step = f"thresholds{of}", trainer.recipe.steps
            fit = land_on_budget(network, trainer, self.source, self.log, what, self.skipped,
                                  step, running)  # fmt: skip
        figures = validate(network, self.source, running.validation_limit, trainer.accelerator,
                           self.skipped.names, running.bars, trainer.judge)  # fmt: skip
        self.skipped.check()
        self.log.write({"event": f"validation{of}", **figures})
        trained = Trained(path, figures, fit)
        if trainer.accelerator.is_main_process:
            self._save(network, trained)
        return trained

    def _save(self, network: ViT, trained: Trained) -> None:
        """Write the network and its sidecar."""
        recipe, source = self.trainer.recipe, self.source
        made = provenance(("torch", "accelerate", "pillow", "mlxtend"))
        made |= {"recipe": asdict(recipe), **self.identity, **trained.validation}
        metadata = {"provenance": json.dumps(made), **self.facts}
        if recipe.labels == "data":
            metadata["classes"] = json.dumps(source.classes)
            metadata["classes_from"] = source.classes_from
        if recipe.budget is not None and self.fit:
            metadata |= {"budget": str(recipe.budget), "budget_by": "release"}
        if (fit := trained.fit) is not None:
            metadata["budget_fit"] = json.dumps({**asdict(fit), "missed": fit.missed})
        save_checkpoint(trained.output, network, metadata, self.backbone)
