"""Training: a dense network from scratch, or an adaptive one from a dense one, to a budget.

One process. Whatever a step does follows from the options and its number, so a run that was
stopped, at any moment and in any way, continues from its last state as if nothing had happened.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from asvit_deploy.artifact import provenance
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.checkpoint import Checkpoint, build_model, save_checkpoint
from asvit_deploy.models.registry import ArchConfig
from asvit_deploy.models.vit import AdaptiveViT
from asvit_deploy.training.budget import Fit, check_budget, fit_thresholds, trace_macs
from asvit_deploy.training.data import Batch, Source
from asvit_deploy.training.log import Log, log_path
from asvit_deploy.training.losses import Outputs, Weights, flops_weight, relative_macs, total_loss
from asvit_deploy.training.recipe import (
    DEFAULT_INTERVALS,
    Intervals,
    Recipe,
    check_memory,
    memory_failures,
    picture_bytes,
    rate,
)
from asvit_deploy.training.state import load_state, save_state, state_path

# The paper's rate, 2e-5, moves a threshold of 0.002 by one per cent a step. Thresholds keep that
# pace relative to themselves, whatever the weights' rate: trained attention can be so sharp that
# they belong at 1e-4 or below, where steps of 2e-5 would jump, and cross zero.
_THRESHOLD_PACE = 0.01
# Far below any that matters; a checkpoint with a threshold of zero would be refused.
MIN_THRESHOLD = 1e-9
_INITIAL_TOKENS = 196  # at which the paper's initial thresholds are meant
# Thresholds are fitted on as many pictures as were trained on, within these limits.
_FIT_PICTURES = (64, 2048)
_FIT_BYTES = 1 << 30


class Interrupted(Exception):
    """The run was asked to stop; its state is saved."""

    def __init__(self, step: int, path: Path) -> None:
        super().__init__(f"stopped after step {step}; {path} holds it, go on with --resume")


# --- the two networks ---------------------------------------------------------------------------


def dense_start(config: ArchConfig, pretrained: Checkpoint | None, seed: int) -> AdaptiveViT:
    """A dense network to train: random, or given weights (with a new head for other classes)."""
    torch.manual_seed(seed)
    model = build(config, adaptive=False)
    if pretrained is not None:
        given = build_model(pretrained, dense=True).state_dict()
        if pretrained.config.num_classes != config.num_classes:
            given = {k: v for k, v in given.items() if not k.startswith(("head.", "aux_head."))}
        model.load_state_dict(given, strict=False)
    return model


def adaptive_start(config: ArchConfig, pretrained: Checkpoint) -> tuple[AdaptiveViT, AdaptiveViT]:
    """Student and frozen teacher, both with the weights of a dense (or adaptive) checkpoint.

    Raises:
        UserError: the checkpoint has another number of classes than the data.
    """
    if pretrained.config.num_classes != config.num_classes:
        raise UserError(
            f"{pretrained.path} has {pretrained.config.num_classes} classes and the data "
            f"{config.num_classes}; first fit a head with finetune --dense --pretrained"
        )
    teacher = build_model(pretrained, dense=True).requires_grad_(False)
    student = build(config, adaptive=True)
    student.load_state_dict(teacher.state_dict(), strict=False)
    for stage, threshold in enumerate(student.thresholds):
        if pretrained.adaptive:
            threshold.data.copy_(pretrained.state[f"thresholds.{stage}"])
        else:
            threshold.data.mul_(_INITIAL_TOKENS / config.image_tokens)
    return student, teacher


def _optimizer(
    model: AdaptiveViT, logarithms: list[torch.nn.Parameter], recipe: Recipe
) -> torch.optim.Optimizer:
    """AdamW; matrices are decayed, everything else is not, thresholds have a pace of their own."""
    weights = dict(model.named_parameters())
    weights = {k: v for k, v in weights.items() if not k.startswith("thresholds.")}
    plain = [k for k, v in weights.items() if v.ndim < 2 or k in ("cls_token", "pos_embed")]
    decayed = [v for k, v in weights.items() if k not in plain]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": recipe.weight_decay, "pace": 1.0},
        {"params": [weights[k] for k in plain], "weight_decay": 0.0, "pace": 1.0},
    ]
    if logarithms:
        pace = _THRESHOLD_PACE / recipe.lr
        groups.append({"params": logarithms, "weight_decay": 0.0, "pace": pace})
    return torch.optim.AdamW(groups, lr=recipe.lr)


# --- one step -----------------------------------------------------------------------------------


def run_masked(model: AdaptiveViT, images: Tensor, bf16: bool) -> Outputs:
    """Training form of a network on a batch; weights' products in bfloat16 where asked."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits, tokens, masks = model.forward_masked(images)
        aux_head = getattr(model, "aux_head", None)
        votes = None if aux_head is None else aux_head(tokens[:, 1:])
    return Outputs(logits, votes, masks)


class Trainer:
    """A network in training, its teacher where there is one, and the optimiser.

    Args:
        from_scratch: learn the statistics of a convolutional stem too. Those of given weights stay
            frozen: they come from more pictures than a fine-tuning batch holds, and a student's
            must remain its teacher's.
    """

    def __init__(
        self,
        model: AdaptiveViT,
        teacher: AdaptiveViT | None,
        recipe: Recipe,
        from_scratch: bool = False,
    ) -> None:
        self.model, self.teacher, self.recipe = model, teacher, recipe
        # The network has no dropout, so the mode decides about those statistics alone.
        model.train(from_scratch)
        self._logarithms = [torch.nn.Parameter(t.detach().log()) for t in model.thresholds]
        self.optimizer = _optimizer(model, self._logarithms, recipe)
        flops, distill = flops_weight(model.config, recipe.flops_weight), recipe.distill_weight
        self.weights = Weights(flops, distill, distill, recipe.smoothing)

    def step(self, number: int, batch: Batch) -> dict[str, Any]:
        """One update; the figures that the log keeps.

        Raises:
            UserError: the loss or its gradient is not finite.
        """
        images, labels = batch
        recipe, config = self.recipe, self.model.config
        for group in self.optimizer.param_groups:
            group["lr"] = rate(recipe, number) * group["pace"]
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = run_masked(self.teacher, images, recipe.bf16)
        student = run_masked(self.model, images, recipe.bf16)
        loss, parts = total_loss(config, student, teacher, labels, recipe.budget, self.weights)
        self.model.zero_grad()
        loss.backward()
        self._check(number, loss)
        self._update()
        return self._figures(loss, parts, student, labels)

    def _check(self, number: int, loss: Tensor) -> None:
        """Clip the weights' gradient; refuse a loss or a gradient that is not finite."""
        # Apart from the weights: in their own unit, thresholds have gradients 1e4 times as large.
        weights = [p for k, p in self.model.named_parameters() if not k.startswith("thresholds.")]
        norm = torch.nn.utils.clip_grad_norm_(weights, self.recipe.clip or math.inf)
        slopes = [t.grad.abs() for t in self.model.thresholds if t.grad is not None]
        if not math.isfinite(loss.item() + norm.item() + sum(slope.item() for slope in slopes)):
            first = number * self.recipe.batch_size
            raise UserError(
                f"training diverged at step {number}, on pictures {first} to "
                f"{first + self.recipe.batch_size - 1} of the run: the loss is {loss.item():g}, "
                f"its gradient {norm.item():g}; start over with --force and a lower --lr "
                f"(it was {self.recipe.lr:g})"
            )

    @torch.no_grad()
    def _update(self) -> None:
        """AdamW on the weights and on the logarithms of the thresholds, which stay positive."""
        for logarithm, threshold in zip(self._logarithms, self.model.thresholds):
            # Derived anew each time, so that the thresholds alone are the state of a run.
            logarithm.copy_(threshold.log())
            logarithm.grad = threshold.grad * threshold
        self.optimizer.step()
        for logarithm, threshold in zip(self._logarithms, self.model.thresholds):
            threshold.copy_(logarithm.exp().clamp(min=MIN_THRESHOLD))

    def _figures(
        self, loss: Tensor, parts: dict[str, Tensor], student: Outputs, labels: Tensor
    ) -> dict[str, Any]:
        right = (student.logits.argmax(1) == labels).float().mean().item()
        figures: dict[str, Any] = {"loss": loss.item()}
        figures |= {name: part.item() for name, part in parts.items()}
        figures |= {"top1": right, "lr": self.optimizer.param_groups[0]["lr"]}
        if student.masks:
            figures["macs"] = relative_macs(self.model.config, student.masks).mean().item()
            figures["kept"] = [mask.detach().sum(1).mean().item() for mask in student.masks]
            figures["thresholds"] = [threshold.item() for threshold in self.model.thresholds]
        return figures


# --- the run ------------------------------------------------------------------------------------


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


def _batches(source: Source, first: int, recipe: Recipe) -> Iterator[tuple[int, Batch]]:
    """Numbered batches, each made while the one before is trained on."""
    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(source.train_batch, first, recipe.batch_size)
        for step in range(first, recipe.steps):
            batch = ahead.result()
            if step + 1 < recipe.steps:
                ahead = worker.submit(source.train_batch, step + 1, recipe.batch_size)
            yield step, batch


def train(
    trainer: Trainer,
    source: Source,
    output: Path,
    identity: dict[str, Any],
    resume: bool = False,
    intervals: Intervals = DEFAULT_INTERVALS,
    force: bool = False,
) -> Log:
    """Run all the steps, from the start or from the saved state.

    Args:
        identity: what else decides the result (data, starting weights); a state that was saved
            under another identity is refused.
        force: replace a log that is there and not this run's own.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM, after saving.
        UserError: the loss diverged, a picture cannot be read, there is nothing to resume, or the
            log would replace another file.
    """
    recipe, state = trainer.recipe, state_path(output)
    # Data first: with other pictures the number of steps may differ too, which says less.
    known = {**identity, **asdict(recipe)}
    first = load_state(state, trainer.model, trainer.optimizer, known) if resume else 0
    log, started = Log(log_path(output), known, first, force), time.monotonic()

    def save(step: int) -> None:
        save_state(state, step, trainer.model, trainer.optimizer, known)

    with (
        _stop_signals() as stop,
        tqdm(total=recipe.steps * recipe.batch_size, initial=first * recipe.batch_size,
             unit="img", file=sys.stderr, mininterval=1.0) as bar,
    ):  # fmt: skip
        for step, batch in _batches(source, first, recipe):
            figures = trainer.step(step, batch)
            done = step + 1
            bar.update(recipe.batch_size)
            if done % intervals.log == 0 or done == recipe.steps:
                speed = (done - first) * recipe.batch_size / (time.monotonic() - started)
                log.write({"step": done, **figures, "images_per_s": speed})
                shown = {k: figures[k] for k in ("loss", "top1", "macs") if k in figures}
                bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()})
            if stop or done % intervals.save == 0 or done == recipe.steps:
                save(done)
            if stop and done < recipe.steps:
                raise Interrupted(done, state)
    return log


@torch.inference_mode()
def validate(model: AdaptiveViT, source: Source, limit: int | None = None) -> dict[str, Any]:
    """Top-1 and, for an adaptive network, MACs / teacher, in the inference form; {} if no data."""
    model = copy.deepcopy(model).eval()
    right, macs = [], []
    for images, labels in source.validation(64, limit):
        logits, trace = model(images)
        right.append((logits.argmax(1) == labels).float())
        if model.adaptive:
            macs.append(trace_macs(model.config, trace))
    if not right:
        return {}
    figures = {"images": sum(map(len, right)), "top1": torch.cat(right).mean().item()}
    return figures | ({"macs": torch.cat(macs).mean().item()} if macs else {})


def _land_on_budget(trainer: Trainer, source: Source, log: Log) -> Fit | None:
    """Thresholds onto the budget, over pictures that come after those trained on."""
    recipe, config = trainer.recipe, trainer.model.config
    if recipe.budget is None:
        return None
    seen, (fewest, most) = recipe.steps * recipe.batch_size, _FIT_PICTURES
    size = min(max(seen, fewest), most, _FIT_BYTES // picture_bytes(config))
    images, _ = source.train_batch(math.ceil(seen / size), size)
    fit = fit_thresholds(trainer.model, images, recipe.budget)
    log.write({"event": "thresholds scaled to the budget", **asdict(fit), "missed": fit.missed})
    return fit


@dataclass(frozen=True)
class Result:
    """How a run ended: `validate`'s figures, and how the thresholds met the budget, if any."""

    validation: dict[str, Any]
    fit: Fit | None


def _start(
    config: ArchConfig, pretrained: Checkpoint | None, recipe: Recipe
) -> tuple[AdaptiveViT, AdaptiveViT | None]:
    """The network to train and its teacher, once it is sure that the run can be made."""
    check_memory(config, recipe.batch_size)
    if recipe.budget is None:
        return dense_start(config, pretrained, recipe.seed), None
    if pretrained is None:
        raise UserError("adaptive training starts from dense weights; pass --pretrained")
    check_budget(config, recipe.budget)
    return adaptive_start(config, pretrained)


def finetune(
    config: ArchConfig,
    source: Source,
    pretrained: Checkpoint | None,
    recipe: Recipe,
    output: Path,
    identity: dict[str, Any],
    resume: bool = False,
    intervals: Intervals = DEFAULT_INTERVALS,
    validation_limit: int | None = None,
    force: bool = False,
) -> Result:
    """Train and write `output`, whole, and only at the end.

    Args:
        config: with the data's number of classes.
        pretrained: starting weights; needed where the recipe has a budget.
        identity, force: see `train`; the data's own identity is added.

    Raises:
        Interrupted, UserError: see `train`; a budget out of reach; a batch that does not fit into
            memory.
    """
    model, teacher = _start(config, pretrained, recipe)
    identity = {**source.identity, **identity}
    trainer = Trainer(model, teacher, recipe, from_scratch=pretrained is None)
    with memory_failures(recipe.batch_size):
        log = train(trainer, source, output, identity, resume, intervals, force)
        fit = _land_on_budget(trainer, source, log)
    figures = validate(model, source, validation_limit)
    log.write({"event": "validation", **figures})
    metadata = {"classes": json.dumps(source.classes), "provenance": json.dumps(
        {**provenance(("torch", "mlxtend")), "recipe": asdict(recipe), **identity, **figures}
    )}  # fmt: skip
    if fit is not None:
        metadata["budget"] = str(recipe.budget)
        metadata["budget_fit"] = json.dumps({**asdict(fit), "missed": fit.missed})
    save_checkpoint(output, model, metadata)
    state_path(output).unlink(missing_ok=True)
    return Result(figures, fit)
