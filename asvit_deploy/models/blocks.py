"""Transformer blocks in two halves, for inference and training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asvit_deploy.models.config import Activation, ArchConfig
from asvit_deploy.ops.ragged import ragged_attention
from asvit_deploy.reduction.base import Seen
from asvit_deploy.reduction.masking import masked_softmax
from asvit_deploy.reduction.rows import Rows


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ArchConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.dim, config.dim)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return by_head(self.qkv(x), 3, self.heads)  # type: ignore[return-value]

    def forward(self, x: Tensor, rows: Rows, masked: bool) -> tuple[Tensor, Callable[[], Seen]]:
        """T of the shape of `x`, the normalised tokens of `rows`, and what was seen.

        `masked` is the training form: keys are weighted by `rows.keep` inside the softmax, where a
        dropped row still attends to itself, so that no row of the softmax is empty.
        """
        if rows.packing is not None:
            return self._packed(x, rows)
        q, k, v = self._heads(x)
        if masked:
            # Not the fused attention: on a CPU its backward pass is three times slower than this.
            logits = (q * k.shape[3] ** -0.5) @ k.transpose(2, 3)  # (B, H, M, M)
            if (bias := rows.bias()) is not None:
                logits = logits + bias.to(logits.dtype)
            weights = logits.softmax(3) if rows.keep is None else masked_softmax(logits, rows.keep)
            context = weights @ v
            out = self.proj(context.transpose(1, 2).flatten(2))
        else:
            mask = _attention_mask(rows, q.dtype)
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out = self.proj(context.transpose(1, 2).reshape(x.shape))
        return out, lambda: Seen(q, k, context, rows, masked)

    def _packed(self, x: Tensor, rows: Rows) -> tuple[Tensor, Callable[[], Seen]]:
        """As `forward`, T [T, D] of several pictures."""
        assert rows.packing is not None
        qkv, packing = self.qkv(x), rows.packing
        if packing.length is None:
            parts = by_head(qkv, 3, self.heads)  # each (1, H, T, Dh)
            q, k, v = (part[0].unflatten(1, (-1, packing.rows)) for part in parts)
            bias = rows.bias()  # (B, 1, 1, M), and here heads come first
            mask = None if bias is None else bias.transpose(0, 1).to(q.dtype)
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (H, B, M, Dh)
            context = context.flatten(1, 2).transpose(0, 1).flatten(1)
        else:
            bias = None if rows.size is None else packing.packed(rows.size.log())
            context = ragged_attention(qkv, packing.length, self.heads, bias)

        def seen() -> Seen:
            q, k, _ = by_head(packing.unpacked(qkv), 3, self.heads)
            (own,) = by_head(packing.unpacked(context), 1, self.heads)
            return Seen(q, k, own, rows.unpacked())

        return self.proj(context), seen

    def of_first(self, x: Tensor, rows: Rows, count: int) -> Tensor:
        """As `forward`, for the first rows alone: T [.., count, D]."""
        query, key_value = self.parted()
        first = replace(rows, tokens=x).first(count)
        (q,) = by_head(_padded(query(first.tokens), first), 1, self.heads)
        k, v = by_head(_padded(key_value(x), rows), 2, self.heads)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=_attention_mask(rows, q.dtype))
        return self.proj(context.transpose(1, 2).reshape(first.tokens.shape))

    def parted(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The layer that makes queries and the one that makes keys and values."""
        weight, bias = self.qkv.weight, self.qkv.bias
        width = weight.shape[1]
        biases = (None, None) if bias is None else (bias[:width], bias[width:])
        return (partial(F.linear, weight=weight[:width], bias=biases[0]),
                partial(F.linear, weight=weight[width:], bias=biases[1]))  # fmt: skip


def by_head(x: Tensor, parts: int, heads: int) -> Sequence[Tensor]:
    """T [B, M, parts H Dh] or [M, ...] -> that many T [B, H, M, Dh]."""
    x = x.unflatten(-1, (parts, heads, -1))
    if x.dim() == 4:  # (M, parts, H, Dh)
        return x.permute(1, 2, 0, 3).chunk(parts)
    return x.permute(2, 0, 3, 1, 4).unbind(0)  # (B, M, parts, H, Dh)


def _padded(x: Tensor, rows: Rows) -> Tensor:
    """T of the rows' own form, or [B, M, X] where they are packed."""
    return x if rows.packing is None else rows.packing.unpacked(x)


def _attention_mask(rows: Rows, dtype: torch.dtype) -> Tensor | None:
    """bool, or T with the sizes' bias; [B, 1, 1, M]."""
    alive = None if rows.alive is None else rows.alive[:, None, None, :]
    bias = rows.bias()
    if bias is None:
        return alive
    return (bias if alive is None else bias.masked_fill(~alive, -torch.inf)).to(dtype)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: ArchConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.dim)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block, in two halves."""

    def __init__(self, config: ArchConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = Mlp(config)
        self.residual = config.residual
        if config.layer_scale:
            self.ls1, self.ls2 = LayerScale(config.dim), LayerScale(config.dim)
        self.layer_scale = config.layer_scale

    def _branch(self, x: Tensor) -> Tensor:
        return x if self.residual == 1 else x * self.residual

    def attend(self, rows: Rows, masked: bool = False) -> tuple[Rows, Callable[[], Seen]]:
        """Norm, attention, residual."""
        out, seen = self.attn(self.norm1(rows.tokens), rows, masked)
        out = self.ls1(out) if self.layer_scale else out
        return replace(rows, tokens=rows.tokens + self._branch(out)), seen

    def attend_first(self, rows: Rows, count: int) -> Rows:
        """As `attend`, of which only the first rows are wanted; the others are gone then."""
        out = self.attn.of_first(self.norm1(rows.tokens), rows, count)
        out = self.ls1(out) if self.layer_scale else out
        first = rows.first(count)
        return replace(first, tokens=first.tokens + self._branch(out))

    def feed(self, rows: Rows) -> Rows:
        """Norm, MLP, residual."""
        out = self.mlp(self.norm2(rows.tokens))
        out = self.ls2(out) if self.layer_scale else out
        return replace(rows, tokens=rows.tokens + self._branch(out))
