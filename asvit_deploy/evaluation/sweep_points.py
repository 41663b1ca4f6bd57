"""What a sweep runs: at each point an image size, a batch, and tokens that leave on a budget.

Everything that may be refused is found out here, before anything is timed. Thresholds and counts
are fitted for speed alone, to a share of the MACs on the pictures at hand; what they do to the
output is for `calibrate` to look at.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from asvit_deploy import calibration, per_picture
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.artefacts.reference import reference_model
from asvit_deploy.budget import fixed_counts, macs_of
from asvit_deploy.data.images import ImageSet
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.sweep_types import Over
from asvit_deploy.evaluation.timing import run_once
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.precision import FLOAT32
from asvit_deploy.reduction.base import Place, Reduction
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.reduction.topk import TopK
from asvit_deploy.runners.pytorch import TorchRunner

MOST_BATCH, MOST_POINTS = 256, 16
Say = Callable[[str], None]
Number = TypeVar("Number", int, float)
Given = str | float | Iterable[Any] | None


@dataclass(frozen=True)
class Asked:
    """What each sweep goes over: rising, each once; an empty one is not made."""

    batch: tuple[int, ...] = ()
    budget: tuple[float, ...] = ()
    size: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.batch or self.budget or self.size)


def asked(batch: Given = (), budget: Given = (), size: Given = ()) -> Asked:
    """The values given, each a number, or several in a sequence or in a text with commas.

    Raises:
        UserError: one is none that could ever be run.
    """
    return Asked(
        _values("sweep_batch", batch, int, lambda b: 1 <= b <= MOST_BATCH,
                f"whole numbers from 1 to {MOST_BATCH} such as 1,2,4"),
        _values("sweep_budget", budget, float, lambda f: 0 < f < 1,
                "numbers between 0 and 1 such as 0.5,0.65"),
        _values("sweep_size", size, int, lambda s: s > 0, "pixels such as 160,224"),
    )  # fmt: skip


def _values(
    name: str, given: Given, kind: type[Number], fits: Callable[[Number], bool], such: str
) -> tuple[Number, ...]:
    if given is None:
        return ()
    if isinstance(given, str):
        items: list[Any] = given.split(",")
    else:
        items = list(given) if isinstance(given, Iterable) else [given]
    found = set()
    for item in items:
        try:
            value = _number(kind, item)
        except (ValueError, TypeError, OverflowError):
            value = None
        if value is None or not fits(value):
            raise UserError(f"{name} has {str(item)[:40]!r}; give {such}")
        found.add(value)
    if len(found) > MOST_POINTS:
        raise UserError(f"{name} has {len(found)} values; give {MOST_POINTS} at most")
    return tuple(sorted(found))


def _number(kind: type[Number], item: Any) -> Number:
    """Raises ValueError, TypeError or OverflowError where it is no such number."""
    if isinstance(item, bool):
        raise TypeError(item)
    return kind(item if isinstance(item, str) or kind is float else operator.index(item))


class FixedScore(TopK):
    """AS-ViT's own cuts and scores with fixed counts: its static form, for timing alone."""

    place: ClassVar[Place] = "before"

    @classmethod
    def usual_blocks(cls, stages: tuple[int, ...], depth: int) -> tuple[int, ...]:
        return stages


@dataclass(frozen=True)
class Point:
    """What runs at one value of a sweep.

    Attributes:
        at: the value.
        batch: pictures that are run at once.
        config: at the point's image size.
        adaptive: how tokens leave.
        static: the same ranking with fixed counts at its mean MACs, or None.
        macs: of each picture, that of the method included: float64 [images].
        kept: image rows behind each cut, means.
        asked: the share of the MACs that it was fitted to; None where it is the artefact's own.
        notes: what there is not, and why.
    """

    at: float
    batch: int
    config: ArchConfig
    adaptive: Reduction
    static: Ranked | None
    macs: NDArray[np.float64]
    kept: list[float]
    asked: float | None
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """Mean MACs as budgets have them."""
        return float(self.macs.mean()) / teacher_macs(self.config)


@dataclass(frozen=True)
class Plan:
    """A sweep that can be run."""

    over: Over
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()


def plans(artefact: OnnxArtefact, pictures: ImageSet, wanted: Asked, say: Say) -> list[Plan]:
    """Each sweep that is wanted, with what it runs; PyTorch looks at every picture for it.

    Raises:
        UserError: the artefact is dense or its checkpoint gone; or a value that cannot be made of
            it: a batch of more pictures than there are, or of int8, a budget out of its method's
            reach, a size that its patches do not divide or that the memory here does not hold.
    """
    if not wanted:
        return []
    require_sweepable(artefact, wanted)
    for batch in wanted.batch:
        if batch > len(pictures):
            raise UserError(
                f"sweep_batch has {batch}, and there are {len(pictures)} pictures; give more of "
                "them, or smaller batches"
            )
    return _Planned(artefact, pictures, say).plans(wanted)


def require_sweepable(artefact: OnnxArtefact, wanted: Asked) -> None:
    """Find out without a picture whether sweeps can be made of an artefact.

    Raises:
        UserError: it is dense, a batch is not for int8, its patches do not divide a size, or a
            value takes more memory than there is.
    """
    if not artefact.adaptive:
        raise UserError(
            f"{artefact.path} is dense: there is nothing to sweep over, all its tokens stay; name "
            "an adaptive file"
        )
    for size in wanted.size:
        config = _of(f"{artefact.path}: sweep_size {size}", partial(artefact.config.at, size))
        _require_memory(config, 1, f"sweep_size {size}")
    for batch in wanted.batch:
        if batch > 1 and artefact.fields["precision"] != FLOAT32.name:
            raise UserError(
                f"sweep_batch has {batch}, and {artefact.path} computes in "
                f"{artefact.fields['precision']}, for one picture: in a batch, ranges of one would "
                "round the others; name a float32 file, or leave the sweep out"
            )
        _require_memory(artefact.config, batch, f"sweep_batch {batch}")


def _require_memory(config: ArchConfig, batch: int, name: str) -> None:
    """Refuse what would end the process: attention over all rows, and the widest tokens."""
    rows = config.rows
    values = batch * (3 * config.heads * rows**2 + 6 * rows * (config.hidden + config.dim))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * values > there // 2:
        raise UserError(
            f"{name} would take about {4 * values / 2**30:.0f} GiB for {rows} rows in "
            f"{config.heads} heads, over half of this machine's memory; give smaller values"
        )


def _of(name: str, make: Callable[[], Any]) -> Any:
    """What is made; an error says for which value."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def lengths_of(network: ViT, images: Sequence[NDArray[np.float32]]) -> NDArray[np.int64]:
    """Rows behind each cut, prefix included, int64 [images, cuts]."""
    return run_once(TorchRunner(network), images)[1]


class _Planned:
    """One artefact's sweeps."""

    def __init__(self, artefact: OnnxArtefact, pictures: ImageSet, say: Say) -> None:
        self.artefact, self.pictures, self.say = artefact, pictures, say
        network = artefact.reference
        assert network.reduction is not None
        self.reduction = network.reduction
        self.config = network.config
        self.images = [pictures[i] for i in range(len(pictures))]
        self.lengths = lengths_of(network, self.images)
        macs = macs_of(self.config, self.reduction, self.lengths)
        self.share = float(macs.mean()) / teacher_macs(self.config)

    def plans(self, wanted: Asked) -> list[Plan]:
        made = []
        if wanted.batch:
            own = self._point(0, 1, self.config, self.reduction, self.lengths, None)
            points = [replace(own, at=batch, batch=batch) for batch in wanted.batch]
            made.append(Plan("batch", tuple(points)))
        if wanted.budget:
            dense = self.artefact.dense_reference
            points = [self._refitted(f, dense, self.images, f, "budget") for f in wanted.budget]
            made.append(Plan("budget", tuple(points), (self._fitted_note(),)))
        if wanted.size:
            points = [self._at_size(size) for size in wanted.size]
            fitted = any(point.asked is not None for point in points)
            made.append(Plan("size", tuple(points), (self._fitted_note(),) * fitted))
        return made

    def _fitted_note(self) -> str:
        what = "counts" if not self.reduction.boundaries() else "thresholds"
        return (
            f"{what} are fitted to a share of the MACs on these pictures, for speed only: what "
            "they do to the output is for `calibrate` to see"
        )

    def _at_size(self, size: int) -> Point:
        if size == self.config.image_size:
            return self._point(size, 1, self.config, self.reduction, self.lengths, None)
        fields = {**self.artefact.checkpoint_fields, "image_size": size}
        dense = reference_model(self.artefact.path, fields, dense=True)
        shown = at_size(self.pictures, dense.config)
        images = [shown[i] for i in range(len(shown))]
        return self._refitted(size, dense, images, self.share, "size")

    def _refitted(
        self, at: float, dense: ViT, images: Sequence[NDArray[np.float32]], share: float, over: Over
    ) -> Point:
        self.say(f"{self.artefact.path}: fitting {share:.3f} of the MACs for {over} {at:g}")
        name = f"{self.artefact.path}: sweep_{over} {at:g}"
        made = _of(name, partial(self._fitted, dense, images, share))
        lengths = lengths_of(dense.with_reduction(made), images)
        return self._point(at, 1, dense.config, made, lengths, share)

    def _fitted(self, dense: ViT, images: Sequence[NDArray[np.float32]], share: float) -> Reduction:
        """The artefact's own method at another share of the MACs, cut at the same blocks.

        AS-ViT's thresholds keep the way in which its stages share the reduction out; what bounds
        the counts of pictures stays as far above the mean as it was.
        """
        own, config = self.reduction, dense.config
        if isinstance(own, Threshold):
            split = split_of(config.prefix, self.config.image_tokens, self.lengths)
            found = calibration.on_budget(dense, images, share, split)
            made = Threshold(own.blocks, config.prefix)
            for threshold, value in zip(made, found.thresholds):
                threshold.data.fill_(value)
            return made
        if isinstance(own, Ranked) and own.kept is not None:
            return fixed_counts(config, type(own), share, own.blocks).taught_by(own)
        if len(images) < calibration.MIN_IMAGES:
            raise UserError(
                f"{len(images)} images are too few to fit thresholds on; give at least "
                f"{calibration.MIN_IMAGES}"
            )
        if not isinstance(own, Ranked):
            return per_picture.fit_pairs(dense, images, share, own.blocks)
        plan = fixed_counts(config, type(own), share, own.blocks)
        bound = self._bound(own, plan, config)
        taught = dense.with_reduction(own)
        return per_picture.fit(taught, type(own), images, share, own.blocks, bound)

    def _bound(self, own: Ranked, plan: Ranked, config: ArchConfig) -> int | None:
        """Rows that a picture keeps at most, as far above the mean ones as the artefact's are."""
        if own.most is None:
            return None
        before = fixed_counts(self.config, type(own), self.share, own.blocks).kept
        assert before is not None
        assert plan.kept is not None
        image = math.ceil(plan.kept[-1] * max(own.most[-1] / before[-1], 1))
        image = max(min(image, config.image_tokens), plan.kept[-1] + 1)
        return config.prefix + own.appends + image

    def _point(
        self, at: float, batch: int, config: ArchConfig, reduction: Reduction,
        lengths: NDArray[np.int64], share: float | None,
    ) -> Point:  # fmt: skip
        macs = macs_of(config, reduction, lengths)
        static, notes = static_rival(config, reduction, float(macs.mean()) / teacher_macs(config))
        kept = (lengths.mean(axis=0) - config.prefix).tolist()
        return Point(at, batch, config, reduction, static, macs, kept, share, notes)


def at_size(pictures: ImageSet, config: ArchConfig) -> ImageSet:
    """The same pictures, decoded for another image size."""
    return ImageSet(pictures.views, pictures.source, config)


def split_of(prefix: int, tokens: int, lengths: NDArray[np.int64]) -> tuple[float, ...]:
    """How stages share a reduction out, as `calibration.candidate_splits` has it.

    Args:
        tokens: image tokens that come to the first stage.
        lengths: rows behind each, int64 [images, stages].
    """
    kept = np.concatenate([[tokens], lengths.mean(axis=0) - prefix])
    parts = np.log(kept[:-1] / kept[1:])
    whole = parts.sum()
    stages = len(parts)
    return tuple(float(p / whole) if whole > 0 else 1 / stages for p in parts)


def static_rival(
    config: ArchConfig, reduction: Reduction, share: float
) -> tuple[Ranked | None, tuple[str, ...]]:
    """The same ranking with fixed counts at those mean MACs, or why there is none."""
    if not reduction.boundaries():
        return None, ("no static rows: it keeps as many tokens of every picture itself",)
    method = FixedScore if isinstance(reduction, Threshold) else type(reduction)
    if not issubclass(method, Ranked):
        return None, (f"no static rows: {method.name} has no fixed counts",)
    try:
        made = fixed_counts(config, method, share, reduction.blocks)
        return made.taught_by(reduction), ()
    except UserError as error:
        return None, (f"no static rows: {error}",)
