"""Where a run's options come from: the command line, then a TOML file, then the arch's preset."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from asvit_deploy.bounded import read_bounded
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.reduction.methods import METHODS
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.requirements import pip_install
from asvit_deploy.training.losses import flops_weight
from asvit_deploy.training.recipe import FIT, Recipe, wanted

# AS-ViT's fine-tuning. Colour jitter of 0.4 is among its options too, but does nothing beside
# RandAugment in timm, which applied them. The average is of no use to a dense start.
_PAPER = {
    "epochs": 30, "weight_decay": 1e-6, "smoothing": 0.1, "randaugment": 9.0, "mixup": 0.8,
    "cutmix": 1.0, "erase": 0.25, "repeats": 3, "ema": 0.99996,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "as_deit_tiny": {**_PAPER, "budget": 0.65},
    "as_deit_small": {**_PAPER, "budget": 0.65},
    "as_deit_base": {**_PAPER, "budget": 0.65},
    "as_lvvit_s": {**_PAPER, "budget": 0.7},
    "as_lvvit_m": {**_PAPER, "budget": 0.76},
    # Digits on clutter: never mirrored, and there is no end of them.
    "as_deit_mini": {"epochs": 30, "budget": 0.65},
}
_OTHER = {**_PAPER, "budget": 0.65}  # networks of no row of the table
# What only adaptive training knows.
_ADAPTIVE = (
    "budget", "flops_weight", "distill_weight", "temperature", "thresholds", "masking", "ema",
    "method", "per_picture", "cuts", "train", "labels",
)  # fmt: skip
# What a loss on labels knows, and what a moving average of frozen weights would be: none of a
# preset's.
_OF_LABELS, _OF_WEIGHTS = ("smoothing",), ("ema",)
# Of thresholds alone, on MACs relative to the teacher's. AdamW divides by a gradient's noise, and
# the sign of (10)'s changes with each batch: on digits 9, the paper's for DeiT-S, moved four
# thresholds of five in step, and 0.5 let them part. At the end one factor lands on the budget.
_THRESHOLDS_PULL = 0.5
# Without labels the dense network's answers are all there is to learn.
_UNLABELLED = {"distill_weight": 1.0}
_PAPER_LR, _PAPER_BATCH = 2e-5, 512  # the rate grows with the batch
_SCRATCH_LR = 1e-3

# Bytes, for some 30 lines: tomllib's time and memory grow with the square of a key's parts.
_MOST_RECIPE = 16 << 10

_KNOWN = {field.name for field in fields(Recipe)} | {"epochs"}


def read_recipe(path: Path) -> dict[str, Any]:
    """The options in a TOML file, named as on the command line, with - or _.

    Raises:
        UserError: it cannot be read, is no TOML, or holds an unknown option.
    """
    try:
        import tomllib
    except ModuleNotFoundError:  # before Python 3.11
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise UserError(f"--recipe needs tomli; run: {pip_install('tomli')}") from error
    try:
        in_file = tomllib.loads(read_bounded(path, _MOST_RECIPE, "TOML file").decode())
    except RecursionError:
        raise UserError(f"{path} is no TOML: brackets too deep; correct it") from None
    except ValueError as error:
        said = "a number too long" if "int_max_str_digits" in str(error) else str(error)[:200]
        raise UserError(f"{path} is no TOML: {said}; correct it") from error
    given = {name.replace("-", "_"): value for name, value in in_file.items()}
    given = {{"ema_decay": "ema"}.get(name, name): value for name, value in given.items()}
    if len(given) < len(in_file):
        raise UserError(f"{path} has an option twice, in two spellings; drop one")
    for name, value in given.items():
        if name not in _KNOWN:
            known = ", ".join(sorted(_KNOWN)).replace("_", "-")
            raise UserError(f"{path} has an unknown option {reprlib.repr(name)}; known: {known}")
        several = name == "cuts" or (name == "thresholds" and value != FIT)
        parts, kinds = (value if several else [value]), _kinds(name, several)
        if not isinstance(parts, list) or not all(type(part) in kinds for part in parts):
            raise UserError(
                f"{path} says {name} = {reprlib.repr(value)}, which it cannot be; correct it"
            )
        if meant := wanted(name, value):
            raise UserError(f"{path} says {name} = {reprlib.repr(value)}; make it {meant}")
    return given


def _kinds(name: str, several: bool) -> tuple[type, ...]:
    """What an option's value may be in a file, or each of several."""
    if name in ("amp", "masking", "method", "train", "labels") or (
        name == "thresholds" and not several
    ):
        return (str,)
    if name == "per_picture":
        return (bool,)
    whole = name in ("steps", "epochs", "batch_size", "warmup", "repeats", "seed", "cuts")
    return (int,) if whole else (int, float)


def check_options(dense: bool, given: Mapping[str, Any]) -> None:
    """Refuse options that contradict one another; those that are None were not given.

    Raises:
        UserError: it names two of them.
    """
    named = {name for name, value in given.items() if value is not None}
    if {"steps", "epochs"} <= named:
        raise UserError("--steps and --epochs say the same thing; drop one")
    if dense and given.get("labels") == "none":
        raise UserError("--dense learns from labels; drop one of --dense and --labels none")
    for name in _ADAPTIVE:
        if dense and name in named:
            option = "ema-decay" if name == "ema" else name.replace("_", "-")
            raise UserError(f"--dense has no {option}; drop one of --dense and --{option}")


def _preset(config: ArchConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arch's, as far as it fits what the options ask for."""
    preset = dict(PRESETS.get(config.name, _OTHER))
    if options.get("labels") == "none":
        preset = {name: value for name, value in preset.items() if name not in _OF_LABELS}
        preset |= _UNLABELLED
    if options.get("train") == "thresholds":
        preset = {name: value for name, value in preset.items() if name not in _OF_WEIGHTS}
        preset["flops_weight"] = round(_THRESHOLDS_PULL / flops_weight(config, 1.0), 4)
    return preset


def recipe_for(
    config: ArchConfig,
    dense: bool,
    scratch: bool,
    epoch: int,
    given: Mapping[str, Any],
    in_file: Mapping[str, Any],
) -> Recipe:
    """The recipe of a run.

    Args:
        scratch: it starts from random weights.
        epoch: pictures in one.
        given: options of the command line by their name; None where not given.
        in_file: those of a recipe file.

    Raises:
        UserError: two of them contradict one another, or see `Recipe`.
    """
    given = {name: value for name, value in given.items() if value is not None}
    check_options(dense, given)
    check_options(False, in_file)
    # Steps of a file stand above the preset's epochs, those of the command line above both.
    length: dict[str, Any] = {}
    preset = _preset(config, {**in_file, **given})
    for options in (preset, in_file, given):
        length = {k: options[k] for k in ("steps", "epochs") if k in options} or length
    merged = {**preset, **in_file, **given}
    merged = {k: v for k, v in merged.items() if k not in ("steps", "epochs")}
    if dense:
        merged = {name: value for name, value in merged.items() if name not in _ADAPTIVE}
    if merged.get("thresholds", FIT) != FIT:
        merged["thresholds"] = tuple(float(value) for value in merged["thresholds"])
    if merged.get("cuts") is not None:
        merged["cuts"] = tuple(merged["cuts"])
    method = METHODS.get(merged.get("method", Threshold.name))
    if method is not None:  # the recipe refuses what is none
        merged.setdefault("temperature", method.temperature)
    batch = merged.setdefault("batch_size", 64)
    if "lr" not in merged:
        merged["lr"] = _SCRATCH_LR if scratch else _PAPER_LR * batch / _PAPER_BATCH
    merged.setdefault("min_lr", merged["lr"] / (1000 if scratch else 10))
    if "steps" not in length:
        epochs = length["epochs"]
        if meant := wanted("epochs", epochs):
            raise UserError(f"--epochs {epochs} cannot be used; pass {meant}")
        length = {"steps": max(1, epochs * epoch // max(batch, 1))}
    return Recipe(**length, **merged)
