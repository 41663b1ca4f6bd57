"""The two networks of a training run, and one step of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from asvit_deploy.checkpoints.load import Checkpoint, build_model
from asvit_deploy.data.batches import Batch
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import Selector, ViT
from asvit_deploy.training.losses import Outputs, Weights, flops_weight, relative_macs, total_loss
from asvit_deploy.training.processes import accelerator_for
from asvit_deploy.training.recipe import Amp, Recipe, rate

# The paper's rate, 2e-5, moves a threshold of 0.002 by one per cent a step. Thresholds keep that
# pace relative to themselves, whatever the weights' rate: trained attention can be so sharp that
# they belong at 1e-4 or below, where steps of 2e-5 would jump, and cross zero.
_THRESHOLD_PACE = 0.01
# Far below any that matters; a checkpoint with a threshold of zero would be refused.
MIN_THRESHOLD = 1e-9
_INITIAL_TOKENS = 196  # at which the paper's initial thresholds are meant
# Under fp16 an infinite gradient costs a step and halves the loss's scale, from 65536 on. Gradients
# that are still infinite below this scale are not a matter of the scale.
_LEAST_SCALE = 1.0
_AMP_TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def adaptive_start(
    config: ArchConfig, pretrained: Checkpoint, thresholds: tuple[float, ...] | None = None
) -> tuple[ViT, ViT]:
    """Student and frozen teacher, both with the weights of a dense (or adaptive) checkpoint.

    Args:
        thresholds: where they start; by default the checkpoint's own, or for dense weights the
            paper's, scaled to the number of tokens.

    Raises:
        UserError: the checkpoint has another number of classes than the data, or there are not as
            many thresholds as stages.
    """
    teacher = load_teacher(config, pretrained)
    student = build(config, adaptive=True)
    student.load_state_dict(teacher.state_dict(), strict=False)
    if thresholds is not None and len(thresholds) != len(config.stages):
        raise UserError(
            f"{len(thresholds)} threshold{'s' * (len(thresholds) != 1)} for the "
            f"{len(config.stages)} stages of {config.name}; "
            "give one for each"
        )
    own = pretrained.adaptive and pretrained.config.stages == config.stages
    for stage, threshold in enumerate(student.thresholds):
        if thresholds is not None:
            threshold.data.fill_(thresholds[stage])
        elif own:
            threshold.data.copy_(pretrained.state[f"thresholds.{stage}"])
        else:
            threshold.data.mul_(_INITIAL_TOKENS / config.image_tokens)
    return student, teacher


def _optimizer(model: ViT, logarithms: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
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


class TrainingForm(nn.Module):
    """`ViT.forward_masked` with its options as a module, for whoever wraps modules."""

    def __init__(self, model: ViT, recipe: Recipe, selector: Selector | None = None) -> None:
        super().__init__()
        self.model, self._amp = model, recipe.amp
        self._options = recipe.temperature, selector, recipe.masking

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Logits [B, C], LV-ViT's token logits [B, N, C], keep masks; products as `amp` says."""
        with autocast(images.device, self._amp):
            logits, tokens, masks = self.model.forward_masked(images, *self._options)
            aux_head, prefix = getattr(self.model, "aux_head", None), self.model.config.prefix
            return logits, None if aux_head is None else aux_head(tokens[:, prefix:]), masks


def autocast(device: torch.device, amp: Amp) -> torch.autocast:
    """The context in which weights' products are computed as `amp` says."""
    return torch.autocast(device.type, _AMP_TYPES[amp], enabled=amp != "no")


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
        if model.reduction is not None:
            model.reduction.requires_grad_(selector is None)
        learning = [t for t in model.thresholds if t.requires_grad]
        self._logarithms = [nn.Parameter(t.detach().log()) for t in learning]
        self.optimizer = _optimizer(model, self._logarithms, recipe)
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
        images, labels = batch.images.to(device), batch.labels.to(device)
        recipe, config = self.recipe, self.model.config
        for group in self.optimizer.param_groups:
            group["lr"] = rate(recipe, number) * group["pace"]
        teacher = None
        if self.teacher is not None:
            with torch.no_grad():
                teacher = Outputs(*self.teacher(images))
        student = Outputs(*self._form(images))
        loss, parts = total_loss(
            config, student, teacher, labels, recipe.budget, self.weights, self.mean
        )
        self.model.zero_grad()
        self.scaler.scale(loss).backward()
        self._hand_over()
        self.scaler.unscale_(self.optimizer)
        self._check(number, loss)
        self._update()
        return self._figures(loss, parts, student, labels)

    def _weights(self) -> list[nn.Parameter]:
        named = self.model.named_parameters()
        return [value for key, value in named if not key.startswith("thresholds.")]

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Give the thresholds' gradients to their logarithms, d/d(log t) = t d/dt."""
        for logarithm, threshold in zip(self._logarithms, self.model.thresholds):
            # Derived anew each time, so that the thresholds alone are the state of a run.
            logarithm.copy_(threshold.log())
            assert threshold.grad is not None
            logarithm.grad = threshold.grad * threshold

    def _check(self, number: int, loss: Tensor) -> None:
        """Clip the weights' gradient; refuse a loss or a gradient that is not finite."""
        # Apart from the weights: in their own unit, thresholds have gradients 1e4 times as large.
        norm = nn.utils.clip_grad_norm_(self._weights(), self.recipe.clip or math.inf)
        slopes = [t.grad.abs() for t in self._logarithms if t.grad is not None]
        told = self.mean(loss.detach()).item()
        if not self.scaler.is_enabled():
            told += 0 * (norm.item() + sum(slope.item() for slope in slopes))
        elif self.scaler.get_scale() < _LEAST_SCALE:
            told = math.nan
        if not math.isfinite(told):
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
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for logarithm, threshold in zip(self._logarithms, self.model.thresholds):
            threshold.copy_(logarithm.exp().clamp(min=MIN_THRESHOLD))
        if self.average is not None:
            self.average.update_parameters(self.model)

    def averaged(self) -> ViT | None:
        """The moving average of the weights with the thresholds as they are now, if one is kept.

        At a decay of 0.99996 averaged thresholds lag behind by a third of the paper's steps.
        """
        if self.average is None:
            return None
        network: ViT = self.average.module  # type: ignore[assignment]
        for mean, live in zip(network.thresholds, self.model.thresholds):
            mean.data.copy_(live.data)
        return network

    def _figures(
        self, loss: Tensor, parts: dict[str, Tensor], student: Outputs, labels: Tensor
    ) -> dict[str, Any]:
        true = labels if labels.ndim == 1 else labels.argmax(1)
        numbers = {"loss": loss.detach(), **parts}
        numbers["top1"] = (student.logits.argmax(1) == true).float().mean()
        if student.masks:
            numbers["macs"] = relative_macs(self.model.config, student.masks).mean().detach()
            for stage, mask in enumerate(student.masks):
                numbers[f"kept.{stage}"] = mask.detach().sum(1).mean()
        means = self.mean(torch.stack([value.float() for value in numbers.values()])).tolist()
        figures: dict[str, Any] = dict(zip(numbers, means))
        figures["lr"] = self.optimizer.param_groups[0]["lr"]
        if student.masks:
            stages = range(len(student.masks))
            figures["kept"] = [figures.pop(f"kept.{stage}") for stage in stages]
            figures["thresholds"] = [threshold.item() for threshold in self.model.thresholds]
        return figures
