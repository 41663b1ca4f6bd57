"""Coarse to fine over budgets, on the calibrating pictures; and the order in which the rest is
tested.

Fixed-sequence testing: the judging pictures test candidates one after the other, each at the full
level (a one-sided 95 % bound each), and the first that fails ends it. The chance that any adaptive
candidate is passed falsely is then that of one test, 5 %, however many there are (Angelopoulos et
al., Learn then Test, 2021; Maurer et al., 1995), as long as the order does not depend on those
pictures. Here it never does: which budgets there are, how they are refined, what stands for each of
them and the order itself come from the calibrating pictures alone, and the list is closed before a
judging picture is run. So coarse to fine costs nothing: it is over when testing begins. Dense
networks in other precisions are tested beside the sequence, each at 5 % of its own.

The order is that of closeness to the dense network on the calibrating pictures: what is likeliest
to pass comes first, be it pruned less, or trained for it, or in another precision. What those
pictures say will hardly pass is not in the list at all, but for the closest of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from asvit_deploy.errors import UserError
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.tuning.clock import Clock
from asvit_deploy.tuning.contenders import (
    Bench,
    Candidate,
    Refusal,
    Way,
    closer,
    closest,
    other_placements,
    usual_ways,
)
from asvit_deploy.tuning.demand import Demand, judged

COARSE = (0.9, 0.75, 0.6, 0.5, 0.4)
_PLACED_AT = 0.6  # the budget at which other placements are tried
_FINE = 2  # budgets between the last that does and the first that does not
# A budget whose loss on the calibrating pictures is so many times what is demanded is the last.
_HOPELESS, _LEAST_LOSS = 8.0, {"embeddings": 0.04, "classes": 4.0, "labels": 4.0}


@dataclass
class Found:
    """What the calibrating pictures led to.

    Attributes:
        candidates: one for each budget, and the checkpoint's own first where there is one.
        tried: every contender at every budget, JSON-ready.
        notes: what was refused, or stands out.
    """

    candidates: list[Candidate] = field(default_factory=list)
    tried: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Search:
    """One run over the budgets.

    Args:
        methods: as `contenders.usual_ways`.
        own: the reduction that the checkpoint has already, or None.
        reserve: seconds that what comes after will take, as far as can be said.
    """

    def __init__(
        self, bench: Bench, methods: Sequence[str], demand: Demand, clock: Clock,
        own: Reduction | None, reserve: Callable[[], float], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.bench, self.demand, self.clock, self.own = bench, demand, clock, own
        self.reserve, self.say = reserve, say
        self.ways = usual_ways(bench.config, methods)
        self.found = Found()

    def run(self) -> Found:
        """Raises UserError where no budget can be met at all or nothing kept, OutOfTime."""
        if self.own is not None:
            try:
                self.found.candidates.append(self.bench.own(self.own))
            except Refusal as error:
                self.found.notes.append(f"not tried: the checkpoint's own {self.own.name}: {error}")
        made: dict[float, Candidate] = {}
        for budget in COARSE:
            self.clock.require()
            # What the next one needs is only known once one was done.
            cost = self.bench.seconds * len(self.ways) * len(self.bench.pictures)
            if made and not self.clock.allows(cost, f"budget {budget:g}", self.reserve()):
                continue
            one = self._at(budget)
            if one is None:
                continue
            made[budget] = one
            if self._hopeless(one) and budget != COARSE[-1]:
                self.found.notes.append(
                    f"budgets under {budget:g} are not tried: there the loss is "
                    f"{_said(self._loss(one), self.demand)} on the pictures that calibrate already"
                )
                break
        if not made and not self.found.candidates:
            raise UserError("; ".join(dict.fromkeys(self.found.notes)) or "no budget can be met")
        self._place(made)
        self._refine(made)
        self.found.candidates += [made[budget] for budget in sorted(made, reverse=True)]
        self._note_fixed()
        return self.found

    def _at(self, budget: float) -> Candidate | None:
        """The best contender on a budget; None where none can meet it."""
        found = []
        for way in self.ways:
            try:
                found.append(self.bench.fitted(way, budget))
            except Refusal as error:
                self._refused(way, budget, str(error))
        if not found:
            return None
        best = closest(found)
        for one in found:
            self.found.tried.append({**one.fields(), "chosen": one is best})
        self.say(f"budget {budget:g}: {best.way.name}, {best.share:.3f} of the MACs")
        return best

    def _refused(self, way: Way, budget: float, reason: str) -> None:
        line = f"not tried: {way.name} at {budget:g}: {reason}"
        if line not in self.found.notes:
            self.found.notes.append(line)

    def _loss(self, one: Candidate) -> float:
        """As `demand.judged` has it, on the calibrating pictures."""
        return judged(one.seen, self.demand)["loss"]

    def _hopeless(self, one: Candidate) -> bool:
        most = max(_HOPELESS * self.demand.allowed, _LEAST_LOSS[self.demand.task])
        return self._loss(one) > most

    def _place(self, made: dict[float, Candidate]) -> None:
        """Try other placements of the best method at one budget; one that wins there beyond chance
        is tried at all of them."""
        if not made:
            return
        at = min(made, key=lambda budget: abs(budget - _PLACED_AT))
        ways = other_placements(self.bench.config, made[at].way)
        cost = self.bench.seconds * len(ways) * len(self.bench.pictures)
        if not ways or not self.clock.allows(cost, "other placements", self.reserve()):
            return
        best = made[at]
        for way in ways:
            try:
                one = self.bench.fitted(way, at)
            except Refusal as error:
                self._refused(way, at, str(error))
                continue
            won = closer(one, best)
            self.found.tried.append({**one.fields(), "chosen": won})
            best = one if won else best
        if best is made[at]:
            return
        self.ways = [*self.ways, best.way]
        made[at] = best
        for budget in made:
            if budget == at:
                continue
            try:
                one = self.bench.fitted(best.way, budget)
            except Refusal as error:
                self._refused(best.way, budget, str(error))
                continue
            won = closest([made[budget], one]) is one
            self.found.tried.append({**one.fields(), "chosen": won})
            made[budget] = one if won else made[budget]

    def _refine(self, made: dict[float, Candidate]) -> None:
        """Budgets between the last that meets the demand on the calibrating pictures and the next,
        which does not."""
        falling = sorted(made, reverse=True)
        fits = [budget for budget in falling if self._loss(made[budget]) <= self.demand.allowed]
        if not fits or fits[-1] == falling[-1]:
            return
        last = fits[-1]
        first = falling[falling.index(last) + 1]
        for i in range(1, _FINE + 1):
            budget = round(last + (first - last) * i / (_FINE + 1), 3)
            cost = self.bench.seconds * len(self.ways) * len(self.bench.pictures)
            if not self.clock.allows(cost, f"fine budget {budget:g}", self.reserve()):
                return
            if (one := self._at(budget)) is not None:
                made[budget] = one

    def _note_fixed(self) -> None:
        own = [one for one in self.found.candidates if one.reduction.boundaries()]
        if own and not any(one.varies for one in own):
            self.found.notes.append(
                "kept tokens hardly vary between these pictures: thresholds bring nothing that "
                "fixed counts do not"
            )


def _said(loss: float, demand: Demand) -> str:
    return (
        f"{loss:.3f} of the cosine" if demand.task == "embeddings" else f"{100 * loss:.1f} points"
    )
