"""BAT, "Beyond Attentive Tokens" (Long et al., CVPR 2023, arXiv 2211.11315), a clean-room form.

What is known of it, and how:
- published (abstract, figures, README): tokens are decoupled by class attention into attentive and
  inattentive ones, between the attention's residual and the MLP; similar attentive tokens are
  matched and merged, inattentive ones are clustered, each cluster becomes one token; the class
  token takes no part; unmatched attentive tokens go on as they are;
- second-hand (works that build on it): the attentive are the top ceil(eta N) (B1); the clustering
  is by density peaks, density (B3), separation (B4), centres by their product (B5);
- inferred here: (B2) with the k = 5 neighbours of the usual density-peak clustering of tokens; (B6)
  a token joins its nearest centre; (B7), (B9) means weighted by class attention; (B8) the match is
  bipartite over alternating places with cosine similarity; (B10) the numbers: eta = r, the keep
  rate, K_c = ceil(N / 10) centres and as many matched pairs as there are centres, so that r N stay.
No sizes and no bias of the attention: nothing published mentions them.

    (B1) T_att = the ceil(r N) tokens of the highest a = mean over heads of A[cls]; T_in the rest
    (B2) d_ij = |t_i - t_j| / sqrt(D) over T_in
    (B3) rho_i = exp(-mean of the 5 smallest d_ij^2)
    (B4) delta_i = min over j of higher rho of d_ij; the largest d_ij where there is none
    (B5) centres: the K_c highest rho_i delta_i
    (B6) c(i) = the nearest centre
    (B7) centre c becomes sum a_i t_i / sum a_i over its cluster
    (B8) of pairs (i, j), i of T_att at an even place and j its most similar one at an odd place,
         the K_c most similar merge
    (B9) j becomes (a_i t_i + a_j t_j) / (a_i + a_j), with all that merge into it
    (B10) what goes on: the prefix, T_att without what merged, the centres
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.reduction.base import Decision, Seen
from asvit_deploy.reduction.matching import nearest_staying, pairs
from asvit_deploy.reduction.rows import Rows, averaged, filled
from asvit_deploy.reduction.topk import TopK

_NEIGHBOURS = 5
_FAR = 1e6  # farther than any two tokens
_LEAST = 1e-9  # of a class attention that weighs


class BAT(TopK):
    """The score of a token is how far it is from changing sides: above 1 it stays, below it leaves.

    An attentive token's is a_i over the edge between attentive and inattentive, where its place is
    odd; at an even place also 1 + (the similarity at which pairs stop merging, minus its own). An
    inattentive token's is 1 and how far it is from becoming a centre, or from ceasing to be one. So
    fixed counts take exactly (B10)'s tokens, and a near tie is one whose score is near 1.
    """

    name: ClassVar[str] = "bat"
    adapts: ClassVar[bool] = False

    def parts(self, stage: int, tokens: int) -> tuple[int, int]:
        """Centres, which are as many as matched pairs, and attentive tokens."""
        kept = self.counts(stage, tokens)
        assert kept is not None
        inattentive = tokens - kept
        # A lone inattentive token is its own cluster; one attentive token has none to match.
        return max(1, min(-(-tokens // 10), inattentive - 1, kept // 2)), kept

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        prefix = self.prefix
        a = seen.class_row().mean(1)[:, prefix:]  # (B, N)
        living = rows.living(prefix)
        x = rows.batched[:, prefix:].float()
        tokens = int(living[0].sum()) if rows.keep is not None else x.shape[1]
        centres, attentive = self.parts(stage, tokens)
        weight = torch.cat([filled(1.0, len(a), prefix, a.device), a.clamp_min(_LEAST)], 1)
        own = torch.arange(prefix + a.shape[1], device=a.device).expand(len(a), -1)
        if attentive == tokens:
            return Decision(1 + a, into=own, weight=weight)
        ranked = torch.where(living, a, -1.0)
        edge = _edge(ranked, attentive)
        high = ranked > edge
        low = living & ~high
        # (B8)
        found = pairs(rows, F.normalize(x, dim=2), prefix, among=high)
        cosine = torch.where(found.paired, found.cosine, -2.0)
        limit = _edge(cosine, centres)
        # (B2) to (B5)
        peaks = _peaks(x, low, tokens - attentive)
        ridge = _edge(peaks.height, centres)
        centre = low & (peaks.height > ridge)
        doubt = peaks.doubt(ridge, centre)
        score = torch.where(
            high,
            torch.where(found.paired, torch.minimum(a / edge, 1 + (limit - cosine)), a / edge),
            torch.where(centre, 1 + doubt, torch.maximum(1 - doubt, a / edge)),
        )
        # (B6) of those that stay; (B8) of attentive tokens that have a partner
        other = ~low[:, None, :] | found.paired[:, :, None]
        near = (-peaks.distance).masked_fill(other, -torch.inf)
        return Decision(score, into=found.into, into_margin=found.margin, nearness=near,
                        weight=weight)  # fmt: skip

    def destined(self, rows: Rows, stay: Tensor, decision: Decision) -> Decision:
        if decision.nearness is None:
            return decision
        return nearest_staying(decision, stay, self.prefix)

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        assert decision.into is not None
        assert decision.weight is not None
        return averaged(rows, decision.into, rows.leaving(stay, self.prefix), decision.weight)


def _edge(values: Tensor, count: int) -> Tensor:
    """The middle between the `count`-th highest and the next: float32 [B, 1]."""
    return values.topk(count + 1).values[:, count - 1 :].mean(1, keepdim=True)


@dataclass(frozen=True)
class _Peaks:
    """(B2) to (B4).

    Attributes:
        distance: d [B, N, N] between any two tokens.
        rho: [B, N].
        delta: [B, N].
        height: rho delta [B, N], -1 of tokens that are not among those to cluster.
        ahead: bool [B, N, N], whether the second has the higher rho of two that are among them.
        behind: likewise, the lower.
    """

    distance: Tensor
    rho: Tensor
    delta: Tensor
    height: Tensor
    ahead: Tensor
    behind: Tensor

    def doubt(self, ridge: Tensor, centre: Tensor) -> Tensor:
        """How far a token is from becoming a centre, or from ceasing to be one; [B, N], above 0.

        Heights change as values do, and in leaps where two rho change places: a centre falls when
        a near token overtakes it, another rises when it overtakes all that are near. So the doubt
        is the smaller of the height's share of the ridge and of rho's share of its rival's.
        """
        ridge, rho = ridge.clamp_min(_LEAST), self.rho.clamp_min(_LEAST)
        share = (self.rho[:, None, :] / rho[:, :, None] - 1).abs()
        nearer = self.distance < self.delta[:, :, None]
        fall = torch.where(self.behind & nearer, share, _FAR).amin(2)
        within = self.distance * rho[:, :, None] < ridge[:, :, None]
        rise = torch.where(self.ahead & within, share, 0.0).amax(2)
        over = self.height / ridge - 1
        doubt = torch.where(centre, torch.minimum(over, fall), torch.minimum(-over, rise))
        return doubt.clamp_min(0)


def _peaks(x: Tensor, among: Tensor, count: int) -> _Peaks:
    """Density peaks.

    Args:
        x: float32 [B, N, D].
        among: bool [B, N], the tokens to cluster.
        count: how many they are.
    """
    square = (x * x).sum(2)
    product = x @ x.transpose(1, 2)
    squared = (square[:, :, None] + square[:, None, :] - 2 * product).clamp_min(0) / x.shape[2]
    both = among[:, :, None] & among[:, None, :]
    within = torch.where(both, squared, _FAR)
    # A token is its own nearest neighbour, as where this clustering is used elsewhere.
    near = within.topk(min(_NEIGHBOURS, count), largest=False).values
    rho = (-near.mean(2)).exp()
    place = torch.arange(x.shape[1], device=x.device)
    # Of equal densities the first ranks higher, so that no two tokens wait for each other.
    mine, other = rho[:, :, None], rho[:, None, :]
    ahead = both & ((other > mine) | ((other == mine) & (place < place[:, None])))
    behind = both & ~ahead & (place != place[:, None])
    distance = squared.sqrt()
    above = torch.where(ahead, distance, _FAR).amin(2)
    farthest = torch.where(both, distance, 0.0).amax(2)
    delta = torch.where(above < _FAR, above, farthest)
    return _Peaks(distance, rho, delta, torch.where(among, rho * delta, -1.0), ahead, behind)
