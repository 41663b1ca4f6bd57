"""Which tokens stay: the learned thresholds (Eq. 8-9 of AS-ViT), for training and inference.

Training masks tokens and keeps every shape; inference removes them. With the same weights both
give the same logits, which is the package's free oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from asvit_deploy.ops.torch_op import falling_order, keep_mask, threshold_compact

# T of Eq. 9: how steep the sigmoid is through which the thresholds learn.
TEMPERATURE = 1e4


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


def mean_k_keep_mask(scores: Tensor, threshold: Tensor) -> Tensor:
    """The paper's batch rule: every image keeps the top k, k the batch's mean count, at least 1.

    An image then depends on its batch mates; use it to reproduce the paper's validation numbers.

    Args:
        scores: float32 [B, N]; number > NaN > -inf, and the first of equals wins.

    Returns:
        bool [B, N] with the same number of True in every row.
    """
    count = int((scores > threshold).sum()) // scores.shape[0]
    top = falling_order(scores)[:, : max(count, 1)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, top, True)


def compact_masked(tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the image tokens that `keep` (bool [B, N]) leaves out; see `threshold_compact`."""
    scores = torch.where(keep, 1.0, -torch.inf)
    compact, index, length, _ = threshold_compact(tokens, scores, scores.new_tensor(0.0))
    return compact, index, length
