"""What is found out of a network between and after its steps: held-out figures, and thresholds
that meet the budget."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from tqdm import tqdm

from asvit_deploy.budget import trace_macs
from asvit_deploy.data.sources import Source
from asvit_deploy.fitting import MOST_PASSES, Fit, Shares, fit_thresholds
from asvit_deploy.models.vit import ViT
from asvit_deploy.training.feed import Skipped
from asvit_deploy.training.log import Log
from asvit_deploy.training.processes import summed, together
from asvit_deploy.training.recipe import Running, picture_bytes
from asvit_deploy.training.trainer import Trainer

# Thresholds are fitted on as many pictures as were trained on, within these limits.
_FIT_PICTURES = (64, 2048)
_FIT_BYTES = 1 << 30
_VALIDATION_BATCH = 64


def _bar(what: str, accelerator: Accelerator | None, shown: bool, total: int | None = None) -> tqdm:
    """What happens between steps, where it lasts; the first process alone shows it."""
    shown = shown and accelerator is not None and accelerator.is_main_process
    return tqdm(total=total, desc=what, unit="img", file=sys.stderr, leave=False, delay=1.0,
                mininterval=1.0, disable=not shown)  # fmt: skip


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
) -> dict[str, Any]:
    """Held-out figures of the inference form, each process with its share; {} if no data.

    Args:
        skipped: gets the names of pictures that could not be read.
        bars: show progress.

    Returns:
        `images`, `top1` and, for an adaptive network, mean `macs` / teacher and image tokens
        `kept` after each stage.
    """
    rank = accelerator.process_index if accelerator else 0
    world = accelerator.num_processes if accelerator else 1
    model, device = copy.deepcopy(model).eval(), model.pos_embed.device
    stages = len(model.thresholds)
    sums = torch.zeros(3 + stages, dtype=torch.float64)  # images, right, MACs, kept per stage
    with _bar("validation", accelerator, bars) as bar:
        for images, labels, unreadable in source.validation(_VALIDATION_BATCH, limit, rank, world):
            if skipped is not None:
                skipped.update(unreadable)
            bar.update(len(labels) * world)
            if not len(labels):
                continue
            logits, trace = model(images.to(device))
            right = (logits.argmax(1).cpu() == labels).sum()
            macs = trace_macs(model.config, trace).sum().cpu() if stages else torch.tensor(0.0)
            kept = [(n - model.config.prefix).sum().cpu() for n in trace.length]
            sums += torch.stack([torch.tensor(len(labels)), right, macs, *kept]).double()
    if accelerator and world > 1:
        sums = accelerator.reduce(sums.to(device), reduction="sum").cpu()  # type: ignore[union-attr]
    count = int(sums[0])
    if not count:
        return {}
    _, top1, macs, *kept = (sums / count).tolist()
    figures = {"images": count, "top1": top1}
    return figures | ({"macs": macs, "kept": kept} if stages else {})


def land_on_budget(
    model: ViT, trainer: Trainer, source: Source, log: Log, what: str, skipped: Skipped,
    step: int, running: Running,
) -> Fit | None:  # fmt: skip
    """Thresholds onto the budget, over the training pictures that come after that step.

    Raises:
        UserError: too many pictures cannot be read; nothing has changed then.
    """
    recipe, config = trainer.recipe, model.config
    if recipe.budget is None:
        return None
    seen, (fewest, most) = recipe.steps * recipe.batch_size, _FIT_PICTURES
    size = min(max(seen, fewest), most, _FIT_BYTES // picture_bytes(config), source.epoch)
    accelerator = trainer.accelerator
    shares = Shares(size, accelerator.process_index, accelerator.num_processes,
                    lambda own: summed(accelerator, own))  # fmt: skip
    with together(accelerator):
        found = [source.fitting(size, step * recipe.batch_size, own) for own in shares.batches]
    skipped.names.update(*(batch.skipped for batch in found))
    skipped.check()
    images = [batch.images for batch in found]
    del found  # so that each batch goes as soon as it is taken
    with _bar(what, accelerator, running.bars, MOST_PASSES * sum(map(len, images))) as bar:
        fit = fit_thresholds(model, _taken(images), recipe.budget, shares, bar.update)
    # Processes may round differently; the first one's is what is written.
    for threshold in model.thresholds:
        threshold.data = broadcast(threshold.data)
    # A resumed run keeps what comes before its first step, and repeats what comes after the last.
    place = {} if step else {"step": 0}
    event = f"{what} scaled to the budget"
    log.write({"event": event, **place, **asdict(fit), "missed": fit.missed})
    return fit
