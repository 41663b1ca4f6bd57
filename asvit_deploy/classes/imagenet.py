"""ImageNet-1k: what its classes are called, and which of them a name means."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files

CLASSES = 1000
_ALIKE = 0.9  # share of names in their place from which a list is ImageNet-1k's; others have none


@functools.cache
def _rows() -> tuple[tuple[str, str], ...]:
    """WordNet id and lemmas of each class, such as n01440764 and "tench, Tinca tinca"."""
    text = files("asvit_deploy.classes").joinpath("imagenet_1k.txt").read_text(encoding="utf-8")
    parted = (line.partition(" ") for line in text.splitlines())
    return tuple((synset, lemmas) for synset, _, lemmas in parted)


@functools.cache
def names() -> tuple[str, ...]:
    """A label for each class, all different.

    The lemmas; with the WordNet id where another class has the same first lemma, as cranes
    (bird and machine) and maillots have.
    """
    shared = Counter(lemmas.split(", ")[0] for _, lemmas in _rows())
    return tuple(
        lemmas if shared[lemmas.split(", ")[0]] == 1 else f"{lemmas} ({synset})"
        for synset, lemmas in _rows()
    )


def plain(name: str) -> str:
    """A name without what folders, lists and people write differently."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


@functools.cache
def _aliases() -> tuple[dict[str, set[int]], ...]:
    """Names to classes, strictest first: as written; in plain form; any lemma in plain form."""
    levels: tuple[dict[str, set[int]], ...] = ({}, {}, {})
    for number, ((synset, lemmas), label) in enumerate(zip(_rows(), names())):
        parts = lemmas.split(", ")
        for name in (synset, label, lemmas, parts[0], f"{synset} {lemmas}", f"{synset} {parts[0]}"):
            levels[0].setdefault(name, set()).add(number)
            levels[1].setdefault(plain(name), set()).add(number)
        for name in parts:
            levels[2].setdefault(plain(name), set()).add(number)
    return levels


def meant_by(name: str) -> set[int]:
    """The classes that a WordNet id or a name may mean: none, one, or several."""
    forms = (name, plain(name), plain(name))
    return next((hit for level, form in zip(_aliases(), forms) if (hit := level.get(form))), set())


def synset(number: int) -> str:
    """The WordNet id of a class."""
    return _rows()[number][0]


def are_these(listed: Sequence[str]) -> bool:
    """Whether names are ImageNet-1k's in its order, in whatever of their forms."""
    if len(listed) != CLASSES:
        return False
    any_lemma = _aliases()[2]
    hits = sum(
        i in meant_by(name) or i in any_lemma.get(plain(name.split(",")[0]), ())
        for i, name in enumerate(listed)
    )
    return hits >= _ALIKE * CLASSES


def distinct(listed: Sequence[str]) -> list[str]:
    """The names; of ImageNet-1k's, those that stand there twice with their WordNet ids."""
    counts = Counter(listed)
    if max(counts.values()) == 1 or not are_these(listed):
        return list(listed)
    return [n if counts[n] == 1 else f"{n} ({synset(i)})" for i, n in enumerate(listed)]
