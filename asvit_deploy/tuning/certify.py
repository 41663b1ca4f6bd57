"""The judging pictures: candidates one after the other until one does not pass (`search`).

Each test takes a one-sided 95 % bound. The 5 % that anything false passes hold for the adaptive
candidates, whose tests are in sequence; the dense network in int8, bf16 and as engines is tested
beside it, once each, at 5 % of its own. A candidate's engines of all modes are one test, each
picture by the worst of them: what passes does so in every mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.errors import UserError
from asvit_deploy.precision import FLOAT32
from asvit_deploy.tuning.clock import Clock
from asvit_deploy.tuning.contenders import Candidate
from asvit_deploy.tuning.demand import Demand, Evidence, evidence, judged, together
from asvit_deploy.tuning.graphs import Entry, Graphs, artefacts_of, judging_runtime
from asvit_deploy.tuning.pictures import Pictures
from asvit_deploy.tuning.running import Crashed, Workshop
from asvit_deploy.tuning.store import Store


@dataclass
class Trial:
    """One candidate in one precision; in a list, in the order in which they are tested.

    Attributes:
        distance: from the dense network, on the calibrating pictures.
        found: as `demand.judged`; None: not tested, since one before did not pass, or it could not
            be run.
    """

    candidate: Candidate
    precision: str
    distance: float
    found: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return self.found is not None and bool(self.found["passed"])

    @property
    def name(self) -> str:
        return self.candidate.name + f", {self.precision}" * (self.precision != FLOAT32.name)

    def fields(self) -> dict[str, Any]:
        return {"name": self.name, "candidate": self.candidate.name, "precision": self.precision,
                "macs_share": self.candidate.share, "distance": self.distance,
                "tested": self.found is not None, **(self.found or {})}  # fmt: skip


@dataclass
class Certificates:
    """What the judging pictures showed.

    Attributes:
        tests: in their order.
        dense: of the dense network in other precisions than float32.
        notes: what could not be run.
    """

    tests: list[Trial] = field(default_factory=list)
    dense: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def certified(self) -> list[Trial]:
        return [test for test in self.tests if test.passed]

    @property
    def stopped_at(self) -> Trial | None:
        """The first that was tested and did not pass."""
        return next((test for test in self.tests if test.found and not test.passed), None)


_OTHERWISE = 3  # candidates that are tested in each other precision than float32


def _distance(apart: NDArray[np.float64]) -> float:
    """Mean; infinite, which comes last, where no output is a number."""
    known = apart[np.isfinite(apart)]
    return float(known.mean()) if len(known) else math.inf


class Judge:
    """Runs artefacts on both parts of the pictures.

    Args:
        tick: called once for each picture.
        batch: pictures at a time, of which the verdict is; the engines are those for so many, and
            all else is judged by the file that takes one.

    Attributes:
        seconds: that a picture took in the last run of judging ones.
    """

    def __init__(
        self, pictures: Pictures, graphs: Graphs, workshop: Workshop, store: Store,
        runtimes: Sequence[str], demand: Demand, clock: Clock, tick: Callable[[], object],
        batch: int = 1,
    ) -> None:  # fmt: skip
        self.pictures, self.graphs, self.workshop, self.store = pictures, graphs, workshop, store
        self.runtimes, self.demand, self.clock, self.tick = runtimes, demand, clock, tick
        self.seconds, self.batch = 0.0, batch
        self._twins: dict[str, NDArray[np.float32]] = {}
        self.config = graphs.dense.config

    def certify(self, candidates: Sequence[Candidate], precisions: Sequence[str]) -> Certificates:
        """Order the tests by the calibrating pictures, then test.

        Raises:
            OutOfTime
        """
        made = Certificates()
        made.tests = self._sequence(candidates, precisions, made.notes)
        for test in made.tests:
            self.clock.require()
            found = None
            if self.clock.allows(self._building(test), f"{test.name} (its engines)"):
                found = self._tried(test.candidate, test.precision, "judging", made.notes)
            if found is None:
                continue
            test.found = judged(found, self.demand)
            if not test.passed:
                break
        for precision in precisions:
            if precision != FLOAT32.name and self.clock.left > 0:
                found = self._tried(None, precision, "judging", made.notes)
                if found is not None:
                    made.dense[precision] = judged(found, self.demand)
        return made

    def _sequence(
        self, candidates: Sequence[Candidate], precisions: Sequence[str], notes: list[str]
    ) -> list[Trial]:
        """The closed list of tests, by what the calibrating pictures say.

        In another precision a candidate is taken to lie as much farther from the dense network as
        the dense network itself does there: one run says that, and no candidate has to be made.
        Only those are tested there that are worth it: of those that seem to do, the ones with the
        fewest MACs.
        """
        seems = [one for one in candidates if self._loss(one) <= self.demand.allowed]
        rest = sorted((one for one in candidates if one not in seems),
                      key=lambda one: _distance(one.seen.apart))  # fmt: skip
        tests = []
        for precision in precisions:
            own, apart = [*seems, *rest[:1]], 0.0
            if precision != FLOAT32.name:
                self.clock.require()
                found = self._tried(None, precision, "calibrating", notes)
                if found is None:
                    continue
                apart = _distance(found.apart)
                own = sorted(seems or rest[:1], key=lambda one: one.share)[:_OTHERWISE]
            tests += [Trial(one, precision, _distance(one.seen.apart) + apart) for one in own]
        return sorted(tests, key=lambda test: (test.distance, test.candidate.share))

    def _building(self, test: Trial) -> float:
        entries = artefacts_of(test.candidate, test.precision, self.runtimes)
        return self.graphs.build_seconds(entries, self.batch)

    def _loss(self, one: Candidate) -> float:
        return judged(one.seen, self.demand)["loss"]

    def _tried(
        self, candidate: Candidate | None, precision: str, part: str, notes: list[str]
    ) -> Evidence | None:
        """What an artefact does to a part of the pictures; None, and a note, where it does not
        run."""
        made = []
        for entry in artefacts_of(candidate, precision, self.runtimes):
            found = self._answered(entry, part, notes)
            if found is not None:
                made.append(found)
        return together(made) if made else None

    def _answered(self, entry: Entry, part: str, notes: list[str]) -> Evidence | None:
        """Likewise, of one file or engine."""
        settings = {"step": "judged", "part": part, "what": entry.fields(),
                    **self.graphs.depends(entry, self.batch)}  # fmt: skip
        if (known := self.store.found(settings)) is not None:
            return Evidence.of_fields(known)
        which = getattr(self.pictures, part)
        twin = self._twin(part)  # what keeps dense from running ends the run
        try:
            output = self._outputs(entry, part)
            found = evidence(self.config, twin, output, self.pictures.labels_of(which))
        except (UserError, Crashed) as error:
            if entry.mode:  # what was not judged is not timed either
                self.graphs.refuse(entry, self.batch, str(error))
            line = f"no {entry.precision} of {entry.name}: {error}"
            if line not in notes:
                notes.append(line)
            return None
        self.store.keep(settings, found.fields())
        return found

    def _outputs(self, entry: Entry, part: str) -> NDArray[np.float32]:
        which = [int(i) for i in getattr(self.pictures, part)]
        batch = self.batch if entry.mode else 1
        made = self.workshop.outputs(self.graphs.runnable(entry, batch), which, self.tick)
        if part == "judging":
            self.seconds = made.said["seconds"]
        return made.arrays["output"]

    def _twin(self, part: str) -> NDArray[np.float32]:
        """The dense network's outputs in float32.

        Raises:
            UserError: it cannot be run.
        """
        if part not in self._twins:
            runtime = judging_runtime(FLOAT32.name, self.runtimes)
            try:
                self._twins[part] = self._outputs(Entry("dense", None, runtime, FLOAT32.name), part)
            except Crashed as error:
                raise UserError(f"{runtime} does not run the dense network: {error}") from None
        return self._twins[part]
