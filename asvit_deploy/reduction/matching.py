"""Pairs of similar tokens, the first half of a bipartite merge (ToMe, Bolya et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.reduction.base import Decision, Seen
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


def alternating(rows: Rows, prefix: int, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Image rows at even and at odd places, bool [B, N] each.

    Places are ranks among the rows that are there, so that masked and compacted form agree; or
    among others (bool [B, N]).
    """
    count = rows.batched.shape[1] - prefix
    if rows.keep is None and rows.alive is None and among is None:
        even = torch.arange(count, device=rows.tokens.device) % 2 == 0
        even = even.expand(rows.batched.shape[0], count)
        return even, ~even
    living = rows.living(prefix) if among is None else among
    rank = living.long().cumsum(1)
    return living & (rank % 2 == 1), living & (rank % 2 == 0)


def pairs(rows: Rows, likeness: Tensor, prefix: int, among: Tensor | None = None) -> Pairs:
    """Match even with odd places.

    Args:
        likeness: float32 [B, N, Dh] of length 1.
        among: bool [B, N], the tokens that may pair and whose places count; None: all.
    """
    even, odd = alternating(rows, prefix, among)
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
    return best, which, best - _next(cosine, which, -2.0)


def nearest_staying(decision: Decision, stay: Tensor, prefix: int) -> Decision:
    """The decision in which each row goes to the nearest that stays, by its `nearness`; to what it
    says already where nothing that stays may take the row.

    Args:
        stay: float32 [B, M], 1 or 0.
    """
    assert decision.nearness is not None
    stays = stay[:, None, prefix:] > 0.5
    near = decision.nearness.masked_fill(~stays, -torch.inf)
    best, which = near.max(2)
    own = torch.arange(stay.shape[1], device=stay.device).expand(stay.shape[0], -1)
    into = own if decision.into is None else decision.into
    margin = (best - _next(near, which, -torch.inf)) / best.abs().clamp_min(_SMALL)
    if decision.into_margin is not None:
        margin = torch.where(best > _LOWEST, margin, decision.into_margin)
    found = torch.where(best > _LOWEST, which + prefix, into[:, prefix:])
    found = torch.where(stays[:, 0], own[:, prefix:], found)
    return replace(decision, into=torch.cat([own[:, :prefix], found], 1), into_margin=margin)


_SMALL = 1e-9
# The maximum of nothing but -inf is this number to OpenVINO.
_LOWEST = torch.finfo(torch.float32).min


def _next(values: Tensor, which: Tensor, nothing: float) -> Tensor:
    """The second highest of each row [B, N, N], given where the highest is."""
    places = torch.arange(values.shape[2], device=values.device)
    return values.masked_fill(which[:, :, None] == places, nothing).amax(2)
