"""The pictures that a model is evaluated on, batch by batch, and an account of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from asvit_deploy.classes.matching import label_map
from asvit_deploy.classes.network import ClassNames
from asvit_deploy.data.labelled import LabelledPictures
from asvit_deploy.data.shards import GIVEN
from asvit_deploy.data.skips import Skips
from asvit_deploy.data.sources import DigitsSource, open_labelled
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.accuracy import LabelledArrays
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.status import Say, hide_bar


class EvaluationPictures:
    """A source's held-out pictures as NumPy arrays.

    Args:
        numbers: the label for each class of the data, int64; by default its own numbers.
        skips: which could not be read.

    Attributes:
        counts: pictures of each class of the data that this process had in its last pass; where
            there are no classes, how many there were.
    """

    def __init__(
        self, source: DigitsSource | LabelledPictures, skips: Skips,
        numbers: NDArray[np.int64] | None = None,
    ) -> None:  # fmt: skip
        self.source, self.counts = source, list[int]()
        self._skips, self._numbers = skips, numbers

    def batches(
        self, size: int, limit: int | None, rank: int, world: int, say: Say
    ) -> Iterator[LabelledArrays]:
        """A process's share, under a progress bar."""
        classes = len(self.source.classes)
        seen = np.zeros(classes or 1, np.int64)
        shared = self.source.validation(size, limit, rank, world)
        bar = tqdm(shared, desc=f"evaluate, batch {size}", disable=hide_bar(say), leave=False,
                   unit="batch")  # fmt: skip
        for images, found, _ in bar:
            labels = found.numpy()
            if len(labels):  # or every one of them was skipped
                seen += np.bincount(labels, minlength=classes) if classes else len(labels)
                yield images.numpy(), labels if self._numbers is None else self._numbers[labels]
        self.counts = seen.tolist()

    def account(self, counts: list[list[int]]) -> dict[str, Any]:
        """What was seen against what was taken, for JSON.

        Args:
            counts: every process's.
        """
        per_class = [sum(own) for own in zip(*counts)]
        names = self.source.classes
        return {
            "seen": self.source.held_out,
            "taken": sum(per_class),
            "skipped": len(self._skips),
            "skipped_by_reason": self._skips.by_reason(),
            "passed_over": dict(self.source.passed_over),
            "classes": len(names),
            "classes_without_pictures": [n for n, count in zip(names, per_class) if not count],
        }


def labelled_pictures(
    model: Path, data: str, config: ArchConfig, found: ClassNames | None, skips: Skips, say: Say
) -> EvaluationPictures:
    """The data with the model's own class numbers.

    Args:
        model: for messages.
        found: names of its classes, where they are known.

    Raises:
        UserError: it tells no classes apart, or its classes cannot be matched with the data's.
    """
    count = config.num_classes
    if count == 1:
        raise UserError(
            f"{model} has one output, a score and no class, so there is no top-1; see the scores "
            "with `asvit-deploy predict`"
        )
    ours, firm = (found.names, found.firm) if found else (None, True)
    # Labels of shards are numbers: where nothing names them, the network's own names do.
    source = open_labelled(data, config, skips, ours)
    if source.classes_from == GIVEN:
        say(f"{data} has no classes.txt: its labels are taken as numbers of the outputs")
    try:
        numbers = label_map(source.classes, ours, count, firm, say)
    except UserError as error:
        raise UserError(f"{model} cannot be evaluated on {data}: {error}") from error
    return EvaluationPictures(source, skips, numbers)
