"""One image along the candidate's own path: which decisions differ, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.errors import UserError
from asvit_deploy.ops.reference import keep_mask
from asvit_deploy.runners.base import Prediction, Reference


@dataclass
class ComparedCut:
    """One image at one stage.

    Attributes:
        decisions: tokens that were there.
        noise: median |score error| / score; None where the candidate does not put out its scores.
        flips: (token, score, margin, boundary) of each; the boundary is what decides.
        turns: likewise of leaving tokens that go elsewhere; their score is 1, and the boundary.
    """

    decisions: int
    noise: float | None
    flips: list[tuple[int, float, float, float]]
    turns: list[tuple[int, float, float, float]] = field(default_factory=list)


@dataclass
class ComparedImage:
    """One image.

    Attributes:
        lengths: per stage the image tokens that the reference and the candidate keep.
        own: the reference's output of its own run.
        output: the reference's along the candidate's path, None if that is unknown.
        theirs: the candidate's output.
        replayed: whether the reference took the candidate's decisions.
    """

    name: str
    cuts: list[ComparedCut]
    lengths: list[list[int]]
    own: NDArray[np.float32]
    output: NDArray[np.float32] | None
    theirs: NDArray[np.float32]
    replayed: bool


def compare_image(
    name: str, image: NDArray[np.float32], reference: Reference, theirs: Prediction, b: int,
    thresholds: Sequence[float | None],
) -> ComparedImage:  # fmt: skip
    """`theirs` holds the image as row `b`; a threshold of None: the highest scores stay, as many
    as the candidate keeps.
    """
    ours = reference(image[None])
    if ours.output.shape[1:] != theirs.output.shape[1:]:
        raise UserError(
            f"the reference has {ours.output.shape[1]} outputs, what is compared with it has "
            f"{list(theirs.output.shape[1:])}; name a model of the same network"
        )
    if thresholds and (ours.kept is None or ours.scores is None):
        raise ValueError("parity needs a reference that records kept tokens and scores")
    path, replayed = ours, False
    if theirs.kept is None:
        cuts, known = _counted(ours, theirs, b, thresholds)
    else:
        kept = [stage[b] for stage in theirs.kept]
        known = _possible(kept, [len(stage[0]) for stage in ours.scores or []])
        if known:
            assert not thresholds or ours.kept is not None
            replayed = any(not np.array_equal(k, o[0]) for k, o in zip(kept, ours.kept or []))
            into = None if theirs.into is None else [stage[b] for stage in theirs.into]
            replayed = replayed or any(map(len, _turned(ours, kept, into)))
            path = reference.replay(image[None], kept, into) if replayed else ours
            cuts = _cuts(path, kept, theirs, b, thresholds)
            for cut, turns in zip(cuts, _turned(path, kept, into)):
                cut.turns = turns
        else:
            cuts = [ComparedCut(1, None, [(-1, np.nan, np.inf, 0.0)])]
    prefix = ours.prefix
    lengths = [[int(o[0]) - prefix, int(t[b]) - prefix]
               for o, t in zip(ours.lengths, theirs.lengths)]  # fmt: skip
    return ComparedImage(name, cuts, lengths, ours.output[0],
                 path.output[0] if known else None, theirs.output[b], replayed)  # fmt: skip


def _turned(
    path: Prediction, kept: Sequence[NDArray[np.int64]], into: Sequence[NDArray[np.int64]] | None
) -> list[list[tuple[int, float, float, float]]]:
    """Per stage the tokens that leave into another one than the reference's own, as
    `ComparedCut.turns`; nothing where either does not say."""
    if into is None or path.into is None or path.into_margin is None:
        return []
    found = []
    before: NDArray[np.int64] = np.arange(len(into[0]))
    for stage, now in enumerate(kept):
        own, doubt = path.into[stage][0], path.into_margin[stage][0]
        leaving = np.setdiff1d(before, now)
        others = leaving[own[leaving] != into[stage][leaving]]
        found.append([(int(token), 1.0, float(doubt[token]), 1.0) for token in others])
        added = (
            np.arange(len(into[stage]), len(into[stage + 1])) if stage + 1 < len(into) else now[:0]
        )
        before = np.append(now, added)
    return found


def _possible(kept: Sequence[NDArray[np.int64]], widths: Sequence[int]) -> bool:
    """Whether each stage keeps something, of what the one before left or added.

    Args:
        widths: tokens that there can be at each stage: those of the input, and added ones.
    """
    before: NDArray[np.int64] = np.arange(widths[0] if widths else 0)
    for stage, now in enumerate(kept):
        if not len(now) or not np.isin(now, before).all():
            return False
        added = np.arange(*widths[stage : stage + 2]) if stage + 1 < len(widths) else now[:0]
        before = np.append(now, added)
    return True


def _cuts(
    path: Prediction, kept: Sequence[NDArray[np.int64]], theirs: Prediction, b: int,
    thresholds: Sequence[float | None],
) -> list[ComparedCut]:  # fmt: skip
    cuts: list[ComparedCut] = []
    before: NDArray[np.int64] = np.arange(len(path.scores[0][0]) if path.scores else 0)
    for stage, threshold in enumerate(thresholds):
        assert path.scores is not None
        scores = path.scores[stage][0]
        if stage:  # what the last cut left, and what it added
            before = _left(kept[stage - 1], path.scores[stage - 1][0], scores)
        alive = np.flatnonzero(~np.isnan(scores)) if threshold is None else before
        if threshold is None:
            decided, threshold = _highest(scores, alive, len(kept[stage]))
        else:
            decided = alive[keep_mask(scores[None, alive], threshold)[0]]
        flipped = np.setxor1d(decided, kept[stage])
        noise = None
        if theirs.scores is not None:
            others = theirs.scores[stage][b]
            same = len(others) == len(scores)
            noise = _noise(scores[alive], others[alive]) if same else np.inf
        flips = [_flip(int(token), scores[alive], scores, threshold) for token in flipped]
        cuts.append(ComparedCut(len(alive), noise, flips))
    return cuts


def _left(
    kept: NDArray[np.int64], before: NDArray[np.float32], scores: NDArray[np.float32]
) -> NDArray[np.int64]:
    """The tokens that come to a stage: those that the one before kept, and those that it added."""
    added = np.arange(len(before), len(scores))
    return np.append(kept, added[~np.isnan(scores[added])])


def _highest(
    scores: NDArray[np.float32], alive: NDArray[np.int64], count: int
) -> tuple[NDArray[np.int64], float]:
    """The tokens of the highest scores, and the middle between the last of them and the next."""
    order = alive[np.argsort(-scores[alive], kind="stable")]
    edge = scores[order[max(count - 1, 0) : count + 1]].astype(np.float64)
    finite = edge[np.isfinite(edge)]
    return np.sort(order[:count]), float(finite.mean()) if len(finite) else 0.0


def _noise(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Median error of the scores relative to themselves; what is equal, infinite or not, is 0.

    Rows that may not leave score +inf and say nothing of rounding.
    """
    compared = ~(np.isposinf(ours) & np.isposinf(theirs))
    if not compared.any():
        return 0.0
    ours, theirs = ours[compared], theirs[compared]
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(ours.astype(np.float64) - theirs) / np.abs(ours)
    return float(np.median(np.where(same, 0.0, np.nan_to_num(error, nan=np.inf))))


def _flip(
    token: int, alive: NDArray[np.float32], scores: NDArray[np.float32], threshold: float
) -> tuple[int, float, float, float]:
    score, best = float(scores[token]), float(np.nanmax(alive))
    # Where nothing passes, the best token stays: the decision was between the two best.
    boundary = float(threshold) if best > threshold else best
    margin = abs(score - boundary)
    return token, score, margin if np.isfinite(margin) else np.inf, abs(boundary)


def _counted(
    ours: Prediction, theirs: Prediction, b: int, thresholds: Sequence[float | None]
) -> tuple[list[ComparedCut], bool]:
    """For a backend that says how many tokens stay and not which: judged up to the first stage
    where that differs, by the flips that there must at least have been.

    Returns:
        the cuts, and whether all counts agree.
    """
    cuts: list[ComparedCut] = []
    for stage, threshold in enumerate(thresholds):
        assert ours.scores is not None
        assert ours.kept is not None
        if threshold is None:  # fixed, so that equal counts say nothing of the tokens
            if ours.lengths[stage][0] != theirs.lengths[stage][b]:
                return [*cuts, ComparedCut(1, None, [(-1, np.nan, np.inf, 0.0)])], False
            continue
        scores, kept = ours.scores[stage][0], ours.kept[stage][0]
        alive = scores[np.isfinite(scores)]
        others = int(ours.lengths[stage][0]) - len(kept)  # the prefix, and rows that were added
        flipped = _likeliest_flips(scores, kept, int(theirs.lengths[stage][b]) - others)
        flips = [_flip(int(token), alive, scores, threshold) for token in flipped]
        cuts.append(ComparedCut(len(alive), None, flips))
        if flips:
            return cuts, False
    return cuts, True


def _likeliest_flips(scores: NDArray, kept: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """What must at least have flipped for `count` tokens to stay: the nearest to the threshold."""
    if count < len(kept):
        return kept[np.argsort(scores[kept])[: len(kept) - count]]
    dropped = np.setdiff1d(np.flatnonzero(np.isfinite(scores)), kept)
    return dropped[np.argsort(-scores[dropped])[: count - len(kept)]]
