"""Figures in words: how the page writes numbers, intervals and what outputs have in common."""

from __future__ import annotations

import math
import re
from typing import Any

from asvit_deploy.intervals import wilson
from asvit_deploy.page.facts import Figure, Mood

NONE = "–"
_PERCENT = "\u00a0%"  # on one line with its number


def base_name(path: str) -> str:
    """The last part of a path of any system."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def ms(value: float) -> str:
    """Milliseconds, three digits."""
    if not math.isfinite(value):
        return "not finite"
    digits = next((n for n, end in enumerate((99.95, 9.995, 0.9995)) if value >= end), 3)
    return f"{value:,.{digits}f}"


def percent(share: float, digits: int = 1) -> str:
    """A share; one that is not all does not read as all, nor one that is something as nothing."""
    said = f"{100 * share:.{digits}f}"
    if share < 1 and float(said) == 100:
        return f"> {100 - 10**-digits:.{digits}f}{_PERCENT}"
    if share > 0 and float(said) == 0:
        return f"< {10**-digits:.{digits}f}{_PERCENT}"
    return f"{said.removesuffix('.0')}{_PERCENT}"


def signed(value: float, digits: int) -> str:
    """A number with a minus sign that is none of a hyphen's length."""
    return f"{value:,.{digits}f}".replace("-", "−")


def small(value: float) -> str:
    """An error or a margin."""
    if not math.isfinite(value):
        return "not finite"
    return "0" if value == 0 else f"{value:.1e}"


def times(interval: dict[str, float] | None) -> str:
    """A ratio with its interval."""
    if interval is None:
        return NONE
    return f"{interval['value']:.2f} ({interval['low']:.2f}–{interval['high']:.2f})"


def shares(interval: dict[str, float] | None) -> str:
    """A share with its interval."""
    if interval is None:
        return NONE
    return f"{percent(interval['value'])} ({interval_percent(interval)})"


def several(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def kept(mean: list[float] | None, tokens: int | None) -> str:
    """Mean numbers of tokens, stage by stage."""
    if not mean:
        return "every token stays"
    of = f" of {tokens}" if tokens else ""
    return f"{', '.join(f'{one:.1f}'.removesuffix('.0') for one in mean)}{of}"


def agreed(agreement: dict[str, Any] | None, images: int | None) -> dict[str, float] | None:
    """The share of equal top-1 or the cosine, with an interval where there is one."""
    if not agreement:
        return None
    if agreement["cosine"] is not None:
        value = agreement["cosine"]
        low, high = agreement["low"], agreement["high"]
        return {"value": value, "low": value if low is None else low,
                "high": value if high is None else high}  # fmt: skip
    if agreement["top1"] is not None:
        if images:
            return wilson(round(agreement["top1"] * images), images)
        return {"value": agreement["top1"], "low": agreement["top1"], "high": agreement["top1"]}
    return None


# Below these even the upper end of an interval says that a network answers differently.
_LOST = {"top1": 0.9, "cosine": 0.9}
_NEAR = {"top1": 0.97, "cosine": 0.98}


def agreement_figure(
    agreement: dict[str, Any] | None, images: int | None, rank: float
) -> Figure | None:
    """What the tokens that left cost, as far as outputs tell."""
    if not agreement:
        return None
    found = agreed(agreement, images)
    sample = f", {several(images, 'picture')}" if images else ""
    if found is None:
        if (error := agreement["score_error"]) is None:
            return None
        return Figure("loss", rank, f"{error:.3g}", f"mean error{sample}",
                      "of the score, beside the dense network",
                      f"its score is off by {error:.3g} on average")  # fmt: skip
    measure = "top1" if agreement["cosine"] is None else "cosine"
    mood: Mood = "even"
    if found["high"] < _LOST[measure]:
        mood = "bad"
    elif found["value"] >= _NEAR[measure]:
        mood = "good"
    if measure == "cosine":
        low, high = found["low"], found["high"]
        return Figure("loss", rank, f"{found['value']:.4f}",
                      f"95 % interval {low:.4f}–{high:.4f}{sample}",
                      "cosine of its embeddings with the dense network's",
                      f"embeddings at a cosine of {found['value']:.4f} with dense",
                      mood)  # fmt: skip
    changed = {"value": 1 - found["value"], "low": 1 - found["high"], "high": 1 - found["low"]}
    share = percent(changed["value"])
    clause = f"another top-1 than dense on {share} of the pictures"
    if found["value"] == 1:
        clause = "the same top-1 as dense on every picture"
    return Figure("loss", rank, share, f"95 % interval {interval_percent(changed)}{sample}",
                  "of the pictures get another top-1 than from the dense network", clause,
                  mood)  # fmt: skip


def interval_percent(found: dict[str, float]) -> str:
    return f"{100 * found['low']:.1f}–{100 * found['high']:.1f}{_PERCENT}"
