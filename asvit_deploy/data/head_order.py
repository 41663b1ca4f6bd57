"""Classes of the data in the order of the head that learns them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asvit_deploy.checkpoints.load import Checkpoint
from asvit_deploy.classes.matching import label_map
from asvit_deploy.classes.network import of_checkpoint
from asvit_deploy.data.batches import Batch
from asvit_deploy.data.picture_sources import fingerprint
from asvit_deploy.data.sources import Source
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say


class Relabelled:
    """A source with its classes in another order; see `Source`."""

    def __init__(self, source: Source, classes: Sequence[str], classes_from: str) -> None:
        self.name, self.epoch, self._source = source.name, source.epoch, source
        self.classes, self.classes_from = list(classes), classes_from
        self.identity = {**source.identity, "classes": fingerprint(self.classes)}
        places = {name: i for i, name in enumerate(self.classes)}
        self._new = torch.tensor([places[name] for name in source.classes])
        self._old = self._new.argsort()

    def __getattr__(self, name: str) -> Any:
        """Everything else about a source stays."""
        if name.startswith("_"):  # not there yet: it is being unpickled
            raise AttributeError(name)
        return getattr(self._source, name)

    def _relabelled(self, batch: Batch) -> Batch:
        # Mixed pictures have a share of each class, [B, C].
        whole = batch.labels.ndim == 1
        labels = self._new[batch.labels] if whole else batch.labels[:, self._old]
        return batch._replace(labels=labels)

    def train_batch(self, step: int, size: int, part: range | None = None) -> Batch:
        return self._relabelled(self._source.train_batch(step, size, part))

    def fitting(self, count: int, after: int, part: range | None = None) -> Batch:
        return self._relabelled(self._source.fitting(count, after, part))

    def validation(
        self, size: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[Batch]:
        return map(self._relabelled, self._source.validation(size, limit, rank, world))


def in_head_order(
    source: Source, names: Sequence[str] | None, path: Path | None, start: Checkpoint | None,
    say: Say,
) -> Source:  # fmt: skip
    """The source with its classes in the order of the head: as the user names them, or as the
    outputs of the weights that it starts from where these keep their head, or as it is.

    Args:
        names, path: the content of `--classes FILE`, and the file.
        start: the weights.
        say: gets one line on what was taken for what.

    Raises:
        UserError: `names` are not exactly the classes of the data.
    """
    if names is not None and path is not None:
        _require_same(source, names, path)
        source = Relabelled(source, names, f"--classes {path.name}")
    if start is None or start.headless or start.config.num_classes != len(source.classes):
        return source
    order = _outputs(source.classes, start, say, "--classes" if names is not None else None)
    if order is None or names is not None or order == source.classes:
        return source
    say(f"{start.path} keeps its head: classes in the order of its outputs, {order[0]!r} first")
    return Relabelled(source, order, source.classes_from)


def check_teacher(source: Source, teacher: Checkpoint, say: Say) -> None:
    """Refuse a teacher that knows the classes in another order.

    Raises:
        UserError: it does.
    """
    if teacher.config.num_classes != len(source.classes):
        return  # refused where the networks are made
    order = _outputs(source.classes, teacher, say, None)
    if order is not None and order != source.classes:
        i = next(i for i, name in enumerate(order) if name != source.classes[i])
        raise UserError(
            f"{teacher.path} cannot teach: its output {i} is {order[i]!r}, and here that is "
            f"{source.classes[i]!r}; settle the order with --classes FILE, or name another teacher"
        )


def _outputs(
    classes: list[str], network: Checkpoint, say: Say, winner: str | None
) -> list[str] | None:
    """The data's classes in the order of a network's outputs, or None where nothing says it."""
    lines: list[str] = []
    try:
        found = of_checkpoint(network, None, say if winner is None else lines.append)
        ours = found.names if found else None
        numbers = label_map(classes, ours, len(classes), False, lines.append)
    except UserError as error:
        say(f"{network.path} knows other classes, its outputs are taken in order: {error}")
        return None
    order = [classes[i] for i in np.argsort(numbers)]
    if winner is not None:
        if ours is not None and order != classes:
            say(f"{network.path} has its classes in another order ({order[0]!r} first); {winner} "
                "wins")  # fmt: skip
        return order
    for line in lines:
        say(f"{network.path}: {line}")
    return order


def _require_same(source: Source, names: Sequence[str], path: Path) -> None:
    theirs, ours = set(source.classes), set(names)
    if missing := [name for name in source.classes if name not in ours]:
        raise UserError(
            f"{path} lacks the class {missing[0]!r} of {source.name}; name every class of the data"
        )
    if extra := [name for name in names if name not in theirs]:
        raise UserError(
            f"{path} names {extra[0]!r}, of which {source.name} has nothing; name the classes of "
            "the data alone"
        )
