"""The table of methods: one row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from asvit_deploy.reduction.base import Reduction
from asvit_deploy.reduction.baselines import MinK, Random
from asvit_deploy.reduction.bat import BAT
from asvit_deploy.reduction.dynamicvit import DynamicViT
from asvit_deploy.reduction.ltmp import LTMP
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.schedule import Schedule
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.reduction.tome import ToMe, ToMeStages
from asvit_deploy.reduction.topk import EViT, TopK, TopKAttention, TopKNearest, TopKScalar

# Those that a budget alone settles on dense weights.
RANKED: dict[str, type[Ranked]] = {
    method.name: method
    for method in (SizePassing, ToMe, ToMeStages, TopKNearest, TopKScalar, TopK, TopKAttention,
                   EViT, BAT, MinK, Random)
}  # fmt: skip
METHODS: dict[str, type[Reduction]] = {
    Threshold.name: Threshold,
    **RANKED,
    Schedule.name: Schedule,
    DynamicViT.name: DynamicViT,
    LTMP.name: LTMP,
}


def method_of(fields: Mapping[str, Any]) -> type[Reduction] | None:
    """The method that a sidecar names, once checked; None where it names none, as AS-ViT's own."""
    reduction = fields.get("reduction")
    return None if reduction is None else METHODS[reduction["name"]]


def restored(fields: dict[str, Any], prefix: int) -> Reduction:
    """The method that `Reduction.fields` described; its parameters are loaded after.

    Raises:
        ValueError: there is no such method, or the fields are not its own.
    """
    try:
        method, blocks = METHODS[fields["name"]], fields["blocks"]
        if type(blocks) is not list or not all(type(block) is int for block in blocks):
            raise TypeError("blocks are a list of numbers")
        return method.restore(fields, prefix)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no reduction is described by {fields!r} ({error})") from None


def within(reduction: Reduction, depth: int) -> bool:
    """Whether its cuts rise and lie between the halves of a network of so many blocks."""
    return rising(reduction.cuts, depth)


def rising(cuts: Sequence[int], depth: int) -> bool:
    """Whether halves rise and lie inside a network of so many blocks."""
    return all(a < b for a, b in pairwise((0, *cuts, 2 * depth)))
