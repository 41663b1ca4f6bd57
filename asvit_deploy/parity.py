"""Does a backend decide as the reference does, and say the same?

Each image is judged along the candidate's own path: where a decision differs, the reference is run
again with the candidate's decisions in place of its own, so that both see the same tokens at every
stage and before the head. A flip at a near tie then neither hides a wrong network nor excuses one.

Scores are judged by measured noise, the error of a score relative to itself, since that is what a
rounded softmax makes: absolute errors grow with the score, and say nothing of those at a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.errors import UserError
from asvit_deploy.ops.reference import keep_mask
from asvit_deploy.runners.base import Prediction, Reference, Runner

# A flip is explained within so many times the noise: 5.4 standard deviations of a normal error.
# Errors have longer tails than that: one of 200 photographs on the trained ViT-S of `LIMITS` had a
# flip at 14 times the noise in bfloat16. So a few images may have one within four times that.
EXPLAINED, STRAY = 8, 4
_STRAYS = 0.01  # of the images, or one
_LEAST = 1e-6  # noise that there always is: float32's own
_FEW_STAGES = 3  # up to so many, images without any flip are counted


@dataclass(frozen=True)
class Limits:
    """What passes; every limit means the same for a few images as for many.

    Attributes:
        noise: largest |score error| / score at a stage: the median over an image's tokens, and of
            those the median over the images.
        margin: a flip is borderline within max(1e-6, margin * threshold); None: within `EXPLAINED`
            times the noise of its image or of its stage, whichever is larger, but at most `noise`;
            `noise` itself where a candidate does not tell its scores.
        alike: least share of images without a flip; one image may always have some.
        logits: |logit error| of an image, the largest of its classes, as a share of its largest
            |logit|: the median over the images.
    """

    noise: float
    logits: float
    margin: float | None = None
    alike: float = 0.0

    @property
    def worst(self) -> float:
        """The same for every single image; a top-1 that changes is borderline where the reference's
        two logits lie within that."""
        return 4 * self.logits


# Noise and logit errors as measured with `exporting.half.rounded` on up to 200 pictures of the
# default checkpoint, a trained ViT-S and random DeiT-T, DeiT-S and LV-ViT-S with and without
# sharpened attention: noise at most 1.4e-3 (fp16) and 1.0e-2 (bf16), the median of logit errors
# 1.5e-3 and 1.2e-2, the largest 5.6e-3 and 3.8e-2. The limits of noise are eight roundings.
LIMITS = {
    "float32": Limits(noise=1e-4, logits=2.5e-5, margin=1e-3, alike=0.99),
    "fp16": Limits(noise=8 * 2**-11, logits=1e-2),
    "bf16": Limits(noise=8 * 2**-8, logits=3e-2),
    # As ONNX Runtime's `quantize_dynamic` makes it: noise 3.9e-2, largest logit error 5.5e-2.
    "int8": Limits(noise=0.125, logits=8e-2),
}


@dataclass(frozen=True)
class Flip:
    """One token that only one side keeps, of those that both had before the stage.

    Attributes:
        margin: distance of the reference's score from what decides: the threshold, or the other
            of the two best scores where none passes.
        allowed: the largest margin that rounding explains.
    """

    image: str
    stage: int
    token: int
    score: float
    threshold: float
    margin: float
    allowed: float

    @property
    def borderline(self) -> bool:
        return self.margin <= self.allowed


@dataclass(frozen=True)
class Top1:
    """An image whose best class changed, given the same tokens; `margin` is a share of its logits.

    Attributes:
        reference, candidate: the classes.
        margin: the reference's best logit minus its logit of `candidate`.
    """

    image: str
    reference: int
    candidate: int
    margin: float
    borderline: bool


@dataclass
class Parity:
    """The verdict over a set of images; `failures` is empty when it passes.

    Attributes:
        equal_sets: images on which no decision differs.
        explained: images on which every flip is borderline.
        top1_equal: images whose top-1 is that of the reference's own run.
        replayed: images on which the reference took the candidate's decisions.
        judged: images whose logits were compared; without knowing which tokens a candidate keeps,
            those where it keeps as many.
        decisions, decisions_equal: tokens at all stages.
        logit_error, typical_logit_error: the largest and the median, as `Limits.logits`.
        noise: per stage, as `Limits.noise`; empty where the candidate does not tell its scores.
        mean_kept, candidate_kept: image tokens after each stage.
        flips, top1_changes: each one, borderline or not.
    """

    precision: str = "float32"
    images: int = 0
    equal_sets: int = 0
    explained: int = 0
    top1_equal: int = 0
    replayed: int = 0
    judged: int = 0
    decisions: int = 0
    decisions_equal: int = 0
    logit_error: float = 0.0
    typical_logit_error: float = 0.0
    noise: list[float] = field(default_factory=list)
    mean_kept: list[float] = field(default_factory=list)
    candidate_kept: list[float] = field(default_factory=list)
    flips: list[Flip] = field(default_factory=list)
    top1_changes: list[Top1] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        flips = [{**asdict(flip), "borderline": flip.borderline} for flip in self.flips]
        return {**asdict(self), "flips": flips, "passed": self.passed}


def compare(
    reference: Reference,
    candidate: Runner,
    images: Sequence[NDArray[np.float32]],
    names: Sequence[str],
    thresholds: Sequence[float],
    precision: str = "float32",
    batch: int = 1,
) -> Parity:
    """Run both on every image and judge.

    Args:
        reference: its scores give the margins; runs one image at a time.
        candidate: runs `batch` images at a time; where it does not record kept tokens, their
            number is compared, and what flipped is guessed from it.
        images: float32 [3, H, W] each.
        names: one per image, for the lists of flips and changes.
        thresholds: one per stage; empty when dense.
        precision: a key of `LIMITS`.

    Raises:
        UserError: they have different numbers of logits.
    """
    seen: list[_Seen] = []
    for first in range(0, len(images), batch):
        chosen = range(first, min(first + batch, len(images)))
        theirs = candidate(np.stack([images[i] for i in chosen]))
        seen += [
            _see(names[i], images[i], reference, theirs, b, thresholds)
            for b, i in enumerate(chosen)
        ]
    return _judged(seen, thresholds, precision)


# --- one image ----------------------------------------------------------------------------------


@dataclass
class _Cut:
    """One image at one stage.

    Attributes:
        decisions: tokens that were there.
        noise: median |score error| / score; None where the candidate does not tell its scores.
        flips: (token, score, margin, boundary) of each; the boundary is what decides.
    """

    decisions: int
    noise: float | None
    flips: list[tuple[int, float, float, float]]


@dataclass
class _Seen:
    """One image: `logits` are the reference's along the candidate's path, None if it is unknown."""

    name: str
    cuts: list[_Cut]
    lengths: list[list[int]]  # per stage: image tokens that the reference and the candidate keep
    top1: int
    logits: NDArray[np.float32] | None
    theirs: NDArray[np.float32]
    replayed: bool


def _see(
    name: str, image: NDArray[np.float32], reference: Reference, theirs: Prediction, b: int,
    thresholds: Sequence[float],
) -> _Seen:  # fmt: skip
    """`theirs` holds the image as row `b`."""
    ours = reference(image[None])
    if ours.logits.shape[1:] != theirs.logits.shape[1:]:
        raise UserError(
            f"the reference has {ours.logits.shape[1]} logits, what is compared with it has "
            f"{list(theirs.logits.shape[1:])}; name a model of the same network"
        )
    if thresholds and (ours.kept is None or ours.scores is None):
        raise ValueError("parity needs a reference that records kept tokens and scores")
    path, replayed = ours, False
    if theirs.kept is None:
        cuts, known = _counted(ours, theirs, b, thresholds)
    else:
        kept = [stage[b] for stage in theirs.kept]
        known = _possible(kept, len(ours.scores[0][0]) if ours.scores else 0)
        if known:
            assert not thresholds or ours.kept is not None
            replayed = any(not np.array_equal(k, o[0]) for k, o in zip(kept, ours.kept or []))
            path = reference.replay(image[None], kept) if replayed else ours
            cuts = _cuts(path, kept, theirs, b, thresholds)
        else:
            cuts = [_Cut(1, None, [(-1, np.nan, np.inf, 0.0)])]
    lengths = [[int(o[0]) - 1, int(t[b]) - 1] for o, t in zip(ours.lengths, theirs.lengths)]
    return _Seen(name, cuts, lengths, int(ours.logits[0].argmax()),
                 path.logits[0] if known else None, theirs.logits[b], replayed)  # fmt: skip


def _possible(kept: Sequence[NDArray[np.int64]], tokens: int) -> bool:
    """Whether each stage keeps something, of what the one before left."""
    before: NDArray[np.int64] = np.arange(tokens)
    for now in kept:
        if not len(now) or not np.isin(now, before).all():
            return False
        before = now
    return True


def _cuts(
    path: Prediction, kept: Sequence[NDArray[np.int64]], theirs: Prediction, b: int,
    thresholds: Sequence[float],
) -> list[_Cut]:  # fmt: skip
    cuts: list[_Cut] = []
    for stage, threshold in enumerate(thresholds):
        assert path.scores is not None
        scores = path.scores[stage][0]
        alive = kept[stage - 1] if stage else np.arange(len(scores))
        decided = alive[keep_mask(scores[None, alive], threshold)[0]]
        flipped = np.setxor1d(decided, kept[stage])
        noise = None
        if theirs.scores is not None:
            noise = _noise(scores[alive], theirs.scores[stage][b][alive])
        flips = [_flip(int(token), scores[alive], scores, threshold) for token in flipped]
        cuts.append(_Cut(len(alive), noise, flips))
    return cuts


def _noise(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Median error of the scores relative to themselves; what is equal, infinite or not, is 0."""
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
    ours: Prediction, theirs: Prediction, b: int, thresholds: Sequence[float]
) -> tuple[list[_Cut], bool]:
    """For a backend that tells how many tokens stay and not which: judged up to the first stage
    where that differs, by the flips that there must at least have been.

    Returns:
        the cuts, and whether all counts agree.
    """
    cuts: list[_Cut] = []
    for stage, threshold in enumerate(thresholds):
        assert ours.scores is not None
        assert ours.kept is not None
        scores, kept = ours.scores[stage][0], ours.kept[stage][0]
        alive = scores[np.isfinite(scores)]
        flipped = _likeliest_flips(scores, kept, int(theirs.lengths[stage][b]) - 1)
        flips = [_flip(int(token), alive, scores, threshold) for token in flipped]
        cuts.append(_Cut(len(alive), None, flips))
        if flips:
            return cuts, False
    return cuts, True


def _likeliest_flips(scores: NDArray, kept: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """What must at least have flipped for `count` tokens to stay: the nearest to the threshold."""
    if count < len(kept):
        return kept[np.argsort(scores[kept])[: len(kept) - count]]
    dropped = np.setdiff1d(np.flatnonzero(np.isfinite(scores)), kept)
    return dropped[np.argsort(-scores[dropped])[: count - len(kept)]]


# --- all images ---------------------------------------------------------------------------------


def _judged(seen: Sequence[_Seen], thresholds: Sequence[float], precision: str) -> Parity:
    limits = LIMITS[precision]
    result = Parity(precision, len(seen))
    if not seen:
        result.failures = ["no image was compared"]
        return result
    result.noise = _noise_by_stage(seen, len(thresholds))
    kept = np.array([image.lengths for image in seen], np.float64).reshape(len(seen), -1, 2)
    result.mean_kept, result.candidate_kept = kept.mean(0).T.tolist()
    for image in seen:
        flips = _flips(image, result.noise, thresholds, limits)
        result.flips += flips
        result.equal_sets += not flips
        result.explained += all(flip.borderline for flip in flips)
        result.decisions += sum(cut.decisions for cut in image.cuts)
        result.decisions_equal += sum(cut.decisions - len(cut.flips) for cut in image.cuts)
        result.replayed += image.replayed
        result.top1_equal += image.top1 == int(image.theirs.argmax())
    _judge_logits(result, seen, limits)
    result.failures = _failures(result, len(thresholds), limits)
    return result


def _noise_by_stage(seen: Sequence[_Seen], stages: int) -> list[float]:
    """Per stage the median over the images; empty where no scores are known."""
    noise = [
        [cut.noise for image in seen for cut in image.cuts[s : s + 1] if cut.noise is not None]
        for s in range(stages)
    ]
    return [float(np.median(values)) for values in noise] if all(noise) else []


def _flips(
    image: _Seen, noise: Sequence[float], thresholds: Sequence[float], limits: Limits
) -> list[Flip]:
    flips = []
    for stage, cut in enumerate(image.cuts):
        for token, score, margin, boundary in cut.flips:
            if limits.margin is not None:
                allowed = max(1e-6, limits.margin * boundary)
            else:
                known = [limits.noise] if cut.noise is None else [cut.noise, noise[stage], _LEAST]
                allowed = EXPLAINED * min(max(known), limits.noise) * boundary
            flips.append(
                Flip(image.name, stage, token, score, float(thresholds[stage]), margin, allowed)
            )
    return flips


def _judge_logits(result: Parity, seen: Sequence[_Seen], limits: Limits) -> None:
    """Of every image whose tokens are known. An image whose logits are all small, such as a score
    near 0, is measured by the median of the images' largest."""
    known = [image for image in seen if image.logits is not None]
    result.judged = len(known)
    largest = [float(np.abs(image.logits).max()) for image in known]  # type: ignore[arg-type]
    errors = []
    for image, own in zip(known, largest):
        assert image.logits is not None
        scale = max(own, float(np.median(largest)), 1e-12)
        error = float(np.abs(image.logits - image.theirs).max()) / scale
        # A NaN would lose every comparison, so it is turned into the failure that it is.
        errors.append(error if np.isfinite(error) else np.inf)
        best, mine = int(image.logits.argmax()), int(image.theirs.argmax())
        if best != mine:
            margin = float(image.logits[best] - image.logits[mine]) / scale
            result.top1_changes.append(Top1(image.name, best, mine, margin, margin <= limits.worst))
    if errors:
        result.logit_error, result.typical_logit_error = max(errors), float(np.median(errors))


def _failures(result: Parity, stages: int, limits: Limits) -> list[str]:
    n = result.images
    failures = [
        f"scores at stage {stage} are off by {noise:.1e} of themselves, {limits.noise:.1e} allowed"
        for stage, noise in enumerate(result.noise)
        if not noise <= limits.noise
    ]
    far = [flip for flip in result.flips if not flip.borderline]
    wild = [flip for flip in far if flip.margin > STRAY * flip.allowed]
    strays = 0 if limits.margin is not None else max(1, _STRAYS * n)
    if wild or n - result.explained > strays:
        worst = max(far, key=lambda flip: flip.margin)
        failures.append(
            f"{len(far)} tokens flipped beyond rounding on {n - result.explained}/{n} images (the "
            f"worst by {worst.margin:.1e} of a threshold of {worst.threshold:.1e}, "
            f"{worst.allowed:.1e} explained)"
        )
    if stages <= _FEW_STAGES and n - result.equal_sets > max(1, (1 - limits.alike) * n):
        failures.append(f"{result.equal_sets}/{n} images keep the same tokens, "
                        f"{limits.alike:.0%} needed")  # fmt: skip
    if changed := sum(not change.borderline for change in result.top1_changes):
        failures.append(f"top-1 changed beyond rounding on {changed}/{n} images")
    if not result.judged:
        failures.append("no image's logits could be compared: all keep other tokens")
    if not result.typical_logit_error <= limits.logits:
        failures.append(f"logits differ by {result.typical_logit_error:.1e} of the largest on the "
                        f"median image, {limits.logits:.1e} allowed")  # fmt: skip
    elif not result.logit_error <= limits.worst:
        failures.append(f"logits differ by {result.logit_error:.1e} of the largest on one image, "
                        f"{limits.worst:.1e} allowed")  # fmt: skip
    return failures
