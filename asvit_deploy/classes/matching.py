"""Which of a network's outputs each class of a data set means."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.classes import imagenet
from asvit_deploy.classes.order import number_of, orders_differ
from asvit_deploy.errors import UserError

_SETTLE = "--classes FILE settles it"


def label_map(
    theirs: Sequence[str],
    ours: Sequence[str] | None,
    count: int,
    firm: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> NDArray[np.int64]:
    """The model's class number for each class of the data.

    By name where the model knows its classes and has them all; ImageNet-1k's by WordNet id or any
    of their names too. Else by number, where numbers are all that the data has; else in order,
    as image folders are read everywhere.

    Args:
        theirs: classes of the data, in its order.
        ours: classes of the model, or None where they are not known.
        count: how many classes the model has.
        firm: whether `ours` are known and not merely found or assumed. Data that has none of them
            is refused then, and otherwise taken in order.
        say: called with a line on what was taken for what where it is no mere match of names.

    Raises:
        UserError: no way fits; a class of the data may mean several of the model's; two of them
            mean the same.
    """
    places: dict[str, set[int]] = {}
    for i, name in enumerate(ours or ()):
        places.setdefault(name, set()).add(i)
    if ours and all(name in places for name in theirs):
        return _single(theirs, [places[name] for name in theirs], ours)
    known = _Looser(ours or (), places)
    hits = [known.meant_by(name) for name in theirs]
    if ours and all(hits):
        numbers = _single(theirs, hits, ours)
        say("classes of the data matched " + _shown(theirs, numbers, ours))
        return numbers
    free = not ours or not firm or known.imagenet or list(ours) == [str(i) for i in range(count)]
    # All of them that stand in another order, as in a `classes.txt`, were put there on purpose.
    by_number = _by_number(theirs, count) if free and not any(hits) else None
    if by_number is not None and len(theirs) == count and (np.diff(by_number) < 0).any():
        by_number = None
    if by_number is not None:
        if ours or len(theirs) < count or orders_differ(theirs):
            say(f"classes of the data taken by number {_shown(theirs, by_number, ours)}; {_SETTLE}")
        return by_number
    if free and len(theirs) == count and sum(map(bool, hits)) * 2 < count:
        numbers = np.arange(count)
        say(f"{'no class of the data has a name of' if ours else 'nothing names the classes of'} "
            f"the network: taken in order {_shown(theirs, numbers, ours)}; {_SETTLE}")  # fmt: skip
        return numbers
    raise _refusal(theirs, ours, count, hits)


class _Looser:
    """Names as people write them: `golden_retriever`, "Golden retriever", n02099601, 007."""

    def __init__(self, ours: Sequence[str], places: dict[str, set[int]]) -> None:
        self._exact = places
        self.imagenet = imagenet.are_these(ours)
        self._plain: dict[str, set[int]] = {}
        for i, name in enumerate(ours):
            self._plain.setdefault(_plain(name), set()).add(i)

    def meant_by(self, name: str) -> set[int]:
        found = self._exact.get(name) or (self.imagenet and imagenet.meant_by(name))
        return found or self._plain.get(_plain(name)) or set()


def _plain(name: str) -> str:
    return number_of(name) or imagenet.plain(name)


def _single(
    theirs: Sequence[str], hits: Sequence[set[int]], ours: Sequence[str]
) -> NDArray[np.int64]:
    """The one output that each class means, another for each."""
    taken: dict[int, str] = {}
    for name, hit in zip(theirs, hits):
        if len(hit) > 1:
            outputs = " and ".join(f"{i} ({ours[i]})" for i in sorted(hit)[:2])
            raise UserError(
                f"the data's class {name!r} may mean the outputs {outputs}; name its folder as the "
                "one that is meant"
            )
        (number,) = hit
        if number in taken:
            raise UserError(
                f"the data's classes {taken[number]!r} and {name!r} both mean output {number} "
                f"({ours[number]}); join them"
            )
        taken[number] = name
    return np.array([next(iter(hit)) for hit in hits], np.int64)


def _by_number(theirs: Sequence[str], count: int) -> NDArray[np.int64] | None:
    """The numbers that all the names are, where each is one of the outputs'."""
    numbers = [number_of(name) for name in theirs]
    longest = len(str(count))  # thousands of digits are no int
    if any(number is None or len(number) > longest for number in numbers):
        return None
    found = np.array([int(number or 0) for number in numbers], np.int64)
    fits = len(found) and found.max() < count and len(set(found.tolist())) == len(found)
    return found if fits else None


def _shown(theirs: Sequence[str], numbers: NDArray[np.int64], ours: Sequence[str] | None) -> str:
    """The first few pairs."""
    pairs = [f"{name!r} = {i}{f' ({ours[i]})' if ours else ''}"
             for name, i in zip(theirs[:3], numbers)]  # fmt: skip
    return f"({', '.join(pairs)}{', …' * (len(theirs) > 3)})"


def _refusal(
    theirs: Sequence[str], ours: Sequence[str] | None, count: int, hits: Sequence[set[int]]
) -> UserError:
    if ours and (any(hits) or len(theirs) == count):
        odd = next(name for name, hit in zip(theirs, hits) if not hit)
        return UserError(
            f"the data has a class {odd!r} that the model does not know; name its folder as the "
            "model does, or name the model's outputs with --classes FILE"
        )
    return UserError(
        f"the data has {len(theirs)} classes and the model {count}; give a folder with the "
        "model's classes, all of them or by their names"
    )
