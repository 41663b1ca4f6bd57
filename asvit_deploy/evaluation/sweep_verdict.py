"""From which batch, budget and image size on adaptive wins: a sweep's intervals in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from asvit_deploy.evaluation.sweep_types import Over, SweepPoint
from asvit_deploy.evaluation.timing import Interval

Outcome = Literal["won", "lost", "drawn"]
# What a speed-up was measured against: how a win over it reads, and how none.
_OVER = {
    "dense": ("wins", "win"),
    "static": ("beats static counts of equal MACs", "beat static counts of equal MACs"),
}
_PLURAL = {"batch": "batches", "budget": "budgets", "size": "sizes"}


def outcome(speedup: Interval) -> Outcome:
    """What the interval allows to say."""
    return "won" if speedup["low"] > 1 else "lost" if speedup["high"] < 1 else "drawn"


def verdicts(over: Over, points: Sequence[SweepPoint]) -> list[str]:
    """One sentence for each runtime on adaptive against dense, and one on adaptive against static
    where that was timed: of each point its fastest adaptive row."""
    found: dict[tuple[str, str], list[tuple[float, Interval]]] = {}
    for runtime in dict.fromkeys(row["runtime"] for point in points for row in point["rows"]):
        for point in points:
            own = [row for row in point["rows"]
                   if row["runtime"] == runtime and row["kind"] == "adaptive"]  # fmt: skip
            if not own:
                continue
            best = min(own, key=lambda row: row["p50_ms"])
            if "speedup" in best:
                found.setdefault((runtime, "dense"), []).append((point["at"], best["speedup"]))
            if "over_static" in best:
                found.setdefault((runtime, "static"), []).append((point["at"], best["over_static"]))
    return [f"{runtime}: {sentence(over, rival, results)}"
            for (runtime, rival), results in found.items()]  # fmt: skip


def sentence(over: Over, rival: str, results: Sequence[tuple[float, Interval]]) -> str:
    """Where adaptive wins over a rival, "dense" or "static", and what happens elsewhere.

    Args:
        results: what was tried, rising, and the speed-up over the rival there.
    """
    tried = [at for at, _ in results]
    by: dict[Outcome, list[float]] = {"won": [], "lost": [], "drawn": []}
    for at, speedup in results:
        by[outcome(speedup)].append(at)
    does, do = _OVER[rival]
    elsewhere = [(f"{rival} wins", by["lost"]), ("a draw", by["drawn"])]
    if by["won"]:
        said = f"adaptive {does} {_place(over, tried, by['won'])}"
        rest = [f"{words} {_place(over, tried, at)}" for words, at in elsewhere if at]
        return "; ".join([said, *rest])
    if len(tried) == 1:
        words = next(words for words, at in elsewhere if at)
        return f"adaptive does not {do} {_place(over, tried, tried)}: {words}"
    said = f"adaptive {does} at none of the {_PLURAL[over]} tried ({_range(over, tried)})"
    if len(by["lost"]) == len(tried):
        return f"{said}: {rival} wins at all of them"
    if len(by["drawn"]) == len(tried):
        return f"{said}: all are draws"
    return f"{said}: " + "; ".join(f"{words} {_place(over, tried, at)}" for words, at in elsewhere)


def _place(over: Over, tried: Sequence[float], hits: Sequence[float]) -> str:
    """Where among the values tried the hits are."""
    if len(tried) == 1:
        return f"at {_named(over, tried[0])}, the only {over} tried"
    if len(hits) == len(tried):
        return f"at every {over} tried ({_range(over, tried)})"
    if len(hits) > 1 and list(hits) == list(tried[-len(hits) :]):
        return f"from {_named(over, hits[0])} on"
    if len(hits) > 1 and list(hits) == list(tried[: len(hits)]):
        return f"up to {_named(over, hits[-1])}"
    if len(hits) == 1:
        edge = {tried[0]: ", the smallest tried", tried[-1]: ", the largest tried"}
        return f"at {_named(over, hits[0])}{edge.get(hits[0], '')}"
    *first, last = [f"{at:g}" for at in hits]
    listed = f"{', '.join(first)} and {last}"
    return f"at {listed} px" if over == "size" else f"at {_PLURAL[over]} {listed}"


def _named(over: Over, at: float) -> str:
    return f"{at:g} px" if over == "size" else f"{over} {at:g}"


def _range(over: Over, tried: Sequence[float]) -> str:
    return f"{tried[0]:g} to {tried[-1]:g}{' px' * (over == 'size')}"
