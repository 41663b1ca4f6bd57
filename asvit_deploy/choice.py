"""Which method holds on a network without training: chosen on some pictures, judged on others.

Size-passing with fixed counts is where one starts. It is left for another method only where,
picture by picture, the other is closer to the dense network beyond what chance explains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asvit_deploy import per_picture, settling, similarity
from asvit_deploy.budget import fixed_counts, macs_of
from asvit_deploy.calibration import MIN_IMAGES, Outcome, agreement_of
from asvit_deploy.distance import distance, measure
from asvit_deploy.errors import UserError
from asvit_deploy.models.macs import dense_macs, teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.reduction.baselines import Random
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.schedule import Schedule
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.tome import ToMe
from asvit_deploy.reduction.topk import TopKNearest

FIRST = SizePassing
CHALLENGERS: tuple[type[Ranked], ...] = (ToMe, TopKNearest)
CHOOSING = 64  # pictures at most
_SHARE = 0.975  # of each interval: with two challengers, 95 % that neither wins by chance

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Choice:
    """A method on budget, and the figures it reached (JSON-ready)."""

    reduction: Reduction
    report: dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        method: the one to take; None: the best of `FIRST` and `CHALLENGERS`.
        budget: f, as `budget.fixed_counts` has it.
        blocks: where it cuts; by default at its usual ones.
        per_picture: thresholds in place of fixed counts.
        max_kept: as `per_picture.fit`.
    """

    method: type[Reduction] | None
    budget: float
    blocks: tuple[int, ...] | None = None
    per_picture: bool = False
    max_kept: int | None = None


def choose(
    model: ViT, images: Sequence[np.ndarray], wanted: Wanted,
    progress: Progress = lambda done, total: None,
) -> Choice:  # fmt: skip
    """Choose a method on every second picture, at most `CHOOSING`, and judge it on all others.

    Args:
        model: in eval mode; of its own reduction, if any, what it learned beside thresholds is
            taken over.
        images: float32 [3, H, W] each, normalised; at least `MIN_IMAGES`.
        progress: called with how many passes of an image are done, of how many.

    Returns:
        Each difference in the report is in the distance from the dense network, picture by picture:
        KL(dense || method) in nats, 1 - cosine of embeddings, |difference| of a single logit.

    Raises:
        UserError: too few images, or a budget, cuts or a bound that the method cannot meet.
    """
    if len(images) < MIN_IMAGES:
        raise UserError(
            f"{len(images)} images are too few to calibrate on; give at least {MIN_IMAGES}"
        )
    with torch.inference_mode():
        return _Trial(model, images, wanted, progress).made()


class _Trial:
    def __init__(
        self, model: ViT, images: Sequence[np.ndarray], wanted: Wanted, progress: Progress
    ) -> None:
        self.model, self.images, self.wanted = model, images, wanted
        self.config = model.config
        count = len(images)
        picked = range(0, count, max(2, -(-count // CHOOSING)))
        self.choosing = list(picked)
        self.judging = sorted(set(range(count)) - set(picked))
        self.out_of_reach: dict[str, str] = {}
        asked: tuple[type[Reduction], ...] = (FIRST, *CHALLENGERS)
        if wanted.method is not None:
            asked = (wanted.method,)
        self.done, self.progress = 0, progress
        # Dense, chance, every contender, and thresholds: fitted on some and carried out on others.
        self.total = (len(asked) + 3) * count
        self.total += sum(map(settling.passes, asked)) * len(self.choosing)
        self.tried = self._contenders(asked)

    def _contenders(self, asked: Sequence[type[Reduction]]) -> dict[str, Reduction]:
        """The methods on budget; of what is not asked for by name, those that reach it."""
        wanted, found = self.wanted, dict[str, Reduction]()
        some = [self.images[i] for i in self.choosing]
        for method in asked:
            try:
                found[method.name] = settling.on_budget(
                    self.model, method, some, wanted.budget, wanted.blocks, self._tick
                )
            except UserError as error:
                self.out_of_reach[method.name] = str(error)
        if not found:
            raise UserError(self.out_of_reach[asked[0].name])
        return found

    def _tick(self) -> None:
        self.done += 1
        self.progress(min(self.done, self.total), self.total)

    def _carried_out(self, reduction: Reduction | None, which: Sequence[int]) -> Outcome:
        network = self.model.with_reduction(reduction)
        return carried_out_on(network, (self.images[i] for i in which), self._tick)

    def made(self) -> Choice:
        every = range(len(self.images))
        dense = self._carried_out(None, every).output
        found = {name: self._carried_out(one, every) for name, one in self.tried.items()}
        apart = {name: distance(self.config, dense, one.output) for name, one in found.items()}
        name, why = chosen({other: values[self.choosing] for other, values in apart.items()})
        rows = {
            other: self._row(one, found[other], dense, apart[other], apart[name])
            for other, one in self.tried.items()
        }
        method = type(self.tried[name])
        chance = fixed_counts(self.config, Random, self.wanted.budget, self.tried[name].blocks)
        beside = self._carried_out(chance, every)
        rows[Random.name] = self._row(
            chance, beside, dense, distance(self.config, dense, beside.output), apart[name]
        )
        adaptive, thresholds, no_thresholds = None, None, None
        if method is Schedule:  # what the search brought
            one_ratio = fixed_counts(self.config, Schedule, self.wanted.budget, self.wanted.blocks)
            name_of_it, start = f"{Schedule.name}, one ratio", self._carried_out(one_ratio, every)
            rows[name_of_it] = self._row(
                one_ratio, start, dense, distance(self.config, dense, start.output), apart[name]
            )
        if method.adapts or self.wanted.per_picture:
            try:
                adaptive, thresholds = self._by_thresholds(method, dense, apart[name])
            except UserError as error:
                if self.wanted.per_picture:
                    raise
                no_thresholds = str(error)
        reduction = adaptive if self.wanted.per_picture and adaptive else self.tried[name]
        report = {
            "method": name, "per_picture": bool(reduction.boundaries()), "why": why,
            "budget": self.wanted.budget, "images": len(self.images),
            "choosing_images": len(self.choosing), "judging_images": len(self.judging),
            "measure": measure(self.config), "blocks": list(reduction.blocks),
            "methods": rows, "out_of_reach": self.out_of_reach, "thresholds": thresholds,
            "no_thresholds": no_thresholds,
        }  # fmt: skip
        own = thresholds if self.wanted.per_picture and thresholds else rows[name]
        report |= {key: own[key] for key in ("macs_ratio", "kept_tokens", "agreement")}
        dense_share = dense_macs(self.config) / teacher_macs(self.config)
        report["macs_ratio_to_dense"] = own["macs_ratio"] / dense_share
        return Choice(reduction, report)

    def _row(
        self, reduction: Reduction, outcome: Outcome, dense: Tensor, apart: NDArray[np.float64],
        chosen: NDArray[np.float64],
    ) -> dict[str, Any]:  # fmt: skip
        """What a method costs, keeps and gets right on the pictures that judge."""
        config, judged = self.config, self.judging
        lengths = outcome.lengths[judged]
        kept = lengths - config.prefix - reduction.appends
        macs = macs_of(config, reduction, lengths)
        return {
            "macs_ratio": float(np.mean(macs)) / teacher_macs(config),
            "kept_tokens": [
                {"mean": float(k.mean()), "min": int(k.min()), "max": int(k.max())} for k in kept.T
            ],
            "agreement": agreement_of(config, dense[judged], outcome.output[judged]),
            "distance": _mean(apart[judged]),
            "choosing_distance": _mean(apart[self.choosing]),
            "behind_chosen": _mean((apart - chosen)[judged]),
        }

    def _by_thresholds(
        self, method: type[Reduction], dense: Tensor, fixed: NDArray[np.float64]
    ) -> tuple[Reduction, dict[str, Any]]:
        """The method picture by picture: what that brings at equal mean MACs, and its drift."""
        wanted, config = self.wanted, self.config
        made = per_picture.fit(
            self.model, method, [self.images[i] for i in self.choosing], wanted.budget,
            wanted.blocks, wanted.max_kept, self._tick,
        )  # fmt: skip
        outcome = self._carried_out(made, range(len(self.images)))
        apart = distance(config, dense, outcome.output)
        row = self._row(made, outcome, dense, apart, fixed)
        row["gain"] = _mean((fixed - apart)[self.judging])
        row["drift"] = row["macs_ratio"] / wanted.budget - 1
        row["values"] = [boundary.item() for boundary in made.boundaries()]
        return made, row


@torch.inference_mode()
def carried_out_on(
    network: ViT, images: Iterable[np.ndarray], tick: Callable[[], object] = lambda: None
) -> Outcome:
    """What a network makes of pictures, float32 [3, H, W] each, one at a time.

    Args:
        tick: called once for each.
    """
    outputs, lengths = list[Tensor](), list[list[int]]()
    for image in images:
        output, trace = network(torch.from_numpy(image)[None])
        outputs.append(output)
        lengths.append([int(length) for length in trace.length])
        tick()
    return Outcome(np.array(lengths, np.int64).reshape(len(lengths), -1), torch.cat(outputs))


def chosen(apart: dict[str, NDArray[np.float64]]) -> tuple[str, str]:
    """The name of the method, and why it is that one.

    Args:
        apart: `distance` of each method on the pictures that choose, the first where one starts.
    """
    first, *others = apart
    if not others:
        return first, "asked for"
    better = {}
    for other in others:
        gain = apart[first] - apart[other]
        if similarity.mean_interval(gain, _SHARE)[0] > 0:
            better[other] = float(gain.mean())
    if not better:
        return first, f"no other is closer to the dense network beyond chance than {first}"
    best = max(better, key=lambda other: better[other])
    return best, f"closer to the dense network than {first} on the pictures that choose"


def _mean(values: NDArray[np.float64]) -> dict[str, float]:
    low, high = similarity.mean_interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}
