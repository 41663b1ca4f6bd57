"""`asvit_deploy.finetune`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from asvit_deploy.api.finetune_inputs import (
    Inputs,
    check_combination,
    config_of,
    load,
    with_file,
    with_fresh_head,
    with_method,
)
from asvit_deploy.api.inputs import (
    Channels,
    PathLike,
    checkpoint_path,
    given_facts,
    optional_path,
    require_at_least,
    require_numbers,
    require_whole,
)
from asvit_deploy.api.methods import THRESHOLD
from asvit_deploy.errors import Interrupted, UserError
from asvit_deploy.requirements import pip_install
from asvit_deploy.status import Say, first_process, silent

if TYPE_CHECKING:
    from asvit_deploy.checkpoints.load import Checkpoint
    from asvit_deploy.data.sources import Source
    from asvit_deploy.models.config import ArchConfig
    from asvit_deploy.training.recipe import Recipe, Running
    from asvit_deploy.training.run import Trained

_MOST_WORKERS = 1024
_NO_NUMBERS = ("thresholds", "masking", "amp", "method", "per_picture", "cuts", "train", "labels")


def finetune(
    data: PathLike, *, arch: str | None = None, pretrained: PathLike | None = None,
    teacher: PathLike | None = None, dense: bool = False, output: PathLike | None = None,
    image_size: int | None = None, stages: Sequence[int] | None = None,
    method: str | None = None, per_picture: bool = False, cuts: Sequence[int] | None = None,
    train: Literal["all", "thresholds"] | None = None,
    labels: Literal["data", "none"] | None = None,
    recipe: PathLike | None = None, budget: float | None = None, epochs: int | None = None,
    steps: int | None = None, batch_size: int | None = None, lr: float | None = None,
    min_lr: float | None = None, warmup: int | None = None, weight_decay: float | None = None,
    clip: float | None = None, smoothing: float | None = None, randaugment: float | None = None,
    mixup: float | None = None, cutmix: float | None = None, erase: float | None = None,
    repeats: int | None = None, flops_weight: float | None = None,
    distill_weight: float | None = None, temperature: float | None = None,
    thresholds: Sequence[float] | Literal["fit"] | None = None, masking: str | None = None,
    ema: bool = False, ema_decay: float | None = None, amp: str | None = None,
    seed: int | None = None, save_every: int = 200, log_every: int = 20,
    validation_limit: int | None = None, workers: int = 0, skip_limit: int = 0,
    classes: PathLike | None = None, tensorboard: PathLike | None = None,
    mean: Channels | None = None, std: Channels | None = None, crop_pct: float | None = None,
    interpolation: str | None = None, heads: int | None = None,
    activation: str | None = None, resume: bool = False,
    force: bool = False, say: Say = silent,
) -> Trained:  # fmt: skip
    """Train to a MACs budget (Eq. 10-13 of AS-ViT), or train a dense network.

    The options are those of `asvit-deploy finetune`; those that are None are the paper's, by
    architecture. Every process of `torchrun` calls it alike; all of them get the result.

    Args:
        data: "digits", or a folder of class folders or of .tar shards; with `labels="none"` any
            folder of pictures.
        method: a name of `reduction.methods.METHODS`; by default the checkpoint's own, and
            "threshold" for dense weights. Rows of those with fixed counts are gathered in training.
        per_picture: a threshold at each cut that learns, in place of a fixed number of tokens.
        cuts: blocks at which tokens leave, rising; by default the method's usual ones.
        train: "thresholds" leaves the weights as they are; only what is the method's own learns.
        labels: "none" learns from the dense network alone: KL of its logits, or 1 - cosine of its
            embeddings.
        recipe: a TOML file of options; those given here win.
        say: gets status lines in the first process; progress bars go with them.

    Raises:
        UserError: bad input, options that contradict one another, or a run that cannot go on.
        Interrupted: Ctrl-C or SIGTERM; the state is saved, `resume=True` goes on from it.
    """
    given = {
        "budget": budget, "epochs": epochs, "steps": steps, "batch_size": batch_size, "lr": lr,
        "min_lr": min_lr, "warmup": warmup, "weight_decay": weight_decay, "clip": clip,
        "smoothing": smoothing, "randaugment": randaugment, "mixup": mixup, "cutmix": cutmix,
        "erase": erase, "repeats": repeats, "flops_weight": flops_weight,
        "distill_weight": distill_weight, "temperature": temperature, "masking": masking,
        "thresholds": _thresholds(thresholds), "ema": ema_decay, "amp": amp, "seed": seed,
        "method": method, "per_picture": per_picture or None, "cuts": _blocks("cuts", cuts),
        "train": train, "labels": labels,
    }  # fmt: skip
    require_at_least(1, epochs=epochs, steps=steps, batch_size=batch_size, repeats=repeats)
    require_at_least(0, warmup=warmup, seed=seed)
    require_numbers({k: v for k, v in given.items() if k not in _NO_NUMBERS})
    require_whole(image_size=image_size)
    known = given_facts(mean, std, crop_pct, interpolation, heads, activation)
    listening, say = say is not silent, say if first_process() else silent
    inputs = Inputs(
        os.fspath(data), arch, _checkpoint(pretrained, say), _checkpoint(teacher, say), dense,
        optional_path(output), image_size, _blocks("stages", stages),
        optional_path(recipe), optional_path(classes), ema, known, given, resume, force,
    )  # fmt: skip
    running = _running(save_every, log_every, validation_limit, workers, skip_limit,
                       optional_path(tensorboard), listening)  # fmt: skip
    return _finetune(inputs, running, say)


def _thresholds(value: Sequence[float] | Literal["fit"] | None) -> Any:
    if value is None or (isinstance(value, str) and value == "fit"):
        return value
    try:
        return tuple(float(threshold) for threshold in value)
    except (TypeError, ValueError):
        raise UserError(
            f"thresholds={value!r} cannot be used; pass a list such as [1e-3, 2e-3, 3e-3], or 'fit'"
        ) from None


def _blocks(name: str, value: Sequence[int] | None) -> tuple[int, ...] | None:
    try:
        blocks = tuple(int(block) for block in value or ())
    except (TypeError, ValueError):
        raise UserError(f"{name}={value!r} cannot be used; pass a list such as [3, 6, 9]") from None
    return blocks or None


def _checkpoint(value: PathLike | None, say: Say) -> Path | None:
    return None if value is None else checkpoint_path(value, say)


def _running(
    save_every: int, log_every: int, validation_limit: int | None, workers: int, skip_limit: int,
    tensorboard: Path | None, bars: bool,
) -> Running:  # fmt: skip
    from asvit_deploy.training.recipe import Running

    require_at_least(1, save_every=save_every, log_every=log_every,
                     validation_limit=validation_limit)  # fmt: skip
    require_at_least(0, workers=workers, skip_limit=skip_limit)
    if workers > _MOST_WORKERS:
        raise UserError(f"workers={workers} cannot be used; pass a number up to {_MOST_WORKERS}")
    return Running(
        save_every, log_every, validation_limit, workers, skip_limit, tensorboard, bars
    )  # fmt: skip


def _finetune(inputs: Inputs, running: Running, say: Say) -> Trained:
    try:
        from asvit_deploy.training.run import finetune as run
        from asvit_deploy.training.summary import summary
    except ModuleNotFoundError as error:
        if error.name != "accelerate":
            raise
        raise UserError(f"finetune needs accelerate; {pip_install('accelerate')}") from error
    from asvit_deploy.classes.network import named, of_checkpoint
    from asvit_deploy.data.head_order import check_teacher
    from asvit_deploy.training.presets import check_options, read_recipe

    check_options(inputs.dense, inputs.given)
    in_file = read_recipe(inputs.recipe) if inputs.recipe else {}
    if inputs.stages is not None:  # the command line wins, and these say the same thing
        in_file.pop("cuts", None)
    if not inputs.dense:
        inputs = replace(inputs, given=with_file(inputs.given, in_file))
    check_combination(inputs)
    start, mentor = load(inputs, say)
    if start and not inputs.dense:
        inputs = with_method(inputs, start)
    if start and start.headless and inputs.labelled:
        inputs = with_fresh_head(inputs, start, say)
    config = config_of(inputs, start)
    target = inputs.output or Path(f"{config.name}{'_dense' if inputs.dense else ''}.safetensors")
    state = _check_outputs(inputs, target)
    config, source, recipe = _prepared(inputs, config, start, in_file, say)
    if mentor is not None and inputs.labelled:
        check_teacher(source, mentor, say)
    if start is not None and not inputs.labelled:
        start = named(start, of_checkpoint(start, None, say, assume=False))
    say(_said(config, source, recipe))
    for note in source.notes:
        say(note)
    before = _stamp(state)
    try:
        result = run(
            config, source, start, recipe, target, _identity(inputs, config), inputs.resume,
            running, inputs.force, mentor,
        )  # fmt: skip
    except KeyboardInterrupt:  # a second one, which does not wait for the step's end
        if not state.exists() or (_stamp(state) == before and not inputs.resume):
            raise  # nothing was saved yet: a state there is that of another run
        raise Interrupted(
            f"interrupted; {state} holds the last state that was saved, go on with --resume"
        ) from None
    for line in summary(result):
        say(line)
    return result


def _stamp(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew; None where there is none."""
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _check_outputs(inputs: Inputs, target: Path) -> Path:
    """Where the run keeps its state, once it is sure that nothing is overwritten unasked.

    Raises:
        UserError: an output is there and not to be replaced, is an input, or cannot be written.
    """
    from asvit_deploy.sidecar import check_target
    from asvit_deploy.training.log import log_path
    from asvit_deploy.training.state import state_path

    resume, force, files = inputs.resume, inputs.force, inputs.files()
    check_target(target, "checkpoint", force or resume, *files)
    state, log = state_path(target), log_path(target)
    for path, given in itertools.product((state, log), files):
        if path.exists() and path.samefile(given):
            raise UserError(f"a run for {target} would write {path}, its own input; name another")
    if state.exists() and not (resume or force):
        raise UserError(f"{state} holds an unfinished run; pass --resume to go on, or --force")
    return state


def _prepared(
    inputs: Inputs, config: ArchConfig, start: Checkpoint | None, in_file: dict[str, Any],
    say: Say,
) -> tuple[ArchConfig, Source, Recipe]:  # fmt: skip
    """The architecture with the data's classes, the data, and the recipe for both."""
    from asvit_deploy.classes.name_files import read_names
    from asvit_deploy.data.head_order import in_head_order
    from asvit_deploy.data.parts import unlabelled
    from asvit_deploy.data.sources import open_source
    from asvit_deploy.training.presets import recipe_for

    make = partial(recipe_for, config, inputs.dense, start is None, given=inputs.given,
                   in_file=in_file)  # fmt: skip
    # Twice: what a batch holds follows from the recipe, and how long an epoch is from the data.
    draft = make(epoch=1)
    names = read_names(inputs.classes, least=2) if inputs.classes else None
    if not inputs.labelled:
        source = open_source(inputs.data, config, draft.seed, draft.augmentation, labelled=False)
        return config, source, make(epoch=source.epoch)
    try:
        source = open_source(inputs.data, config, draft.seed, draft.augmentation, names)
    except UserError as error:
        if inputs.dense or not unlabelled(inputs.data):
            raise
        raise UserError(f"{error}; or pass --labels none, which needs no classes") from error
    source = in_head_order(source, names, inputs.classes, start, say)
    return config.at(num_classes=len(source.classes)), source, make(epoch=source.epoch)


def _identity(inputs: Inputs, config: ArchConfig) -> dict[str, Any]:
    """What, beside data and recipe, decides the result; None where nothing was said: states of
    earlier versions know of neither."""
    from asvit_deploy.checkpoints.facts import fields_of
    from asvit_deploy.checkpoints.places import fingerprint
    from asvit_deploy.models.archs import described, description

    facts, traits = fields_of(config), description(config)
    return {
        "arch": config.name,
        "image_size": config.image_size,
        "stages": list(config.stages),
        "pretrained": fingerprint(inputs.pretrained) if inputs.pretrained else None,
        "teacher": fingerprint(inputs.teacher) if inputs.teacher else None,
        "averaged": True if inputs.averaged else None,
        "facts": facts if facts != fields_of(described(config.name, traits)) else None,
        "architecture": traits,
    }


def _said(config: ArchConfig, source: Source, recipe: Recipe) -> str:
    """What is trained on what, in a line."""
    of = f"{len(source.classes)} classes of {source.name}"
    if recipe.labels == "none":
        of = f"{source.name} without labels"
    how = (
        ""
        if recipe.method == THRESHOLD
        else f", {recipe.method}{', per picture' * recipe.per_picture}"
    )
    return (
        f"{config.name}, {config.image_size} px, {of} ({_pictures(source)}){how}: {recipe.steps} "
        f"steps of {recipe.batch_size}, learning rate {recipe.lr:g}"
        f"{', thresholds alone' * (recipe.train == 'thresholds')}"
    )


def _pictures(source: Source) -> str:
    """How many pictures of each part, and what lies beside them."""
    from asvit_deploy.data.listing import others

    if source.held_out is None:  # digits, which are placed anew each time
        return f"{source.epoch:,} training pictures an epoch"
    parts = [f"{source.epoch:,} training pictures", f"{source.held_out:,} for validation"]
    return ", ".join(filter(None, (*parts, others(source.passed_over))))
