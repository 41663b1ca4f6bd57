"""Attention over packed rows: each picture's queries meet its own keys, and no row pads them.

In PyTorch an operator: picture by picture on a CPU, in one call on a GPU. In a graph it is the
nodes of `exporting.ragged`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "asvit::ragged_attention"
_HALF = (torch.float16, torch.bfloat16)


@torch.library.custom_op(NAME, mutates_args=())
def ragged_attention(
    qkv: Tensor, length: Tensor, heads: int, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """softmax(Q K^T / sqrt(Dh) + bias) V of every picture by itself.

    Args:
        qkv: T [T, 3 H Dh], the pictures' rows one behind another: queries, keys, values.
        length: int64 [B], rows of each, at least one; their sum is T.
        heads: H.
        bias: float32 [T], added to the logits of each key; None: nothing.

    Returns:
        T [T, H Dh].
    """
    rows = qkv.unflatten(1, (3, heads, -1))
    if not qkv.is_cuda:
        return by_picture(rows, length, bias)
    varlen = _varlen() if bias is None and qkv.dtype in _HALF else None
    return padded(rows, length, bias) if varlen is None else varlen(rows, length)


@ragged_attention.register_fake
def _(qkv: Tensor, length: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


def by_picture(rows: Tensor, length: Tensor, bias: Tensor | None) -> Tensor:
    """As `ragged_attention` of T [T, 3, H, Dh], one call for each picture."""
    query, key, value = rows.permute(1, 2, 0, 3)[:, None]  # each (1, H, T, Dh)
    made = torch.empty_like(rows[:, 0], memory_format=torch.contiguous_format)
    first = 0
    for count in length.tolist():
        one = slice(first, first := first + count)
        own = None if bias is None else bias[one].to(rows.dtype)[None, None, None]
        context = F.scaled_dot_product_attention(
            query[:, :, one], key[:, :, one], value[:, :, one], attn_mask=own
        )
        made[one] = context[0].transpose(0, 1)
    return made.flatten(1)


def padded(rows: Tensor, length: Tensor, bias: Tensor | None) -> Tensor:
    """As `by_picture`, in one call over pictures of which all are as long as the longest."""
    column = torch.arange(int(length.max()), device=length.device)
    real, start = column < length[:, None], (length.cumsum(0) - length)[:, None]
    # A place that only pads holds its picture's first row: never numbers of another picture.
    place = start + torch.where(real, column, 0)
    query, key, value = rows[place].permute(2, 0, 3, 1, 4)  # each (B, H, M, Dh)
    added = torch.where(real, 0.0, -torch.inf)
    added = added if bias is None else added + bias[place]
    mask = added[:, None, None].to(rows.dtype)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return context.transpose(1, 2)[real].flatten(1)


def _varlen() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Flash attention over rows of any lengths, where this PyTorch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    def attend(rows: Tensor, length: Tensor) -> Tensor:
        ends = F.pad(length.cumsum(0), (1, 0)).int()
        query, key, value = rows.unbind(1)
        most = int(length.max())
        made = varlen_attn(query, key, value, ends, ends, most, most)
        assert isinstance(made, Tensor)  # a pair where more is asked for
        return made.flatten(1)

    return attend
