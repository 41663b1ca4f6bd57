"""Cases that every implementation of the op must meet, in whatever language: one list of inputs.

What comes out is `reference.threshold_compact`'s, bit for bit. `CASES` is all of them: `EDGES`
(ties, NaN, infinities, one or all tokens kept), `SIZES`, and `PREFIXED`, both behind prefixes of
several rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Case:
    """Inputs of the op.

    Attributes:
        tokens: float32 [B, P+N, D], to be cast to the type under test.
        scores: float32 [B, N].
    """

    name: str
    tokens: NDArray[np.float32]
    scores: NDArray[np.float32]
    threshold: float

    @property
    def prefix(self) -> int:
        """P, the rows in front that never leave."""
        return self.tokens.shape[1] - self.scores.shape[1]


_Change = Callable[[NDArray[np.float32]], None]


def _case(
    name: str, batch: int, rows: int, dim: int, threshold: float, change: _Change | None = None,
    seed: int = 0, prefix: int = 1,
) -> Case:  # fmt: skip
    rng = np.random.default_rng([seed, batch, rows, dim])
    tokens = rng.standard_normal((batch, rows, dim)).astype(np.float32)
    scores = rng.random((batch, rows - prefix)).astype(np.float32)
    if change is not None:
        change(scores)
    return Case(name, tokens, scores, threshold)


def _set(*places: Any, value: float) -> _Change:
    def change(scores: NDArray[np.float32]) -> None:
        for place in places:
            scores[place] = value

    return change


def _mixed(scores: NDArray[np.float32]) -> None:
    """Every special value beside ordinary ones, other ones in each image."""
    special = np.array([np.nan, np.inf, -np.inf, 0.5, -0.0, 1e-40], np.float32)
    for b, row in enumerate(scores):
        for i, value in enumerate(np.roll(special, b)):
            row[(3 * i + b) % len(row)] = value


def _quantised(scores: NDArray[np.float32]) -> None:
    """Many equal scores, some of them equal to the threshold."""
    np.round(scores * 4, out=scores)
    scores /= 4


def _rows(*rows: Any) -> _Change:
    """These scores, row by row."""

    def change(scores: NDArray[np.float32]) -> None:
        scores[:] = rows

    return change


_ALL = np.s_[:]
_LOWEST = np.finfo(np.float32).min
_NAN, _INF = float("nan"), float("inf")

EDGES = [
    _case("plain", 1, 50, 64, 0.5),
    _case("keep_one_of_all", 1, 50, 64, 2.0),
    _case("keep_all", 1, 50, 64, -1.0),
    _case("one_token_kept_by_the_floor", 1, 2, 64, 2.0),
    _case("one_token_above", 1, 2, 64, -1.0),
    _case("all_scores_equal_the_threshold", 2, 20, 64, 0.5, _set(_ALL, value=0.5)),
    _case("ties_on_top_below_the_threshold", 2, 20, 64, 9.0, _set(np.s_[:, 7::3], value=2.0)),
    _case("quantised", 4, 50, 64, 0.5, _quantised),
    _case("nan_first", 1, 20, 64, 9.0, _set(np.s_[:, 0], value=np.nan)),
    _case("all_nan", 2, 20, 64, 0.5, _set(_ALL, value=np.nan)),
    _case("nan_and_minus_inf", 2, 9, 64, 0.5, _set(np.s_[:, ::2], value=np.nan)),
    _case("all_minus_inf", 2, 20, 64, 0.5, _set(_ALL, value=-np.inf)),
    _case("all_plus_inf", 2, 20, 64, 0.5, _set(_ALL, value=np.inf)),
    _case("plus_inf_against_plus_inf", 2, 20, 64, _INF, _set(np.s_[:, 5:8], value=np.inf)),
    _case("minus_inf_against_minus_inf", 2, 20, 64, -_INF, _set(np.s_[:, 5:8], value=-np.inf)),
    _case("threshold_nan", 3, 20, 64, _NAN),
    _case("threshold_nan_scores_nan", 2, 20, 64, _NAN, _set(_ALL, value=np.nan)),
    _case("threshold_plus_inf", 3, 20, 64, _INF),
    _case("threshold_minus_inf", 3, 20, 64, -_INF),
    _case("mixed_specials", 8, 33, 64, 0.3, _mixed),
    _case("nan_before_padding", 1, 5, 64, 0.5, _rows([_NAN, _NAN, -_INF, -_INF])),
    _case("nan_behind_padding", 1, 5, 64, 0.5, _rows([-_INF, -_INF, _NAN, _NAN])),
    _case("negative_nan_before_padding", 1, 5, 64, 0.5,
          _rows(np.copysign([_NAN, _NAN, _INF, _INF], -1))),
    _case("nan_and_padding_in_a_batch", 4, 5, 64, 0.5, _rows(
        [_NAN, _NAN, -_INF, -_INF], [-_INF, _NAN, -_INF, _NAN], [-_INF] * 4,
        [_NAN, _LOWEST, -_INF, _NAN])),
    _case("nan_before_the_lowest_number", 1, 5, 64, 0.5, _rows([_NAN, _LOWEST, _LOWEST, -_INF])),
    _case("nan_behind_the_lowest_number", 1, 5, 64, 0.5, _rows([-_INF, _LOWEST, _NAN, -_INF])),
    _case("nan_before_plus_inf", 1, 5, 64, _INF, _rows([-_INF, _NAN, _INF, _INF])),
    _case("nan_and_padding_against_nan", 2, 4, 64, _NAN, _rows([-_INF, _NAN, _NAN], [-_INF] * 3)),
    _case("nan_and_padding_against_minus_inf", 2, 4, 64, -_INF,
          _rows([-_INF, _NAN, _NAN], [_NAN, _LOWEST, -_INF])),
    _case("zero_threshold_negative_zero", 1, 9, 64, 0.0, _set(_ALL, value=-0.0)),
    _case("threshold_rounded_to_float32", 1, 9, 64, 0.1, _set(_ALL, value=np.float32(0.1))),
]  # fmt: skip

SIZES = [
    _case(f"b{batch}_m{rows}_d{dim}", batch, rows, dim, threshold, seed=1)
    for batch, rows, dim, threshold in [
        (1, 2, 64, 0.5), (1, 3, 192, 0.2), (1, 197, 384, 0.35), (1, 577, 768, 0.5),
        (2, 197, 192, 0.5), (3, 17, 512, 0.9), (4, 100, 384, 0.65), (5, 2, 128, 0.5),
        (8, 197, 64, 0.99), (8, 33, 768, 0.01),
    ]
]  # fmt: skip


def _behind(case: Case, prefix: int) -> Case:
    """The same image tokens behind a longer prefix."""
    images, _, dim = case.tokens.shape
    rng = np.random.default_rng([prefix, images, dim])
    front = rng.standard_normal((images, prefix - case.prefix, dim)).astype(np.float32)
    tokens = np.concatenate([front, case.tokens], axis=1)
    return replace(case, name=f"{case.name}_p{prefix}", tokens=tokens)


# Every edge again, and sizes: networks with a distillation token or registers, the shortest that
# there can be, and prefixes of more rows than a warp or a block of the kernel has threads.
PREFIXED = [_behind(case, prefix) for prefix in (2, 5) for case in EDGES] + [
    _case(f"b{batch}_m{rows}_d{dim}_p{prefix}", batch, rows, dim, threshold, None, 1, prefix)
    for batch, rows, dim, threshold, prefix in [
        (1, 3, 64, 0.5, 2), (1, 6, 64, 0.5, 5), (5, 6, 128, 0.5, 5), (1, 198, 384, 0.35, 2),
        (4, 261, 384, 0.65, 5), (8, 201, 64, 0.99, 5), (2, 40, 192, 0.5, 33),
        (1, 40, 192, 2.0, 39), (2, 600, 64, 0.5, 515),
    ]
]  # fmt: skip

CASES = EDGES + SIZES + PREFIXED
