"""Embeddings along the candidate's own path: cosine, norm, and the nearest other image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.parity.limits import Limits
from asvit_deploy.parity.one_image import ComparedImage
from asvit_deploy.parity.report import Neighbour, Parity
from asvit_deploy.similarity import cosines, nearest, norms, same_nearest, units

CHOICE = 3  # images: of two, each has but the other


def judge_embeddings(result: Parity, compared: Sequence[ComparedImage], limits: Limits) -> None:
    """Of every image whose tokens are known."""
    known = [image for image in compared if image.output is not None]
    result.judged = len(known)
    if not known:
        return
    ours = np.stack([image.output for image in known])  # type: ignore[misc]
    theirs = np.stack([image.theirs for image in known])
    cosine = cosines(ours, theirs)
    lost = np.isnan(cosine)
    result.directionless = [image.name for image, odd in zip(known, lost) if odd]
    errors = np.maximum(1 - cosine[~lost], 0)
    if len(errors):
        result.cosine_error = float(errors.max())
        result.typical_cosine_error = float(np.median(errors))
    if lost.any():  # then neighbours say nothing
        return
    result.norm_error = float(np.abs(norms(theirs) / norms(ours) - 1).max())
    own = units(np.stack([image.own for image in compared]))
    all_theirs = units(np.stack([image.theirs for image in compared]))
    if len(compared) >= CHOICE and not np.isnan(own + all_theirs).any():
        result.neighbours_equal = int(same_nearest(own, all_theirs).sum())
    names = [image.name for image in known]
    result.neighbour_changes = _changes(names, units(ours), units(theirs), limits)


def _changes(
    names: Sequence[str], ours: NDArray[np.float64], theirs: NDArray[np.float64], limits: Limits
) -> list[Neighbour]:
    """Each image whose nearest other one is another for the candidate."""
    if len(names) < CHOICE:
        return []
    changes = []
    before, after = nearest(ours), nearest(theirs)
    for i in np.flatnonzero(~same_nearest(ours, theirs)).tolist():
        near, far = (float(ours[i] @ ours[other[i]]) for other in (before, after))
        turned = np.arccos(np.clip(far, -1, 1)) - np.arccos(np.clip(near, -1, 1))
        reference, candidate = names[int(before[i])], names[int(after[i])]
        borderline = bool(turned <= limits.angle)
        changes.append(Neighbour(names[i], reference, candidate, near - far, borderline))
    return changes


def embedding_failures(result: Parity, limits: Limits) -> list[str]:
    failures = []
    if odd := result.directionless:
        failures.append(f"embeddings of {len(odd)}/{result.judged} images are zero or not finite "
                        f"({odd[0]} first), so that they have no cosine")  # fmt: skip
    if changed := sum(not change.borderline for change in result.neighbour_changes):
        failures.append(
            f"the nearest neighbour changed beyond rounding on {changed}/{result.images} images"
        )
    if not result.cosine_error <= limits.cosine:
        failures.append(f"the cosine with the reference falls to 1 - {result.cosine_error:.1e}, "
                        f"1 - {limits.cosine:.0e} needed")  # fmt: skip
    if not result.norm_error <= limits.worst:
        failures.append(f"an embedding's norm differs by {result.norm_error:.1e} of itself, "
                        f"{limits.worst:.1e} allowed")  # fmt: skip
    return failures
