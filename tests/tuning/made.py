"""Certificates and timings as runs make them, for what is decided by them."""

from __future__ import annotations

from typing import Any

import numpy as np

from asvit_deploy.reduction.topk import TopK
from asvit_deploy.tuning.certify import Certificates, Trial
from asvit_deploy.tuning.contenders import Candidate, Way
from asvit_deploy.tuning.demand import Demand, Evidence, judged
from asvit_deploy.tuning.graphs import Entry
from asvit_deploy.tuning.latency import Timing

DEMAND = Demand("classes", 0.5, 0.95)


def seen(pictures: int, changed: int) -> Evidence:
    """Answers on so many pictures, the first of which changed."""
    which = np.arange(pictures) < changed
    return Evidence(np.where(which, 1.0, 0.01), which)


def candidate(budget: float = 0.6, changed: int = 0, pictures: int = 64) -> Candidate:
    return Candidate(
        Way("topk"), budget, TopK([1, 3], [30, 20]), budget, [30.0, 20.0], 0.0,
        seen(pictures, changed),
    )  # fmt: skip


def shown(
    pictures: int = 700, changed: int = 0, budget: float = 0.6, precision: str = "float32",
    demand: Demand = DEMAND,
) -> Trial:  # fmt: skip
    one = candidate(budget)
    return Trial(one, precision, 0.01, judged(seen(pictures, changed), demand))


def timing(milliseconds: dict[tuple[Any, str], float], spread: float = 0.01) -> Timing:
    """Rows in ONNX Runtime.

    Args:
        milliseconds: by candidate (None: dense) and precision.
        spread: of each row's rounds.
    """
    rng = np.random.default_rng(0)
    entries, seconds = [], []
    for (one, precision), ms in milliseconds.items():
        kind = "dense" if one is None else "adaptive"
        entries.append(Entry(kind, one, "onnxruntime", precision))
        seconds.append(ms / 1e3 * (1 + spread * rng.random(100)))
    macs = [np.full(4, 1e9)] * len(entries)
    runners = [{"backend": "onnxruntime 1"}] * len(entries)
    from asvit_deploy.evaluation.timing import too_busy

    equal = [s for e, s in zip(entries, seconds) if e.kind == "dense"]
    return Timing(1, entries, seconds, macs, runners, 8, [], too_busy(equal))


def certificates(*tests: Trial, **dense: Any) -> Certificates:
    return Certificates(list(tests), dense)
