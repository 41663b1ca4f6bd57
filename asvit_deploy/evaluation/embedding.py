"""Embeddings over a set of pictures: agreement with the dense twin, k-NN accuracy, MACs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.accuracy import LabelledArrays
from asvit_deploy.evaluation.costs import kept_of, macs_of, summarise_costs
from asvit_deploy.intervals import wilson
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import Cuts
from asvit_deploy.runners.base import Runner
from asvit_deploy.similarity import agreement, directions, voted
from asvit_deploy.status import Say

NEIGHBOURS = 5


@dataclass(frozen=True)
class Embedded:
    """One row per image.

    Attributes:
        labels: the data's own class numbers, int64 [P]; -1 where it has none.
        output: embeddings, float32 [P, C].
        twin: the dense twin's, float32 [P, C], or [P, 0] where there is none.
        kept: image tokens left after each stage: int64 [P, stages], no columns when dense.
    """

    labels: NDArray[np.int64]
    output: NDArray[np.float32]
    twin: NDArray[np.float32]
    kept: NDArray[np.int64]


def embed(
    runner: Runner, twin: Runner | None, batches: Iterable[LabelledArrays], config: ArchConfig
) -> list[Embedded]:
    """Run every batch as it comes, and the twin beside it."""
    found = []
    for images, labels in batches:
        made = runner(images)
        other = np.empty((len(labels), 0), np.float32) if twin is None else twin(images).output
        found.append(Embedded(labels, made.output, other, kept_of(made, config)))
    return found


def joined(parts: Sequence[Embedded]) -> Embedded:
    """The images of all parts.

    Raises:
        UserError: there is no image at all.
    """
    if not parts:
        raise UserError("there is no picture to evaluate on")
    columns = zip(*((part.labels, part.output, part.twin, part.kept) for part in parts))
    return Embedded(*(np.concatenate(column) for column in columns))


def summarise(
    found: Embedded, config: ArchConfig, cuts: Cuts, neighbours: int, model: str,
    say: Say,
) -> dict[str, Any]:  # fmt: skip
    """Figures for JSON.

    Args:
        cuts: as `model_macs`.
        neighbours: k.
        model: what gives the embeddings, for messages.
        say: gets a line where something cannot be told.

    Returns:
        `images`; `agreement` with the dense twin as `similarity.agreement`, `neighbour` with its
        95 % interval, or None; `knn` as `_knn`, or None; and the figures of `summarise_costs`.

    Raises:
        UserError: an embedding is zero or not finite.
    """
    images, agreed, has_twin = len(found.labels), None, bool(found.twin.shape[1])
    if has_twin:
        agreed = agreement(found.twin, found.output, model)
        share = agreed.pop("neighbour", None)
        if share is None:
            say(f"{images} picture{'s' * (images > 1)}: nearest neighbours take three or more")
        agreed["neighbour"] = None if share is None else wilson(round(share * images), images)
    return {
        "images": images,
        "agreement": agreed,
        "knn": _knn(found, neighbours, model, say),
        **summarise_costs(found.kept, macs_of(found.kept, config, cuts), config),
    }


def _knn(found: Embedded, neighbours: int, model: str, say: Say) -> dict[str, Any] | None:
    """Leave-one-out accuracy: the label that most of a picture's nearest others have.

    Returns:
        `neighbours`, `classes`, `alone`, the pictures that no other shares a class with, and the
        accuracy of `model` and of `dense`, None without a twin; None where there are no two classes
        to tell apart.
    """
    labels = found.labels
    names, counts = np.unique(labels, return_counts=True)
    if (labels < 0).any():
        return None
    if len(names) < 2:
        say("all pictures are of one class, so that k-NN accuracy would say nothing: left out")
        return None
    if (others := len(labels) - 1) < neighbours:
        say(f"each picture has but {others} others: so many neighbours vote, not {neighbours}")
    if alone := int((counts == 1).sum()):
        say(f"{alone} picture{'s are' if alone > 1 else ' is'} alone in a class, which no "
            "neighbour can tell")  # fmt: skip

    def accuracy(vectors: NDArray[np.float32], whose: str) -> dict[str, float]:
        right = voted(directions(vectors, whose), labels, neighbours) == labels
        return wilson(int(right.sum()), len(labels))

    dense = accuracy(found.twin, f"{model}, dense,") if found.twin.shape[1] else None
    return {"neighbours": min(neighbours, others), "classes": len(names), "alone": alone,
            "model": accuracy(found.output, model), "dense": dense}  # fmt: skip
