"""Attention in which dropped rows stay in place and are hidden, differentiably."""

from __future__ import annotations

import torch
from torch import Tensor


class _MaskedSoftmax(torch.autograd.Function):
    """Softmax of a factor times an exponential, w_j exp(l_ij), differentiable in w at w = 0 too.

    Written out because autograd's version of it costs three times the memory traffic.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
        dropped = keep[:, None, None, :] < 0.5
        if logits.shape[2] == logits.shape[3]:
            own = torch.eye(logits.shape[3], dtype=torch.bool, device=logits.device)
            dropped = dropped & ~own  # (B, 1, M, M)
        masked = logits.masked_fill(dropped, -torch.inf)
        weights = masked.softmax(3)
        ctx.save_for_backward(logits, masked.logsumexp(3, keepdim=True), weights)
        return weights

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        logits, log_sum, weights = ctx.saved_tensors
        inner = grad - (grad * weights).sum(3, keepdim=True)
        if not ctx.needs_input_grad[1]:
            return inner * weights, None
        # d weights_ij / d w_j; a dropped key may outdo all that are kept, so its share is bounded.
        share = (logits - log_sum).clamp(max=0).exp() * inner
        if logits.shape[2] == logits.shape[3]:
            share.diagonal(dim1=2, dim2=3).zero_()  # a token sees itself whatever the mask says
        return inner * weights, share.sum((1, 2), dtype=torch.float32)


def masked_softmax(logits: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the kept keys and oneself; the mask is a factor, so its gradient lives.

    Args:
        logits: T [B, H, M, M], or [B, H, 1, M] for the class token's row alone.
        keep: float32 [B, M], 1 or 0; the class token's is 1.

    Returns:
        The shape of `logits`, in T; in float32 where autocast on a GPU has its softmax so.
    """
    return _MaskedSoftmax.apply(logits, keep)
