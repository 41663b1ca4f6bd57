"""One step of a training run."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from asvit_deploy.data.batches import Batch
from asvit_deploy.errors import UserError
from asvit_deploy.models.vit import Selector, ViT, Walk
from asvit_deploy.precision import of_option
from asvit_deploy.reduction.base import Passed
from asvit_deploy.training.learning import Learners
from asvit_deploy.training.losses import (
    Outputs,
    Weights,
    flops_weight,
    mean_macs,
    relative_macs,
    total_loss,
)
from asvit_deploy.training.processes import accelerator_for
from asvit_deploy.training.recipe import Amp, Recipe, rate

# Under fp16 an infinite gradient costs a step and halves the loss's scale, from 65536 on. Gradients
# that are still infinite below this scale are not a matter of the scale.
_LEAST_SCALE = 1.0


class TrainingForm(nn.Module):
    """`ViT.forward_training` with its options as a module, for whoever wraps modules."""

    def __init__(self, model: ViT, recipe: Recipe, selector: Selector | None = None) -> None:
        super().__init__()
        self.model, self._amp = model, recipe.amp
        self._options = recipe.temperature, selector, recipe.masking

    def forward(self, images: Tensor) -> tuple[Walk, Tensor | None]:
        """The pass, and LV-ViT's token logits [B, M-P, C]; products as `amp` says."""
        with autocast(images.device, self._amp):
            walk = self.model.forward_training(images, *self._options)
            aux_head, prefix = getattr(self.model, "aux_head", None), self.model.config.prefix
            return walk, None if aux_head is None else aux_head(walk.tokens[:, prefix:])


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """The context in which weights' products are computed as `amp` says."""
    products = of_option(None if amp == "no" else amp)
    return torch.autocast(device.type, products.torch_type, enabled=products.half)


class Trainer:
    """A network in training, its teacher where there is one, and the optimiser.

    Args:
        from_scratch: learn the statistics of a convolutional stem too. Those of given weights stay
            frozen: they come from more pictures than a fine-tuning batch holds, and a student's
            must remain its teacher's.
        accelerator: the processes that train together; by default this one alone.
        selector: a rule in place of the thresholds, which then do not learn; for ablations.
    """

    def __init__(
        self,
        model: ViT,
        teacher: ViT | None,
        recipe: Recipe,
        from_scratch: bool = False,
        accelerator: Accelerator | None = None,
        selector: Selector | None = None,
    ) -> None:
        self.accelerator = accelerator or accelerator_for(recipe.amp)
        device = self.accelerator.device
        self.model, self.recipe = model.to(device), recipe
        self.teacher = None if teacher is None else TrainingForm(teacher.to(device).eval(), recipe)
        # The network has no dropout, so the mode decides about those statistics alone.
        model.train(from_scratch)
        model.requires_grad_(recipe.train == "all")
        self._reduction = model.reduction if selector is None else None
        own = []
        if model.reduction is not None:
            model.reduction.train()
            model.reduction.requires_grad_(selector is None)
            own = [] if selector is not None else model.reduction.learning()
        self._learners = Learners(model, recipe, own)
        self.optimizer = self._learners.optimizer
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        form = TrainingForm(model, recipe, selector)
        alone = self.accelerator.num_processes == 1 or device.type == "cuda"
        if from_scratch and model.config.stem == "conv" and not alone:
            raise UserError(
                f"{model.config.name} from scratch learns the statistics of its stem, which "
                "processes on CPUs cannot share; start it as one process, or give --pretrained"
            )
        if from_scratch and self.accelerator.num_processes > 1 and device.type == "cuda":
            form = nn.SyncBatchNorm.convert_sync_batchnorm(form)
        self._form = self.accelerator.prepare(form)
        self.average: AveragedModel | None = None
        if recipe.ema:
            decay = get_ema_multi_avg_fn(recipe.ema)
            self.average = AveragedModel(model, multi_avg_fn=decay, use_buffers=True)
        flops, distill = flops_weight(model.config, recipe.flops_weight), recipe.distill_weight
        self.weights = Weights(flops, distill, distill, recipe.smoothing)

    @property
    def judge(self) -> ViT | None:
        """The dense network that held-out pictures are compared with; None: their labels judge."""
        if self.recipe.labels == "data" or self.teacher is None:
            return None
        return self.teacher.model

    @property
    def _pull(self) -> float | None:
        """The budget, where (10) pulls towards it: not where counts are fixed by it already, nor
        where a method has a term of its own."""
        fixed = self._reduction is not None and (self._reduction.steers or self._reduction.compacts)
        return None if fixed else self.recipe.budget

    def mean(self, value: Tensor) -> Tensor:
        """A number's mean over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value.clone(), reduction="mean")  # type: ignore[return-value]

    def step(self, number: int, batch: Batch) -> dict[str, Any]:
        """One update; the figures that the log keeps, means over the pictures of all processes.

        Raises:
            UserError: the loss or its gradient is not finite.
        """
        device = self.accelerator.device
        images = batch.images.to(device)
        labels = batch.labels.to(device) if self.recipe.labels == "data" else None
        self._learners.set_rate(number)
        teacher, target = None, None
        if self.teacher is not None:
            with torch.no_grad():
                dense, tokens = self.teacher(images)
            teacher, target = Outputs(dense.logits, tokens), dense.tokens
        if self._reduction is not None:
            part = number * self.accelerator.num_processes + self.accelerator.process_index
            self._reduction.before_pass(self.recipe.seed, part * len(images))
        walk, tokens = self._form(images)
        student = self._outputs(walk, tokens, target)
        loss, parts = total_loss(
            self.model.config, student, teacher, labels, self._pull, self.weights, self.mean
        )
        self.model.zero_grad()
        self.scaler.scale(loss).backward()
        self._learners.hand_over()
        self.scaler.unscale_(self.optimizer)
        self._check(number, loss)
        self._update()
        return self._figures(number, loss, parts, walk, student, labels)

    def _outputs(self, walk: Walk, tokens: Tensor | None, target: Tensor | None) -> Outputs:
        """What the loss is about.

        Args:
            tokens: LV-ViT's token logits.
            target: the teacher's final tokens.
        """
        macs, terms, prefix = None, {}, self.model.config.prefix
        if walk.lengths:
            macs = relative_macs(self.model.config, walk.lengths, self.model.reduction)
            macs = mean_macs(macs, self.mean)
        if self._reduction is not None and self.recipe.budget is not None:
            assert macs is not None
            passed = Passed(self.recipe.budget, macs, walk.masks, walk.tokens, target, self.mean)
            terms = self._reduction.own_loss(passed)
        alive = None if walk.alive is None else walk.alive[:, prefix:]
        place = None if walk.place is None else walk.place[:, prefix:] - prefix
        return Outputs(walk.logits, tokens, macs, alive, place, terms)

    def _check(self, number: int, loss: Tensor) -> None:
        """Clip the weights' gradient; refuse a loss or a gradient that is not finite."""
        norm, slopes = self._learners.clip(), self._learners.slopes()
        shared = self.mean(loss.detach()).item()
        if not self.scaler.is_enabled():
            shared += 0 * (norm.item() + sum(slope.item() for slope in slopes))
        elif self.scaler.get_scale() < _LEAST_SCALE:
            shared = math.nan
        if not math.isfinite(shared):
            first = number * self.recipe.batch_size
            raise UserError(
                f"training diverged at step {number}, on pictures {first} to "
                f"{first + self.recipe.batch_size - 1} of the run: the loss is {loss.item():g}, "
                f"its gradient {norm.item():g}; start over with --force and a lower --lr "
                f"(it was {self.recipe.lr:g})"
            )

    @torch.no_grad()
    def _update(self) -> None:
        """AdamW on what learns; thresholds stay positive."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._learners.follow()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def averaged(self) -> ViT | None:
        """The moving average of the weights with the thresholds as they are now, if one is kept.

        At a decay of 0.99996 averaged thresholds lag behind by a third of the paper's steps.
        """
        if self.average is None:
            return None
        network: ViT = self.average.module  # type: ignore[assignment]
        if network.reduction is not None and self.model.reduction is not None:
            live = self.model.reduction.boundaries()
            for mean, now in zip(network.reduction.boundaries(), live):
                mean.data.copy_(now.data)
        return network

    def _figures(
        self, number: int, loss: Tensor, parts: dict[str, Tensor], walk: Walk, student: Outputs,
        labels: Tensor | None,
    ) -> dict[str, Any]:  # fmt: skip
        numbers = {"loss": loss.detach(), **parts}
        if labels is not None:
            true = labels if labels.ndim == 1 else labels.argmax(1)
            numbers["top1"] = (student.logits.argmax(1) == true).float().mean()
        if student.macs is not None:
            numbers["macs"] = student.macs.detach()
            for stage, length in enumerate(walk.lengths):
                kept = length.detach() - self.model.config.prefix
                numbers[f"kept.{stage}"] = kept.mean()
        means = self.mean(torch.stack([value.float() for value in numbers.values()])).tolist()
        figures: dict[str, Any] = dict(zip(numbers, means))
        figures["lr"] = rate(self.recipe, number)
        if student.macs is not None:
            stages = range(len(walk.lengths))
            figures["kept"] = [figures.pop(f"kept.{stage}") for stage in stages]
            if thresholds := self.model.threshold_values():
                figures["thresholds"] = thresholds
        return figures
