"""`asvit::ThresholdCompact` in numpy: the contract, and the oracle of every other form.

The contract in words stands in `plugins/README.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Compacted(NamedTuple):
    """Outputs of the op; T is the type of `tokens`, P+K the most rows any image keeps."""

    compact: NDArray  # T [B, P+K, D]: prefix, kept tokens in order, zero rows
    index: NDArray[np.int64]  # type: ignore[assignment]  # [B, P+K]: source row in `tokens`, -1 where the row is zero
    length: NDArray[np.int64]  # [B]: rows in use, prefix included
    size: NDArray[np.int64]  # scalar: max(length)


def keep_mask(scores: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Which image tokens stay: `score > threshold`, and always the best one.

    The best is the highest score, the lowest index on a tie, in the order number > NaN > -inf:
    rows that only pad carry -inf, and one of them stays only where every score is -inf.

    Args:
        scores: float32 [B, N].
        threshold: compared strictly, in float32.
    """
    nan = np.isnan(scores)
    number = np.where(nan, -np.inf, scores)
    # argmax is the first of equals: where there is no number, the first NaN, or place 0.
    best = np.where(number.max(axis=1) > -np.inf, number.argmax(axis=1), nan.argmax(axis=1))
    with np.errstate(invalid="ignore"):
        keep = scores > np.float32(threshold)
    keep[np.arange(len(keep)), best] = True
    return keep


def prefix_rows(tokens: Sequence[int], scores: Sequence[int]) -> int:
    """P: how many rows at the front of tokens [B, M, D] always stay, given scores [B, M-P].

    Args:
        tokens: the shape of the tokens.
        scores: the shape of the scores.

    Raises:
        ValueError: shapes that do not fit, no prefix, an empty batch, or no image token at all.
    """
    given = f"tokens {tuple(tokens)} and scores {tuple(scores)}"
    if len(tokens) != 3 or len(scores) != 2 or tokens[0] != scores[0]:
        raise ValueError(f"{given} do not fit: they must be [B, M, D] and [B, M-P]")
    if scores[1] >= tokens[1] > 0:
        raise ValueError(f"{given} do not fit: at least one row must come before the image tokens")
    if tokens[0] == 0 or scores[1] == 0 or tokens[1] == 0:
        raise ValueError(f"nothing to compact in {given}: no image, or no image token")
    return tokens[1] - scores[1]


def threshold_compact(tokens: NDArray, scores: NDArray[np.float32], threshold: float) -> Compacted:
    """Keep the prefix and every image token above the threshold (Eq. 8 of AS-ViT).

    Args:
        tokens: T [B, M, D], P prefix rows (class token first), then the image tokens.
        scores: float32 [B, M-P], one per image token: P follows from the shapes.
        threshold: scalar.

    Raises:
        ValueError: as `prefix_rows`.
    """
    prefix = prefix_rows(tokens.shape, scores.shape)
    keep = keep_mask(scores, threshold)
    length = prefix + keep.sum(axis=1).astype(np.int64)
    size = int(length.max())
    compact = np.zeros((tokens.shape[0], size, tokens.shape[2]), tokens.dtype)
    index = np.full((tokens.shape[0], size), -1, np.int64)
    for b, count in enumerate(length):
        rows = np.concatenate([np.arange(prefix), prefix + np.flatnonzero(keep[b])])
        compact[b, :count] = tokens[b, rows]
        index[b, :count] = rows
    return Compacted(compact, index, length, np.asarray(size, np.int64))
