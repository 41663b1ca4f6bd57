"""Training: a dense network from scratch, or an adaptive one from a dense one, to a budget.

One process, or as many as `accelerate launch` or `torchrun` start. Whatever a step does follows
from the options and its number, so a run that was stopped, at any moment and in any way, continues
from its last state as if nothing had happened.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from asvit_deploy.artefacts.sidecar import claimed, provenance
from asvit_deploy.budget import (
    MOST_PASSES,
    Fit,
    check_budget,
    fit_thresholds,
    trace_macs,
)
from asvit_deploy.checkpoints.load import Checkpoint, save_checkpoint, with_head
from asvit_deploy.data.batches import Batch
from asvit_deploy.data.skips import too_many
from asvit_deploy.data.sources import Source
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import AdaptiveViT, Selector
from asvit_deploy.training.log import Log, log_path
from asvit_deploy.training.processes import (
    accelerator_for,
    in_all,
    lost_peers,
    together,
    total,
)
from asvit_deploy.training.recipe import (
    DEFAULT_RUNNING,
    FIT,
    Recipe,
    Running,
    check_memory,
    memory_failures,
    picture_bytes,
)
from asvit_deploy.training.state import load_state, save_state, state_path
from asvit_deploy.training.trainer import Trainer, adaptive_start, dense_start, load_teacher

# Thresholds are fitted on as many pictures as were trained on, within these limits.
_FIT_PICTURES = (64, 2048)
_FIT_BYTES = 1 << 30
_VALIDATION_BATCH = 64


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""

    def __init__(self, step: int, path: Path) -> None:
        super().__init__(f"stopped after step {step}; {path} holds it, go on with --resume")


def average_path(output: Path) -> Path:
    """Where the moving average of the weights goes, beside the weights themselves."""
    return output.with_name(f"{output.stem}.ema{output.suffix}")


# --- batches ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM put themselves into the list; a second one acts at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for number in before:
            signal.signal(number, note)
    except ValueError:  # not the main thread: whoever runs us sees to signals
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Numbered(Dataset):
    """Batch number `step` as item `step`: what worker processes of a `DataLoader` ask for."""

    def __init__(self, source: Source, size: int, part: range) -> None:
        self._source, self._size, self._part = source, size, part

    def __getitem__(self, step: int) -> Batch | UserError:
        """A refusal is returned: a worker process would wrap it in a traceback of its own."""
        try:
            return self._source.train_batch(step, self._size, self._part)
        except UserError as error:
            return error


def _batches(
    source: Source, first: int, recipe: Recipe, part: range, workers: int
) -> Iterator[tuple[int, Batch | UserError]]:
    """Numbered batches or why there is none, made ahead: by worker processes, or the next one by a
    thread."""
    steps, numbered = range(first, recipe.steps), _Numbered(source, recipe.batch_size, part)
    if workers:
        loader: DataLoader[Batch | UserError] = DataLoader(
            numbered, batch_size=None, sampler=steps, num_workers=workers,
            pin_memory=torch.cuda.is_available(), worker_init_fn=_stops_are_the_runs,
        )  # fmt: skip
        yield from zip(steps, _handed_over(loader))
        return
    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(numbered.__getitem__, first)
        for step in steps:
            batch = ahead.result()
            if step + 1 < recipe.steps:
                ahead = worker.submit(numbered.__getitem__, step + 1)
            yield step, batch


def _stops_are_the_runs(worker: int) -> None:
    """A signal to the whole group must not end worker processes before the run has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _handed_over(loader: DataLoader[Batch | UserError]) -> Iterator[Batch | UserError]:
    """The loader's batches; where a worker process dies, why there is none."""
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    # Torch would raise wherever the run is at that moment, such as in the middle of a step. It also
    # notices, if seconds later, when the next batch does not come.
    with contextlib.suppress(ValueError):  # not the main thread, where torch changes nothing
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    while True:
        try:
            batch = next(batches, None)
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            told = str(error)
            if "in DataLoader worker" in told:  # raised by its own code, and told with its place
                raise
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in told:
                raise
            # The others: what it was handing over broke off.
            batch = UserError(
                "a process of --workers was killed, perhaps for want of memory; go on with "
                "--resume, with fewer --workers if need be"
            )
        if batch is None:
            return
        yield batch


def _share(accelerator: Accelerator, recipe: Recipe) -> range:
    """The pictures of each batch that this process sees.

    Raises:
        UserError: the batch does not divide among the processes, or parts pairs that are mixed.
    """
    size, processes = recipe.batch_size, accelerator.num_processes
    if size % processes:
        raise UserError(
            f"--batch-size {size} is that of all processes together and does not divide by their "
            f"{processes}; try {math.ceil(size / processes) * processes}"
        )
    own = size // processes
    parts = [range(process * own, (process + 1) * own) for process in range(processes)]
    for part in parts:  # of all, so that all processes refuse
        recipe.augmentation.check_part(size, part)
    return parts[accelerator.process_index]


@dataclass
class Skipped:
    """Pictures that this process could not read since it started, and how many may be so in all."""

    accelerator: Accelerator
    limit: int
    names: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)  # of all processes, when they last met

    def fresh(self) -> int:
        """How many of this process's the others may not know yet."""
        return len(self.names - self.known)

    def everywhere(self) -> set[str]:
        """Those of all processes, which must all ask."""
        self.known = in_all(self.accelerator, self.names)
        return self.known

    def too_many(self) -> bool:
        """Whether they are more than the limit; for all processes to ask."""
        return len(self.everywhere()) > self.limit

    def check(self) -> None:
        """Raises UserError, in all processes, once there are more than the limit."""
        if self.too_many():
            names = self.known
            raise too_many(f"cannot read {min(names)}", len(names), self.limit)


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


# --- the run ------------------------------------------------------------------------------------


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
    recipe, state, accelerator = trainer.recipe, state_path(output), trainer.accelerator
    part, means, saved = _share(accelerator, recipe), _Means(), -1
    first, fitted = 0, False
    # Data first: with other pictures the number of steps may differ too, which says less.
    known = {**identity, **asdict(recipe)}
    main = accelerator.is_main_process
    with together(accelerator):
        if resume:
            first = load_state(state, trainer, known)
        since = first if resume else None
        log = Log(log_path(output), known, since, force, running.tensorboard, quiet=not main)
    if recipe.thresholds == FIT and not resume:
        what, model, fitted = "starting thresholds", trainer.model, True
        _land_on_budget(model, trainer, source, log, what, skipped, 0)
    started, size = time.monotonic(), recipe.batch_size

    def save(step: int) -> None:
        nonlocal saved
        if step != saved:
            with together(accelerator):
                if main:
                    save_state(state, step, trainer, known)
        saved = step

    with (
        _stop_signals() as signals,
        tqdm(total=recipe.steps * size, initial=first * size, unit="img", file=sys.stderr,
             mininterval=1.0, disable=not main) as bar,
    ):  # fmt: skip
        for step, batch in _batches(source, first, recipe, part, running.workers):
            refused = isinstance(batch, UserError)
            skipped.names.update(() if isinstance(batch, UserError) else batch.skipped)
            stopped, failed, fresh = total(accelerator, len(signals), refused, skipped.fresh())
            if stopped or failed or (fresh and skipped.too_many()):
                if stopped or step > first or fitted:
                    save(step)
                with together(accelerator):
                    if isinstance(batch, UserError):
                        raise batch
                skipped.check()
            if stopped:
                raise Interrupted(step, state)
            assert isinstance(batch, Batch)  # a refusal has ended the run
            figures = trainer.step(step, batch)
            done = step + 1
            means.add(figures)
            bar.update(size)
            last = done == recipe.steps
            if done % running.log_every == 0 or last:
                speed = (done - first) * size / (time.monotonic() - started)
                log.write({"step": done, **figures, "images_per_s": speed})
                shown = {k: figures[k] for k in ("loss", "top1", "macs") if k in figures}
                bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()})
            epoch = done * size // source.epoch
            ended = epoch > step * size // source.epoch
            if ended:
                paused = time.monotonic()
                _end_epoch(trainer, source, log, epoch, done, means, skipped, running)
                started += time.monotonic() - paused  # a speed is that of training alone
            if ended or done % running.save_every == 0 or last:
                save(done)
            if ended:
                skipped.check()
    return log


def _end_epoch(
    trainer: Trainer, source: Source, log: Log, epoch: int, done: int, means: _Means,
    skipped: Skipped, running: Running,
) -> None:  # fmt: skip
    """Log the epoch's means (since a resumed run went on) and what validation says."""
    steps, figures = means.steps, means.take()
    for name in ("lr", "thresholds"):  # where they are now says more than where they were
        figures.pop(name, None)
    held_out = validate(
        trainer.model, source, running.validation_limit, trainer.accelerator, skipped.names
    )
    unreadable = len(skipped.everywhere())
    log.write({
        "event": "epoch", "epoch": epoch, "step": done, "steps": steps, **figures,
        "skipped": unreadable, "thresholds": trainer.model.threshold_values(),
        "validation": held_out,
    })  # fmt: skip


def _bar(what: str, accelerator: Accelerator | None, total: int | None = None) -> tqdm:
    """What happens between steps, where it lasts; the first process alone shows it."""
    silent = accelerator is None or not accelerator.is_main_process
    return tqdm(total=total, desc=what, unit="img", file=sys.stderr, leave=False, delay=1.0,
                mininterval=1.0, disable=silent)  # fmt: skip


@torch.inference_mode()
def validate(
    model: AdaptiveViT,
    source: Source,
    limit: int | None = None,
    accelerator: Accelerator | None = None,
    skipped: set[str] | None = None,
) -> dict[str, Any]:
    """Held-out figures of the inference form, each process with its share; {} if no data.

    Args:
        skipped: gets the names of pictures that could not be read.

    Returns:
        `images`, `top1` and, for an adaptive network, mean `macs` / teacher and image tokens
        `kept` after each stage.
    """
    rank = accelerator.process_index if accelerator else 0
    world = accelerator.num_processes if accelerator else 1
    model, device = copy.deepcopy(model).eval(), model.pos_embed.device
    stages = len(model.thresholds)
    sums = torch.zeros(3 + stages, dtype=torch.float64)  # images, right, MACs, kept per stage
    with _bar("validation", accelerator) as bar:
        for images, labels, unreadable in source.validation(_VALIDATION_BATCH, limit, rank, world):
            if skipped is not None:
                skipped.update(unreadable)
            bar.update(len(labels) * world)
            if not len(labels):
                continue
            logits, trace = model(images.to(device))
            right = (logits.argmax(1).cpu() == labels).sum()
            macs = trace_macs(model.config, trace).sum().cpu() if stages else torch.tensor(0.0)
            kept = [(length - 1).sum().cpu() for length in trace.length]
            sums += torch.stack([torch.tensor(len(labels)), right, macs, *kept]).double()
    if accelerator and world > 1:
        sums = accelerator.reduce(sums.to(device), reduction="sum").cpu()  # type: ignore[union-attr]
    count = int(sums[0])
    if not count:
        return {}
    _, top1, macs, *kept = (sums / count).tolist()
    figures = {"images": count, "top1": top1}
    return figures | ({"macs": macs, "kept": kept} if stages else {})


def _land_on_budget(
    model: AdaptiveViT, trainer: Trainer, source: Source, log: Log, what: str, skipped: Skipped,
    step: int,
) -> Fit | None:  # fmt: skip
    """Thresholds onto the budget, over the training pictures that come after that step.

    Raises:
        UserError: too many pictures cannot be read; nothing has changed then.
    """
    recipe, config = trainer.recipe, model.config
    if recipe.budget is None:
        return None
    seen, (fewest, most) = recipe.steps * recipe.batch_size, _FIT_PICTURES
    size = min(max(seen, fewest), most, _FIT_BYTES // picture_bytes(config))
    pictures = source.fitting(size, after=step * recipe.batch_size)
    skipped.names.update(pictures.skipped)
    skipped.check()
    with _bar(what, trainer.accelerator, MOST_PASSES * len(pictures.images)) as bar:
        fit = fit_thresholds(model, pictures.images, recipe.budget, bar.update)
    # Processes may round differently; the first one's is what is written.
    for threshold in model.thresholds:
        threshold.data = broadcast(threshold.data)
    # A resumed run keeps what comes before its first step, and repeats what comes after the last.
    place = {} if step else {"step": 0}
    event = f"{what} scaled to the budget"
    log.write({"event": event, **place, **asdict(fit), "missed": fit.missed})
    return fit


@dataclass(frozen=True)
class Result:
    """How a run ended: `validate`'s figures, and how the thresholds met the budget, if any; of the
    moving average too where one is kept; and which pictures no process could read."""

    validation: dict[str, Any]
    fit: Fit | None
    average: Result | None = None
    skipped: tuple[str, ...] = ()


def _start(
    config: ArchConfig, pretrained: Checkpoint | None, teacher: Checkpoint | None, recipe: Recipe,
    accelerator: Accelerator,
) -> tuple[AdaptiveViT, AdaptiveViT | None]:  # fmt: skip
    """The network to train and its teacher, once it is sure that the run can be made."""
    if pretrained is not None and pretrained.headless:
        pretrained = with_head(pretrained, config.num_classes, recipe.seed)
    if accelerator.device.type == "cpu":  # a GPU says itself when it is full
        check_memory(config, recipe.batch_size, accelerator.num_processes)
    if recipe.budget is None:
        return dense_start(config, pretrained, recipe.seed), None
    if pretrained is None:
        raise UserError("adaptive training starts from dense weights; pass --pretrained")
    check_budget(config, recipe.budget)
    told = None if recipe.thresholds == FIT else recipe.thresholds
    student, own = adaptive_start(config, pretrained, told)
    if not recipe.distill_weight:
        if teacher is not None:
            raise UserError("--distill-weight 0 needs no teacher; drop one of it and --teacher")
        return student, None
    return student, own if teacher is None else load_teacher(config, teacher)


@contextlib.contextmanager
def _kept(output: Path, recipe: Recipe) -> Iterator[None]:
    """A stop after the last step loses nothing either: the state of that step is saved."""
    before = None

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # not the main thread
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(recipe.steps, state_path(output)) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


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
) -> Result:
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
    accelerator = accelerator_for(recipe.amp)
    main = accelerator.is_main_process
    model, mentor = _start(config, pretrained, teacher, recipe, accelerator)
    identity = {**source.identity, **identity}
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_failures(recipe.batch_size))
        stack.enter_context(lost_peers(accelerator))
        trainer = Trainer(
            model, mentor, recipe, from_scratch=pretrained is None, accelerator=accelerator,
            selector=selector,
        )  # fmt: skip
        with together(accelerator):
            if main:
                stack.enter_context(claimed(output, "checkpoint", force or resume))
            if main and recipe.ema:
                inputs = [given.path for given in (pretrained, teacher) if given is not None]
                beside = average_path(output)
                stack.enter_context(claimed(beside, "checkpoint", force or resume, *inputs))
        skipped = Skipped(accelerator, running.skip_limit)
        log = train(trainer, source, output, identity, skipped, resume, running, force)
        stack.enter_context(_kept(output, recipe))

        def finish(path: Path, network: AdaptiveViT, of: str) -> Result:
            """Thresholds onto the budget, held-out figures, and the file."""
            fit = None
            if selector is None:
                what = f"thresholds{of}"
                fit = _land_on_budget(network, trainer, source, log, what, skipped, recipe.steps)
            limit = running.validation_limit
            figures = validate(network, source, limit, accelerator, skipped.names)
            skipped.check()
            log.write({"event": f"validation{of}", **figures})
            if main:
                told = pretrained.told.metadata() if pretrained else {}
                _save(path, network, source, recipe, identity, Result(figures, fit), told)
            return Result(figures, fit)

        averaged = None
        if (average := trainer.averaged()) is not None:
            averaged = finish(average_path(output), average, " of the average")
        result = replace(finish(output, model, ""), average=averaged)
        result = replace(result, skipped=tuple(sorted(skipped.everywhere())))
        if main:
            state_path(output).unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    return result


def _save(
    path: Path, network: AdaptiveViT, source: Source, recipe: Recipe, identity: dict[str, Any],
    result: Result, facts: dict[str, str],
) -> None:  # fmt: skip
    """Write a network and its sidecar; `facts` says where those of its start came from."""
    made = provenance(("torch", "accelerate", "kornia", "mlxtend"))
    made |= {"recipe": asdict(recipe), **identity, **result.validation}
    metadata = {"classes": json.dumps(source.classes), "classes_from": source.classes_from}
    metadata |= {"provenance": json.dumps(made), **facts}
    if result.fit is not None:
        metadata["budget"] = str(recipe.budget)
        metadata["budget_fit"] = json.dumps({**asdict(result.fit), "missed": result.fit.missed})
    save_checkpoint(path, network, metadata)
