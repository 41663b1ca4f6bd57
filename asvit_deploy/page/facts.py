"""What one report says, in the terms of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Mood = Literal["good", "bad", "even", ""]
Role = Literal["speed", "loss", "proof"]

# Sections in the order of the page: name, heading, what it says where there is nothing to show; a
# section without such a line is left out then.
SECTIONS: tuple[tuple[str, str, str], ...] = (
    ("tune", "Is it worth it here", ""),
    ("quality", "What the speed costs", ""),
    ("kept", "Latency over kept tokens", ""),
    ("variants", "Every variant", "Nothing was timed: `asvit-deploy bench MODEL --html` does."),
    ("sweeps", "Batch, budget and size", ""),
    ("gallery", "Which tokens stay", ""),
    ("histograms", "How many tokens stay", ""),
    ("parity", "Parity with PyTorch",
     "Nothing was compared with PyTorch: `asvit-deploy check MODEL --html` does."),
    ("accuracy", "Accuracy", ""),
    ("calibration", "How it was calibrated", ""),
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A candidate for one of the three figures of the first screen.

    Attributes:
        rank: of several for one role and model the lowest is shown.
        value: large.
        span: its interval or its sample, small.
        says: what it is, a phrase.
        clause: what the verdict says of it.
    """

    role: Role
    rank: float
    value: str
    span: str
    says: str
    clause: str
    mood: Mood = ""


@dataclass(frozen=True)
class Ruling:
    """A verdict that a report itself gives: a few words, a sentence, and how that is."""

    lead: str
    rest: str
    mood: Mood


@dataclass(frozen=True)
class Accuracy:
    """Top-1 on labelled pictures, to be held against that of a dense network on the same ones."""

    data: str
    images: int
    arch: str | None
    dense: bool
    top1: dict[str, float]


@dataclass(frozen=True)
class Timed:
    """A row of a bench; `agreement` is the share of equal top-1, or the cosine, with its interval.

    Attributes:
        number: of its row in the table.
        role: "own" of the model itself, "dense" of its twin, "other" of what is beside them.
    """

    number: int
    name: str
    ms: float
    role: Literal["own", "dense", "other"]
    agreement: dict[str, float] | None


@dataclass(frozen=True)
class Cell:
    """A text; before it may stand the number that a plot shows."""

    text: str
    mood: Mood = ""
    number: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a caption; the first cell of each is its heading."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    note: str = ""
    folded: str = ""  # a summary under which it lies folded

    kind = "table"


@dataclass(frozen=True)
class Lines:
    """Sentences below each other; of `mood` "bad" they stand out."""

    lines: Sequence[str]
    mood: Mood = ""

    kind = "lines"


@dataclass(frozen=True)
class Scatter:
    """Points over their milliseconds, under numbers that a legend explains.

    Attributes:
        values: of each point, with its interval.
    """

    caption: str
    x: str
    y: str
    points: Sequence[Timed]
    values: Sequence[dict[str, float]]

    kind = "plot"


@dataclass(frozen=True)
class Series:
    """Points of one colour; `line` is slope and offset of the line through them, or None."""

    name: str
    points: Sequence[tuple[float, float]]
    line: tuple[float, float] | None = None


@dataclass(frozen=True)
class Cloud:
    """Series of points, each with its line."""

    caption: str
    x: str
    y: str
    series: Sequence[Series]

    kind = "plot"


@dataclass(frozen=True)
class Spans:
    """By series, values with intervals over what was tried: (at, value, low, high)."""

    caption: str
    x: str
    y: str
    series: Sequence[tuple[str, Sequence[tuple[float, float, float, float]]]]

    kind = "plot"


@dataclass(frozen=True)
class Histograms:
    """By stage, how many pictures kept so many image tokens: entry k counts those that kept k."""

    caption: str
    stages: Sequence[tuple[str, Sequence[int]]]

    kind = "plot"

    @property
    def pictures(self) -> int:
        return sum(self.stages[0][1])


@dataclass(frozen=True)
class Picture:
    """One drawing of `visualize`: what kind, what the network says, and what stays by panel."""

    image: str
    file: str
    kind: str
    answer: str
    panels: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Gallery:
    caption: str
    pictures: Sequence[Picture]
    of: int

    kind = "gallery"


Plot = Scatter | Cloud | Spans | Histograms
Block = Table | Lines | Plot | Gallery


@dataclass
class Facts:
    """One report.

    Attributes:
        model: the path that it names, or the name.
        what: how notes call the report, such as "bench, 1 thread".
        blocks: by section.
        notes: what it says itself: notes, and that the machine was busy.
        missing: what is not in it, one line each.
        ruling: its own verdict, which then is the page's.
        figures, accuracy, timed, histograms: what `joined` makes something of.
    """

    model: str
    what: str
    sha256: str | None = None
    ruling: Ruling | None = None
    figures: list[Figure] = field(default_factory=list)
    accuracy: Accuracy | None = None
    timed: list[Timed] = field(default_factory=list)
    histograms: Histograms | None = None
    blocks: dict[str, list[Block]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    command: str | None = None
    machine: dict[str, Any] | None = None

    def add(self, section: str, *blocks: Block) -> None:
        self.blocks.setdefault(section, []).extend(blocks)
