"""What `asvit_deploy.finetune` is asked for: its weights and options, once they fit together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asvit_deploy.api.inputs import checkpoint_files, say_load
from asvit_deploy.api.methods import THRESHOLD, method_for
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say

if TYPE_CHECKING:
    from asvit_deploy.checkpoints.facts import Given
    from asvit_deploy.checkpoints.load import Checkpoint
    from asvit_deploy.models.config import ArchConfig


@dataclass(frozen=True)
class Inputs:
    """What a run is asked to do; names as those of the options.

    Attributes:
        given: the recipe's options by their field, None where not given.
    """

    data: str
    arch: str | None
    pretrained: Path | None
    teacher: Path | None
    dense: bool
    output: Path | None
    image_size: int | None
    stages: tuple[int, ...] | None
    recipe: Path | None
    classes: Path | None
    averaged: bool
    known: Given
    given: dict[str, Any]
    resume: bool
    force: bool

    @property
    def labelled(self) -> bool:
        """Whether the data's labels are learnt."""
        return self.given["labels"] != "none"

    def files(self) -> list[Path]:
        """What the run reads and must not write."""
        networks = (self.pretrained, self.teacher)
        weights = [file for path in networks if path for file in checkpoint_files(path)]
        return weights + [path for path in (self.recipe, self.classes) if path]


# Options of a recipe that are looked at before there is one.
_EARLY = ("method", "per_picture", "cuts", "train", "labels", "distill_weight")


def with_file(given: dict[str, Any], in_file: dict[str, Any]) -> dict[str, Any]:
    """The options that are given, with those of the file that say what is trained."""
    return given | {name: in_file[name] for name in _EARLY
                    if given[name] is None and name in in_file}  # fmt: skip


def with_method(inputs: Inputs, start: Checkpoint) -> Inputs:
    """The method by name: as asked for, or the checkpoint's own, or AS-ViT's; and where it cuts.

    Raises:
        UserError: as `method_for` and `check_method`; stages of another method than AS-ViT's.
    """
    from asvit_deploy.training.recipe import check_method

    given, fields = inputs.given, start.reduction or {}
    asked = given["method"] or fields.get("name") or THRESHOLD
    check_method(asked, bool(given["per_picture"]))
    name = method_for(start, asked)
    own = {"per_picture": True} if fields and fields.get("kept", ()) is None else {}
    if name != THRESHOLD:
        if inputs.stages is not None:
            raise UserError(f"--stages are those of --method {THRESHOLD}; pass --cuts for {name}")
        return replace(inputs, given={**given, **own, "method": name})
    if inputs.stages is not None and given["cuts"] is not None:
        raise UserError("--stages and --cuts say the same thing; drop one")
    stages = inputs.stages or given["cuts"]
    return replace(inputs, stages=stages and tuple(stages), given={**given, "cuts": None})


def check_combination(inputs: Inputs) -> None:
    """Refuse what contradicts itself, before anything is loaded."""
    if inputs.classes is not None and not inputs.labelled:
        raise UserError("--classes says what labels mean; drop one of it and --labels none")
    if inputs.dense and inputs.teacher is not None:
        raise UserError("--dense has no teacher; drop one of --dense and --teacher")
    if not inputs.dense and inputs.pretrained is None:
        raise UserError(
            "adaptive training starts from dense weights: pass --pretrained FILE, "
            "or train them first with --dense"
        )
    if inputs.arch is None and inputs.pretrained is None:
        raise UserError("nothing says which network to train; pass --arch or --pretrained")
    asked = inputs.known.options() + ["--ema"] * inputs.averaged
    if inputs.pretrained is None and asked:
        raise UserError(
            f"{' and '.join(asked)} say something of --pretrained's weights; pass --pretrained, or "
            "drop it"
        )


def load(inputs: Inputs, say: Say) -> tuple[Checkpoint | None, Checkpoint | None]:
    """The weights to start from and those to learn from, with a line on each.

    Raises:
        UserError: as `load_checkpoint`; averaged weights are asked for and neither has any; those
            to learn from give embeddings.
    """
    from asvit_deploy.checkpoints.facts import seen_alike
    from asvit_deploy.checkpoints.load import load_checkpoint

    pretrained, teacher, averaged = inputs.pretrained, inputs.teacher, inputs.averaged
    if pretrained is None:
        return None, None
    open_start = partial(load_checkpoint, pretrained, inputs.image_size, inputs.arch,
                   given=inputs.known)  # fmt: skip
    start = open_start()
    teach = None
    if teacher is not None:
        teach = partial(load_checkpoint, teacher, start.config.image_size)
    mentor = teach() if teach else None
    if mentor is not None and mentor.headless and inputs.labelled:
        raise UserError(
            f"{teacher} gives embeddings and no classes, so it teaches none; name a --teacher with "
            "a head (finetune --dense --pretrained fits one), or leave it out"
        )
    if averaged and not (start.has_average or (mentor and mentor.has_average)):
        where = f"{pretrained} holds" if mentor is None else f"{pretrained} and {teacher} hold"
        raise UserError(f"{where} no moving average of its weights; drop --ema")
    if averaged:
        start = open_start(ema=True) if start.has_average else start
        mentor = teach(ema=True) if teach and mentor and mentor.has_average else mentor
    for checkpoint in (start, mentor):
        if checkpoint is not None:
            say_load(checkpoint, say)
            if averaged and not checkpoint.has_average:
                say(f"{checkpoint.path}: holds no moving average; its own weights are taken")
    if mentor is not None:
        alike = seen_alike(mentor.config, mentor.origins, start.config.preprocessing)
        if alike != mentor.config:
            say(f"{teacher}: what is assumed of its pictures is as {pretrained} sees them instead")
        mentor = replace(mentor, config=alike)
    return start, mentor


def with_fresh_head(inputs: Inputs, start: Checkpoint, say: Say) -> Inputs:
    """Say that the head is fresh; such a network is no teacher, so that an adaptive run without
    another one distils nothing.

    Raises:
        UserError: distillation is asked for, and there is nobody to learn from; or no weights, a
            head's among them, are to learn.
    """
    if inputs.given["train"] == "thresholds":
        raise UserError(
            f"{start.path} gives embeddings, and a loss on classes needs a head, which --train "
            "thresholds would leave as it is; pass --labels none"
        )
    alone, weight = not inputs.dense and inputs.teacher is None, inputs.given["distill_weight"]
    if alone and weight:
        raise UserError(
            f"{start.path} tells no classes apart, so it teaches nothing and --distill-weight "
            f"{weight:g} needs another teacher; pass --teacher, or drop it"
        )
    nothing = ", and without a --teacher nothing is distilled" if alone else ""
    has, place = "has no head", ""
    if start.config.head != "none":
        has, place = "gives embeddings, no classes", " in place of its projection"
    keep = "" if inputs.dense else "; --labels none would keep the embedding"
    say(f"{start.path}: {has}; a fresh head is trained{place}{nothing}{keep}")
    return replace(inputs, given={**inputs.given, "distill_weight": 0.0}) if alone else inputs


def config_of(inputs: Inputs, start: Checkpoint | None) -> ArchConfig:
    from asvit_deploy.checkpoints.load import telling_classes
    from asvit_deploy.models.archs import arch

    config = arch(inputs.arch or "").at(inputs.image_size) if start is None else start.config
    config = (telling_classes(config) if inputs.labelled else config).released()
    return config.with_stages(inputs.stages) if inputs.stages else config
