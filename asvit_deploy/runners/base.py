"""What every backend looks like to parity, bench and predict: images in, a prediction out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.errors import UserError

Stages = Sequence[NDArray]


@dataclass(frozen=True)
class Prediction:
    """One batch's result. Token numbers are those of the input: 0-based, class token not counted.

    Attributes:
        output: float32 [B, C], logits or embeddings.
        lengths: per stage int64 [B], rows in use, class token included; empty when dense.
        kept: per stage, per image, the kept image tokens, ascending; None when not recorded.
        scores: per stage, per image, float32 [N], NaN where the token was gone before the stage;
            None when not recorded.
        prefix: P, rows of `lengths` that are no image tokens.
        into: per stage, per image, int64 [N], the token that takes what each carries where it
            leaves, itself where none does, -1 where the token was gone before the stage; None where
            not recorded, or where what leaves is lost.
        into_margin: likewise float32 [N], how far the next best was; the reference's alone.
    """

    output: NDArray[np.float32]
    lengths: list[NDArray[np.int64]]
    kept: list[list[NDArray[np.int64]]] | None = None
    scores: list[list[NDArray[np.float32]]] | None = None
    prefix: int = 1
    into: list[list[NDArray[np.int64]]] | None = None
    into_margin: list[list[NDArray[np.float32]]] | None = None


class Runner(Protocol):
    """A model on a backend.

    `infer` is the bare call that bench times: it returns when the output is there and hands back
    the backend's own outputs. Calling the runner decodes them.
    """

    def infer(self, images: NDArray[np.float32]) -> Any: ...

    def __call__(self, images: NDArray[np.float32]) -> Prediction: ...

    def describe(self) -> dict[str, str]:
        """backend, provider, precision, versions, device."""
        ...


class Reference(Runner, Protocol):
    """A runner that others are judged by: it can take their decisions in place of its own."""

    def replay(
        self, images: NDArray[np.float32], kept: Sequence[NDArray[np.int64]],
        into: Sequence[NDArray[np.int64]] | None = None,
    ) -> Prediction:  # fmt: skip
        """Run one image with given tokens kept.

        Args:
            images: float32 [1, 3, H, W].
            kept: per stage the image tokens that stay, as `Prediction.kept` has them.
            into: per stage where what leaves goes, as `Prediction.into` has it.

        Returns:
            the prediction along that path: its scores are those of this runner.
        """
        ...


class Remembered:
    """A reference that runs each picture once, however many candidates are compared with it."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.replay, self.describe = reference.replay, reference.describe
        self.infer = reference.infer
        self._seen: dict[bytes, Prediction] = {}

    def __call__(self, images: NDArray[np.float32]) -> Prediction:
        key = hashlib.sha256(images.tobytes()).digest()
        if key not in self._seen:
            self._seen[key] = self.reference(images)
        return self._seen[key]


class RunnerBase:
    """The part that all runners share.

    Attributes:
        learns_shapes: a picture that keeps a count not seen before takes longer.
        runs_beside: another thread may call it than the one that made it, while that one runs
            another runner.
    """

    learns_shapes = False
    runs_beside = False

    def infer(self, images: NDArray[np.float32]) -> Any:
        raise NotImplementedError


def require_images(images: NDArray[np.float32]) -> None:
    """Raise UserError for a batch of none."""
    if not len(images):
        raise UserError("a batch of 0 pictures cannot be run; give one or more")


def decode(
    output: NDArray, lengths: Stages, index: Stages, scores: Stages, prefix: int = 1,
    appended: int = 0, into: Stages = (), into_margin: Stages = (),
) -> Prediction:  # fmt: skip
    """Follow the stages' row numbers back to the input's tokens.

    A stage may have removed rows, or kept them all in place and hidden some from then on.

    Args:
        output: [B, C].
        lengths: per stage int [B].
        index: per stage int64 [B, rows], the op's `index`; -1 where a row is none in use.
        scores: per stage float32 [B, rows before the stage - P].
        prefix: P.
        appended: rows that each stage adds where something leaves, behind those that stay. They are
            tokens too, numbered from N on in the order in which they come.
        into: per stage int64 [B, rows before the stage], or nothing.
        into_margin: per stage float32 [B, rows before the stage - P], or nothing.
    """
    batch, found = output.shape[0], _Found([], [], [], [])
    tokens = scores[0].shape[1] if scores else 0
    places = [np.arange(tokens) for _ in range(batch)]
    for s, rows in enumerate(index):
        width = tokens + s * appended
        found.scores.append([_spread(p, scores[s][b], width) for b, p in enumerate(places)])
        if len(into):
            found.into.append([_goes(p, into[s][b], width, prefix) for b, p in enumerate(places)])
        if len(into_margin):
            found.margin.append(
                [_spread(p, into_margin[s][b], width) for b, p in enumerate(places)]
            )
        added = added_at(s, tokens, appended)
        more = np.asarray(lengths[s]) - (rows >= 0).sum(1)  # behind what the index says
        places = [_after(p, rows[b, prefix:], prefix, added, more[b] > 0)
                  for b, p in enumerate(places)]  # fmt: skip
        found.kept.append([p[(p >= 0) & (p < width)] for p in places])
    return Prediction(
        np.asarray(output, np.float32), [np.asarray(length, np.int64) for length in lengths],
        found.kept, found.scores, prefix, found.into or None, found.margin or None,
    )  # fmt: skip


class _Found(NamedTuple):
    """As `Prediction` has them."""

    kept: list[list[NDArray[np.int64]]]
    scores: list[list[NDArray[np.float32]]]
    into: list[list[NDArray[np.int64]]]
    margin: list[list[NDArray[np.float32]]]


def _after(
    places: NDArray[np.int64], rows: NDArray[np.int64], prefix: int, added: NDArray[np.int64],
    behind: bool,
) -> NDArray[np.int64]:  # fmt: skip
    """Which token each row is behind a stage, -1 for none.

    Args:
        places: likewise before the stage.
        rows: of the stage's input, or -1; those that the stage adds may be among them, at its end.
        behind: whether they come behind these instead.
    """
    own = rows - prefix
    known = np.concatenate([places, added])
    after = np.where((own >= 0) & (own < len(known)), known[np.clip(own, 0, len(known) - 1)], -1)
    return np.append(after, added) if behind else after


def _goes(
    places: NDArray[np.int64], rows: NDArray[np.int64], width: int, prefix: int
) -> NDArray[np.int64]:
    """Rows of a stage's input as tokens; what goes to no token stays where it is."""
    alive = places >= 0
    own = rows[prefix : prefix + len(places)] - prefix
    target = np.where((own >= 0) & (own < len(places)), own, np.arange(len(places)))
    goes = np.where(places[target] >= 0, places[target], places)
    found = np.full(width, -1, np.int64)
    found[places[alive]] = goes[alive]
    return found


def _spread(
    places: NDArray[np.int64], values: NDArray[np.float32], width: int
) -> NDArray[np.float32]:
    """By token; NaN where there is no row of it."""
    found, alive = np.full(width, np.nan, np.float32), places >= 0
    found[places[alive]] = values[: len(places)][alive]
    return found


def added_at(stage: int, tokens: int, appended: int) -> NDArray[np.int64]:
    """The numbers of the rows that a stage adds: N on, in the order in which they come."""
    return tokens + stage * appended + np.arange(appended)


def rows_of(
    kept: Sequence[NDArray[np.int64]], tokens: int, prefix: int = 1, appended: int = 0
) -> list[NDArray[np.int64]]:
    """The opposite of `decode` for one image: kept tokens as rows of each stage's input.

    Args:
        kept: per stage the image tokens that stay, ascending, each among those of the stage before.
        tokens: N of the input.
        prefix, appended: as `decode`.

    Returns:
        per stage int64 [P+K], the prefix first.
    """
    before, rows, first = np.arange(tokens), [], np.arange(prefix)
    for stage, now in enumerate(kept):
        places = prefix + np.searchsorted(before, now)
        rows.append(np.concatenate([first, places]).astype(np.int64))
        before = np.append(now, added_at(stage, tokens, appended))
    return rows


def into_rows(
    into: Sequence[NDArray[np.int64]], kept: Sequence[NDArray[np.int64]], tokens: int,
    prefix: int = 1, appended: int = 0,
) -> list[NDArray[np.int64]]:  # fmt: skip
    """`Prediction.into` of one image as rows of each stage's input, int64 [M] each.

    Args:
        kept, tokens, prefix, appended: as `rows_of`.
    """
    before, rows, first = np.arange(tokens), [], np.arange(prefix)
    for stage, (goes, now) in enumerate(zip(into, kept)):
        there = np.isin(goes[before], before)
        target = np.where(there, goes[before], before)
        rows.append(np.concatenate([first, prefix + np.searchsorted(before, target)]))
        before = np.append(now, added_at(stage, tokens, appended))
    return rows


def stack(parts: list[Prediction]) -> Prediction:
    """Predictions of single images as one batch."""

    def join(field: str) -> list[list[NDArray]] | None:
        lists = [getattr(part, field) for part in parts]
        return (
            None if lists[0] is None else [[x for s in stage for x in s] for stage in zip(*lists)]
        )

    return Prediction(
        np.concatenate([part.output for part in parts]),
        [np.concatenate(stage) for stage in zip(*(part.lengths for part in parts))],
        join("kept"),
        join("scores"),
        parts[0].prefix,
        join("into"),
        join("into_margin"),
    )
