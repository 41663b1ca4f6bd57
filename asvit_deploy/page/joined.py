"""All reports of a page together: the verdict on each model, and what takes several reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from asvit_deploy.intervals import difference
from asvit_deploy.page.facts import (
    SECTIONS,
    Accuracy,
    Block,
    Facts,
    Figure,
    Histograms,
    Lines,
    Mood,
    Role,
    Scatter,
    Table,
)
from asvit_deploy.page.wording import base_name, percent, several, signed

_MOST_POINTS = 30  # of a plot, each with a number
_SUFFIXES = (".onnx", ".engine", ".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_ROLES: tuple[tuple[Role, str, str], ...] = (
    ("speed", "Is it worth it here?", "Not measured: asvit-deploy bench times it beside dense."),
    ("loss", "What do I lose?", "Not measured: asvit-deploy bench, evaluate and calibrate say."),
    ("proof", "How do I know?", "Not checked: asvit-deploy check compares it with PyTorch."),
)


@dataclass(frozen=True)
class Card:
    """One of the three figures; `figure` is None where `absent` says what would measure it."""

    question: str
    figure: Figure | None
    absent: str


@dataclass(frozen=True)
class Summary:
    """What the first screen says of one model."""

    model: str
    lead: str
    rest: str
    mood: Mood
    cards: Sequence[Card]
    warnings: Sequence[str]


@dataclass(frozen=True)
class Group:
    """A section's blocks on one model."""

    model: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Section:
    name: str
    heading: str
    groups: Sequence[Group]
    absent: str


@dataclass(frozen=True)
class Environment:
    """A machine, and which reports were made on it."""

    rows: Sequence[tuple[str, str]]
    reports: Sequence[str]


@dataclass
class Page:
    """What the template shows."""

    models: list[str]
    summaries: list[Summary]
    sections: list[Section]
    environments: list[Environment]
    commands: list[tuple[str, list[str]]]
    notes: list[tuple[str, list[str]]]
    without: list[str] = field(default_factory=list)


def stem(path: str) -> str:
    """What the files of one model share: the name without what says its kind."""
    name = base_name(path)
    for suffix in _SUFFIXES:
        if name.endswith(suffix) and len(name) > len(suffix):
            return name.removesuffix(suffix)
    return name


def joined(facts: Sequence[Facts]) -> Page:
    """One page of all reports, in their order; models in that of their first one."""
    by_model: dict[str, list[Facts]] = {}
    for one in facts:
        by_model.setdefault(stem(one.model), []).append(one)
    accuracies = [one.accuracy for one in facts if one.accuracy]
    for some in by_model.values():
        _quality(some, accuracies)
        _histograms(some)
    summaries = [_summary(model, some, accuracies) for model, some in by_model.items()]
    notes = [(_whose(one, by_model), [*one.notes, *(f"its JSON has {m}" for m in one.missing)])
             for one in facts]  # fmt: skip
    return Page(
        list(by_model), summaries,
        [_section(*row, by_model) for row in SECTIONS],
        _environments(facts, by_model), _commands(facts),
        [(whose, lines) for whose, lines in notes if lines],
        [f"{_whose(one, by_model)}: no exact command" for one in facts if not one.command],
    )  # fmt: skip


def _whose(one: Facts, by_model: dict[str, list[Facts]]) -> str:
    return f"{base_name(one.model)}, {one.what}" if len(by_model) > 1 else one.what


# --- the verdict ---------------------------------------------------------------------------------


def _summary(model: str, some: Sequence[Facts], accuracies: Sequence[Accuracy]) -> Summary:
    figures = [figure for one in some for figure in one.figures]
    figures += [figure for one in some if one.accuracy
                if (figure := _beside_dense(one.accuracy, accuracies))]  # fmt: skip
    best = {
        role: min((one for one in figures if one.role == role), key=lambda one: one.rank,
                  default=None)
        for role, *_ in _ROLES
    }  # fmt: skip
    if (proof := best["proof"]) is not None:
        alike = [one for one in figures if (one.role, one.says) == ("proof", proof.says)]
        best["proof"] = _of_all(proof, alike)
    lead, mood = _lead(best["speed"], best["loss"], best["proof"])
    # A failed proof comes first: what it failed of says nothing for sure.
    order = sorted((figure for figure in best.values() if figure),
                   key=lambda figure: (figure.role, figure.mood) != ("proof", "bad"))  # fmt: skip
    clauses = [figure.clause for figure in order]
    if best["proof"] is None and (best["speed"] or best["loss"]):
        clauses.append("parity with PyTorch was not checked")
    # Of a file that was only compared one sentence is enough.
    cards = [Card(question, best[role], absent) for role, question, absent in _ROLES
             if best["speed"] or best["loss"]]  # fmt: skip
    rest = "; ".join(clauses)
    for ruling in [one.ruling for one in some if one.ruling]:
        if best["proof"] and best["proof"].mood == "bad":  # which no verdict outweighs
            rest = f"{rest}; {ruling.rest}"
        else:
            lead, rest, mood = ruling.lead, ruling.rest, ruling.mood
    return Summary(model, lead, rest, mood, cards, _warnings(model, some))


def _of_all(weakest: Figure, every: Sequence[Figure]) -> Figure:
    """The proof in the way that does worst, of how many."""
    if len(every) == 1:
        return weakest
    failed = sum(one.mood == "bad" for one in every)
    said = (
        f"failed in {failed} of {len(every)} ways" if failed else f"the least of {len(every)} ways"
    )
    return replace(weakest, span=f"{weakest.span}; {said}")


def _lead(speed: Figure | None, loss: Figure | None, proof: Figure | None) -> tuple[str, Mood]:
    if proof and proof.mood == "bad":
        return "Not to be trusted yet", "bad"
    if speed is None:
        return ("Speed was not measured" if loss else "Parity holds" if proof else
                "Nothing was measured"), ""  # fmt: skip
    if speed.mood == "bad":
        return "Not worth it here", "bad"
    if speed.mood == "even":
        return "No clear gain here", "even"
    if loss is None:
        return "Faster, at a cost that was not measured", "even"
    if loss.mood == "bad":
        return "Faster, but it answers differently", "bad"
    return "Worth it here", "good"


def _warnings(model: str, some: Sequence[Facts]) -> list[str]:
    """Where reports on one name are of several files, of one kind of file."""
    found: dict[str, set[str]] = {}
    for one in some:
        if one.sha256:
            found.setdefault(base_name(one.model), set()).add(one.sha256)
    return [f"{name} was another file in some of these reports than in others (its sha256 "
            "differs): their figures are not of one model." for name, digests in found.items()
            if len(digests) > 1]  # fmt: skip


def _beside_dense(own: Accuracy, accuracies: Sequence[Accuracy]) -> Figure | None:
    """What top-1 an adaptive network loses against a dense one on the same pictures."""
    dense = _dense_of(own, accuracies)
    if own.dense or dense is None:
        return None
    found = difference(own.top1, dense.top1)
    points = [signed(100 * found[key], 2) for key in ("value", "low", "high")]
    points[0] = f"+{points[0]}" if found["value"] > 0 else points[0]
    mood: Mood = "bad" if found["high"] < -0.02 else "good" if found["value"] > -0.01 else "even"
    accuracy = percent(own.top1["value"], 2)
    return Figure("loss", 0, f"{points[0]} points",
                  f"95 % interval {points[1]} to {points[2]}, {several(own.images, 'picture')}",
                  f"of top-1 beside dense: {accuracy} on {own.data}",
                  f"top-1 {accuracy} on {own.data}, {points[0]} points beside dense",
                  mood)  # fmt: skip


def _dense_of(own: Accuracy, accuracies: Sequence[Accuracy]) -> Accuracy | None:
    return next((one for one in accuracies if one.dense and (one.data, one.images, one.arch)
                 == (own.data, own.images, own.arch)), None)  # fmt: skip


# --- what takes several reports ------------------------------------------------------------------


def _quality(some: Sequence[Facts], accuracies: Sequence[Accuracy]) -> None:
    """Accuracy over latency, where it is known of both networks; else agreement with dense."""
    own = next((one.accuracy for one in some if one.accuracy and not one.accuracy.dense), None)
    dense = _dense_of(own, accuracies) if own else None
    for one in some:
        known = [point for point in one.timed if point.agreement is not None]
        measure = "same top-1 as dense"
        values = [point.agreement for point in known if point.agreement is not None]
        if own and dense:
            known = [point for point in known if point.role != "other"]
            values = [own.top1 if point.role == "own" else dense.top1 for point in known]
            measure = f"top-1 on {own.data}"
        elif any(figure.role == "loss" and figure.says.startswith("cosine")
                 for figure in one.figures):  # fmt: skip
            measure = "cosine with dense"
        if {point.role for point in known} - {"dense"}:
            caption = one.what.removeprefix("bench, ")
            if len(known) > _MOST_POINTS:
                caption = f"{caption}; the first {_MOST_POINTS} of {len(known)} rows"
                known, values = known[:_MOST_POINTS], values[:_MOST_POINTS]
            one.add("quality", Scatter(f"batch 1, {caption}", "ms at p50", measure, known, values))


def _histograms(some: Sequence[Facts]) -> None:
    """Of all reports on a model those of the most pictures."""
    sources = [one for one in some if one.histograms and one.histograms.stages]
    if not sources:
        return
    best = max(sources, key=lambda one: one.histograms.pictures if one.histograms else 0)
    found = best.histograms
    assert found is not None
    if not found.pictures:
        return
    caption = f"{several(found.pictures, 'picture')}: {found.caption}"
    if all(sum(map(bool, counts)) == 1 for _, counts in found.stages):
        stay = [next(k for k, n in enumerate(counts) if n) for _, counts in found.stages]
        line = f"Every picture keeps as many tokens: {', '.join(map(str, stay))} ({caption})."
        best.add("histograms", Lines([line]))
    else:
        best.add("histograms", Histograms(caption, found.stages))


# --- sections, machines, commands ----------------------------------------------------------------


def _section(name: str, heading: str, absent: str, by_model: dict[str, list[Facts]]) -> Section:
    groups = [Group(model, _merged([block for one in some for block in one.blocks.get(name, [])]))
              for model, some in by_model.items()]  # fmt: skip
    return Section(name, heading, [group for group in groups if group.blocks], absent)


def _merged(blocks: Sequence[Block]) -> list[Block]:
    """Plots first, beside each other; tables of one caption and the same columns are one."""
    found: list[Block] = []
    for block in blocks:
        twin = next((place for place, one in enumerate(found) if _alike(one, block)), None)
        if twin is None:
            found.append(block)
            continue
        one = found[twin]
        assert isinstance(one, Table)
        assert isinstance(block, Table)
        notes = dict.fromkeys(note for note in (one.note, block.note) if note)
        found[twin] = replace(one, rows=[*one.rows, *block.rows], note="; ".join(notes))
    return sorted(found, key=lambda block: block.kind != "plot")


def _alike(one: Block, other: Block) -> bool:
    """Whether both are tables of the same caption and columns, and seen."""
    return (
        isinstance(one, Table) and isinstance(other, Table) and not other.folded
        and (one.caption, one.heads) == (other.caption, other.heads)
    )  # fmt: skip


def _environments(facts: Sequence[Facts], by_model: dict[str, list[Facts]]) -> list[Environment]:
    found: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for one in facts:
        if rows := tuple(_machine(one.machine or {})):
            found.setdefault(rows, []).append(_whose(one, by_model))
    return [Environment(rows, list(dict.fromkeys(reports))) for rows, reports in found.items()]


def _machine(machine: dict[str, Any]) -> list[tuple[str, str]]:
    names = {"gpu": "GPU", "cpu": "CPU", "cores": "cores", "system": "system", "python": "Python"}
    rows = [(said, str(machine[name])) for name, said in names.items()
            if machine.get(name) is not None]  # fmt: skip
    return rows + list((machine.get("versions") or {}).items())


def _commands(facts: Sequence[Facts]) -> list[tuple[str, list[str]]]:
    """Each command once, and which reports it made."""
    found: dict[str, list[str]] = {}
    for one in facts:
        if one.command:
            found.setdefault(one.command, []).append(one.what)
    return [(command, list(dict.fromkeys(whats))) for command, whats in found.items()]
