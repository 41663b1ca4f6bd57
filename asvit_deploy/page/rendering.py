"""From reports to the text of a page: Jinja2's template, all of it escaped but our own SVG."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asvit_deploy.errors import UserError
from asvit_deploy.page.facts import Cloud, Gallery, Histograms, Scatter, Spans
from asvit_deploy.page.joined import Page, joined
from asvit_deploy.page.kinds import KINDS
from asvit_deploy.page.pictures import Embedded, embedded
from asvit_deploy.page.plots import described, draw, legend
from asvit_deploy.page.reading import Report

_TEMPLATES = Path(__file__).parent / "templates"
_NAMED = 5  # pictures that are not there


@dataclass
class _Shown:
    """What of a gallery is on the page."""

    pictures: list[Embedded]
    lines: list[str]


def page_of(reports: Sequence[Report], most: int) -> str:
    """The page.

    Args:
        most: bytes; pictures are left out, with a line, until it has no more.

    Raises:
        UserError: it would have more without any picture.
    """
    facts = [KINDS[report.kind].tell(report.fields) for report in reports]
    galleries: list[tuple[Gallery, list[Embedded], list[str]]] = []
    for report, one in zip(reports, facts):
        for block in one.blocks.get("gallery", []):
            if isinstance(block, Gallery):
                galleries.append((block, *_embed(block, report.folder)))
    page = joined(facts)
    plots = _drawn(page)
    bare = _rendered(page, plots, {id(block): _Shown([], lines) for block, _, lines in galleries})
    room = most - len(bare.encode())
    while room >= 0:
        text = _rendered(page, plots, _thinned(galleries, room))
        if (over := len(text.encode()) - most) <= 0:
            return text
        room -= over  # what stands around the pictures
    raise UserError(
        f"the page would have more than {most:,} bytes without any picture; join fewer reports"
    )


def _embed(gallery: Gallery, folder: Path | None) -> tuple[list[Embedded], list[str]]:
    found, lines = list[Embedded](), list[str]()
    for picture in gallery.pictures:
        one = embedded(picture, folder)
        if isinstance(one, Embedded):
            found.append(one)
        else:
            lines.append(f"{picture.file} is not shown: {one}.")
    if len(lines) > _NAMED:
        more = len(lines) - _NAMED
        lines[_NAMED:] = [f"{more:,} other{'s are' if more > 1 else ' is'} not shown either."]
    return found, lines


def _thinned(
    galleries: Sequence[tuple[Gallery, list[Embedded], list[str]]], room: int
) -> dict[int, _Shown]:
    """By gallery the pictures that fit: in turn one of each, so that each keeps some."""
    kept: dict[int, list[Embedded]] = {id(block): [] for block, _, _ in galleries}
    every = [[(id(block), one) for one in _spread(some)] for block, some, _ in galleries]
    for turn in itertools.zip_longest(*every):
        for place, one in filter(None, turn):
            if one.size <= room:
                kept[place].append(one)
                room -= one.size
    shown = {}
    for block, some, lines in galleries:
        own = [one for one in some if one in kept[id(block)]]  # in the order of the gallery
        if len(own) < len(some):
            lines = [f"{len(own)} of {len(some)} pictures are here, as a page has 3 MB at most.",
                     *lines]  # fmt: skip
        shown[id(block)] = _Shown(own, lines)
    return shown


def _spread(some: Sequence[Embedded]) -> list[Embedded]:
    """One of each kind first, so that what is left out is of every kind."""
    kinds: dict[str, list[Embedded]] = {}
    for one in some:
        kinds.setdefault(one.picture.kind, []).append(one)
    return [one for turn in itertools.zip_longest(*kinds.values()) for one in turn if one]


def _drawn(page: Page) -> dict[int, dict[str, Any]]:
    """By plot what the template needs of it."""
    from markupsafe import Markup

    found: dict[int, dict[str, Any]] = {}
    for section in page.sections:
        for block in (block for group in section.groups for block in group.blocks):
            if isinstance(block, (Scatter, Cloud, Spans, Histograms)):
                name = f"p{len(found) + 1}"
                found[id(block)] = {"svg": Markup(draw(block, name)), "legend": legend(block),
                                    "alt": described(block)}  # fmt: skip
    return found


def _rendered(page: Page, plots: dict[int, dict[str, Any]], galleries: dict[int, _Shown]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["plot"] = lambda block: plots[id(block)]
    environment.filters["shown"] = lambda block: galleries[id(block)]
    style = Markup((_TEMPLATES / "page.css").read_text())
    return environment.get_template("page.html").render(page=page, style=style)
