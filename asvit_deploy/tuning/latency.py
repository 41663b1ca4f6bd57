"""Latency of candidates beside dense and static rivals, interleaved in one process a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.budget import macs_of
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.timing import Interval, interval_of, share_of_macs_ratio, too_busy
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import dense_macs
from asvit_deploy.precision import FLOAT32
from asvit_deploy.runtimes import ONNXRUNTIME, OPENVINO_BF16, TENSORRT, TORCH
from asvit_deploy.tuning.certify import Certificates, Trial
from asvit_deploy.tuning.clock import Clock
from asvit_deploy.tuning.engines import EXACT, graphs_of, is_engine, modes_of
from asvit_deploy.tuning.graphs import BF16, INT8, Entry, Graphs, rivals
from asvit_deploy.tuning.running import Crashed, Runnable, Workshop
from asvit_deploy.tuning.store import Store

ROUNDS = (40, 300)
SECONDS = 30.0  # that the timed rounds of one batch take about
PICTURES, PICTURES_LARGE = 32, 16
_BATCHES = 4
_LARGE = 8e9  # MACs of the dense network
_TIMED = 3  # candidates that passed, in each precision: those with the fewest MACs
_ELSEWHERE = 2  # candidates in each further runtime
AGAIN = 2  # times that a busy machine is measured again


@dataclass
class Timing:
    """One batch's measurements.

    Attributes:
        entries: what ran, in the order of the rows.
        seconds: float64 [rounds] of each, for the whole batch.
        macs: float64 [batches] of each, per picture.
        runners: as `Runner.describe` of each.
        notes: what did not run, and why.
        busy: one line where equal work took unequal time.
    """

    batch: int
    entries: list[Entry]
    seconds: list[NDArray[np.float64]]
    macs: list[NDArray[np.float64]]
    runners: list[dict[str, str]]
    warmup: int
    notes: list[str] = field(default_factory=list)
    busy: str | None = None

    def p50(self, number: int) -> float:
        """Milliseconds per picture."""
        return float(np.median(self.seconds[number])) * 1e3 / self.batch

    def fields(self) -> dict[str, Any]:
        runs = len(self.seconds[0]) if self.seconds else 0
        return {"batch": self.batch, "warmup": self.warmup, "runs": runs, "rows": rows(self),
                "notes": self.notes, "busy": self.busy}  # fmt: skip


def pictures_for(config: ArchConfig, batch: int = 1) -> int:
    """How many are timed: each is warmed up on where a runtime compiles for its counts; several
    batches of different ones."""
    least = PICTURES if dense_macs(config) < _LARGE else PICTURES_LARGE
    return max(least, _BATCHES * batch)


def timed_seconds(left: float) -> float:
    """How long the timed rounds of a batch may take about, of so many seconds left."""
    return min(SECONDS, max(left / 2, 5.0))


def timed_tests(found: Certificates) -> list[Trial]:
    """What is worth timing: of each precision the passed ones with the fewest MACs; the first that
    did not pass; and the one with the fewest MACs of all, which says whether pruning pays at all.
    """
    chosen: list[Trial] = []
    for precision in dict.fromkeys(test.precision for test in found.tests):
        own = [test for test in found.certified if test.precision == precision]
        chosen += sorted(own, key=lambda test: test.candidate.share)[:_TIMED]
    if (nearest := found.stopped_at) is not None:
        chosen.append(nearest)
    if found.tests:
        least = min(found.tests, key=lambda test: (test.candidate.share, test.precision))
        chosen.append(least)
    return list({id(test): test for test in chosen}.values())


def entries_of(
    tests: Sequence[Trial], runtimes: Sequence[str], precisions: Sequence[str], batch: int,
    graphs: Graphs,
) -> list[Entry]:  # fmt: skip
    """All variants of one batch: in each runtime and precision dense, adaptive, static.

    Where the op's library is built, ONNX Runtime runs it too, which computes what the function in
    the file does. Of several pictures dense and adaptive ones are packed too, but in PyTorch, and
    in ONNX Runtime one picture after the other; in int8 that alone.
    """
    found = _engines(tests, precisions, batch, graphs)
    pairs = [(runtime, FLOAT32.name) for runtime in runtimes]
    if INT8 in precisions:
        pairs.append((ONNXRUNTIME, INT8))
    if BF16 in precisions:
        pairs.append((OPENVINO_BF16, BF16))
    for runtime, precision in pairs:
        own = [Entry("dense", None, runtime, precision)]
        fit = [test for test in tests if test.precision == precision]
        # Every runtime counts alike, so that the first shows the whole row of candidates.
        for test in fit if runtime in runtimes[:1] else fit[:_ELSEWHERE]:
            one = Entry("adaptive", test.candidate, runtime, precision)
            own.append(one)
            if graphs.library is not None and runtime == ONNXRUNTIME and _takes_op(one):
                own.append(replace(one, library=True))
            static = None if runtime == TORCH else rivals(one, graphs.dense)
            own += [static] if static else []
        if batch == 1:
            found += own
            continue
        if precision == INT8:  # ranges of one picture would round the others
            found += [replace(one, singly=True) for one in own]
            continue
        found += own
        plain = [one for one in own if one.kind != "static"]
        singly = [replace(one, singly=True) for one in plain]
        if runtime != TORCH:  # which runs an artefact as it was trained
            found += [replace(one, packed=True) for one in plain]
        found += singly if runtime == ONNXRUNTIME else []
    return found


def _takes_op(entry: Entry) -> bool:
    return entry.leaves is not None and bool(entry.leaves.boundaries())


def _engines(
    tests: Sequence[Trial], precisions: Sequence[str], batch: int, graphs: Graphs
) -> list[Entry]:
    """In each mode, with and without CUDA graphs; dense ones in float32 always."""
    measured = [precision for precision in precisions if is_engine(precision)]
    found: list[Entry] = []
    for precision in dict.fromkeys([EXACT, *measured] if measured else ()):
        own = [Entry("dense", None, TENSORRT, precision)]
        for test in [test for test in tests if test.precision == precision][:_ELSEWHERE]:
            one = Entry("adaptive", test.candidate, TENSORRT, precision)
            static = rivals(one, graphs.dense)
            own += [one, static] if static else [one]
        # Buckets take one picture at a time.
        found += [
            replace(one, mode=mode, graph=graph, singly=mode == "bucketed" and batch > 1)
            for one in own for mode in modes_of(one.leaves) for graph in graphs_of(mode)
        ]  # fmt: skip
    return found


class Stopwatch:
    """Times batches, keeps what was measured on a quiet machine, and drops what crashes.

    Args:
        which: places of the pictures, judging ones: on those that calibrated, thresholds keep what
            they were fitted to.
        tick: called once for each round.
    """

    def __init__(
        self, graphs: Graphs, workshop: Workshop, store: Store, which: Sequence[int], seed: int,
        clock: Clock, tick: Callable[[], object], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.graphs, self.workshop, self.store, self.which = graphs, workshop, store, list(which)
        self.seed, self.clock, self.tick, self.say = seed, clock, tick, say
        self.config: ArchConfig = graphs.dense.config

    def batch(self, entries: Sequence[Entry], batch: int, retries: int = AGAIN) -> Timing:
        """Time one batch; on a busy machine again, as often as that."""
        settings = {"step": "timed", "batch": batch, "which": self.which, "rounds": ROUNDS,
                    "what": [one.fields() | self.graphs.depends(one, batch) for one in entries],
                    "threads": self.workshop.threads}  # fmt: skip
        if (known := self.store.found(settings)) is not None:
            return self._timing(batch, entries, known)
        timing = None
        for attempt in range(retries + 1):
            began = self.clock.spent
            found = self._measure(entries, batch)
            timing = self._timing(batch, entries, found)
            if timing.busy is None:
                # What crashed once or was cut short may run to its end the next time.
                if len(found["numbers"]) == len(entries) and not found["short"]:
                    self.store.keep(settings, found)
                break
            if attempt < retries and self.clock.left > self.clock.spent - began:
                self.say(f"batch {batch} is timed again: {timing.busy}")
            else:
                break
        assert timing is not None
        return timing

    def _measure(self, entries: Sequence[Entry], batch: int) -> dict[str, Any]:
        """JSON-ready; what crashes ends there, and the others are timed without it."""
        notes, ready, crashed = list[str](), list[tuple[int, Runnable]](), set[str]()
        for number, one in enumerate(entries):
            try:
                ready.append((number, self.graphs.runnable(one, batch)))
            except UserError as error:
                notes.append(f"no rows of {one.name}: {error}")
        while ready:
            self.clock.require()
            seconds = timed_seconds(self.clock.left)
            try:
                made = self.workshop.timed(
                    [one for _, one in ready], self.which, batch, seconds, ROUNDS, self.seed,
                    self.tick, self.clock.end,
                )  # fmt: skip
            except Crashed as crash:
                place = crash.variant if crash.variant is not None else 0
                lost = ready[min(place, len(ready) - 1)][1]
                line = f"the rows of {lost.name} end here: {crash}"
                notes.append(line)
                self.say(line)
                # One that takes the process down a second time may do so with any graph.
                whole = lost.runtime in crashed
                crashed.add(lost.runtime)
                ready = [
                    (n, one)
                    for n, one in ready
                    if one is not lost and not (whole and one.runtime == lost.runtime)
                ]
                continue
            runs, planned = made.said["runs"], made.said["planned"]
            if runs < planned:
                notes.append(f"{runs} rounds instead of {planned}: --minutes ended")
            return {
                "numbers": [n for n, _ in ready], "notes": notes, "short": runs < planned,
                "warmup": made.said["warmup"], "runners": made.said["described"],
                "seconds": [np.round(made.arrays[f"seconds_{i}"], 8).tolist()
                            for i in range(len(ready))],
                "macs": [self._macs(entries[n], made.arrays[f"lengths_{i}"]).tolist()
                         for i, (n, _) in enumerate(ready)],
            }  # fmt: skip
        return {"numbers": [], "notes": notes, "short": False, "warmup": 0, "runners": [],
                "seconds": [], "macs": []}  # fmt: skip

    def _macs(self, entry: Entry, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """Per picture of each batch, float64 [batches]."""
        leaves = entry.leaves
        if leaves is None:
            return np.full(len(lengths), float(dense_macs(self.config)))
        return np.array([macs_of(self.config, leaves, one).mean() for one in lengths])

    def _timing(self, batch: int, entries: Sequence[Entry], found: dict[str, Any]) -> Timing:
        own = [entries[n] for n in found["numbers"]]
        seconds = [np.array(one) for one in found["seconds"]]
        equal = [s for one, s in zip(own, seconds) if one.kind == "dense"]
        return Timing(batch, own, seconds, [np.array(one) for one in found["macs"]],
                      found["runners"], found["warmup"], found["notes"],
                      too_busy(equal))  # fmt: skip


def peer(timing: Timing, number: int, kind: str) -> int | None:
    """The fastest row of that kind in the same runtime and precision; singly or not."""
    own = timing.entries[number]
    found = [
        n for n, one in enumerate(timing.entries)
        if one.kind == kind and (one.runtime, one.precision) == (own.runtime, own.precision)
        and (kind == "dense" or one.candidate is own.candidate)
    ]  # fmt: skip
    return min(found, key=timing.p50, default=None)


def rows(timing: Timing) -> list[dict[str, Any]]:
    """One for each variant, JSON-ready; times are per picture."""
    made = []
    for number, entry in enumerate(timing.entries):
        own = timing.seconds[number] / timing.batch
        p50, p90, p99 = np.percentile(own * 1e3, [50, 90, 99])
        macs = timing.macs[number]
        row: dict[str, Any] = {
            "name": entry.name, "kind": entry.kind, "runtime": entry.runtime,
            "precision": entry.precision, "singly": entry.singly, "packed": entry.packed,
            "batch": timing.batch,
            "candidate": entry.candidate and entry.candidate.name,
            "runner": timing.runners[number], "gmacs": float(macs.mean()) / 1e9,
            "p50_ms": float(p50), "p90_ms": float(p90), "p99_ms": float(p99),
        }  # fmt: skip
        if entry.kind != "dense" and (dense := peer(timing, number, "dense")) is not None:
            beside = timing.seconds[dense] / timing.batch
            by_round = macs[np.arange(len(own)) % len(macs)]
            row["speedup"] = interval_of(beside, own)
            row["speedup_p99"] = ratio_at(beside, own, 99)
            row["share_of_macs_ratio"] = share_of_macs_ratio(
                beside, own, timing.macs[dense][0] / by_round
            )
        if entry.kind == "adaptive" and (static := peer(timing, number, "static")) is not None:
            row["over_static"] = interval_of(timing.seconds[static] / timing.batch, own)
        made.append(row)
    return made


def ratio_at(
    slow: NDArray[np.float64], fast: NDArray[np.float64], percentile: float, draws: int = 1000
) -> Interval:
    """As `interval_of`, of another percentile than the median."""
    pick = np.random.default_rng(0).integers(0, len(slow), (draws, len(slow)))
    ends = [np.percentile(one[pick], percentile, axis=1) for one in (slow, fast)]
    low, high = np.percentile(ends[0] / ends[1], [2.5, 97.5])
    value = np.percentile(slow, percentile) / np.percentile(fast, percentile)
    return {"value": float(value), "low": float(low), "high": float(high)}
