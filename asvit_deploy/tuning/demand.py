"""What is demanded of an artefact's output, and what pictures show of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from asvit_deploy import similarity
from asvit_deploy.distance import distance
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.tuning import bounds

Task = Literal["classes", "labels", "embeddings"]
FEWEST_COSINES = 16  # an interval by bootstrap of fewer says nothing
_Z = 1.96


@dataclass(frozen=True)
class Demand:
    """How far an output may lie from the dense twin's.

    Attributes:
        task: "classes": pictures whose top-1 is another; "labels": accuracy lost; "embeddings":
            mean cosine.
        max_drop: points (per cent) of either of the first two.
        min_cosine: of the third.
    """

    task: Task
    max_drop: float
    min_cosine: float

    @property
    def allowed(self) -> float:
        """The most `loss`, as `judged` has it."""
        return 1 - self.min_cosine if self.task == "embeddings" else self.max_drop

    def fields(self) -> dict[str, Any]:
        own: dict[str, Any] = {"task": self.task, "error": bounds.ERROR}
        if self.task == "embeddings":
            return {**own, "min_cosine": self.min_cosine}
        return {**own, "max_drop_points": self.max_drop}

    def said(self) -> str:
        if self.task == "embeddings":
            return f"the mean cosine may not be below {self.min_cosine:g}"
        if self.task == "labels":
            return f"accuracy may fall by at most {self.max_drop:g} points"
        return f"top-1 may differ on at most {self.max_drop:g} % of the pictures"


@dataclass(frozen=True)
class Evidence:
    """What one artefact answers on pictures, beside its dense twin: arrays [pictures].

    Attributes:
        apart: `distance.distance`.
        changed: the top-1 is another; None for embeddings.
        worse, better: only the twin was right, only the artefact was; None without labels.
        cosine: None but for embeddings.
        neighbour: share of pictures whose nearest other one is the same.
    """

    apart: NDArray[np.float64]
    changed: NDArray[np.bool_] | None = None
    worse: NDArray[np.bool_] | None = None
    better: NDArray[np.bool_] | None = None
    cosine: NDArray[np.float64] | None = None
    neighbour: float | None = None

    def fields(self) -> dict[str, Any]:
        """JSON-ready; `of_fields` is the opposite."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value
                for name, value in vars(self).items()}  # fmt: skip

    @staticmethod
    def of_fields(fields: dict[str, Any]) -> Evidence:
        kinds = {"apart": np.float64, "cosine": np.float64, "changed": np.bool_,
                 "worse": np.bool_, "better": np.bool_}  # fmt: skip
        return Evidence(**{name: np.array(value, kinds[name]) if isinstance(value, list) else value
                           for name, value in fields.items()})  # fmt: skip


def together(found: Sequence[Evidence]) -> Evidence:
    """Of several artefacts of one network as of one: each picture counts as the worst of them, so
    that what is shown holds for every one."""

    def over(name: str, worst: Callable[..., NDArray]) -> Any:
        own = [getattr(one, name) for one in found]
        return None if own[0] is None else worst(own, axis=0)

    neighbour = over("neighbour", np.min)
    return Evidence(
        over("apart", np.max), over("changed", np.any), over("worse", np.any),
        over("better", np.all), over("cosine", np.min),
        None if neighbour is None else float(neighbour),
    )  # fmt: skip


def evidence(
    config: ArchConfig, dense: NDArray[np.float32], output: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
) -> Evidence:  # fmt: skip
    """Of outputs [pictures, C] beside the dense twin's.

    Raises:
        UserError: an embedding without a direction.
    """
    apart = distance(config, torch.from_numpy(dense), torch.from_numpy(output))
    if config.output == "embedding":
        neighbour = None
        if len(dense) > 2:
            pair = [similarity.units(one) for one in (dense, output)]
            neighbour = float(similarity.same_nearest(*pair).mean())
        return Evidence(apart, cosine=1 - apart, neighbour=neighbour)
    ours, theirs = output.argmax(1), dense.argmax(1)
    # An output of NaN answers nothing, whatever argmax says of it.
    broken = ~np.isfinite(output).all(1)
    changed = (ours != theirs) | broken
    if labels is None:
        return Evidence(apart, changed)
    right, before = (ours == labels) & ~broken, theirs == labels
    return Evidence(apart, changed, before & ~right, right & ~before)


def judged(found: Evidence, demand: Demand) -> dict[str, Any]:
    """What the pictures show, JSON-ready.

    Returns:
        `passed`: the interval's far end meets the demand; `refuted`: its near end does not; `loss`
        and `loss_bound`: in points, or 1 - cosine; `more`: how many pictures more would pass if
        they went as these did, None where none would; `agreement` with its 95 % interval and that
        of another sample of the same size (`expected_low`, `expected_high`).
    """
    if demand.task == "embeddings":
        return _by_cosine(found, demand)
    assert found.changed is not None
    total, changed = len(found.changed), int(found.changed.sum())
    same = total - changed
    low, high = bounds.interval(same, total)
    expected = bounds.expected(same, total, total)
    own = {"pictures": total, "changed": changed, "agreement": same / total,
           "agreement_low": low, "agreement_high": high,
           "expected_low": expected[0], "expected_high": expected[1]}  # fmt: skip
    most = demand.max_drop / 100
    if demand.task == "classes":
        loss, bound = changed / total, bounds.upper(changed, total)
        least = bounds.lower(changed, total)

        def fits(n: int) -> bool:
            return bounds.upper(_scaled(changed, total, n), n) <= most
    else:
        assert found.worse is not None
        assert found.better is not None
        worse, better = int(found.worse.sum()), int(found.better.sum())
        own |= {"worse": worse, "better": better}
        loss, bound = (worse - better) / total, bounds.drop_upper(worse, better, total)
        least = bounds.drop_lower(worse, better, total)

        def fits(n: int) -> bool:
            scaled = [_scaled(count, total, n) for count in (worse, better)]
            return bounds.drop_upper(scaled[0], math.floor(better * n / total), n) <= most

    passed = bound <= most
    needed = total if passed else bounds.pictures_needed(fits, total) if loss < most else None
    return {**own, "loss": 100 * loss, "loss_bound": 100 * bound, "loss_least": 100 * least,
            "passed": passed, "refuted": least > most,
            "more": None if needed is None else needed - total}  # fmt: skip


def _scaled(hits: int, total: int, other: int) -> int:
    """As many of other pictures, if those go alike; never fewer than were seen."""
    return max(hits, math.ceil(hits * other / total))


def _by_cosine(found: Evidence, demand: Demand) -> dict[str, Any]:
    """By the ends of the bootstrap's two-sided 95 % interval, so that each errs by 2.5 %: half of
    what is allowed, for cosines are skewed and a bootstrap of few pictures is narrow."""
    assert found.cosine is not None
    total, mean = len(found.cosine), float(found.cosine.mean())
    low, high = similarity.mean_interval(found.cosine)
    spread = float(found.cosine.std(ddof=1)) if total > 1 else 0.0
    aside = _Z * spread * math.sqrt(2 / total)
    room = mean - demand.min_cosine
    enough = total >= FEWEST_COSINES
    passed = enough and low >= demand.min_cosine
    more: int | None = 0
    if not passed:
        needed = math.ceil((_Z * spread / room) ** 2) if room > 0 else None
        more = None if needed is None else max(needed, FEWEST_COSINES, total + 1) - total
    return {
        "pictures": total, "agreement": mean, "agreement_low": low, "agreement_high": high,
        "expected_low": min(low, mean - aside), "expected_high": min(1.0, max(high, mean + aside)),
        "p10": float(np.quantile(found.cosine, 0.1)), "neighbour": found.neighbour,
        "loss": 1 - mean, "loss_bound": 1 - low, "loss_least": 1 - high, "passed": passed,
        "refuted": enough and high < demand.min_cosine, "more": more,
    }  # fmt: skip
