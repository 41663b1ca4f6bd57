"""Head-weighted class attention: how much an image token matters (Eq. 5-7 of AS-ViT)."""

from __future__ import annotations

import torch
from torch import Tensor

# The released code adds this to the denominator of Eq. 6.
_EPS = 1e-8


def token_scores(class_attention: Tensor, context: Tensor, prefix: int = 1) -> Tensor:
    """S = sum_h R * A_cls with R the share of head h in a token's context norm.

        (5) Hd = |ctx|_2    (6) R = Hd / sum_h Hd    (7) S = sum_h R * A[:, :, 0, P:]

    Args:
        class_attention: float32 [B, H, M], softmax row of the class token over all tokens.
        context: T [B, H, M, Dh], attention output of each head before the projection.
        prefix: P.

    Returns:
        float32 [B, M-P]; sums to at most 1 per image, about 1/M each.
    """
    # The prefix' columns are computed too and cut last: one small slice instead of two large.
    norm = torch.linalg.vector_norm(context.float(), dim=3)  # (B, H, M)
    share = norm / (norm.sum(1, keepdim=True) + _EPS)
    return (share * class_attention).sum(1)[:, prefix:]


def class_attention_row(
    query: Tensor, key: Tensor, key_mask: Tensor | None, bias: Tensor | None = None
) -> Tensor:
    """float32 [B, H, M]: softmax(q_cls K^T / sqrt(Dh)), the one row that scoring needs.

    Computed beside a fused attention, which never shows its weights. Always in float32: scores
    near 0.002 have a spacing of 1e-3 relative in half precision.

    Args:
        query, key: T [B, H, M, Dh].
        key_mask: bool [B, M], False where the row only pads the batch, or None.
        bias: float32 [B, 1, 1, M], added to the logits.
    """
    scale = key.shape[3] ** -0.5
    logits = (query[:, :, 0:1].float() * scale) @ key.float().transpose(2, 3)  # (B, H, 1, M)
    logits = logits if bias is None else logits + bias
    if key_mask is not None:
        logits = logits.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return logits.softmax(3).squeeze(2)
