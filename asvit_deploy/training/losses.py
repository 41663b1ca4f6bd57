"""What training minimises: Eq. 10-13 of AS-ViT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.models.archs import arch
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import model_macs, teacher_macs
from asvit_deploy.reduction.base import Reduction

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


def relative_macs(
    config: ArchConfig, lengths: Sequence[Tensor], reduction: Reduction | None = None
) -> Tensor:
    """MACs of each image as a fraction of the teacher's, float32 [B]; differentiable.

    Args:
        lengths: rows in use behind each cut, float32 [B].
        reduction: whose cuts they are, and whose own MACs count too; by default the cuts lie before
            the blocks of the architecture's stages.
    """
    return model_macs(config, lengths, reduction) / teacher_macs(config)


def mean_macs(macs: Tensor, mean: Mean = _alone) -> Tensor:
    """float32 scalar: the mean over the pictures of all processes, with the gradient of one's own.

    Args:
        macs: `relative_macs` of this process's pictures, [B].
    """
    own = macs.mean()
    return own - own.detach() + mean(own.detach())


def flops_loss(macs: Tensor, budget: float) -> Tensor:
    """(10) | mean_b FLOPs(x_b) - t | / teacher, with t = budget * teacher.

    The mean is over the pictures of all processes and stands inside the absolute value: each
    process's gradient is that of its own pictures, with the sign of them all.

    Args:
        macs: `mean_macs`.
    """
    return (macs - budget).abs()


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


def output_distance(config: ArchConfig, student: Tensor, teacher: Tensor) -> Tensor:
    """How far outputs [B, C] are from the teacher's, mean over the pictures: (12) of classes,
    1 - cosine of embeddings, |difference| of a single number."""
    if config.output == "embedding":
        return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()
    if student.shape[1] == 1:
        return (student.float() - teacher.float()).abs().mean()
    return distillation(student, teacher)


def token_distillation(
    student: Tensor, teacher: Tensor, alive: Tensor, mean: Mean = _alone
) -> Tensor:
    """(12), LV-ViT's second part: the same KL over the tokens that the last stage kept.

    Args:
        student, teacher: token logits [B, N, C].
        alive: which count, [B, N], above 0.5 where they do.
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
    """What one forward pass gave.

    Attributes:
        logits: [B, C], or embeddings.
        tokens: token logits [B, M-P, C], or None.
        macs: `mean_macs`; None of a dense network.
        alive: which image rows are in use at the end, [B, M-P]; None: all.
        place: int64 [B, M-P], each row's place among the teacher's image rows, -1 of one that it
            does not have; None: its own.
        terms: what a method adds to the loss.
    """

    logits: Tensor
    tokens: Tensor | None = None
    macs: Tensor | None = None
    alive: Tensor | None = None
    place: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)


def total_loss(
    config: ArchConfig,
    student: Outputs,
    teacher: Outputs | None,
    labels: Tensor | None,
    budget: float | None,
    weights: Weights,
    mean: Mean = _alone,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(13) L = L_ce + w_flops L_flops + w_distill L_distill (+ w_token L_token), and its parts.

    Without labels, a teacher or a budget the parts that need them are left out.

    Args:
        labels: int64 [B], or float32 [B, C] where pictures were mixed; None: there is no L_ce.
        budget: None too where nothing is to be pulled there.
        mean: over all processes.
    """
    logits = student.logits.float()
    parts, weighed = dict[str, Tensor](), list[Tensor]()
    if labels is not None:
        parts["ce"] = F.cross_entropy(logits, labels, label_smoothing=weights.smoothing)  # (11)
        weighed.append(parts["ce"])
    if budget is not None:
        assert student.macs is not None
        parts["flops"] = flops_loss(student.macs, budget)
        weighed.append(weights.flops * parts["flops"])
    if teacher is not None:
        parts["distill"] = output_distance(config, logits, teacher.logits)
        weighed.append(weights.distill * parts["distill"])
        if student.tokens is not None and teacher.tokens is not None:
            parts["token"] = token_distillation(*_beside(student, teacher.tokens), mean)
            weighed.append(weights.token * parts["token"])
    for name, term in student.terms.items():
        parts[name] = term
        weighed.append(term)
    return sum(weighed[1:], weighed[0]), {name: part.detach() for name, part in parts.items()}


def _beside(student: Outputs, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token logits of student and teacher row by row, and which rows count."""
    assert student.tokens is not None
    alive, place = student.alive, student.place
    alive = torch.ones_like(student.tokens[:, :, 0]) if alive is None else alive
    if place is not None:
        teacher = teacher.gather(1, place.clamp_min(0)[:, :, None].expand(-1, -1, teacher.shape[2]))
    elif (added := student.tokens.shape[1] - teacher.shape[1]) > 0:
        # Rows that a method added stand behind those of the input; the teacher has none of them.
        teacher, alive = F.pad(teacher, (0, 0, 0, added)), alive.clone()
        alive[:, -added:] = 0
    return student.tokens, teacher, alive
