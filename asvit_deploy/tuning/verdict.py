"""Go, no go, or not shown: what certificates and timings of one batch allow to say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from asvit_deploy.evaluation.timing import Interval, interval_of
from asvit_deploy.precision import FLOAT32
from asvit_deploy.tuning.certify import Certificates, Trial
from asvit_deploy.tuning.demand import Demand, judged
from asvit_deploy.tuning.engines import EXACT
from asvit_deploy.tuning.graphs import INT8, Entry
from asvit_deploy.tuning.latency import Timing, peer, rows

Why = Literal[
    "adaptive_wins", "dense_as_fast", "dense_int8_wins", "nothing_meets_the_demand",
    "more_pictures", "not_tested", "busy", "out_of_time", "nothing_ran",
]  # fmt: skip
GO, NO_GO, NOT_SHOWN = 0, 3, 4  # exit codes


@dataclass(frozen=True)
class Timed:
    """An adaptive row, and what the judging pictures say of it."""

    number: int
    entry: Entry
    test: Trial
    over: Interval
    p50_ms: float

    @property
    def faster(self) -> bool:
        """Than the fastest dense row that may be taken, beyond chance."""
        return self.over["low"] > 1


@dataclass(frozen=True)
class Verdict:
    """What a run ends in.

    Attributes:
        go: True, False, or None: not shown.
        why: which of the ways to end it is.
        sentence: for people.
        winner: the row to take, where there is one.
        nearest: the row, or the test, that came nearest where there is none.
        over: what that row gains over the fastest dense one.
        more: pictures that the folder lacks to show it, about.
        dense: the fastest dense row that may be taken.
    """

    go: bool | None
    why: Why
    sentence: str
    winner: Timed | None = None
    nearest: str | None = None
    over: Interval | None = None
    more: int | None = None
    dense: str | None = None

    @property
    def code(self) -> int:
        return GO if self.go else NOT_SHOWN if self.go is None else NO_GO

    def fields(self) -> dict[str, Any]:
        won = self.winner
        return {
            "go": self.go, "why": self.why, "sentence": self.sentence, "exit_code": self.code,
            "winner": won and won.entry.name, "candidate": won and won.test.candidate.name,
            "runtime": won and won.entry.runtime, "precision": won and won.entry.precision,
            "over_fastest_dense": won.over if won else self.over, "fastest_dense": self.dense,
            "nearest": self.nearest, "more_pictures": self.more,
        }  # fmt: skip


def fastest_dense(timing: Timing, found: Certificates) -> int | None:
    """The dense row that one would run instead: in float32, or in a precision that meets the
    demand as well."""
    allowed = {FLOAT32.name, EXACT, *(p for p, shown in found.dense.items() if shown["passed"])}
    own = [n for n, one in enumerate(timing.entries)
           if one.kind == "dense" and one.precision in allowed]  # fmt: skip
    return min(own, key=timing.p50, default=None)


def timed(timing: Timing, found: Certificates, dense: int) -> list[Timed]:
    """The adaptive rows, the fastest first."""
    tests = {(id(test.candidate), test.precision): test for test in found.tests}
    made = []
    for number, entry in enumerate(timing.entries):
        test = tests.get((id(entry.candidate), entry.precision))
        if entry.kind == "adaptive" and test is not None:
            over = interval_of(timing.seconds[dense], timing.seconds[number])
            made.append(Timed(number, entry, test, over, timing.p50(number)))
    return sorted(made, key=lambda one: one.p50_ms)


def decide(
    timing: Timing, found: Certificates, demand: Demand, more: Callable[[int], int]
) -> Verdict:
    """What can be said of one batch.

    Args:
        more: how many pictures a folder lacks for so many more judging ones.
    """
    dense = fastest_dense(timing, found)
    ways = [] if dense is None else timed(timing, found, dense)
    if dense is None or not ways:
        reason = "; ".join([*found.notes, *timing.notes]) or "nothing could be timed"
        return Verdict(None, "nothing_ran", f"not shown: nothing ran to its end ({reason})")
    beside = timing.entries[dense].name
    if timing.busy is not None:
        return Verdict(
            None, "busy", f"not shown: {timing.busy}", dense=beside, nearest=ways[0].entry.name
        )
    certified = [one for one in ways if one.test.passed]
    if certified and certified[0].faster:
        return _won(certified[0], timing, dense, found, demand)
    faster = [one for one in ways if one.faster and not one.test.passed]
    if [one for one in faster if _may_pass(one.test, demand)] or (faster and not certified):
        return _open(faster, certified, found, demand, more, beside)
    return _dense_wins(certified or ways, timing, dense, faster)


def _may_pass(test: Trial, demand: Demand) -> bool:
    """Whether more pictures might show that it meets the demand; of what was not tested, the
    calibrating ones say."""
    if test.found is None:
        return judged(test.candidate.seen, demand)["loss"] <= demand.allowed
    return test.found["more"] is not None and not test.found["refuted"]


def _span(interval: Interval) -> str:
    return f"{interval['value']:.2f}x ({interval['low']:.2f} to {interval['high']:.2f})"


def _won(
    one: Timed, timing: Timing, dense: int, found: Certificates, demand: Demand
) -> Verdict:  # fmt: skip
    beside = timing.entries[dense]
    said = (
        f"go: {one.entry.name} is {_span(one.over)} as fast as the fastest dense "
        f"({beside.name}) at batch {timing.batch}; {shown(one.test, demand)}"
    )
    if (int8 := _unproven(timing, found, one.p50_ms)) is not None:
        said += f"; {int8} is faster still, but not shown to meet the demand ({demand.said()})"
    return Verdict(True, "adaptive_wins", said, one, dense=beside.name)


def _unproven(timing: Timing, found: Certificates, p50: float) -> str | None:
    """A dense row that is faster, in a precision that has not met the demand."""
    for n, one in enumerate(timing.entries):
        other = one.kind == "dense" and one.precision not in (FLOAT32.name, EXACT)
        if other and not found.dense.get(one.precision, {}).get("passed") and timing.p50(n) < p50:
            return one.name
    return None


def shown(test: Trial, demand: Demand) -> str:
    """What the judging pictures show, in words."""
    found = test.found
    assert found is not None
    count = found["pictures"]
    if demand.task == "embeddings":
        said = f"mean cosine {found['agreement']:.4f}, at least {found['agreement_low']:.4f}"
        return f"{said} ({count} pictures)"
    what = "accuracy falls" if demand.task == "labels" else "top-1 changes on"
    points = "points" if demand.task == "labels" else "% of the pictures"
    by = "by " if demand.task == "labels" else ""
    seen = (
        f"{found['worse']} got worse and {found['better']} better"
        if demand.task == "labels" else f"{found['changed']} did"
    )  # fmt: skip
    return f"{what} {by}at most {found['loss_bound']:.2f} {points} ({seen} of {count})"


def _open(
    ways: Sequence[Timed], certified: Sequence[Timed], found: Certificates, demand: Demand,
    more: Callable[[int], int], beside: str,
) -> Verdict:  # fmt: skip
    """Something is faster and has not passed: more pictures would show it, or none would."""
    tested = [one for one in ways if one.test.found is not None]
    stopped = found.stopped_at
    nearest = tested[0] if tested else None  # the fastest
    test = nearest.test if nearest else stopped
    if test is None or test.found is None:
        return Verdict(
            None, "nothing_ran", "not shown: nothing could be judged "
            f"({'; '.join(found.notes) or 'no candidate ran'})", dense=beside,
        )  # fmt: skip
    skipped = [one for one in ways if one.test.found is None and _may_pass(one.test, demand)]
    if nearest is None and skipped:
        return _not_tested(skipped[0], test, demand, more, beside)
    untested = ""
    if skipped and skipped[0] is ways[0]:
        first = skipped[0].entry.name
        untested = f"; {first} is faster and was not tested, because {test.name} did not pass"
    name = nearest.entry.name if nearest else test.name
    fast = f", {_span(nearest.over)} as fast as {beside}" if nearest else ""
    needed = test.found["more"]
    kept = f"; {certified[0].entry.name} passes and is no faster than {beside}" if certified else ""
    if test.found["refuted"] or needed is None:
        return Verdict(
            False, "nothing_meets_the_demand",
            f"no go: nothing that is faster meets the demand ({demand.said()}); nearest is "
            f"{name}{fast}: {shown(test, demand)}{untested}{kept}",
            nearest=name, over=nearest.over if nearest else None, dense=beside,
        )  # fmt: skip
    about = more(needed)
    return Verdict(
        None, "more_pictures",
        f"not shown: about {about:,} more pictures would, if they go like these; nearest is "
        f"{name}{fast}: {shown(test, demand)}, and {demand.said()}{untested}{kept}",
        nearest=name, over=nearest.over if nearest else None, more=about, dense=beside,
    )  # fmt: skip


def _not_tested(
    one: Timed, stopped: Trial, demand: Demand, more: Callable[[int], int], beside: str
) -> Verdict:
    """What is faster came behind the one that ended the tests, and nothing is known of it."""
    assert stopped.found is not None
    needed = stopped.found["more"]
    about = more(needed) if needed is not None and not stopped.found["refuted"] else None
    would = "" if about is None else f"; about {about:,} more pictures would let it pass"
    return Verdict(
        None, "not_tested",
        f"not shown: {one.entry.name}, {_span(one.over)} as fast as {beside}, is faster and was "
        f"not tested, because {stopped.name} did not pass: {shown(stopped, demand)}, and "
        f"{demand.said()}{would}",
        nearest=one.entry.name, over=one.over, more=about, dense=beside,
    )  # fmt: skip


def _dense_wins(
    ways: Sequence[Timed], timing: Timing, dense: int, lossy: Sequence[Timed]
) -> Verdict:
    """No adaptive row is faster than dense, but for those that lose too much."""
    best, beside = ways[0], timing.entries[dense]
    but = f"; {lossy[0].entry.name} is faster, and loses more than is allowed" if lossy else ""
    said = f"{_span(best.over)} as fast at batch {timing.batch}"
    if beside.precision == INT8 and best.entry.precision == FLOAT32.name:
        own = peer(timing, best.number, "dense")
        gain = None if own is None else interval_of(timing.seconds[own],
                                                    timing.seconds[best.number])  # fmt: skip
        if gain is not None and gain["low"] > 1:
            return Verdict(
                False, "dense_int8_wins",
                f"no go: dense int8 beats adaptive float32: {beside.name} takes "
                f"{timing.p50(dense):.2f} ms and {best.entry.name} {best.p50_ms:.2f} ms ({said}); "
                f"`asvit-deploy export --dense --int8` writes it{but}",
                nearest=best.entry.name, over=best.over, dense=beside.name,
            )  # fmt: skip
    slower = best.over["high"] < 1
    return Verdict(
        False, "dense_as_fast",
        f"no go: dense is {'faster' if slower else 'as fast'} here: {beside.name} takes "
        f"{timing.p50(dense):.2f} ms, and the fastest adaptive, {best.entry.name}, "
        f"{best.p50_ms:.2f} ms ({said}){but}",
        nearest=best.entry.name, over=best.over, dense=beside.name,
    )  # fmt: skip


def promise(verdict: Verdict, timing: Timing) -> dict[str, Any] | None:
    """What a later measurement on other pictures should find; None without a winner.

    Returns:
        `ratio`, `low`, `high`: speed-up at p50 over dense in the same runtime and precision; the
        agreement with the dense network and its 95 % interval, which is of all pictures like
        these; and `expected_low`, `expected_high`, which are of another sample of the same size:
        that one has its own chance.
    """
    won = verdict.winner
    if won is None or won.test.found is None:
        return None
    row, found = rows(timing)[won.number], won.test.found
    names = ("agreement", "agreement_low", "agreement_high", "expected_low", "expected_high",
             "pictures", "loss", "loss_bound")  # fmt: skip
    return {
        "candidate": won.test.candidate.name, "runtime": won.entry.runtime,
        "precision": won.entry.precision, "batch": timing.batch,
        "ratio": row["speedup"]["value"], "low": row["speedup"]["low"],
        "high": row["speedup"]["high"], "ratio_p99": row["speedup_p99"],
        "over": f"dense in {won.entry.runtime}, {won.entry.precision}",
        "over_fastest_dense": won.over, "p50_ms": row["p50_ms"], "p99_ms": row["p99_ms"],
        "macs_share": won.test.candidate.share, **{name: found[name] for name in names},
    }  # fmt: skip
