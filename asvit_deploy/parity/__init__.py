"""Does a backend decide as the reference does, and say the same?

Each image is judged along the candidate's own path: where a decision differs, the reference is run
again with the candidate's decisions in place of its own, so that both see the same tokens at every
stage and before the head. A flip at a near tie then neither hides a wrong network nor excuses one.

Scores are judged by measured noise, the error of a score relative to itself, since that is what a
rounded softmax makes: absolute errors grow with the score, and say nothing of those at a threshold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.models.config import Output
from asvit_deploy.parity.embeddings import CHOICE
from asvit_deploy.parity.judging import judged
from asvit_deploy.parity.limits import LIMITS, Limits
from asvit_deploy.parity.one_image import ComparedImage, compare_image
from asvit_deploy.parity.report import Flip, Neighbour, Parity, Top1
from asvit_deploy.processor import torch_threads, usable_cores
from asvit_deploy.runners.base import Prediction, Reference, Runner

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
    groups = [range(i, min(i + batch, len(images))) for i in range(0, len(images), batch)]
    batches = (np.stack([images[i] for i in chosen]) for chosen in groups)
    with _answers(candidate, batches) as answers:
        for chosen, theirs in zip(groups, answers):
            compared += [
                compare_image(names[i], images[i], reference, theirs, b, thresholds)
                for b, i in enumerate(chosen)
            ]
    return judged(compared, thresholds, precision, output)


@contextlib.contextmanager
def _answers(
    candidate: Runner, batches: Iterable[NDArray[np.float32]]
) -> Iterator[Iterable[Prediction]]:
    """Each batch's prediction; where it can, a thread works out the next one meanwhile.

    The reference then has a core less: threads that wait for one another's core are slower than
    fewer of them.
    """
    cores = usable_cores()
    if cores == 1 or not getattr(candidate, "runs_beside", False):
        yield map(candidate, batches)
        return
    import torch

    fewer = min(torch.get_num_threads(), cores - 1)
    with torch_threads(fewer), ThreadPoolExecutor(1) as pool:
        yield _one_ahead(pool, candidate, batches)


def _one_ahead(
    pool: Executor, candidate: Runner, batches: Iterable[NDArray[np.float32]]
) -> Iterator[Prediction]:  # fmt: skip
    waiting: Future[Prediction] | None = None
    for given in batches:
        following = pool.submit(candidate, given)
        if waiting is not None:
            yield waiting.result()
        waiting = following
    if waiting is not None:
        yield waiting.result()
