"""`asvit::ThresholdCompact` in numpy: the contract, and the oracle of every other form.

The contract in words stands in `plugins/README.md`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Compacted(NamedTuple):
    """Outputs of the op; T is the type of `tokens`, 1+K the most rows any image keeps."""

    compact: NDArray  # T [B, 1+K, D]: class token, kept tokens in order, zero rows
    index: NDArray[np.int64]  # type: ignore[assignment]  # [B, 1+K]: source row in `tokens`, -1 where the row is zero
    length: NDArray[np.int64]  # [B]: rows in use, class token included
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


def threshold_compact(tokens: NDArray, scores: NDArray[np.float32], threshold: float) -> Compacted:
    """Keep the class token and every image token above the threshold (Eq. 8 of AS-ViT).

    Args:
        tokens: T [B, M, D], class token in row 0.
        scores: float32 [B, M-1], one per image token.
        threshold: scalar.

    Raises:
        ValueError: shapes that do not fit, an empty batch, or no image token at all.
    """
    if tokens.ndim != 3 or scores.shape != (tokens.shape[0], tokens.shape[1] - 1):
        raise ValueError(f"tokens {tokens.shape} and scores {scores.shape} do not fit")
    if tokens.shape[0] == 0 or scores.shape[1] == 0:
        raise ValueError(f"nothing to compact in tokens {tokens.shape}")
    keep = keep_mask(scores, threshold)
    length = 1 + keep.sum(axis=1).astype(np.int64)
    size = int(length.max())
    compact = np.zeros((tokens.shape[0], size, tokens.shape[2]), tokens.dtype)
    index = np.full((tokens.shape[0], size), -1, np.int64)
    for b, count in enumerate(length):
        rows = np.concatenate([[0], 1 + np.flatnonzero(keep[b])])
        compact[b, :count] = tokens[b, rows]
        index[b, :count] = rows
    return Compacted(compact, index, length, np.asarray(size, np.int64))
