"""What training minimises: Eq. 10-13 of AS-ViT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.models.archs import arch
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import model_macs, teacher_macs

# Eq. 13 weighs GMACs by 2, which pulls less the smaller the network. Networks below DeiT-S get
# the pull that DeiT-S has. In short trials on the default arch (200 steps) the literal weight met
# the budget too, but the tokens kept then did not follow the size of what is on the picture.
PAPER_WEIGHT = 2.0

# A number's mean over all processes; where there is one process, the number.
Mean = Callable[[Tensor], Tensor]


def _alone(value: Tensor) -> Tensor:
    return value


def flops_weight(config: ArchConfig, per_gmac: float = PAPER_WEIGHT) -> float:
    """Weight of `flops_loss`, which is relative to the teacher, from Eq. 13's, which is per GMAC.

    Of the teacher's GMACs, or of DeiT-S's where the teacher has fewer.
    """
    reference = teacher_macs(arch("as_deit_small"))
    return per_gmac * max(teacher_macs(config), reference) / 1e9


def relative_macs(config: ArchConfig, masks: Sequence[Tensor]) -> Tensor:
    """MACs of each image as a fraction of the teacher's, float32 [B]; differentiable.

    Args:
        masks: keep masks of the stages, float32 [B, N].
    """
    lengths = [config.prefix + mask.sum(1) for mask in masks]
    return model_macs(config, lengths) / teacher_macs(config)


def flops_loss(
    config: ArchConfig, masks: Sequence[Tensor], budget: float, mean: Mean = _alone
) -> Tensor:
    """(10) | mean_b FLOPs(x_b) - t | / teacher, with t = budget * teacher.

    The mean is over the pictures of all processes and stands inside the absolute value: each
    process's gradient is that of its own pictures, with the sign of them all.
    """
    own = relative_macs(config, masks).mean()
    return (own - own.detach() + mean(own.detach()) - budget).abs()


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """(12) KL(student, teacher) of class distributions, mean over the rows.

    As in the released code it is the teacher's distribution that is expected over:
    sum_c p_t (log p_t - log p_s).

    Args:
        student, teacher: logits [R, C].
    """
    log_student = F.log_softmax(student.float(), 1)
    log_teacher = F.log_softmax(teacher.float(), 1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def token_distillation(
    student: Tensor, teacher: Tensor, alive: Tensor, mean: Mean = _alone
) -> Tensor:
    """(12), LV-ViT's second part: the same KL over the tokens that the last stage kept.

    Args:
        student, teacher: token logits [B, N, C].
        alive: keep mask of the last stage, float32 [B, N].
    """
    rows = alive.detach() > 0.5
    # Every token weighs the same, in whatever process it is.
    share = rows.sum() / mean(rows.sum().float())
    return distillation(student[rows], teacher[rows]) * share


@dataclass(frozen=True)
class Weights:
    """Factors of Eq. 13; `flops` applies to MACs relative to the teacher."""

    flops: float
    distill: float = 0.5
    token: float = 0.5
    smoothing: float = 0.0


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gave: logits [B, C], token logits [B, N, C] or None, keep masks."""

    logits: Tensor
    tokens: Tensor | None
    masks: list[Tensor]


def total_loss(
    config: ArchConfig,
    student: Outputs,
    teacher: Outputs | None,
    labels: Tensor,
    budget: float | None,
    weights: Weights,
    mean: Mean = _alone,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(13) L = L_ce + w_flops L_flops + w_distill L_distill (+ w_token L_token), and its parts.

    Without a teacher or a budget the parts that need them are left out.

    Args:
        labels: int64 [B], or float32 [B, C] where pictures were mixed.
        mean: over all processes.
    """
    logits = student.logits.float()
    parts = {"ce": F.cross_entropy(logits, labels, label_smoothing=weights.smoothing)}  # (11)
    loss = parts["ce"]
    if budget is not None:
        parts["flops"] = flops_loss(config, student.masks, budget, mean)
        loss = loss + weights.flops * parts["flops"]
    if teacher is not None:
        parts["distill"] = distillation(logits, teacher.logits)
        loss = loss + weights.distill * parts["distill"]
        if student.tokens is not None and teacher.tokens is not None:
            alive = student.masks[-1] if student.masks else torch.ones_like(student.tokens[:, :, 0])
            parts["token"] = token_distillation(student.tokens, teacher.tokens, alive, mean)
            loss = loss + weights.token * parts["token"]
    return loss, {name: part.detach() for name, part in parts.items()}
