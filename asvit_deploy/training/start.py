"""The networks that a run starts from: what learns, and what it learns from."""

from __future__ import annotations

from dataclasses import replace

import torch

from asvit_deploy.budget import TOLERANCE, carried_out, check_budget, fitting, fixed_counts
from asvit_deploy.checkpoints.load import Checkpoint, build_model
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.reduction.ltmp import LTMP
from asvit_deploy.reduction.methods import METHODS, restored
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.schedule import Schedule
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.training.recipe import FIT, Recipe

_INITIAL_TOKENS = 196  # at which the paper's initial thresholds are meant


def dense_start(config: ArchConfig, pretrained: Checkpoint | None, seed: int) -> ViT:
    """A dense network to train: random, or given weights (with a new head for other classes)."""
    torch.manual_seed(seed)
    model = build(config, adaptive=False)
    if pretrained is not None:
        given = build_model(pretrained, dense=True).state_dict()
        if pretrained.config.num_classes != config.num_classes:
            given = {k: v for k, v in given.items() if not k.startswith(("head.", "aux_head."))}
        model.load_state_dict(given, strict=False)
    return model


def load_teacher(config: ArchConfig, given: Checkpoint) -> ViT:
    """The frozen dense network whose answers the student learns.

    Raises:
        UserError: it takes other pictures or knows another number of classes.
    """
    if given.config.num_classes != config.num_classes:
        if config.output == "embedding":
            raise UserError(
                f"{given.path} gives {given.config.num_classes} numbers and {config.name} "
                f"{config.num_classes}, so it cannot teach it; name another teacher"
            )
        raise UserError(
            f"{given.path} has {given.config.num_classes} classes and the data "
            f"{config.num_classes}; first fit a head with finetune --dense --pretrained"
        )
    for name in ("head", "image_size", "preprocessing"):
        if getattr(given.config, name) != getattr(config, name):
            raise UserError(
                f"{given.path} ({given.config.name}) cannot teach {config.name}: it has another "
                f"{name.replace('_', ' ')}; name a teacher that sees the same pictures"
            )
    return build_model(given, dense=True).requires_grad_(False)


def adaptive_start(config: ArchConfig, pretrained: Checkpoint, recipe: Recipe) -> tuple[ViT, ViT]:
    """Student and frozen teacher, both with the weights of a dense (or adaptive) checkpoint.

    The student's method is the recipe's. Its parameters are the checkpoint's own where it is of
    that method and cuts there; thresholds of dense weights start at the paper's, scaled to the
    number of tokens, those of other methods anywhere, to be fitted.

    Raises:
        UserError: the checkpoint has another number of classes than the data; the method cannot
            meet the budget, has nothing to learn where it alone is to, or is told what it has not;
            or there are not as many thresholds as cuts.
    """
    torch.manual_seed(recipe.seed)  # of what a method draws at its start
    teacher = load_teacher(config, pretrained)
    reduction = _reduction(config, pretrained, recipe)
    _check(reduction, config, recipe)
    student = build(config, True, reduction)
    student.load_state_dict(teacher.state_dict(), strict=False)
    if recipe.thresholds is not None and recipe.thresholds != FIT:
        for threshold, value in zip(reduction.boundaries(), recipe.thresholds):
            threshold.data.fill_(float(value))
    return student, teacher


def settled(config: ArchConfig, pretrained: Checkpoint | None, recipe: Recipe) -> Recipe:
    """The recipe, with thresholds that start on the budget where nothing else says where: those of
    methods whose scores have any unit, and those of AS-ViT over weights that stay as they are."""
    if recipe.budget is None or recipe.thresholds is not None or pretrained is None:
        return recipe
    method, fields = METHODS[recipe.method], pretrained.reduction
    if method is Threshold:
        known = recipe.train == "all" or _own_thresholds(config, pretrained)
        return recipe if known else replace(recipe, thresholds=FIT)
    if method is not LTMP and not (recipe.per_picture and issubclass(method, Ranked)):
        return recipe
    own = restored(fields, config.prefix) if fields and fields["name"] == method.name else None
    same = own is not None and own.boundaries() and recipe.cuts in (None, own.blocks)
    return recipe if same else replace(recipe, thresholds=FIT)


def _own_thresholds(config: ArchConfig, pretrained: Checkpoint) -> bool:
    """Whether the checkpoint has AS-ViT's thresholds at these stages."""
    adaptive = pretrained.adaptive and pretrained.reduction is None
    return adaptive and pretrained.config.stages == config.stages


def _reduction(config: ArchConfig, pretrained: Checkpoint, recipe: Recipe) -> Reduction:
    """The method as it starts."""
    assert recipe.budget is not None
    if recipe.method == Threshold.name:
        check_budget(config, recipe.budget)
        return _thresholds(config, pretrained)
    method, fields = METHODS[recipe.method], pretrained.reduction
    own = restored(fields, config.prefix) if fields and fields["name"] == method.name else None
    blocks, kept = recipe.cuts or (own.blocks if own else None), None
    if isinstance(own, Schedule) and blocks == own.blocks:
        return _as_searched(config, own, pretrained, recipe.budget)
    if issubclass(method, Ranked):
        plan = fixed_counts(config, method, recipe.budget, blocks)
        blocks, kept = plan.blocks, None if recipe.per_picture else plan.kept
    else:
        blocks = fitting(config, method, blocks)
    fresh = method.planned(config.dim, config.prefix, blocks, kept)
    if own is None or own.blocks != fresh.blocks:
        return fresh
    slot = f"{own.slot}."
    state = {k.removeprefix(slot): v for k, v in pretrained.state.items() if k.startswith(slot)}
    # Counts follow from the budget; the rest of what the checkpoint says stays.
    made = own if [*fresh.state_dict()] == [*state] and kept is None else fresh
    made.load_state_dict(state, strict=False)
    return made


def _as_searched(
    config: ArchConfig, own: Schedule, pretrained: Checkpoint, budget: float
) -> Schedule:
    """The schedule of a checkpoint, whose counts no other budget can have."""
    macs = carried_out(config, own) / teacher_macs(config)
    if abs(macs / budget - 1) > TOLERANCE:
        raise UserError(
            f"{pretrained.path} keeps the counts of its schedule, {macs:.3f} of the dense MACs by "
            f"the release's count; pass --budget {macs:.3f}, or calibrate another schedule"
        )
    return own


def _thresholds(config: ArchConfig, pretrained: Checkpoint) -> Threshold:
    made = Threshold(config.stages, config.prefix)
    own = _own_thresholds(config, pretrained)
    for stage, threshold in enumerate(made):
        if own:
            threshold.data.copy_(pretrained.state[f"thresholds.{stage}"])
        else:
            threshold.data.mul_(_INITIAL_TOKENS / config.image_tokens)
    return made


def _check(reduction: Reduction, config: ArchConfig, recipe: Recipe) -> None:
    """Refuse options that say something of what this method has not."""
    name, given, cuts = reduction.name, recipe.thresholds, len(reduction.cuts)
    if recipe.train == "thresholds" and not reduction.learning():
        able = isinstance(reduction, Ranked) and reduction.adapts
        raise UserError(
            f"{name} with fixed counts has nothing of its own to learn, and --train thresholds "
            f"leaves the weights as they are; {'pass --per-picture, or ' * able}drop it"
        )
    if reduction.compacts and recipe.masking != "attention":
        raise UserError(
            f"{name} with fixed counts masks nothing in training: its rows are gathered; drop "
            "--masking"
        )
    if given is not None and not reduction.boundaries():
        raise UserError(f"{name} as it is trained here has no thresholds; drop --thresholds")
    if given is not None and given != FIT and len(given) != cuts:
        where = "stages" if isinstance(reduction, Threshold) else "cuts"
        raise UserError(
            f"{len(given)} threshold{'s' * (len(given) != 1)} for the {cuts} {where} of "
            f"{config.name}; give one for each"
        )
