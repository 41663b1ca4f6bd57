"""Shares and their intervals."""

from __future__ import annotations

import math

_Z = 1.959964  # two-sided 95 %


def wilson(hits: int, total: int) -> dict[str, float]:
    """A share with its 95 % interval after Wilson (1927), which holds near 0 and 1 too."""
    share = hits / total
    middle = (share + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
    spread = _Z / (1 + _Z**2 / total) * math.sqrt(
        share * (1 - share) / total + _Z**2 / (4 * total**2)
    )  # fmt: skip
    return {"value": share, "low": max(0.0, middle - spread), "high": min(1.0, middle + spread)}


def difference(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """One share less another with its 95 % interval after Newcombe (1998), from those of the two.

    Of the same pictures it is wider than it need be.
    """
    value = one["value"] - other["value"]
    down = math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    up = math.hypot(one["high"] - one["value"], other["value"] - other["low"])
    return {"value": value, "low": value - down, "high": value + up}
