"""One run from pictures to a verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from asvit_deploy import __version__, sidecar
from asvit_deploy.artefacts.onnx_file import find_op_library
from asvit_deploy.checkpoints.facts import fields_of
from asvit_deploy.checkpoints.load import Checkpoint, build_model
from asvit_deploy.checkpoints.places import fingerprint
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.machine import machine
from asvit_deploy.files import scratch
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.runners.pytorch import torch_threads
from asvit_deploy.runtimes import ONNXRUNTIME, TENSORRT
from asvit_deploy.status import Say
from asvit_deploy.tuning import winner
from asvit_deploy.tuning.certify import Certificates, Judge, Trial
from asvit_deploy.tuning.clock import Clock, OutOfTime, Steps
from asvit_deploy.tuning.contenders import Bench, usual_ways
from asvit_deploy.tuning.demand import Demand
from asvit_deploy.tuning.engines import Engines, is_engine
from asvit_deploy.tuning.graphs import INT8, Graphs
from asvit_deploy.tuning.latency import (
    AGAIN,
    ROUNDS,
    Stopwatch,
    Timing,
    entries_of,
    pictures_for,
    timed_seconds,
    timed_tests,
)
from asvit_deploy.tuning.means import Means
from asvit_deploy.tuning.pictures import Pictures, even, more_pictures, sizes_of
from asvit_deploy.tuning.place import Place
from asvit_deploy.tuning.running import Workshop
from asvit_deploy.tuning.search import COARSE, Found, Search
from asvit_deploy.tuning.store import Store
from asvit_deploy.tuning.verdict import Verdict, decide, promise

KIND = "tune"
_CANDIDATES = 7  # as many as are usually judged, for estimates


@dataclass(frozen=True)
class Wanted:
    """What is asked for; names as in `asvit_deploy.tune`."""

    demand: Demand
    means: Means
    methods: tuple[str, ...]
    minutes: float | None
    seed: int
    threads: int


class Session:
    """A run.

    Args:
        checkpoint: what `--ckpt` named, with the names of its classes.
        place: a folder that is claimed.
    """

    def __init__(
        self, checkpoint: Checkpoint, pictures: Pictures, wanted: Wanted, place: Place, say: Say
    ) -> None:
        self.checkpoint, self.pictures, self.wanted = checkpoint, pictures, wanted
        self.place, self.say, self.means = place, say, wanted.means
        self.clock = Clock(wanted.minutes, say)
        self.clock.left_out += wanted.means.left_out
        self.dense: ViT = build_model(checkpoint, dense=True)
        self.store = Store(place.measured, self._of(), say)
        self.found, self.certificates = Found(), Certificates()
        self.timings: list[Timing] = []
        self.estimate = 0.0

    def _of(self) -> dict[str, Any]:
        """What every measurement of this run depends on."""
        config, demand = self.checkpoint.config, self.wanted.demand
        return {
            "machine": machine(), "checkpoint": fingerprint(self.checkpoint.path),
            "format": self.checkpoint.format, "averaged": self.checkpoint.has_average,
            "arch": config.name, "image_size": config.image_size, **fields_of(config),
            "pictures": self.pictures.fingerprint(), "task": demand.task,
            "threads": self.wanted.threads, "seed": self.wanted.seed,
        }  # fmt: skip

    def run(self) -> dict[str, Any]:
        """Measure, decide, export; the report, which is written too.

        Raises:
            UserError: no budget can be met at all, or something cannot be written.
        """
        steps = Steps(self.say)
        try:
            with (
                scratch("tune") as folder,
                torch_threads(self.wanted.threads or None),
            ):
                return self._run(folder, steps)
        finally:
            steps.close()

    def _run(self, folder: Path, steps: Steps) -> dict[str, Any]:
        pictures = self.pictures
        for note in pictures.notes:
            self.say(note)
        workshop = Workshop(folder, pictures.images, self.wanted.threads)
        names = [pictures.names[i] for i in pictures.calibrating]
        builder = Engines(self.say) if self.means.engines else None
        graphs = Graphs(folder, self.checkpoint, self.dense, pictures.part(pictures.calibrating),
                        names, self.say, builder, self._library())  # fmt: skip
        verdict = None
        try:
            with contextlib.closing(workshop):
                self._search(steps)
                self._judge(graphs, workshop, steps)
                self._time(graphs, workshop, steps)
        except OutOfTime:
            verdict = Verdict(
                None, "out_of_time",
                f"not shown: --minutes {self.wanted.minutes:g} ended before enough was measured; "
                "run it again with more, which takes up what was measured",
            )  # fmt: skip
        if self.timings:
            verdict = decide(self.timings[0], self.certificates, self.wanted.demand, self._more)
        assert verdict is not None
        promised = promise(verdict, self.timings[0]) if verdict.winner else None
        if promised is not None:
            with steps.step("writing the winner", 0.05, 1):
                winner.write(verdict, self.timings[0], graphs, pictures, self.place,
                             self.wanted.threads, promised)  # fmt: skip
        else:
            self._take_away(verdict)
        if self.store.reused:
            self.say(
                f"{self.store.reused} measurements of an earlier run were taken up, "
                f"{self.store.added} are new"
            )
        return self._report(verdict, promised)

    def _library(self) -> Path | None:
        """The op's, where ONNX Runtime is measured and `build-plugins` made it."""
        measured = ONNXRUNTIME in self.means.runtimes or INT8 in self.means.precisions
        return find_op_library(None, self.say) if measured else None

    def _take_away(self, verdict: Verdict) -> None:
        """What an earlier run exported, once this one shows that it does not pay; where nothing
        is shown, it stays."""
        if verdict.go is False:
            self.place.clear()
        elif self.place.model.exists():
            self.say(f"{self.place.model} of an earlier run stays: nothing speaks against it yet")

    def _more(self, judging: int) -> int:
        pictures = self.pictures
        return more_pictures(
            len(pictures.images), len(pictures.calibrating), len(pictures.judging) + judging,
            sizes_of(self.checkpoint.config)[0],
        )  # fmt: skip

    def _search(self, steps: Steps) -> None:
        calibrating = self.pictures.part(self.pictures.calibrating)
        labels = self.pictures.labels_of(self.pictures.calibrating)
        ways = len(usual_ways(self.checkpoint.config, self.wanted.methods))
        passes = int(len(calibrating) * ways * (len(COARSE) + 2.5))
        with steps.step("fitting", 0.4, passes) as tick:
            bench = Bench(self.dense, calibrating, labels, self.store, tick)

            def reserve() -> float:
                return self._reserve(bench.seconds)

            search = Search(bench, self.wanted.methods, self.wanted.demand, self.clock,
                            self._own(), reserve, self.say)  # fmt: skip
            self.found = search.run()
            self.estimate = bench.seconds
        for note in self.found.notes:
            self.say(note)

    def _own(self) -> Reduction | None:
        """The checkpoint's own, where it is adaptive."""
        return build_model(self.checkpoint).reduction if self.checkpoint.adaptive else None

    def _reserve(self, seconds: float) -> float:
        """What judging and timing the first batch in one runtime will take, about.

        Args:
            seconds: of one picture.
        """
        judging = len(self.pictures.judging) * seconds * (_CANDIDATES + 1) / 2
        exports = 20 * seconds * (_CANDIDATES + 1) + 2 * _CANDIDATES
        return judging + exports + ROUNDS[0] * 4 * seconds

    def _judge(self, graphs: Graphs, workshop: Workshop, steps: Steps) -> None:
        seconds = self.estimate
        own = list(self.means.precisions)
        while len(own) > 1:
            each = (len(self.pictures.judging) / 2 + len(self.pictures.calibrating) + 60) * seconds
            cost = each * len(self.found.candidates)
            if self.clock.allows(cost, f"precision {own[-1]}", self._reserve(seconds)):
                break
            own.pop()
        self.means = replace(self.means, precisions=tuple(own))
        runs = len(self.pictures.judging) * (_CANDIDATES + 1)
        with steps.step("judging", 0.3, runs) as tick:
            judge = Judge(self.pictures, graphs, workshop, self.store, self.means.runtimes,
                          self.wanted.demand, self.clock, tick,
                          self.means.batches[0])  # fmt: skip
            self.certificates = judge.certify(self.found.candidates, own)
        for note in self.certificates.notes:
            self.say(note)

    def _time(self, graphs: Graphs, workshop: Workshop, steps: Steps) -> None:
        tests = timed_tests(self.certificates)
        graphs.forget([test.candidate for test in tests])
        share = 0.25 / len(self.means.batches)
        for number, batch in enumerate(self.means.batches):
            means = self._affordable(number, batch, tests, graphs)
            if means is None:
                continue
            if INT8 in means.precisions and batch > 1:
                self.clock.leave_out(
                    f"int8 at batch {batch}, other than one picture at a time: the ranges of one "
                    "picture would round the others"
                )
            which = even(self.pictures.judging, pictures_for(self.checkpoint.config, batch))
            try:
                with steps.step(f"timing batch {batch}", share, ROUNDS[1]) as tick:
                    watch = Stopwatch(graphs, workshop, self.store, which, self.wanted.seed,
                                      self.clock, tick, self.say)  # fmt: skip
                    entries = entries_of(tests, means.runtimes, means.precisions, batch, graphs)
                    # The verdict is of the first batch: only that one is worth waiting for.
                    timing = watch.batch(entries, batch, AGAIN if number == 0 else 0)
            except OutOfTime:
                if number == 0:
                    raise
                self.clock.leave_out(f"batch {batch}: --minutes ended before it was timed")
                continue
            self.timings.append(timing)
            for note in timing.notes:
                self.say(note)

    def _affordable(
        self, number: int, batch: int, tests: Sequence[Trial], graphs: Graphs
    ) -> Means | None:
        """The runtimes and precisions that there is time for; None: not even one of them."""
        means = replace(self.means, batches=(batch,))
        while True:
            entries = entries_of(tests, means.runtimes, means.precisions, batch, graphs)
            building = graphs.build_seconds(entries, batch)
            left = self.clock.left - building
            cost = building + timing_cost(len(entries), self.estimate * batch, left)
            if cost <= self.clock.left:
                return means
            if (less := means.cheaper()) is None:
                break
            gone = [*set(means.runtimes) - set(less.runtimes),
                    *set(means.precisions) - set(less.precisions)]  # fmt: skip
            self.clock.leave_out(f"{', '.join(sorted(gone))} at batch {batch}: no time left")
            means = less
        if number == 0:
            raise OutOfTime
        self.clock.leave_out(f"batch {batch}: no time left")
        return None

    def _report(self, verdict: Verdict, promised: dict[str, Any] | None) -> dict[str, Any]:
        config = self.checkpoint.config
        tests = {test.name: test for test in self.certificates.tests}
        return {
            "kind": KIND, "model": str(self.checkpoint.path), "arch": config.name,
            "image_size": config.image_size, "output": config.output,
            "demand": self.wanted.demand.fields(), "pictures": self.pictures.fields(),
            "seed": self.wanted.seed, "threads": self.wanted.threads,
            "runtimes": [*self.means.runtimes, *[TENSORRT] * self.means.engines],
            "precisions": list(self.means.precisions),
            "batches": list(self.wanted.means.batches),
            "verdict": verdict.fields(), "promise": promised,
            "exported": self.place.model.name if promised else None,
            "frontier": frontier(self.timings, self.certificates),
            "candidates": [one.fields() for one in self.found.candidates],
            "tried": self.found.tried, "sequence": [test.fields() for test in tests.values()],
            "dense_precisions": self.certificates.dense,
            "latency": [timing.fields() for timing in self.timings],
            "notes": [*self.pictures.notes, *self.found.notes, *self.certificates.notes],
            "left_out": self.clock.left_out,
            "measurements": {"reused": self.store.reused, "new": self.store.added},
            "seconds": round(self.clock.spent, 1), "machine": machine(),
            "command": sidecar.command_line(), "tool": f"asvit-deploy {__version__}",
        }  # fmt: skip


def timing_cost(rows: int, seconds: float, left: float) -> float:
    """Seconds that the timing of one batch takes, about.

    Args:
        rows: variants.
        seconds: that one of them takes for one batch.
        left: seconds that there are.
    """
    once = rows * seconds
    usual = min(timed_seconds(left), ROUNDS[1] * once)
    return max(usual, ROUNDS[0] * once) + 10 * once + 3


def frontier(timings: Sequence[Timing], found: Certificates) -> list[dict[str, Any]]:
    """Every adaptive row beside what the judging pictures show of its output: what to choose
    from. Engines for another batch than the first are others than those that were judged."""
    tests = {(test.candidate.name, test.precision): test for test in found.tests}
    made = []
    for timing in timings:
        for row in timing.fields()["rows"]:
            test = tests.get((row["candidate"], row["precision"]))
            if row["kind"] != "adaptive" or test is None:
                continue
            shown = {key: value for key, value in test.fields().items() if key != "name"}
            other = is_engine(test.precision) and timing is not timings[0]
            made.append({**row, **shown, "certified": test.passed and not other})
    return sorted(made, key=lambda row: (row["batch"], row["p50_ms"]))


def require_demand(max_drop: float, min_cosine: float) -> None:
    """Raises UserError for a demand that is none."""
    if not 0 < max_drop < 100:
        raise UserError(f"max_drop is {max_drop:g}; give points above 0 and under 100, such as 0.5")
    if not -1 < min_cosine < 1:
        raise UserError(f"min_cosine is {min_cosine:g}; give a cosine under 1, such as 0.95")
