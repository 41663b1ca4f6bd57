"""How rows leave at a cut, the same way for every method: by the op, or by a gather."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asvit_deploy.ops.torch_op import best_places, falling_order, threshold_compact
from asvit_deploy.reduction.base import Decision, Reduction
from asvit_deploy.reduction.rows import Rows, filled


def remove(
    reduction: Reduction, stage: int, rows: Rows, decision: Decision, padded: bool,
    given: Tensor | None = None, keep: Tensor | None = None, into: Tensor | None = None,
) -> tuple[Rows, Removed]:  # fmt: skip
    """Take out what does not stay, once the reduction has combined what it wants to.

    Args:
        padded: whether images that keep fewer are padded, and what pads is hidden from then on.
        given: what stays in place of the decision, of one image: int64 [K], prefix first.
        keep: likewise, bool [B, M-P].
        into: where what leaves goes in place of the decision, int64 [B, M].

    Returns:
        the rows that stay, then appended ones; and what happened.
    """
    before, own = rows.batched.shape[1], given is None and keep is None
    count = reduction.counts(stage, before - reduction.prefix) if own else None
    if given is not None:
        index = given[None]
    elif count is not None:
        index = _highest(decision.score, count, reduction.prefix)
    else:
        return _by_op(reduction, stage, rows, decision, padded, keep, into)
    if reduction.hands_on() and not (reduction.appends and index.shape[1] == before):
        images, kept = index.shape
        nothing = filled(0.0, images, before, index.device)
        stay = nothing.scatter(1, index, filled(1.0, images, kept, index.device))
        rows, decision = combined(reduction, stage, rows, stay, decision, into)
    rows, length = _gathered(rows, index, before)
    return rows, Removed(index, length, decision)


@dataclass(frozen=True)
class Removed:
    """What happened at a cut.

    Attributes:
        index: int64 [B, K] as the op gives it, of rows of the cut's input; where the op removes,
            appended ones are among them, numbered on.
        length: int64 [B], the rows in use from now on.
        decision: the reduction's own, whatever was given in its place.
    """

    index: Tensor
    length: Tensor
    decision: Decision


def combined(
    reduction: Reduction, stage: int, rows: Rows, stay: Tensor, decision: Decision,
    into: Tensor | None = None,
) -> tuple[Rows, Decision]:  # fmt: skip
    """Rows of which those that stay have taken what leaving ones carry, all still there.

    Args:
        stay: float32 [B, M].
        into: as `remove`.
    """
    own = reduction.destined(rows, stay, decision)
    taken = own if into is None else replace(own, into=into)
    return reduction.combine(stage, rows, stay, taken), own


def _highest(score: Tensor, count: int, prefix: int) -> Tensor:
    """int64 [B, P+count]: the prefix and the highest scores, in their order."""
    place = best_places(score, count)
    # Brought into order as float32, which runtimes sort and which is exact for them.
    rising = place.float().topk(count, largest=False).values.long() + prefix
    first = torch.arange(prefix, device=score.device).expand(score.shape[0], -1)
    return torch.cat([first, rising], 1)


def _gathered(rows: Rows, index: Tensor, before: int) -> tuple[Rows, Tensor]:
    tokens, taken = rows.batched, index
    if (added := tokens.shape[1] - before) > 0:
        last = torch.arange(before, before + added, device=index.device)
        taken = torch.cat([index, last.expand(index.shape[0], -1)], 1)
    if taken.shape[0] == 1:
        tokens = tokens[:, taken[0]]
    else:
        tokens = tokens.gather(1, taken.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
    length = torch.full_like(taken[:, 0], taken.shape[1])
    return _side_rows(rows, tokens, taken), length


def _by_op(
    reduction: Reduction, stage: int, rows: Rows, decision: Decision, padded: bool,
    keep: Tensor | None, into: Tensor | None,
) -> tuple[Rows, Removed]:  # fmt: skip
    score, boundary = decision.score, decision.boundary
    if keep is not None:
        score = torch.where(keep, 1.0, -torch.inf)
        boundary = score.new_tensor(0.0)
    assert boundary is not None
    rows, decision, score = before_op(reduction, stage, rows, decision, score, boundary, into)
    compact, index, length, _ = threshold_compact(rows.batched, score, boundary)
    rows = replace(_side_rows(rows, compact, index), alive=index >= 0 if padded else None)
    return rows, Removed(index, length, decision)


def before_op(
    reduction: Reduction, stage: int, rows: Rows, decision: Decision, score: Tensor,
    boundary: Tensor, into: Tensor | None = None,
) -> tuple[Rows, Decision, Tensor]:  # fmt: skip
    """What the op is given: rows that have handed on what they carry, and the scores of all.

    Args:
        score, boundary: what decides, float32 [B, M-P] and scalar.
        into: as `remove`.

    Returns:
        the rows, appended ones too; the decision with what `destined` says; and the scores.
    """
    if not reduction.hands_on():
        return rows, decision, score
    images, device = score.shape[0], score.device
    stays = _passing(score, boundary) & rows.living(reduction.prefix)
    first = filled(1.0, images, reduction.prefix, device)
    stay = torch.cat([first, stays.float()], 1)
    leaves = (rows.leaving(stay, reduction.prefix) > 0.5).any(1, keepdim=True)
    rows, decision = combined(reduction, stage, rows, stay, decision, into)
    if reduction.appends:
        # The best stays even where it is not above the boundary: what is added outdoes it.
        score = torch.where(stays, torch.inf, score)
        # Where nothing leaves, what is added stands for nothing and goes at once.
        added = torch.where(leaves, torch.inf, -torch.inf).expand(images, reduction.appends)
        score = torch.cat([score, added], 1)
    return rows, decision, score


def _passing(score: Tensor, boundary: Tensor) -> Tensor:
    """bool [B, N]: what the op will keep, of scores that are numbers; in few and plain nodes."""
    passes, place = score > boundary, torch.arange(score.shape[1], device=score.device)
    best = score.max(1, keepdim=True).indices
    return passes | (~passes.any(1, keepdim=True) & (place == best))


def _side_rows(rows: Rows, tokens: Tensor, index: Tensor) -> Rows:
    """What goes along with the tokens, by the index."""
    size = None if rows.size is None else rows.size.gather(1, index.clamp_min(0))
    tokens = tokens.squeeze(0) if rows.tokens.dim() == 2 else tokens
    return replace(rows, tokens=tokens, size=size)


def mean_k_keep_mask(scores: Tensor, threshold: Tensor) -> Tensor:
    """The paper's batch rule: every image keeps the top k, k the batch's mean count, at least 1.

    Rows that may not leave (+inf) stay on every image, so k is no less than their number on any.

    An image then depends on its batch mates; use it to reproduce the paper's validation numbers.

    Args:
        scores: float32 [B, N]; number > NaN > -inf, and the first of equals wins.

    Returns:
        bool [B, N] with the same number of True in every row.
    """
    passing = scores > threshold
    count = int(passing.sum()) // scores.shape[0]
    fixed = int((passing & (scores == torch.inf)).sum(1).max())
    top = falling_order(scores)[:, : max(count, fixed, 1)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, top, True)


def compact_masked(tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the image tokens that `keep` (bool [B, N]) leaves out; see `threshold_compact`."""
    scores = torch.where(keep, 1.0, -torch.inf)
    compact, index, length, _ = threshold_compact(tokens, scores, scores.new_tensor(0.0))
    return compact, index, length
