"""The pictures of a run: which calibrate, which judge, and what is odd about them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.calibration import MIN_IMAGES
from asvit_deploy.classes.network import ClassNames
from asvit_deploy.data.images import open_images, pictures_below
from asvit_deploy.data.skips import Skips
from asvit_deploy.data.sources import DigitsSource
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import dense_macs
from asvit_deploy.status import Say

FEWEST = 2 * MIN_IMAGES
DIGITS = "digits"
_Read = tuple[NDArray[np.float32], list[str], NDArray[np.int64] | None, str, dict[str, Any]]
# What a pass of the dense network over one part takes at most, unless more pictures are asked for.
_CALIBRATING, _JUDGING = 6e11, 4e11  # MACs
_PLAIN = 0.05  # of two pictures' difference over the spread of one: they are alike


@dataclass(frozen=True)
class Pictures:
    """Pictures as the network takes them, each once.

    Attributes:
        images: float32 [n, 3, H, W].
        names: of each.
        labels: int64 [n], the network's own class numbers; None where nobody asked for them.
        source: one line on where they come from.
        account: as `ImageSet.account`.
        calibrating, judging: their places; no picture is in both.
        notes: what is odd about them.
    """

    images: NDArray[np.float32]
    names: list[str]
    labels: NDArray[np.int64] | None
    source: str
    account: dict[str, Any]
    calibrating: NDArray[np.int64]
    judging: NDArray[np.int64]
    notes: list[str] = field(default_factory=list)

    def part(self, which: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        return [self.images[i] for i in which]

    def labels_of(self, which: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return None if self.labels is None else self.labels[which]

    def fingerprint(self) -> str:
        """sha256 of the pictures as they are taken, their labels and their parts."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        for image in self.images:
            digest.update(image.tobytes())
        for numbers in (self.labels, self.calibrating, self.judging):
            digest.update(b"none" if numbers is None else numbers.tobytes())
        return digest.hexdigest()

    def fields(self) -> dict[str, Any]:
        return {"source": self.source, "taken": len(self.images),
                "calibrating": len(self.calibrating), "judging": len(self.judging),
                "labelled": self.labels is not None, **self.account}  # fmt: skip


def sizes_of(config: ArchConfig) -> tuple[int, int]:
    """How many pictures calibrate at most, and how many judge unless more are asked for.

    650 can show half a point: 598 are the fewest whose bound lies there, without one disagreement;
    947 allow one.
    """
    macs = dense_macs(config)
    embeds = config.output == "embedding"
    calibrating = int(np.clip(_CALIBRATING / macs, 32, 96))
    judging = int(np.clip(_JUDGING / macs, *((96, 650) if embeds else (650, 950))))
    return calibrating, judging


def read(
    model: Path, data: Path | None, config: ArchConfig, found: ClassNames | None, labelled: bool,
    limit: int | None, skip_limit: int, seed: int, say: Say,
) -> Pictures:  # fmt: skip
    """Every picture that a run takes, in memory, parted by a seed.

    Args:
        model: for messages.
        data: a folder, a file, or "digits"; None: the photographs of scikit-image.
        found: names of the network's classes, where they are known.
        labelled: take the labels too: folders are classes.
        limit: of pictures; by default as many as `sizes_of` says.

    Raises:
        UserError: there are too few, they cannot be read, or their labels fit no class.
    """
    calibrating, judging = sizes_of(config)
    most = limit or calibrating + judging
    skips = Skips(skip_limit, say)
    labels: NDArray[np.int64] | None
    if labelled or _is_digits(data):
        images, names, labels, source, account = _of_classes(
            model, data, config, found, most, skips, say, labelled
        )
    else:
        shown = open_images(data, config, most, skip_limit, say)
        given, names = shown.loaded()
        images, labels, source, account = np.stack(given), None, shown.source, shown.account
        if limit is None and len(shown.names) == most and _more_in(data, most):
            say(f"{source}: enough for this network; --limit takes more")
    kept = _different(images)
    notes = list[str]()
    if len(kept) < len(images):
        gone = len(images) - len(kept)
        notes.append(
            f"{gone} picture{'s are' if gone > 1 else ' is'} the same as another, pixel for pixel, "
            "and left out: what one shows the other shows too"
        )
    if len(kept) < FEWEST:
        of = f" ({len(images)} were found, {len(kept)} of them distinct)"
        of = of if len(kept) < len(images) else ""
        raise UserError(
            f"{len(kept)} picture{'s' * (len(kept) != 1)} of {source} cannot both calibrate and "
            f"judge{of}; give at least {FEWEST} different ones with --images"
        )
    images, names = images[kept], [names[i] for i in kept]
    labels = None if labels is None else labels[kept]
    if _alike(images):
        notes.append(
            "the pictures are nearly all alike, so that kept tokens hardly vary: what is found "
            "holds for pictures like these alone"
        )
    if data is None:
        notes.append(
            "the pictures are crops of few photographs, which are no independent sample; bounds "
            "hold for your own with --images"
        )
    parts = _parted(len(images), calibrating, seed)
    return Pictures(images, names, labels, source, account, *parts, notes)


def _more_in(data: Path | None, most: int) -> bool:
    """Whether a folder holds more pictures than that."""
    return data is not None and data.is_dir() and len(pictures_below(data).names) > most


def _is_digits(data: Path | None) -> bool:
    return data is not None and str(data) == DIGITS and not data.exists()


def _of_classes(
    model: Path, data: Path | None, config: ArchConfig, found: ClassNames | None, most: int,
    skips: Skips, say: Say, labelled: bool,
) -> _Read:  # fmt: skip
    """Pictures of class folders or of shards, or digits."""
    from asvit_deploy.evaluation.pictures import EvaluationPictures, labelled_pictures

    if data is None:
        raise UserError("--labels takes the folders of --images as classes; pass --images too")
    if labelled:
        shown = labelled_pictures(model, str(data), config, found, skips, say)
    else:
        shown = EvaluationPictures(DigitsSource(config, 0), skips)
    for note in shown.source.notes:
        say(note)
    batches = list(shown.batches(64, most, 0, 1, say))
    if not batches:
        raise UserError(f"none of the pictures in {data} can be read")
    images = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    account = {key: value for key, value in shown.account([shown.counts]).items()
               if key in ("skipped", "skipped_by_reason", "passed_over")}  # fmt: skip
    of = shown.source.held_out
    source = f"{len(images)}{f' of {of}' * (of not in (None, len(images)))} pictures in {data}"
    names = [f"picture {i}" for i in range(len(images))]
    return images, names, labels if labelled else None, source, account


def _different(images: NDArray[np.float32]) -> list[int]:
    """Places of pictures that none before them equals."""
    seen, kept = set[bytes](), []
    for i, image in enumerate(images):
        key = hashlib.sha256(image.tobytes()).digest()
        if key not in seen:
            seen.add(key)
            kept.append(i)
    return kept


def _alike(images: NDArray[np.float32]) -> bool:
    """Whether pictures differ from the first by less than a twentieth of its own spread."""
    first = images[0]
    spread = float(first.std()) or 1.0
    apart = [float(np.sqrt(np.square(image - first).mean())) for image in images[1:]]
    return float(np.median(apart)) < _PLAIN * spread


def _parted(
    count: int, most: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # fmt: skip
    """Half of the pictures calibrate, `most` of them at most, and all others judge."""
    order = np.random.default_rng(seed).permutation(count)
    first = min(most, count // 2)
    return np.sort(order[:first]), np.sort(order[first:])


def more_pictures(have: int, calibrating: int, judging: int, most: int) -> int:
    """How many more pictures a folder must hold for so many more to judge.

    Args:
        have: pictures now.
        calibrating: of them that do not judge; half, until `most` do.
        judging: that must judge.
    """
    total = have
    while total - min(most, total // 2) < judging:
        total += max(1, (judging - (total - min(most, total // 2))))
    return total - have


def even(items: Sequence[int] | NDArray[np.int64], count: int) -> list[int]:
    """So many of the items at most, spread evenly."""
    taken = min(count, len(items))
    return [int(items[i * len(items) // taken]) for i in range(taken)]
