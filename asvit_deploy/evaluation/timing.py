"""Latency of one image at a time, interleaved, beside the dense model of the same runtime.

All variants run in one process, in a new random order each round, so that drift and neighbours
hit them alike; what counts is the ratio of medians, with a bootstrap interval over rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import onnx
from numpy.typing import NDArray

from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import Cuts, dense_macs, halves_of, model_macs
from asvit_deploy.precision import FLOAT32
from asvit_deploy.runners.base import Runner


class Interval(TypedDict):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


class _Timed(TypedDict):
    name: str
    runtime: str
    adaptive: bool
    precision: str
    runner: dict[str, str]
    p50_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float


class Line(TypedDict):
    """A least-squares line through one point for each picture; `r2` is its share of the variance.

    The points are medians of a picture's rounds over the image tokens that its blocks saw, as a
    mean over the blocks; `points` has some of them where there are many, [tokens, ms] each.
    """

    ms_per_token: float
    ms_at_none: float
    r2: float
    pictures: int
    points: list[list[float]]


class Row(_Timed, total=False):
    """A variant's latency.

    The ratios are there where its runtime has a dense row too, `over_others` where other runtimes
    or precisions have one, by its name; and `first_ms`, the median over pictures as it first sees
    them, where new counts take it time. `way` is how the file that was benched is run itself, and
    not a twin or another method.
    """

    speedup: Interval
    share_of_macs_ratio: Interval
    over_others: dict[str, Interval]
    first_ms: float
    way: str
    over_kept: Line
    memory_mib: Memory


class Memory(TypedDict):
    """MiB that a process of its own holds beside the libraries: `opened` once the model is open,
    `peak` at most while pictures run through it."""

    opened: float
    peak: float


class Macs(TypedDict):
    """Means over the rounds as they ran.

    `mean_kept` has the image tokens after each stage; `ratio` is what a perfect runtime would show.
    """

    dense_gmacs: float
    adaptive_gmacs: float
    ratio: float
    mean_kept: list[float]
    image_tokens: int


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: shown.
        runtime: rows of one runtime are compared with its dense row.
        adaptive: False for the dense row.
        runner: must not record, so that only the inference itself is timed.
        precision: of one runtime, rows of one precision are compared.
        model: what the runner runs, where that is an ONNX model.
        way: of the artefact itself, see `Row`.
    """

    name: str
    runtime: str
    adaptive: bool
    runner: Runner
    precision: str = FLOAT32.name
    model: onnx.ModelProto | None = None
    way: str | None = None

    @property
    def peers(self) -> tuple[str, str]:
        """What the rows that it is compared with have in common."""
        return self.runtime, self.precision


def interleave(
    variants: Sequence[Variant],
    images: Sequence[NDArray[np.float32]],
    warmup: int,
    runs: int,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
    first: dict[str, NDArray[np.float64]] | None = None,
    ended: Callable[[], bool] = lambda: False,
) -> dict[str, NDArray[np.float64]]:
    """Time every variant on the same image, round after round.

    Args:
        images: float32 [3, H, W] each, or batches [B, 3, H, W]; round r takes the one of number r
            modulo their number.
        warmup: rounds that do not count first.
        runs: timed rounds.
        first: gets the seconds [warmup] of those, by variant name.
        ended: asked before each run; once it says so, the round does not count and none follows.

    Returns:
        Seconds [runs] by variant name; of fewer runs where it ended before.
    """
    order, rng = list(variants), random.Random(seed)
    seconds = {variant.name: np.zeros(warmup + runs) for variant in variants}
    done = 0
    for r in range(-warmup, runs):
        image = images[r % len(images)]
        image = image[None] if image.ndim == 3 else image
        rng.shuffle(order)
        for variant in order:
            if ended():
                break
            start = time.perf_counter()
            variant.runner.infer(image)
            seconds[variant.name][warmup + r] = time.perf_counter() - start
        else:
            done += 1
            progress()
            continue
        break
    if first is not None:
        first.update({name: timed[: min(warmup, done)] for name, timed in seconds.items()})
    return {name: timed[warmup : max(warmup, done)] for name, timed in seconds.items()}


def ratio_of_medians(
    slow: NDArray[np.float64], fast: NDArray[np.float64], draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """median(slow) / median(fast) with its 95 % bootstrap interval over rounds (paired)."""
    rng = np.random.default_rng(seed)
    pick = rng.integers(0, len(slow), (draws, len(slow)))
    ratios = np.median(slow[pick], axis=1) / np.median(fast[pick], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(np.median(slow) / np.median(fast)), float(low), float(high)


def interval_of(slow: NDArray[np.float64], fast: NDArray[np.float64]) -> Interval:
    """As `ratio_of_medians`."""
    value, low, high = ratio_of_medians(slow, fast)
    return {"value": value, "low": low, "high": high}


def run_once(
    runner: Runner, images: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The outputs float32 [images, C], and the rows left after each stage, prefix included: int64
    [images, stages]."""
    made = [runner(image[None]) for image in images]
    lengths = np.array([[int(n[0]) for n in one.lengths] for one in made])
    return np.concatenate([one.output for one in made]), lengths


def share_of_macs_ratio(
    dense: NDArray[np.float64],
    adaptive: NDArray[np.float64],
    ratios: NDArray[np.float64],
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """How much of the MACs saved becomes time saved: 1 is all of it.

    Each round's speed-up is divided by the MACs ratio of the image it ran on; the median over
    rounds has a 95 % bootstrap interval.

    Args:
        dense, adaptive: seconds [runs], paired by round.
        ratios: dense MACs over adaptive MACs of each round's image [runs].
    """
    shares = dense / adaptive / ratios
    pick = np.random.default_rng(seed).integers(0, len(shares), (draws, len(shares)))
    low, high = np.percentile(np.median(shares[pick], axis=1), [2.5, 97.5])
    return {"value": float(np.median(shares)), "low": float(low), "high": float(high)}


def macs_by_round(
    config: ArchConfig, lengths: NDArray[np.int64], runs: int, cuts: Cuts = None
) -> NDArray[np.float64]:
    """Adaptive MACs of the image that each round ran: [runs].

    Args:
        lengths: int64 [images, stages], prefix included; the images cycle.
        cuts: as `model_macs`.
    """
    shown = lengths[np.arange(runs) % len(lengths)].astype(np.float64)
    return np.asarray(model_macs(config, list(shown.T), cuts), np.float64)


def tokens_by_image(
    config: ArchConfig, lengths: NDArray[np.int64], cuts: Cuts = None
) -> NDArray[np.float64]:
    """Image tokens that the blocks see, as a mean over the blocks: [images].

    Args:
        lengths: int64 [images, stages], prefix included.
        cuts: as `model_macs`.
    """
    halves = np.diff([0, *halves_of(config, cuts), 2 * config.depth])
    rows = np.concatenate([np.full((len(lengths), 1), config.rows), lengths], axis=1)
    return np.asarray((rows - config.prefix) @ halves / halves.sum(), np.float64)


_MOST_POINTS = 200  # of a line, in the JSON


def line_over_kept(
    seconds: NDArray[np.float64], tokens: NDArray[np.float64]
) -> Line | None:  # fmt: skip
    """Latency as a line over kept tokens; None where fewer than three numbers of tokens were seen.

    Args:
        seconds: [runs]; round r ran image r modulo their number.
        tokens: [images], as `tokens_by_image`.
    """
    image = np.arange(len(seconds)) % len(tokens)
    seen = np.unique(image)
    if len(np.unique(tokens[seen])) < 3:
        return None
    x = tokens[seen]
    y = np.array([np.median(seconds[image == i]) * 1e3 for i in seen])
    slope, offset = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - slope * x - offset) ** 2).sum())
    return {
        "ms_per_token": float(slope), "ms_at_none": float(offset),
        "r2": 1 - left / spread if spread else 0.0, "pictures": len(seen),
        "points": np.stack([x, y], axis=1)[:: -(-len(seen) // _MOST_POINTS)].tolist(),
    }  # fmt: skip


# p90 over median of rounds that all do the same work: 1.01 to 1.08 on quiet machines.
_BUSY = 1.15
# Of a core's time: one thread that computes without a pause has 0.99 on a quiet machine.
_SHARED = 0.9


class Core:
    """How much of a core's time this process has while the context lasts.

    A steady neighbour slows every round alike, which no spread shows. Of a process that computes in
    several threads only less than a single core's time can be told.

    Attributes:
        share: processor seconds of all threads over seconds that passed.
    """

    share = 1.0

    def __enter__(self) -> Core:
        self._began = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *ignored: object) -> None:
        used, passed = time.process_time() - self._began[0], time.perf_counter() - self._began[1]
        self.share = used / passed if passed > 0 else 1.0


def busy(
    variants: Sequence[Variant], seconds: dict[str, NDArray[np.float64]], core: Core
) -> str | None:  # fmt: skip
    """One line where others had the core too, or rounds of equal work, those of dense rows, took
    unequal time; else None."""
    return too_busy([seconds[v.name] for v in variants if not v.adaptive], core.share)


def too_busy(rounds: Sequence[NDArray[np.float64]], share: float = 1.0) -> str | None:
    """As `busy`, of the rounds of each variant that always does the same work.

    Args:
        share: as `Core` has it.
    """
    advice = "trust ratios and their intervals, not milliseconds, or run it again"
    if share < _SHARED:
        return (
            f"the machine was busy: this process had {share:.2f} of a core's time while its rounds "
            f"ran; {advice}"
        )
    spreads = [float(np.percentile(one, 90) / np.median(one)) for one in rounds]
    if not spreads or (calmest := min(spreads)) < _BUSY:
        return None
    return (
        f"the machine was busy: one round in ten of the dense network took {calmest:.2f} times the "
        f"median or more; {advice}"
    )


def macs_summary(
    config: ArchConfig, lengths: NDArray[np.int64], runs: int, cuts: Cuts = None
) -> Macs:
    """Mean MACs over the rounds as they ran, and the ratio that a perfect runtime would show."""
    adaptive = float(macs_by_round(config, lengths, runs, cuts).mean())
    shown = lengths[np.arange(runs) % len(lengths)]
    return {
        "dense_gmacs": dense_macs(config) / 1e9,
        "adaptive_gmacs": adaptive / 1e9,
        "ratio": dense_macs(config) / adaptive,
        "mean_kept": (shown.mean(axis=0) - config.prefix).tolist(),
        "image_tokens": config.image_tokens,
    }


def summarise(
    variants: Sequence[Variant],
    seconds: dict[str, NDArray[np.float64]],
    ratios: NDArray[np.float64],
) -> list[Row]:
    """One row per variant: percentiles in ms, and the ratio to the dense row of its runtime
    and precision.

    Args:
        ratios: MACs ratio of each round's image [runs].
    """
    dense = {v.peers: seconds[v.name] for v in variants if not v.adaptive}
    rows = []
    for variant in variants:
        times = seconds[variant.name]
        p50, p90, p99 = np.percentile(times * 1e3, [50, 90, 99])
        row: Row = {
            "name": variant.name,
            "runtime": variant.runtime,
            "adaptive": variant.adaptive,
            "precision": variant.precision,
            "runner": variant.runner.describe(),
            "p50_ms": float(p50),
            "p90_ms": float(p90),
            "p99_ms": float(p99),
            "min_ms": float(times.min() * 1e3),
        }
        if variant.way is not None:
            row["way"] = variant.way
        if variant.adaptive and variant.peers in dense:
            row["speedup"] = interval_of(dense[variant.peers], times)
            row["share_of_macs_ratio"] = share_of_macs_ratio(dense[variant.peers], times, ratios)
        others = [v for v in variants if not v.adaptive and v.peers != variant.peers]
        if variant.adaptive and others:
            row["over_others"] = {v.name: interval_of(seconds[v.name], times) for v in others}
        rows.append(row)
    return rows


def verdict(rows: Sequence[Row]) -> str:
    """One sentence on whether dropping tokens pays, in the fastest runtime that ran both."""
    compared = [row for row in rows if "speedup" in row]
    if not compared:
        return "no runtime ran both the dense and the adaptive model: nothing to compare"
    best = min(compared, key=lambda row: row["p50_ms"])
    return judged(
        best["speedup"],
        f"{best['name']} wins over dense in the same runtime: <span>",
        f"dense wins in {best['runtime']}: the adaptive model's speed-up is <span>",
        f"a draw in {best['runtime']}: the adaptive model's speed-up is <span>",
    )


def judged(speedup: Interval, won: str, lost: str, drawn: str) -> str:
    """Of three sentences the one that the interval allows, with the figures where it has <span>."""
    said = won if speedup["low"] > 1 else lost if speedup["high"] < 1 else drawn
    span = f"{speedup['value']:.2f}x ({speedup['low']:.2f} to {speedup['high']:.2f})"
    return said.replace("<span>", span)
