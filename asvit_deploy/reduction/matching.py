"""Pairs of similar tokens, the first half of a bipartite merge (ToMe, Bolya et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.reduction.base import Seen
from asvit_deploy.reduction.rows import Rows


@dataclass(frozen=True)
class Pairs:
    """Each image token at an even place and the most similar one at an odd place.

    Attributes:
        cosine: float32 [B, N], the similarity of the pair.
        paired: bool [B, N], whether the token is at an even place and has a partner.
        into: int64 [B, M], the partner's row; of all others their own.
        margin: float32 [B, N], by how much the partner is more similar than the next one.
    """

    cosine: Tensor
    paired: Tensor
    into: Tensor
    margin: Tensor


def likeness(seen: Seen, prefix: int) -> Tensor:
    """float32 [B, N, Dh] of length 1: a token's key, mean over heads."""
    return F.normalize(seen.key[:, :, prefix:].float().mean(1), dim=2)


def alternating(rows: Rows, prefix: int) -> tuple[Tensor, Tensor]:
    """Image rows at even and at odd places, bool [B, N] each.

    Places are ranks among the rows that are there, so that masked and compacted form agree.
    """
    count = rows.batched.shape[1] - prefix
    if rows.keep is None and rows.alive is None:
        even = torch.arange(count, device=rows.tokens.device) % 2 == 0
        even = even.expand(rows.batched.shape[0], count)
        return even, ~even
    living = rows.living(prefix)
    rank = living.long().cumsum(1)
    return living & (rank % 2 == 1), living & (rank % 2 == 0)


def pairs(rows: Rows, likeness: Tensor, prefix: int, among: Tensor | None = None) -> Pairs:
    """Match even with odd places.

    Args:
        likeness: float32 [B, N, Dh] of length 1.
        among: bool [B, N], the tokens that may pair; None: all.
    """
    even, odd = alternating(rows, prefix)
    if among is not None:
        even, odd = even & among, odd & among
    own = torch.arange(rows.batched.shape[1], device=even.device).expand(even.shape[0], -1)
    best, into, margin = most_similar(likeness, odd)
    paired = even & (best > _NONE)
    into = torch.where(paired, into + prefix, own[:, prefix:])
    return Pairs(best, paired, torch.cat([own[:, :prefix], into], 1), margin)


_NONE = -1.5  # no cosine is that low


def most_similar(likeness: Tensor, among: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each token the most similar one among some, the first of equals.

    Args:
        likeness: float32 [B, N, Dh] of length 1.
        among: bool [B, N].

    Returns:
        the cosine, float32 [B, N], -2 where there is none; which, int64 [B, N]; and by how much it
        is more similar than the next.
    """
    cosine = (likeness @ likeness.transpose(1, 2)).masked_fill(~among[:, None, :], -2.0)
    best, which = cosine.max(2)
    places = torch.arange(cosine.shape[2], device=cosine.device)
    others = cosine.masked_fill(which[:, :, None] == places, -2.0)
    return best, which, best - others.amax(2)
