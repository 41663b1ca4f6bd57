"""The verdict over all images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from asvit_deploy.models.config import Output
from asvit_deploy.parity.embeddings import embedding_failures, judge_embeddings
from asvit_deploy.parity.limits import (
    EXPLAINED,
    FEW_STAGES,
    LEAST,
    LIMITS,
    STRAY,
    STRAYS,
    Limits,
)
from asvit_deploy.parity.one_image import ComparedImage
from asvit_deploy.parity.report import Flip, Parity, Top1


def judged(
    compared: Sequence[ComparedImage], thresholds: Sequence[float | None], precision: str,
    output: Output = "logits",
) -> Parity:  # fmt: skip
    limits = LIMITS[precision]
    result = Parity(precision, len(compared), output)
    if not compared:
        result.failures = ["no image was compared"]
        return result
    result.noise = _noise_by_stage(compared, len(thresholds))
    kept = np.array([image.lengths for image in compared], np.float64).reshape(len(compared), -1, 2)
    result.mean_kept, result.candidate_kept = kept.mean(0).T.tolist()
    for image in compared:
        flips = _flips(image, result.noise, thresholds, limits)
        stay, turns = ([f for f in flips if f.turned is turned] for turned in (False, True))
        result.flips += stay
        result.turns += turns
        result.equal_sets += not stay
        result.explained += all(flip.borderline for flip in flips)
        result.decisions += sum(cut.decisions for cut in image.cuts)
        result.decisions_equal += sum(cut.decisions - len(cut.flips) for cut in image.cuts)
        result.replayed += image.replayed
    judge, failures = _OUTPUTS[output]
    judge(result, compared, limits)
    result.failures = _failures(result, len(thresholds), limits)
    if not result.judged:
        result.failures.append("no image's output could be compared: all keep other tokens")
    result.failures += failures(result, limits)
    return result


def _noise_by_stage(compared: Sequence[ComparedImage], stages: int) -> list[float]:
    """Per stage the median over the images; empty where no scores are known."""
    noise = [
        [cut.noise for image in compared for cut in image.cuts[s : s + 1] if cut.noise is not None]
        for s in range(stages)
    ]
    return [float(np.median(values)) for values in noise] if all(noise) else []


def _flips(
    image: ComparedImage,
    noise: Sequence[float],
    thresholds: Sequence[float | None],
    limits: Limits,
) -> list[Flip]:
    flips = []
    for stage, cut in enumerate(image.cuts):
        several = [(flip, False) for flip in cut.flips] + [(turn, True) for turn in cut.turns]
        for (token, score, margin, boundary), turned in several:
            if turned:  # a share of a similarity, which is off by as much as scores may be
                allowed = limits.noise * boundary
            elif limits.margin is not None:
                allowed = max(1e-6, limits.margin * boundary)
            else:
                known = [limits.noise] if cut.noise is None else [cut.noise, noise[stage], LEAST]
                allowed = EXPLAINED * min(max(known), limits.noise) * boundary
            given = None if turned else thresholds[stage]
            decides = boundary if given is None else float(given)
            flips.append(Flip(image.name, stage, token, score, decides, margin, allowed, turned))
    return flips


def _judge_logits(result: Parity, compared: Sequence[ComparedImage], limits: Limits) -> None:
    """Of every image whose tokens are known. An image whose logits are all small, such as a score
    near 0, is measured by the median of the images' largest."""
    result.top1_equal = sum(int(i.own.argmax()) == int(i.theirs.argmax()) for i in compared)
    known = [image for image in compared if image.output is not None]
    result.judged = len(known)
    largest = [float(np.abs(image.output).max()) for image in known]  # type: ignore[arg-type]
    errors = []
    for image, own in zip(known, largest):
        assert image.output is not None
        scale = max(own, float(np.median(largest)), 1e-12)
        error = float(np.abs(image.output - image.theirs).max()) / scale
        # A NaN would lose every comparison, so it is turned into the failure that it is.
        errors.append(error if np.isfinite(error) else np.inf)
        best, mine = int(image.output.argmax()), int(image.theirs.argmax())
        if best != mine:
            margin = float(image.output[best] - image.output[mine]) / scale
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
    far = [flip for flip in (*result.flips, *result.turns) if not flip.borderline]
    if _too_many(far, result, limits):
        worst = max(far, key=lambda flip: flip.margin)
        failures.append(
            f"{len(far)} tokens flipped beyond rounding on {n - result.explained}/{n} images (the "
            f"worst by {worst.margin:.1e} of a threshold of {worst.threshold:.1e}, "
            f"{worst.allowed:.1e} explained)"
        )
    if result.decisions_equal < limits.decisions * result.decisions:
        failures.append(f"{result.decisions_equal / result.decisions:.1%} of the decisions are "
                        f"alike, {limits.decisions:.0%} needed")  # fmt: skip
    if stages <= FEW_STAGES and n - result.equal_sets > max(1, (1 - limits.alike) * n):
        failures.append(f"{result.equal_sets}/{n} images keep the same tokens, "
                        f"{limits.alike:.0%} needed")  # fmt: skip
    return failures


def _too_many(far: Sequence[Flip], result: Parity, limits: Limits) -> bool:
    """Whether more flips are unexplained than there may be; what cannot be is never explained."""
    if not all(np.isfinite(flip.margin) for flip in far):
        return True
    if limits.unexplained is not None:
        return len(far) > max(1, limits.unexplained * result.decisions)
    wild = any(flip.margin > STRAY * flip.allowed for flip in far)
    strays = 0 if limits.margin is not None else max(1, STRAYS * result.images)
    return wild or result.images - result.explained > strays


def _logit_failures(result: Parity, limits: Limits) -> list[str]:
    failures = []
    if changed := sum(not change.borderline for change in result.top1_changes):
        failures.append(f"top-1 changed beyond rounding on {changed}/{result.images} images")
    if not result.typical_logit_error <= limits.logits:
        failures.append(f"logits differ by {result.typical_logit_error:.1e} of the largest on the "
                        f"median image, {limits.logits:.1e} allowed")  # fmt: skip
    elif not result.logit_error <= limits.worst:
        failures.append(f"logits differ by {result.logit_error:.1e} of the largest on one image, "
                        f"{limits.worst:.1e} allowed")  # fmt: skip
    return failures


# How the outputs are judged once the decisions are, and what that may end in.
_OUTPUTS: dict[Output, tuple[Callable[..., None], Callable[..., list[str]]]] = {
    "logits": (_judge_logits, _logit_failures),
    "embedding": (judge_embeddings, embedding_failures),
}
