"""Does a backend decide as the reference does, and say the same?

Each image is judged along the candidate's own path: where a decision differs, the reference is run
again with the candidate's decisions in place of its own, so that both see the same tokens at every
stage and before the head. A flip at a near tie then neither hides a wrong network nor excuses one.

Scores are judged by measured noise, the error of a score relative to itself, since that is what a
rounded softmax makes: absolute errors grow with the score, and say nothing of those at a threshold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.models.config import Output
from asvit_deploy.parity.embeddings import CHOICE
from asvit_deploy.parity.judging import judged
from asvit_deploy.parity.limits import LIMITS, Limits
from asvit_deploy.parity.one_image import ComparedImage, compare_image
from asvit_deploy.parity.report import Flip, Neighbour, Parity, Top1
from asvit_deploy.runners.base import Reference, Runner

__all__ = ["CHOICE", "LIMITS", "Flip", "Limits", "Neighbour", "Parity", "Top1", "compare"]


def compare(
    reference: Reference,
    candidate: Runner,
    images: Sequence[NDArray[np.float32]],
    names: Sequence[str],
    thresholds: Sequence[float | None],
    precision: str = "float32",
    batch: int = 1,
    output: Output = "logits",
) -> Parity:
    """Run both on every image and judge.

    Args:
        reference: its scores give the margins; runs one image at a time.
        candidate: runs `batch` images at a time; where it does not record kept tokens, their
            number is compared, and what flipped is guessed from it.
        images: float32 [3, H, W] each.
        names: one per image, for the lists of flips and changes.
        thresholds: one per stage, None where the number of tokens is fixed; empty when dense.
        precision: a key of `LIMITS`.
        output: what the network returns.

    Raises:
        UserError: their outputs are not of one width.
    """
    compared: list[ComparedImage] = []
    for first in range(0, len(images), batch):
        chosen = range(first, min(first + batch, len(images)))
        theirs = candidate(np.stack([images[i] for i in chosen]))
        compared += [
            compare_image(names[i], images[i], reference, theirs, b, thresholds)
            for b, i in enumerate(chosen)
        ]
    return judged(compared, thresholds, precision, output)
