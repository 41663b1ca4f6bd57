"""`asvit-deploy finetune`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.cli import options
from asvit_deploy.requirements import pip_install

if TYPE_CHECKING:
    from asvit_deploy.checkpoints.facts import Given
    from asvit_deploy.checkpoints.load import Checkpoint
    from asvit_deploy.data.sources import Source
    from asvit_deploy.training.finetune import Result

_NAMED = 10  # skipped pictures
_BARE = "average"  # --ema without a value


def _ema(context: click.Context, parameter: click.Parameter, text: str | None):
    """True for the bare option, the decay where it has its older meaning."""
    if text is None or text == _BARE:
        return text == _BARE
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no decay; --ema alone takes averaged weights") from (
            None
        )


def _numbers(kind: type, context: click.Context, parameter: click.Parameter, text: str | None):
    """`1,2,3` as a tuple; `fit`, which thresholds may be, as it is."""
    if text is None or (text == "fit" and kind is float):
        return text
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list such as 1,2,3") from None


@click.command()
@click.option(
    "--data", required=True,
    help="`digits`, or a folder of class folders or of .tar shards (perhaps in train/ and val/).",
)  # fmt: skip
@click.option("--arch", "arch_name", help="Architecture [default: the one of --pretrained].")
@click.option("--pretrained", type=options.CheckpointPath(), help="Weights to start from.")
@click.option("--teacher", type=options.CheckpointPath(), help="[default: those of --pretrained]")
@click.option("--dense", is_flag=True, help="Train a dense network, from scratch if need be.")
@click.option("-o", "--output", type=options.PATH, help="`.safetensors` [default: by arch, here].")
@click.option("--image-size", type=int, help="Another image size than that of the arch.")
@click.option(
    "--stages", callback=partial(_numbers, int), help="Blocks before which tokens leave: 3,6,9.",
)  # fmt: skip
@click.option(
    "--recipe", "recipe_file", type=options.PATH,
    help="TOML file of the options below; those given here win.",
)  # fmt: skip
@click.option("--budget", type=float, help="MACs as a fraction of the dense.")
@click.option("--epochs", type=click.IntRange(1), help="Epochs.")
@click.option("--steps", type=click.IntRange(1), help="Steps, in place of --epochs.")
@click.option(
    "--batch-size", type=click.IntRange(1),
    help="Pictures of a step, all processes together [default: 64].",
)  # fmt: skip
@click.option("--lr", type=float, help="[default: 2e-5 * batch / 512; dense from scratch: 1e-3]")
@click.option("--min-lr", type=float, help="[default: lr / 10; dense from scratch: lr / 1000]")
@click.option("--warmup", type=click.IntRange(0), help="Warm-up steps.")
@click.option("--weight-decay", type=float, help="AdamW's [default: 1e-6]; thresholds have none.")
@click.option("--clip", type=float, help="Clip the gradient's norm; 0 does not.")
@click.option("--smoothing", type=float, help="Label smoothing.")
@click.option("--randaugment", type=float, help="Its magnitude, of 10; 0 is off.")
@click.option("--mixup", type=float, help="Its alpha; 0 is off.")
@click.option("--cutmix", type=float, help="Its alpha; 0 is off.")
@click.option("--erase", type=float, help="Probability of random erasing.")
@click.option("--repeats", type=click.IntRange(1), help="Copies of a picture in a batch.")
@click.option("--flops-weight", type=float, help="Of L_flops in Eq. 13, per GMAC [default: 2].")
@click.option("--distill-weight", type=float, help="Of L_distill in Eq. 13 [default: 0.5].")
@click.option("--temperature", type=float, help="T of Eq. 9 [default: 10000].")
@click.option(
    "--thresholds", callback=partial(_numbers, float),
    help="Where they start: 1e-3,2e-3,3e-3; `fit` scales them onto the budget first.",
)  # fmt: skip
@click.option("--masking", help="`attention` (the method), or `activation`.")
@click.option(
    "--ema", "averaged", is_flag=False, flag_value=_BARE, callback=_ema, metavar="",
    help="Start from averaged weights, of --pretrained and --teacher.",
)  # fmt: skip
@click.option(
    "--ema-decay", "ema", type=float, help="Of a moving average of the weights; 0 keeps none."
)
@click.option(
    "--amp", help="`bf16` or `fp16` products [default: no]; scores and thresholds stay float32.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), help="Of weights, order and augmentation.")
@click.option("--save-every", type=click.IntRange(1), default=200, help="Steps between states.")
@click.option("--log-every", type=click.IntRange(1), default=20, help="Steps between log lines.")
@click.option("--validation-limit", type=click.IntRange(1), help="Validate on so many pictures.")
@click.option(
    "--workers", type=click.IntRange(0, 1024), default=0, help="Processes that make batches."
)
@options.skip_limit
@click.option(
    "--classes", type=options.PATH,
    help="The data's classes in the order of the outputs: text, one a line, or JSON.",
)  # fmt: skip
@click.option("--tensorboard", type=options.PATH, help="Folder for TensorBoard's events.")
@options.facts
@click.option("--resume", is_flag=True, help="Go on with the unfinished run of this output.")
@options.force
def command(
    data: str,
    arch_name: str | None,
    pretrained: Path | None,
    teacher: Path | None,
    dense: bool,
    output: Path | None,
    image_size: int | None,
    stages: tuple[int, ...] | None,
    recipe_file: Path | None,
    save_every: int,
    log_every: int,
    validation_limit: int | None,
    workers: int,
    skip_limit: int,
    classes: Path | None,
    tensorboard: Path | None,
    resume: bool,
    force: bool,
    averaged: bool | float,
    known: Given,
    **given: Any,
) -> None:
    """Train to a MACs budget (Eq. 10-13 of AS-ViT), or train a dense network.

    \b
    asvit-deploy finetune --data DIR --pretrained deit_small.pth --budget 0.65
    asvit-deploy finetune --data digits --arch as_deit_mini --dense --steps 4000

    Options that are not given are the paper's, by arch. With several GPUs or machines, start it
    with `torchrun --nproc-per-node 8 -m asvit_deploy finetune ...` or `accelerate launch`.

    A run that was stopped goes on with the same command and --resume.
    """
    from asvit_deploy.artefacts.sidecar import check_target
    from asvit_deploy.checkpoints.facts import fields_of
    from asvit_deploy.classes.name_files import read_names
    from asvit_deploy.data.head_order import check_teacher, in_head_order
    from asvit_deploy.data.sources import open_source
    from asvit_deploy.errors import UserError
    from asvit_deploy.files import sha256
    from asvit_deploy.models.archs import arch
    from asvit_deploy.training.log import log_path
    from asvit_deploy.training.presets import check_options, read_recipe, recipe_for
    from asvit_deploy.training.recipe import Running
    from asvit_deploy.training.state import state_path

    try:
        from asvit_deploy.training.finetune import Interrupted, finetune
    except ModuleNotFoundError as error:
        if error.name != "accelerate":
            raise
        raise UserError(f"finetune needs accelerate; {pip_install('accelerate')}") from error

    # `torchrun` and `accelerate launch` number their processes; the first one speaks for them all.
    first = os.environ.get("RANK", "0") == "0"
    say = options.status if first else lambda text: None

    if averaged is not False and averaged is not True:
        if given["ema"] is not None:
            raise UserError(f"--ema {averaged:g} and --ema-decay say the same thing; drop one")
        say(f"--ema {averaged:g} is the older spelling of --ema-decay {averaged:g}")
        given["ema"], averaged = averaged, False
    check_options(dense, given)
    if dense and teacher is not None:
        raise UserError("--dense has no teacher; drop one of --dense and --teacher")
    if not dense and pretrained is None:
        raise UserError(
            "adaptive training starts from dense weights: pass --pretrained FILE, "
            "or train them first with --dense"
        )
    if arch_name is None and pretrained is None:
        raise UserError("nothing says which network to train; pass --arch or --pretrained")
    if pretrained is None and (asked := known.options() + ["--ema"] * averaged):
        raise UserError(f"{' and '.join(asked)} tell of --pretrained's weights; name them, or drop "
                        "it")  # fmt: skip
    told = read_recipe(recipe_file) if recipe_file else {}
    checkpoint, mentor = _loaded(pretrained, teacher, image_size, arch_name, averaged, known, say)
    if checkpoint and checkpoint.headless:
        _start_headless(checkpoint, dense, teacher, given, say)
    config = checkpoint.config if checkpoint else arch(arch_name or "").at(image_size)
    config = config.with_stages(stages) if stages else config
    target = output or Path(f"{config.name}{'_dense' if dense else ''}.safetensors")
    inputs = [path for path in (pretrained, teacher, recipe_file, classes) if path]
    check_target(target, "checkpoint", force or resume, *inputs)
    state, log = state_path(target), log_path(target)
    for path, given_path in itertools.product((state, log), inputs):
        if path.exists() and path.samefile(given_path):
            raise UserError(f"a run for {target} would write {path}, its own input; name another")
    if state.exists() and not (resume or force):
        raise UserError(f"{state} holds an unfinished run; pass --resume to go on, or --force")
    # Twice: what a batch holds is the recipe's affair, and how long an epoch is the data's.
    draft = recipe_for(config, dense, checkpoint is None, 1, given, told)
    names = read_names(classes, least=2) if classes else None
    source = open_source(data, config, draft.seed, draft.augmentation, names)
    source = in_head_order(source, names, classes, checkpoint, say)
    config = config.at(num_classes=len(source.classes))
    recipe = recipe_for(config, dense, checkpoint is None, source.epoch, given, told)
    if mentor is not None:
        check_teacher(source, mentor, say)
    identity = {
        "arch": config.name,
        "image_size": config.image_size,
        "stages": list(config.stages),
        "pretrained": sha256(pretrained) if pretrained else None,
        "teacher": sha256(teacher) if teacher else None,
        # None where nothing was said: states of before know of neither.
        "averaged": True if averaged else None,
        "facts": fields_of(config) if fields_of(config) != fields_of(arch(config.name)) else None,
    }
    say(
        f"{config.name}, {config.image_size} px, {len(source.classes)} classes of {source.name} "
        f"({_pictures(source)}): {recipe.steps} steps of {recipe.batch_size}, learning rate "
        f"{recipe.lr:g}"
    )
    for note in source.notes:
        say(note)
    running = Running(save_every, log_every, validation_limit, workers, skip_limit, tensorboard)
    try:
        result = finetune(
            config, source, checkpoint, recipe, target, identity, resume, running, force, mentor
        )
    except Interrupted as stopped:
        say(str(stopped))
        click.get_current_context().exit(130)
    except KeyboardInterrupt:  # a second one, which does not wait for the step's end
        if not state.exists():
            raise
        say(f"interrupted; {state} holds the last state that was saved, go on with --resume")
        click.get_current_context().exit(130)
    if result.average:
        _tell(result.average, "its moving average: ", say)
    _tell(result, "", say)
    if result.skipped:
        more, plural = ", …" * (len(result.skipped) > _NAMED), "s" * (len(result.skipped) > 1)
        say(f"skipped {len(result.skipped)} unreadable picture{plural}: "
            f"{', '.join(result.skipped[:_NAMED])}{more}")  # fmt: skip
    if first:
        click.echo(target)


def _pictures(source: Source) -> str:
    """How many pictures of each part, and what lies beside them."""
    from asvit_deploy.data.listing import others

    if source.held_out is None:  # digits, which are placed anew each time
        return f"{source.epoch:,} training pictures an epoch"
    parts = [f"{source.epoch:,} training pictures", f"{source.held_out:,} for validation"]
    return ", ".join(filter(None, (*parts, others(source.passed_over))))


def _loaded(
    pretrained: Path | None, teacher: Path | None, image_size: int | None, arch_name: str | None,
    averaged: bool, known: Given, say: Callable[[str], None],
) -> tuple[Checkpoint | None, Checkpoint | None]:  # fmt: skip
    """The weights to start from and those to learn from, with a line on each.

    Raises:
        UserError: as `load_checkpoint`; averaged weights are asked for and neither has any.
    """
    from asvit_deploy.checkpoints.facts import seen_alike
    from asvit_deploy.checkpoints.load import load_checkpoint
    from asvit_deploy.errors import UserError

    if pretrained is None:
        return None, None
    load = partial(load_checkpoint, pretrained, image_size, arch_name, given=known, headless=True)
    start = load()
    teach = None
    if teacher is not None:
        teach = partial(load_checkpoint, teacher, start.config.image_size)
    mentor = teach() if teach else None
    if averaged and not (start.has_average or (mentor and mentor.has_average)):
        where = f"{pretrained} holds" if mentor is None else f"{pretrained} and {teacher} hold"
        raise UserError(f"{where} no moving average of its weights; drop --ema")
    if averaged:
        start = load(ema=True) if start.has_average else start
        mentor = teach(ema=True) if teach and mentor and mentor.has_average else mentor
    for checkpoint in (start, mentor):
        if checkpoint is not None:
            options.tell(checkpoint, say)
            if averaged and not checkpoint.has_average:
                say(f"{checkpoint.path}: holds no moving average; its own weights are taken")
    if mentor is not None:
        alike = seen_alike(mentor.config, mentor.told, start.config.preprocessing)
        if alike != mentor.config:
            say(f"{teacher}: what is assumed of its pictures is as {pretrained} sees them instead")
        mentor = replace(mentor, config=alike)
    return start, mentor


def _start_headless(
    checkpoint: Checkpoint, dense: bool, teacher: Path | None, given: dict[str, Any],
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Say that the head is fresh; such a network is no teacher, so that an adaptive run needs one.

    Raises:
        UserError: distillation is asked for, and there is nobody to learn from.
    """
    from asvit_deploy.errors import UserError

    alone = not dense and teacher is None
    if alone and given.get("distill_weight"):
        raise UserError(
            f"{checkpoint.path} has no head, so it teaches nothing and --distill-weight "
            f"{given['distill_weight']:g} needs another teacher; pass --teacher, or drop it"
        )
    told = ", and without a --teacher nothing is distilled" if alone else ""
    say(f"{checkpoint.path}: has no head; a fresh one is trained{told}")
    if alone:
        given["distill_weight"] = 0.0


def _tell(result: Result, of: str, say: Callable[[str], None]) -> None:
    """How a network ended: its MACs, whether they are those asked for, what validation says."""
    if fit := result.fit:
        say(
            f"{of}{fit.after:.4f} of the dense MACs on {fit.pictures} training pictures, "
            f"budget {fit.budget:g}"
        )
        if fit.missed:
            say(
                f"{of}missed the budget by {fit.off:+.1%}: these weights' scores are too much "
                "alike for any thresholds; train longer, or start from better weights"
            )
    if result.validation:
        numbers = {n: v for n, v in result.validation.items() if not isinstance(v, list)}
        say(of + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
