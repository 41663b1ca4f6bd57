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
  rate, K_c = ceil(N / 10) centres and as many matched pairs as there are centres, so that r N stay;
  of equal values the first ranks higher.
No sizes and no bias of the attention: nothing published mentions them.

    (B1) T_att = the ceil(r N) tokens of the highest a = mean over heads of A[cls]; T_in the rest
    (B2) d_ij = |t_i - t_j| / sqrt(D) over T_in
    (B3) rho_i = exp(-mean of the 5 smallest d_ij^2)
    (B4) delta_i = min over j of higher rho of d_ij; the largest d_ij where there is none
    (B5) centres: the K_c highest rho_i delta_i
    (B6) c(i) = the nearest centre
    (B7) centre c becomes sum a_i t_i / sum a_i over its cluster
    (B8) of pairs (i, j), i at an even place of T_att and j its most similar one at an odd place of
         T_att, the K_c most similar merge
    (B9) j becomes (a_i t_i + a_j t_j) / (a_i + a_j), with all that merge into it
    (B10) what goes on: the prefix, T_att without what merged, the centres

Where tokens are few, K_c is at most |T_in| - 1, |T_att| / 2, and at least 1; where one token is to
stay, T_in is all and becomes that one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.ops.torch_op import best_places
from asvit_deploy.reduction.base import Decision, Seen
from asvit_deploy.reduction.matching import nearest_staying, pairs
from asvit_deploy.reduction.rows import Rows, averaged, chosen, filled
from asvit_deploy.reduction.topk import TopK

_NEIGHBOURS = 5
_FAR = 1e6  # farther than any two tokens
_LOW = -1e9  # lower than the logarithm of any rho delta
_LEAST = 1e-9  # of a class attention that weighs, of a distance
_MARGIN = 1e-6  # around a score of 1: equal values on both sides of an edge


class BAT(TopK):
    """The score of a token is how far it is from changing sides: above 1 it stays, below it leaves.

    An attentive token's is a_i over the edge between attentive and inattentive, where its place is
    odd; at an even place also 1 + (the similarity at which pairs stop merging, minus its own); and
    never farther from 1 than a token in front of it is from that edge, which decides whether its
    place is odd. An inattentive token's is 1 and how far it is from becoming a centre, or from
    ceasing to be one. So fixed counts take exactly (B10)'s tokens, and a near tie is one whose
    score is near 1.
    """

    name: ClassVar[str] = "bat"
    adapts: ClassVar[bool] = False

    def parts(self, stage: int, tokens: int) -> tuple[int, int, int]:
        """Attentive tokens, matched pairs and centres, where some of so many tokens leave."""
        kept = self.counts(stage, tokens)
        assert kept is not None
        if kept == 1:
            return 0, 0, 1
        centres = max(1, min(-(-tokens // 10), tokens - kept - 1, kept // 2))
        return kept, centres, centres

    def rank(self, stage: int, rows: Rows, seen: Seen) -> Decision:
        prefix = self.prefix
        a = seen.class_row().mean(1)[:, prefix:]  # (B, N)
        weight = a.clamp_min(_LEAST)
        living = rows.living(prefix)
        x = rows.batched[:, prefix:].float()
        tokens = int(living[0].sum()) if rows.keep is not None else x.shape[1]
        if self.counts(stage, tokens) == tokens:
            # Nothing leaves; where it would go is said as at every cut.
            found = pairs(rows, F.normalize(x, dim=2), prefix)
            return Decision(1 + a, into=found.into, into_margin=found.margin, weight=weight)
        attentive, merging, centres = self.parts(stage, tokens)
        # (B1)
        high, edge = _highest(torch.where(living, a, -1.0), attentive)
        above = a / edge.clamp_min(_LEAST)
        low = living & ~high
        # (B8)
        found = pairs(rows, F.normalize(x, dim=2), prefix, among=high)
        matched, limit = _highest(torch.where(found.paired, found.cosine, -2.0), merging)
        apart = torch.where(found.paired, 1 + (limit - found.cosine), torch.inf)
        # (B2) to (B5)
        peaks = _peaks(x, low, tokens - attentive)
        centre, ridge = _highest(peaks.height, centres)
        doubt = peaks.doubt(ridge, centre)
        other = torch.where(centre, 1 + doubt, torch.maximum(1 - doubt, above))
        score = torch.where(high, torch.minimum(above, apart), other)
        # Places in (B8) are those within T_att: a token that enters or leaves it moves all behind.
        gap = torch.where(living, (above - 1).abs(), _FAR)
        moves = _before(gap)
        score = torch.where(high, torch.minimum(torch.maximum(score, 1 - moves), 1 + moves), score)
        stays = (high & ~matched) | centre
        leaves = score.clamp(_MARGIN, 1 - _MARGIN)
        score = torch.where(stays, score.clamp_min(1 + _MARGIN), leaves)
        # (B6) of those that stay; (B8) of attentive tokens that have a partner
        barred = ~low[:, None, :] | found.paired[:, :, None]
        near = (-peaks.distance).masked_fill(barred, -torch.inf)
        doubted = torch.where(high, torch.minimum(found.margin, moves), found.margin)
        return Decision(score, into=found.into, into_margin=doubted, nearness=near, weight=weight,
                        onward_margin=gap)  # fmt: skip

    def destined(self, rows: Rows, stay: Tensor, decision: Decision) -> Decision:
        assert decision.into is not None
        if decision.nearness is None:
            own = torch.arange(stay.shape[1], device=stay.device).expand_as(decision.into)
            return replace(decision, into=torch.where(stay > 0.5, own, decision.into))
        found = nearest_staying(decision, stay, self.prefix)
        # A token that stays as attentive or as a centre, by a hair, takes others or does not.
        assert found.into_margin is not None
        assert found.onward_margin is not None
        hair = found.onward_margin.amin(1, keepdim=True)
        return replace(found, into_margin=torch.minimum(found.into_margin, hair))

    def combine(self, stage: int, rows: Rows, stay: Tensor, decision: Decision) -> Rows:
        assert decision.into is not None
        assert decision.weight is not None
        one = filled(1.0, rows.batched.shape[0], self.prefix, rows.tokens.device)
        weight = torch.cat([one, decision.weight], 1)
        return averaged(rows, decision.into, rows.leaving(stay, self.prefix), weight)


def _before(values: Tensor) -> Tensor:
    """The smallest value at the places before each, `_FAR` at the first; [B, N]."""
    place = torch.arange(values.shape[1], device=values.device)
    return torch.where(place < place[:, None], values[:, None, :], _FAR).amin(2)


def _highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest, the first of equals, bool [B, N]; and the middle between the last of
    them and the next, [B, 1].
    """
    best = best_places(values, count + 1)
    at_edge = values.gather(1, best[:, max(count - 1, 0) :]).mean(1, keepdim=True)
    if count == 0:
        return values > torch.inf, at_edge
    return chosen(values, count), at_edge


@dataclass(frozen=True)
class _Peaks:
    """(B2) to (B4).

    Attributes:
        distance: d [B, N, N] between any two tokens.
        rho: its logarithm [B, N]: far tokens' own would all be 0.
        delta: [B, N].
        height: log(rho delta) [B, N], lowest of tokens that are not among those to cluster.
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
        share = _more(self.rho[:, None, :] - self.rho[:, :, None]).abs()
        nearer = self.distance < self.delta[:, :, None]
        fall = torch.where(self.behind & nearer, share, _FAR).amin(2)
        within = _logarithm(self.distance) + self.rho[:, :, None] < ridge[:, :, None]
        rise = torch.where(self.ahead & within, share, 0.0).amax(2)
        over = _more(self.height - ridge)
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
    place = torch.arange(x.shape[1], device=x.device)
    # Exactly 0 from itself: of two tokens alone the densities are equal then, and the first wins.
    squared = squared.masked_fill(place == place[:, None], 0)
    within = torch.where(both, squared, _FAR)
    # A token is its own nearest neighbour, as where this clustering is used elsewhere.
    near = within.topk(min(_NEIGHBOURS, count), largest=False).values
    rho = -near.mean(2)
    # Of equal densities the first ranks higher, so that no two tokens wait for each other.
    mine, other = rho[:, :, None], rho[:, None, :]
    ahead = both & ((other > mine) | ((other == mine) & (place < place[:, None])))
    behind = both & ~ahead & (place != place[:, None])
    distance = squared.sqrt()
    above = torch.where(ahead, distance, _FAR).amin(2)
    farthest = torch.where(both, distance, 0.0).amax(2)
    delta = torch.where(above < _FAR, above, farthest)
    height = torch.where(among, rho + _logarithm(delta), _LOW)
    return _Peaks(distance, rho, delta, height, ahead, behind)


def _logarithm(distance: Tensor) -> Tensor:
    return distance.clamp_min(_LEAST).log()


def _more(logarithm: Tensor) -> Tensor:
    """By what share one value is above another, from the difference of their logarithms."""
    return logarithm.clamp(-30, 30).exp() - 1
