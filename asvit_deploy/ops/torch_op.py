"""`asvit::threshold_compact`: the op in PyTorch, eager and traceable by torch.export."""

from __future__ import annotations

import torch
from torch import Tensor

from asvit_deploy.ops.reference import prefix_rows

NAME = "asvit::threshold_compact"


def keep_mask(scores: Tensor, threshold: Tensor | float) -> Tensor:
    """bool [B, N]: `score > threshold`, and always the best score (see `reference.keep_mask`)."""
    # number > NaN > -inf. A NaN becomes the lowest finite number, and what equals the top is raised
    # above all, which a NaN never does: it loses against a true lowest number too.
    lowest = torch.finfo(scores.dtype).min
    number = scores.nan_to_num(nan=lowest, posinf=torch.inf, neginf=-torch.inf)
    top = number.amax(1, keepdim=True)
    best = number.masked_fill(scores == top, torch.inf).argmax(1, keepdim=True)
    return (scores > threshold).scatter(1, best, True)


def falling_order(scores: Tensor) -> Tensor:
    """int64 [B, N]: places from the best score to the worst, the first of equals first.

    The op's order: numbers, then NaN, then -inf.
    """
    nan = scores.isnan()
    kind = nan + 2 * (scores == -torch.inf).to(torch.uint8)
    falling = scores.masked_fill(nan, 0).argsort(dim=1, descending=True, stable=True)
    return falling.gather(1, kind.gather(1, falling).argsort(dim=1, stable=True))


def best_places(scores: Tensor, count: int) -> Tensor:
    """int64 [B, count]: places of the highest scores, the first of equals first.

    In a graph by a top-k, which takes the first of equals there; PyTorch's own takes any.
    """
    if torch.compiler.is_exporting():
        return scores.topk(count).indices
    return falling_order(scores)[:, :count]


@torch.library.custom_op(NAME, mutates_args=())
def threshold_compact(
    tokens: Tensor, scores: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep the prefix and every image token whose score exceeds the threshold.

    Args:
        tokens: T [B, M, D], P prefix rows (class token first), then the image tokens.
        scores: float32 [B, M-P]: P follows from the shapes.
        threshold: float32 scalar.

    Returns:
        compact T [B, P+K, D] (zero rows at the tail), index int64 [B, P+K] (-1 at the tail),
        length int64 [B] and size int64 [], its maximum.

    Raises:
        ValueError: an empty batch, no prefix, no image token, or shapes that do not fit.
    """
    prefix = prefix_rows(tokens.shape, scores.shape)
    keep = torch.nn.functional.pad(keep_mask(scores, threshold), (prefix, 0), value=True)  # (B, M)
    length = keep.sum(1)
    if tokens.shape[0] == 1:
        index = keep[0].nonzero().t()
        return tokens[:, index[0]], index, length, length.amax()
    size = length.amax()
    # A stable sort of "dropped" brings the kept rows to the front in their own order.
    index = (~keep).to(torch.uint8).sort(dim=1, stable=True).indices[:, :size]
    valid = torch.arange(index.shape[1], device=index.device) < length[:, None]
    rows = index.unsqueeze(2).expand(-1, -1, tokens.shape[2])
    compact = tokens.gather(1, rows).masked_fill(~valid.unsqueeze(2), 0)
    return compact, index.masked_fill(~valid, -1), length, size


@threshold_compact.register_fake
def _(tokens: Tensor, scores: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
    batch, rows, dim = tokens.shape
    # A number where the difference of symbols is one, as where both come of one count of rows.
    prefix = rows - scores.shape[1]
    known = prefix if isinstance(prefix, int) else prefix.node.maybe_as_int()
    if known is not None and known < 1:
        prefix_rows(tokens.shape, scores.shape)  # says why not
    # The prefix and one image token.
    size = torch.library.get_ctx().new_dynamic_size(min=2 if known is None else known + 1)
    torch._check(size <= rows)
    int64 = torch.int64
    return (
        tokens.new_empty(batch, size, dim),
        tokens.new_empty(batch, size, dtype=int64),
        tokens.new_empty(batch, dtype=int64),
        tokens.new_empty((), dtype=int64),
    )
