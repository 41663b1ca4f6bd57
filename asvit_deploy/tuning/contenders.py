"""Ways to meet a budget, fitted and compared on the pictures that calibrate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asvit_deploy import calibration, per_picture, settling, similarity
from asvit_deploy.budget import macs_of
from asvit_deploy.choice import CHALLENGERS, FIRST, carried_out_on
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.reduction.methods import METHODS, restored
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.tuning.demand import Evidence, evidence
from asvit_deploy.tuning.store import Store

PER_PICTURE = "per picture"
_HARDLY = 0.02  # of the mean: the spread of kept tokens behind the last cut


@dataclass(frozen=True)
class Way:
    """A method, where it cuts, and whether each picture has its own count.

    Attributes:
        blocks: None: the method's usual ones.
    """

    method: str
    blocks: tuple[int, ...] | None = None
    per_picture: bool = False

    @property
    def name(self) -> str:
        own = f", {PER_PICTURE}" if self.per_picture and self.method != Threshold.name else ""
        at = "" if self.blocks is None else f", in blocks {_listed(self.blocks)}"
        return f"{self.method}{own}{at}"

    def fields(self) -> dict[str, Any]:
        return {"method": self.method, "per_picture": self.per_picture,
                "blocks": None if self.blocks is None else list(self.blocks)}  # fmt: skip


def _listed(blocks: Sequence[int]) -> str:
    """0,2,4 or, where they follow one another, 3-10."""
    whole = list(blocks) == list(range(blocks[0], blocks[-1] + 1))
    return f"{blocks[0]}-{blocks[-1]}" if whole and len(blocks) > 2 else ",".join(map(str, blocks))


@dataclass(frozen=True, eq=False)
class Candidate:
    """One network with its tokens leaving, and what it did to the calibrating pictures.

    Attributes:
        budget: what it was fitted to; None: it is the checkpoint's own, trained or calibrated.
        reduction: with its thresholds.
        share: mean MACs over the dense ones as budgets count them.
        kept: image tokens behind each cut, means.
        spread: standard deviation of the kept tokens behind the last cut, over their mean.
        seen: its answers beside the dense twin's.
    """

    way: Way
    budget: float | None
    reduction: Reduction
    share: float
    kept: list[float]
    spread: float
    seen: Evidence

    @property
    def name(self) -> str:
        at = f"own {self.share:.3f}" if self.budget is None else f"{self.budget:g}"
        return f"{self.way.name} at {at}"

    @property
    def varies(self) -> bool:
        """Whether pictures keep counts of their own, as far as they may."""
        return bool(self.reduction.boundaries()) and self.spread >= _HARDLY

    def fields(self) -> dict[str, Any]:
        return {
            "name": self.name, "budget": self.budget, "own": self.budget is None,
            **self.way.fields(), "cuts": list(self.reduction.blocks), "macs_share": self.share,
            "kept_tokens": self.kept, "spread": self.spread,
            "thresholds": [one.item() for one in self.reduction.boundaries()],
            "distance": float(self.seen.apart.mean()),
        }  # fmt: skip


class Refusal(UserError):
    """A way that cannot be taken, which is an outcome as any other: the search goes on."""


class Bench:
    """The calibrating pictures and the dense network, and what is tried on them.

    Args:
        dense: in eval mode.
        pictures: float32 [3, H, W] each.
        labels: of each, int64, or None.
        tick: called once for each pass of a picture.

    Attributes:
        seconds: that a pass of one picture through one contender took so far, on average.
    """

    def __init__(
        self, dense: ViT, pictures: Sequence[NDArray[np.float32]],
        labels: NDArray[np.int64] | None, store: Store,
        tick: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self.dense, self.pictures, self.labels, self.store = dense, pictures, labels, store
        self.config: ArchConfig = dense.config
        self.tick, self.seconds = tick, 0.0
        self._twin: NDArray[np.float32] | None = None

    def twin(self) -> NDArray[np.float32]:
        """The dense network's outputs [pictures, C]."""
        if self._twin is None:
            outcome = carried_out_on(self.dense, self.pictures, self.tick)
            self._twin = outcome.output.numpy()
        return self._twin

    def fitted(self, way: Way, budget: float) -> Candidate:
        """A way on a budget, tried.

        Raises:
            Refusal: it cannot meet the budget, or these pictures do not let it.
            UserError: what was found cannot be kept.
        """
        settings = {"step": "fitted", **way.fields(), "budget": budget}
        found = self.store.measured(settings, lambda: self._try(lambda: self._fit(way, budget)))
        if "refused" in found:
            raise Refusal(found["refused"])
        return self._candidate(way, budget, found)

    def own(self, reduction: Reduction) -> Candidate:
        """The checkpoint's own reduction, tried.

        Raises:
            Refusal: its outputs cannot be compared.
            UserError: what was found cannot be kept.
        """
        fixed = not reduction.boundaries()
        way = Way(reduction.name, tuple(reduction.blocks), not fixed)
        found = self.store.measured(
            {"step": "own", "reduction": state_of(reduction)}, lambda: self._try(lambda: reduction)
        )
        if "refused" in found:
            raise Refusal(found["refused"])
        return self._candidate(way, None, found)

    def _try(self, make: Callable[[], Reduction]) -> dict[str, Any]:
        """JSON-ready; a refusal is an outcome too."""
        self.twin()
        start = time.perf_counter()
        try:
            reduction = make()
        except UserError as error:
            for _ in self.pictures:
                self.tick()
            return {"refused": str(error)}
        outcome = carried_out_on(self.dense.with_reduction(reduction), self.pictures, self.tick)
        self.seconds = (time.perf_counter() - start) / len(self.pictures)
        try:
            seen = evidence(self.config, self.twin(), outcome.output.numpy(), self.labels)
        except UserError as error:  # such as an embedding without a direction
            return {"refused": str(error)}
        macs = macs_of(self.config, reduction, outcome.lengths)
        kept = outcome.lengths - self.config.prefix
        last = kept[:, -1]
        return {
            "reduction": state_of(reduction), "seen": seen.fields(),
            "share": float(macs.mean()) / teacher_macs(self.config),
            "kept": kept.mean(axis=0).tolist(), "spread": float(last.std() / last.mean()),
        }  # fmt: skip

    def _candidate(self, way: Way, budget: float | None, found: Mapping[str, Any]) -> Candidate:
        return Candidate(
            way, budget, reduction_of(found["reduction"], self.config.prefix), found["share"],
            found["kept"], found["spread"], Evidence.of_fields(found["seen"]),
        )  # fmt: skip

    def _fit(self, way: Way, budget: float) -> Reduction:
        config = self.config
        if way.method == Threshold.name:
            result = calibration.calibrate(self.dense, self.pictures, budget)
            return with_values(Threshold(config.stages, config.prefix), result.thresholds)
        method = METHODS[way.method]
        if way.per_picture:
            return per_picture.fit(self.dense, method, self.pictures, budget, way.blocks)
        return settling.on_budget(self.dense, method, self.pictures, budget, way.blocks)


def state_of(reduction: Reduction) -> dict[str, Any]:
    """What `reduction_of` makes it from again, JSON-ready: of methods that learn numbers alone."""
    own = {id(boundary) for boundary in reduction.boundaries()}
    learned = {name: value.item() for name, value in reduction.named_parameters()
               if id(value) not in own}  # fmt: skip
    return {"fields": reduction.fields(), **({"learned": learned} if learned else {}),
            "thresholds": [one.item() for one in reduction.boundaries()]}  # fmt: skip


def reduction_of(state: Mapping[str, Any], prefix: int) -> Reduction:
    made = restored(state["fields"], prefix)
    learned = {name: torch.tensor(value) for name, value in state.get("learned", {}).items()}
    made.load_state_dict(learned, strict=False)
    return with_values(made, state["thresholds"])


def with_values(reduction: Reduction, values: Sequence[float]) -> Reduction:
    with torch.no_grad():
        for boundary, value in zip(reduction.boundaries(), values, strict=True):
            boundary.fill_(value)
    return reduction


def usual_ways(config: ArchConfig, methods: Sequence[str]) -> list[Way]:
    """What is tried at each budget.

    Args:
        methods: names of `METHODS`; none: those of `choice`, and its first one picture by picture.
    """
    if not methods:
        first: tuple[type[Ranked], ...] = (FIRST, *CHALLENGERS)
        found = [Way(method.name) for method in first]
        found = [way for way in found if METHODS[way.method].carries_sizes or not config.averages]
        return [*found, Way(FIRST.name, per_picture=True)]
    ways = []
    for name in methods:
        if name == Threshold.name:
            ways.append(Way(name, per_picture=True))
            continue
        ways.append(Way(name))
        if METHODS[name].adapts:
            ways.append(Way(name, per_picture=True))
    return ways


def other_placements(config: ArchConfig, way: Way) -> list[Way]:
    """The same method with its cuts elsewhere: every second block of its usual ones, none in the
    first quarter of the network, and at the architecture's stages."""
    if way.method == Threshold.name:  # its stages are the architecture's
        return []
    method = METHODS[way.method]
    usual = method.usual_blocks(config.stages, config.depth)
    # Cuts inside a block come before its second half: the stages' tokens leave one half earlier.
    shifted = tuple(stage - (method.place == "inside") for stage in config.stages)
    ideas = [usual[::2], tuple(b for b in usual if b >= config.depth // 4), shifted]
    places = dict.fromkeys(blocks for blocks in ideas if blocks and blocks != usual)
    return [Way(way.method, blocks, way.per_picture) for blocks in places]


def closest(found: Sequence[Candidate]) -> Candidate:
    """The one whose outputs lie closest to the dense network's on average.

    As many tokens of every picture are simpler and faster everywhere, so counts of their own win
    only where they are closer beyond chance.
    """
    fixed = [one for one in found if not one.reduction.boundaries()]
    best = min(fixed or found, key=_apart)
    own = [one for one in found if one.reduction.boundaries() and one is not best]
    if not own:
        return best
    other = min(own, key=_apart)
    return other if closer(other, best) else best


def _apart(one: Candidate) -> float:
    """On average; outputs that are no numbers are the farthest."""
    mean = float(one.seen.apart.mean())
    return mean if math.isfinite(mean) else math.inf


def closer(one: Candidate, other: Candidate) -> bool:
    """Whether the first is closer than the other beyond chance, picture by picture."""
    if not math.isfinite(_apart(other)):
        return math.isfinite(_apart(one))
    gain = other.seen.apart - one.seen.apart
    return similarity.mean_interval(gain)[0] > 0
