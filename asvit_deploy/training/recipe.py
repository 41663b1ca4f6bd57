"""The options of a training run: what they may be, and what they ask of the machine."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from asvit_deploy.data.augment import Augmentation
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import Masking
from asvit_deploy.per_picture import check as check_per_picture
from asvit_deploy.reduction.methods import METHODS
from asvit_deploy.reduction.threshold import TEMPERATURE, Threshold

# What products are computed in; weights, scores and thresholds stay float32.
Amp = Literal["no", "bf16", "fp16"]

# What learns, and what a run learns from: the data's labels, or the dense network alone.
Learns = Literal["all", "thresholds"]
Labels = Literal["data", "none"]

# Thresholds that start on the budget (`validation.start_on_budget`): cut by cut, or by one factor
# on where they would start otherwise.
FIT: Literal["fit"] = "fit"

_WHOLE = 2**53  # above it, floats skip whole numbers
_MOST = 1e12  # far above any use, and what float32 still multiplies
# What each number may be. Comparisons alone: they are false for NaN, and hold for any size.
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (lambda x: 1 <= x < _WHOLE, "a whole number from 1 to 2^53"),
    "epochs": (lambda x: 1 <= x < _WHOLE, "a whole number from 1 to 2^53"),
    "batch_size": (lambda x: 1 <= x < _WHOLE, "a whole number from 1 to 2^53"),
    "budget": (lambda x: 0 < x < 1, "a fraction of the dense MACs, above 0 and below 1"),
    "lr": (lambda x: 1e-30 <= x <= _MOST, "a number from 1e-30 to 1e12"),
    "min_lr": (lambda x: 0 <= x <= _MOST, "a number from 0 to 1e12"),
    "warmup": (lambda x: 0 <= x < _WHOLE, "a whole number of at least 0"),
    "weight_decay": (lambda x: 0 <= x <= _MOST, "a number from 0 to 1e12"),
    "clip": (lambda x: 0 <= x <= _MOST, "a number up to 1e12, or 0 not to clip"),
    "smoothing": (lambda x: 0 <= x < 1, "a number of at least 0 and below 1"),
    "distill_weight": (lambda x: 0 <= x <= _MOST, "a number from 0 to 1e12"),
    "flops_weight": (lambda x: 0 <= x <= _MOST, "a number from 0 to 1e12"),
    "seed": (lambda x: 0 <= x < 2**63, "a whole number of at least 0 and below 2^63"),
    "temperature": (lambda x: 0 < x <= _MOST, "a number above 0, up to 1e12"),
    "ema": (lambda x: 0 <= x < 1, "a decay of at least 0 and below 1; 0 keeps no average"),
    "randaugment": (lambda x: 0 <= x < 10, "a magnitude of at least 0 and below 10; 0 is off"),
    "mixup": (lambda x: 0 <= x <= _MOST, "a number from 0 to 1e12; 0 is off"),
    "cutmix": (lambda x: 0 <= x <= _MOST, "a number from 0 to 1e12; 0 is off"),
    "erase": (lambda x: 0 <= x <= 1, "a probability"),
    "repeats": (lambda x: 1 <= x < _WHOLE, "a whole number of at least 1"),
    "amp": (lambda x: x in get_args(Amp), f"one of {', '.join(get_args(Amp))}"),
    "masking": (lambda x: x in get_args(Masking), f"one of {', '.join(get_args(Masking))}"),
    "train": (lambda x: x in get_args(Learns), f"one of {', '.join(get_args(Learns))}"),
    "labels": (lambda x: x in get_args(Labels), f"one of {', '.join(get_args(Labels))}"),
    "thresholds": (
        lambda x: x == FIT if isinstance(x, str) else all(0 < t <= _MOST for t in x),
        f"numbers above 0, up to 1e12, or {FIT!r}",
    ),
    "save_every": (lambda x: x >= 1, "a whole number of at least 1"),
    "log_every": (lambda x: x >= 1, "a whole number of at least 1"),
    "validation_limit": (lambda x: x >= 1, "a whole number of at least 1"),
    "workers": (lambda x: x >= 0, "a whole number of at least 0"),
    "skip_limit": (lambda x: x >= 0, "a whole number of at least 0"),
}


def wanted(name: str, value: Any) -> str | None:
    """What an option must be, where `value` is not that."""
    allowed, meant = _ALLOWED.get(name, (lambda x: True, ""))
    return None if value is None or allowed(value) else meant


def _check(options: Any) -> None:
    """Refuse the first number of a dataclass that is not what it may be."""
    for field in fields(options):
        value = getattr(options, field.name)
        if meant := wanted(field.name, value):
            option = "ema-decay" if field.name == "ema" else field.name.replace("_", "-")
            raise UserError(f"--{option} {value} cannot be used; pass {meant}")


def check_method(name: str, per_picture: bool) -> None:
    """Raise UserError for a method that is not known or has no such training form."""
    able = [other for other, method in METHODS.items() if method.trains]
    if name not in METHODS:
        raise UserError(f"--method {name} is not known; pass one of {', '.join(able)}")
    method = METHODS[name]
    if not method.trains:
        raise UserError(
            f"--method {name} has no training form: it is what methods must beat; pass one of "
            f"{', '.join(able)}"
        )
    if per_picture:
        check_per_picture(method)


def _check_unlabelled(recipe: Recipe) -> None:
    if recipe.smoothing:
        raise UserError(
            "--smoothing is of a loss on labels, and --labels none has no such loss; drop one"
        )
    if not recipe.distill_weight:
        raise UserError(
            "--labels none learns from the dense network alone, and --distill-weight 0 leaves "
            "nothing of it; drop one"
        )


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run's result beside data and starting weights.

    `budget` is None for a dense run; `clip` 0 means no clipping; `lr` and `min_lr` are per step at
    this batch size, all processes together; `warmup` is in steps. `flops_weight` (per GMAC) and
    `distill_weight` are the factors of Eq. 13, `temperature` is T of Eq. 9, `thresholds` are where
    they start (by default see `adaptive_start`, whatever MACs that makes), and `masking` is what a
    dropped token loses (Table 3), for adaptive runs. `ema` is the decay of a moving average of the
    weights; `randaugment` to `repeats` are `Augmentation`'s.

    `method` is that of an adaptive run, `per_picture` and `cuts` are as `calibrate` has them;
    `train` is what learns, the thresholds meaning all that is a method's own; without `labels` the
    dense network's answers are learnt alone, and `distill_weight` is their weight.

    Raises:
        UserError: a number is out of its range or not finite, or `min_lr` is above `lr`; a method
            that is not known or cannot be trained; options that contradict one another.
    """

    steps: int
    batch_size: int = 64
    budget: float | None = None
    lr: float = 1e-4
    min_lr: float = 1e-6
    warmup: int = 0
    weight_decay: float = 1e-6
    clip: float = 0.0
    smoothing: float = 0.0
    distill_weight: float = 0.5
    flops_weight: float = 2.0
    temperature: float = TEMPERATURE
    thresholds: tuple[float, ...] | Literal["fit"] | None = None
    masking: Masking = "attention"
    ema: float = 0.0
    randaugment: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erase: float = 0.0
    repeats: int = 1
    amp: Amp = "no"
    seed: int = 0
    method: str = Threshold.name
    per_picture: bool = False
    cuts: tuple[int, ...] | None = None
    train: Learns = "all"
    labels: Labels = "data"

    def __post_init__(self) -> None:
        _check(self)
        check_method(self.method, self.per_picture)
        if self.train == "thresholds" and self.ema:
            raise UserError(
                "--ema-decay averages weights, and --train thresholds leaves them as they are; "
                "drop one"
            )
        if self.labels == "none" and self.budget is not None:
            _check_unlabelled(self)
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr:g} is above --lr {self.lr:g}; lower it")

    @property
    def augmentation(self) -> Augmentation:
        """What happens to training pictures."""
        return Augmentation(**{f.name: getattr(self, f.name) for f in fields(Augmentation)})


@dataclass(frozen=True)
class Running:
    """How a run goes on, none of which changes its result.

    `save_every` and `log_every` are steps between states and between log lines; `workers` are
    processes that make batches (0: a thread); `skip_limit` is how many unreadable pictures are
    passed over; `tensorboard` is a folder for its events; without `bars`, no progress is shown.

    Raises:
        UserError: a number is out of its range.
    """

    save_every: int = 200
    log_every: int = 20
    validation_limit: int | None = None
    workers: int = 0
    skip_limit: int = 0
    tensorboard: Path | None = None
    bars: bool = True

    def __post_init__(self) -> None:
        _check(self)


DEFAULT_RUNNING = Running()


def rate(recipe: Recipe, step: int) -> float:
    """Learning rate of a step: linear warm-up, then a cosine from `lr` to `min_lr`."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * done))


# --- memory -------------------------------------------------------------------------------------


def picture_bytes(config: ArchConfig) -> int:
    """Bytes of one float32 picture, normalised."""
    return 3 * config.image_size**2 * 4


def _least_bytes(config: ArchConfig, batch_size: int) -> int:
    """Less than any step needs: its pictures, and in two bytes each what every block must keep for
    its backward pass (queries, keys, values, context and the MLP's hidden layer)."""
    rows = config.depth * config.rows
    return batch_size * (picture_bytes(config) + 2 * rows * (4 * config.dim + config.hidden))


def check_memory(config: ArchConfig, batch_size: int, processes: int = 1) -> None:
    """Refuse a batch that this machine's memory cannot hold, before any of it is asked for.

    A system that overcommits would grant it and kill the process later.

    Args:
        batch_size: of all processes together; one process's share is what must fit.

    Raises:
        UserError: it names both sizes.
    """
    needed = _least_bytes(config, batch_size // processes)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        among = f" in each of {processes} processes" if processes > 1 else ""
        raise UserError(
            f"--batch-size {batch_size} needs more than {needed / 2**30:,.0f} GiB of memory for "
            f"{config.name}{among} and this machine has {there / 2**30:,.0f}; lower --batch-size"
        )


@contextlib.contextmanager
def memory_failures(batch_size: int) -> Iterator[None]:
    """Turn a failed allocation of numpy, torch or Python into one line.

    Raises:
        UserError: memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = str(error)
        # torch has no class of its own for the CPU's.
        if not (
            isinstance(error, MemoryError) or "allocate memory" in message or "of memory" in message
        ):
            raise
        raise UserError(f"--batch-size {batch_size} does not fit into memory; lower it") from error
