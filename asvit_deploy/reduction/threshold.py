"""Which tokens stay: the learned thresholds (Eq. 8-9 of AS-ViT), for training and inference.

Training masks tokens and keeps every shape; inference removes them. With the same weights both
give the same logits, which is the package's free oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from asvit_deploy.ops.torch_op import keep_mask
from asvit_deploy.reduction.base import Decision, Learning, Place, Reduction, Seen
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.scoring import token_scores

# T of Eq. 9: how steep the sigmoid is through which the thresholds learn.
TEMPERATURE = 1e4

# The paper's rate, 2e-5, moves a threshold of 0.002 by one per cent a step. Thresholds keep that
# pace relative to themselves, whatever the weights' rate: trained attention can be so sharp that
# they belong at 1e-4 or below, where steps of 2e-5 would jump, and cross zero.
PACE = 0.01
# Far below any that matters; a checkpoint with a threshold of zero would be refused.
MIN_THRESHOLD = 1e-9

# Where the paper's fine-tuning starts: 0.001, 0.002, 0.003. A fresh adaptive model carries these.
INITIAL_THRESHOLD = 0.001


class Threshold(Reduction):
    """AS-ViT: head-weighted class attention above a learned threshold, before a block."""

    name: ClassVar[str] = "threshold"
    slot: ClassVar[str] = "thresholds"
    place: ClassVar[Place] = "before"
    temperature: ClassVar[float] = TEMPERATURE

    def __init__(self, blocks: Sequence[int], prefix: int = 1) -> None:
        super().__init__(blocks, prefix)
        for stage in range(len(self.blocks)):
            value = torch.tensor(INITIAL_THRESHOLD * (stage + 1))
            self.register_parameter(str(stage), nn.Parameter(value))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, stage: int) -> nn.Parameter:
        return self._parameters[str(range(len(self))[stage])]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (self[stage] for stage in range(len(self)))

    def boundaries(self) -> list[Tensor]:
        return list(self)

    def decide(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        scores = token_scores(seen.class_row(), seen.context, self.prefix)
        return Decision(scores, self[stage])

    def mask(self, stage: int, decision: Decision, alive: Tensor, temperature: float) -> Tensor:
        return soft_keep_mask(decision.score, self[stage], alive, temperature)

    def learning(self) -> list[Learning]:
        return learnt_as_logarithms(list(self))


def learnt_as_logarithms(thresholds: Sequence[nn.Parameter]) -> list[Learning]:
    """How thresholds above 0 learn, whatever the scores' unit."""
    if not thresholds:
        return []
    return [Learning(tuple(thresholds), relative=PACE, least=MIN_THRESHOLD)]


def soft_keep_mask(scores: Tensor, threshold: Tensor, alive: Tensor, temperature: float) -> Tensor:
    """Training form: 0/1 forward, the sigmoid's gradient backward, for scores and threshold.

        (8) M = 1[S > theta]    (9) M~ = sigmoid(T (S - theta))    out = M - stopgrad(M~) + M~

    A NaN, of a score or of the threshold, never passes and has no gradient.

    Args:
        scores: float32 [B, N].
        threshold: float32 scalar.
        alive: float32 [B, N], mask of the stage before; a dropped token never returns.
        temperature: T of Eq. 9.

    Returns:
        float32 [B, N].
    """
    masked = scores.detach().masked_fill(alive.detach() < 0.5, -torch.inf)
    hard = keep_mask(masked, threshold.detach()).float()
    distance = temperature * (scores - threshold)
    soft = torch.sigmoid(distance.masked_fill(distance.isnan(), -torch.inf))
    return alive * (hard - soft.detach() + soft)
