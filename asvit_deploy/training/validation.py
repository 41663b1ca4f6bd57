"""What is found out of a network before, between and after its steps: held-out figures, and
thresholds that meet the budget."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from tqdm import tqdm

from asvit_deploy import calibration, per_picture
from asvit_deploy.budget import network_macs
from asvit_deploy.data.sources import Source
from asvit_deploy.distance import distance
from asvit_deploy.fitting import MOST_PASSES, Fit, Shares, fit_thresholds
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.reduction.ltmp import LTMP
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.training.feed import Skipped
from asvit_deploy.training.log import Log
from asvit_deploy.training.processes import summed, together
from asvit_deploy.training.recipe import Running, picture_bytes
from asvit_deploy.training.trainer import Trainer

# Thresholds are fitted on as many pictures as were trained on, within these limits.
_FIT_PICTURES = (64, 2048)
_FIT_BYTES = 1 << 30
_START_PICTURES = 256  # cut by cut, which keeps the rows of all
_VALIDATION_BATCH = 64


def _bar(what: str, accelerator: Accelerator | None, shown: bool, total: int | None = None) -> tqdm:
    """What happens between steps, where it lasts; the first process alone shows it."""
    shown = shown and accelerator is not None and accelerator.is_main_process
    shown = shown and sys.stderr is not None
    return tqdm(total=total, desc=what, unit="img", file=sys.stderr, leave=False, delay=1.0,
                mininterval=1.0, disable=not shown)  # fmt: skip


def _all(accelerator: Accelerator | None) -> AbstractContextManager[None]:
    """As `together`, of this process alone too."""
    return contextlib.nullcontext() if accelerator is None else together(accelerator)


def _taken(batches: list[Tensor]) -> Iterator[Tensor]:
    """One after the other, each let go by the list."""
    while batches:
        yield batches.pop(0)


@torch.inference_mode()
def validate(
    model: ViT,
    source: Source,
    limit: int | None = None,
    accelerator: Accelerator | None = None,
    skipped: set[str] | None = None,
    bars: bool = True,
    dense: ViT | None = None,
) -> dict[str, Any]:
    """Held-out figures of the inference form, each process with its share; {} if no data.

    Args:
        skipped: gets the names of pictures that could not be read.
        bars: show progress.
        dense: what the network is compared with, in place of labels.

    Returns:
        `images`; `top1`, or in place of labels `cosine`, `kl` (nats) or `score_error`, means over
        the pictures, and with classes `top1_as_dense`; for an adaptive network, mean `macs` /
        teacher and image tokens `kept` after each cut.

    Raises:
        UserError: data cannot be read, in this process or in another.
    """
    rank = accelerator.process_index if accelerator else 0
    world = accelerator.num_processes if accelerator else 1
    model, device = copy.deepcopy(model).eval(), model.pos_embed.device
    cuts = len(model.cuts)
    sums = torch.zeros(4 + cuts, dtype=torch.float64)  # images, right, apart, MACs, kept per cut
    with _all(accelerator), _bar("validation", accelerator, bars) as bar:
        for images, labels, unreadable in source.validation(_VALIDATION_BATCH, limit, rank, world):
            if skipped is not None:
                skipped.update(unreadable)
            bar.update(len(labels) * world)
            if not len(labels):
                continue
            images = images.to(device)
            output, trace = model(images)
            apart = torch.tensor(0.0)
            if dense is not None:
                wanted = dense(images)[0].cpu()
                labels = wanted.argmax(1)
                apart = torch.from_numpy(distance(model.config, wanted, output.cpu())).sum()
            right = (output.argmax(1).cpu() == labels).sum()
            macs = network_macs(model, trace).sum().cpu() if cuts else torch.tensor(0.0)
            kept = [(n - model.config.prefix).sum().cpu() for n in trace.length]
            sums += torch.stack([torch.tensor(len(labels)), right, apart, macs, *kept]).double()
    if accelerator and world > 1:
        sums = accelerator.reduce(sums.to(device), reduction="sum").cpu()  # type: ignore[union-attr]
    count = int(sums[0])
    if not count:
        return {}
    _, right_share, mean_apart, mean, *kept_mean = (sums / count).tolist()
    figures = {"images": count}
    if dense is None:
        figures["top1"] = right_share
    else:
        figures |= _agreement(model, mean_apart, right_share)
    return figures | ({"macs": mean, "kept": kept_mean} if cuts else {})


def _agreement(model: ViT, apart: float, same: float) -> dict[str, Any]:
    """A mean `distance` under its name, and the share of equal classes."""
    if model.config.output == "embedding":
        return {"cosine": 1 - apart}
    if model.config.num_classes == 1:
        return {"score_error": apart}
    return {"kl": apart, "top1_as_dense": same}


def start_on_budget(
    trainer: Trainer, source: Source, log: Log, skipped: Skipped, running: Running
) -> None:
    """Thresholds onto the budget before the first step: cut by cut where a method ranks, whose
    scores have any unit, or where the weights stay as they are; else by one factor.

    Raises:
        UserError: too many pictures cannot be read, or their scores meet no such budget.
    """
    model, recipe, what = trainer.model, trainer.recipe, "starting thresholds"
    reduction, budget = model.reduction, recipe.budget
    by_cut = isinstance(reduction, Ranked | LTMP) or (
        isinstance(reduction, Threshold) and recipe.train == "thresholds"
    )
    if reduction is None or budget is None or not by_cut:
        land_on_budget(model, trainer, source, log, what, skipped, 0, running)
        return
    size = min(_fit_size(trainer), _START_PICTURES)
    images = [image.numpy() for image in _fitting(trainer, source, size, 0, skipped)]
    accelerator = trainer.accelerator
    with together(accelerator), _bar(what, accelerator, running.bars, len(images)) as bar:
        found = _fitted(model, reduction, images, budget, bar.update)
    for name, value in reduction.named_parameters():
        value.data = broadcast(found[name].to(value.device, copy=True))
    log.write({"event": f"{what} fitted to the budget", "step": 0, "pictures": len(images),
               "thresholds": model.threshold_values()})  # fmt: skip


def _fitted(
    model: ViT, reduction: Reduction, images: list[np.ndarray], budget: float,
    progress: Callable[[], object],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The method's parameters, with thresholds that meet the budget cut by cut."""
    made: Reduction
    if isinstance(reduction, LTMP):
        made = per_picture.fit_pairs(model, images, budget, reduction.blocks, progress)
    elif isinstance(reduction, Ranked):
        method, blocks = type(reduction), reduction.blocks
        made = per_picture.fit(model, method, images, budget, blocks, progress=progress,
                               most=reduction.most)  # fmt: skip
    else:
        equal = (1 / len(reduction.cuts),) * len(reduction.cuts)
        found = calibration.on_budget(model, images, budget, equal)
        made = Threshold(reduction.blocks, reduction.prefix)
        for threshold, value in zip(made, found.thresholds):
            threshold.data.fill_(value)
    return {name: value.detach() for name, value in made.named_parameters()}


def _fit_size(trainer: Trainer) -> int:
    """How many pictures thresholds are fitted on."""
    recipe, (fewest, most) = trainer.recipe, _FIT_PICTURES
    seen = recipe.steps * recipe.batch_size
    return min(max(seen, fewest), most, _FIT_BYTES // picture_bytes(trainer.model.config))


def _fitting(
    trainer: Trainer, source: Source, size: int, step: int, skipped: Skipped
) -> torch.Tensor:
    """Training pictures that come after that step, float32 [P, 3, H, W].

    Raises:
        UserError: too many pictures cannot be read.
    """
    with together(trainer.accelerator):
        pictures = source.fitting(size, after=step * trainer.recipe.batch_size)
    skipped.names.update(pictures.skipped)
    skipped.check()
    return pictures.images


def land_on_budget(
    model: ViT, trainer: Trainer, source: Source, log: Log, what: str, skipped: Skipped,
    step: int, running: Running,
) -> Fit | None:  # fmt: skip
    """Thresholds onto the budget, over the training pictures that come after that step; None where
    there are none.

    Raises:
        UserError: too many pictures cannot be read; nothing has changed then.
    """
    budget = trainer.recipe.budget
    thresholds = [] if model.reduction is None else model.reduction.boundaries()
    if budget is None or not thresholds:
        return None
    recipe, accelerator = trainer.recipe, trainer.accelerator
    size = min(_fit_size(trainer), source.epoch)
    shares = Shares(size, accelerator.process_index, accelerator.num_processes,
                    lambda own: summed(accelerator, own))  # fmt: skip
    with together(accelerator):
        found = [source.fitting(size, step * recipe.batch_size, own) for own in shares.batches]
    skipped.names.update(*(batch.skipped for batch in found))
    skipped.check()
    images = [batch.images for batch in found]
    del found  # so that each batch goes as soon as it is taken
    with _bar(what, accelerator, running.bars, MOST_PASSES * sum(map(len, images))) as bar:
        fit = fit_thresholds(model, _taken(images), budget, shares, bar.update)
    # Processes may round differently; the first one's is what is written.
    for threshold in thresholds:
        threshold.data = broadcast(threshold.data)
    # A resumed run keeps what comes before its first step, and repeats what comes after the last.
    place = {} if step else {"step": 0}
    event = f"{what} scaled to the budget"
    log.write({"event": event, **place, **asdict(fit), "missed": fit.missed})
    return fit
