"""Panels in a row with captions, and rows in a gallery."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

PAPER, INK, SOFT, RULE = (255, 255, 255), (28, 28, 32), (98, 98, 106), (222, 222, 226)
MARGIN, GAP = 16, 12  # pixels around everything, and between panels
_TITLE, _TEXT = 18, 14  # pixels of a font
_LABEL = 124  # pixels of the column of names in a gallery
_LONGEST = 400  # characters of a text that are looked at
_ELLIPSIS = "..."


@dataclass(frozen=True)
class Panel:
    """A picture and the two lines above it; pixels is uint8 [S, S, 3]."""

    pixels: NDArray[np.uint8]
    head: str
    note: str


@functools.lru_cache
def _font(size: int) -> Font:
    try:
        return ImageFont.load_default(size)
    except (ImportError, TypeError):  # without FreeType, or before Pillow 10.1: one size
        return ImageFont.load_default()


def _line(size: int) -> int:
    """Pixels from one line of text to the next."""
    return round(size * 1.3)


def drawable(text: str) -> str:
    """Text as it can be drawn: letters that the font lacks without their accents, what else it
    lacks as Python escapes it, and so what steers a terminal or turns a line around."""
    if len(text) > 2 * _LONGEST:
        text = text[:_LONGEST] + text[-_LONGEST:]
    plain = unicodedata.normalize("NFC", text)
    return "".join(map(_glyph, plain))


def _glyph(character: str) -> str:
    if character.isprintable():
        bare = unicodedata.normalize("NFKD", character)[0]
        for one in (character, bare):
            if _has(one) and (one == character or one.isalnum()):
                return one
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


@functools.lru_cache(maxsize=4096)
def _has(character: str) -> bool:
    """Whether the font has it; else a box would stand there."""
    return character < "\x7f" or _inked(character) not in (None, _inked("\uffff"))


def _inked(character: str) -> bytes | None:
    image = Image.new("L", (48, 48))
    try:
        ImageDraw.Draw(image).text((8, 8), character, fill=255, font=_font(_TITLE))
    except UnicodeEncodeError:
        return None
    return image.tobytes()


def shortened(text: str, size: int, width: int) -> str:
    """As much of a text as fits into so many pixels, its middle left out."""
    text = drawable(text)
    if len(text) <= _LONGEST and extent(text, size)[1] <= width:
        return text
    low, high = 0, min(len(text), _LONGEST) - 1  # so many characters fit, so many may not
    while low < high:
        middle = (low + high + 1) // 2
        fits = extent(_without_middle(text, middle), size)[1] <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return _without_middle(text, low)


def extent(text: str, size: int) -> tuple[int, int]:
    """Pixels that a text reaches out to the left of its place, and those that it takes in all."""
    left, _, right, _ = _font(size).getbbox(text)
    out = max(0, -math.floor(left))
    return out, out + math.ceil(right)


def _without_middle(text: str, count: int) -> str:
    end = count // 2
    return text[: count - end] + _ELLIPSIS + (text[-end:] if end else "")


_CAPTION = 2 * _line(_TEXT) + 4  # pixels of the two lines above a panel


def _above(answer: bool) -> int:
    """Pixels above a row's captions."""
    return MARGIN + _line(_TITLE) + (_line(_TEXT) if answer else 0) + 8


def row(title: str, answer: str, note: str, panels: Sequence[Panel]) -> Image.Image:
    """One picture's panels, RGB.

    Args:
        title: above them, such as the file's name.
        answer: below that, or nothing.
        note: at the right end of the title's line.
    """
    side, count = len(panels[0].pixels), len(panels)
    width = 2 * MARGIN + count * side + (count - 1) * GAP
    above = _above(bool(answer))
    top = above + _CAPTION
    image = Image.new("RGB", (width, top + side + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    taken = extent(note, _TEXT)[1] + GAP if note else 0
    inner = width - 2 * MARGIN
    _write(draw, (MARGIN, MARGIN), title, _TITLE, inner - taken, INK)
    if note:
        _write(draw, (width - MARGIN - taken + GAP, MARGIN + 4), note, _TEXT, taken, SOFT)
    if answer:
        _write(draw, (MARGIN, MARGIN + _line(_TITLE)), answer, _TEXT, inner, SOFT)
    for place, panel in enumerate(panels):
        left = MARGIN + place * (side + GAP)
        _write(draw, (left, above), panel.head, _TEXT, side, INK)
        _write(draw, (left, above + _line(_TEXT)), panel.note, _TEXT, side, SOFT)
        image.paste(Image.fromarray(panel.pixels), (left, top))
    return image


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, width: int,
    colour: tuple[int, int, int],
) -> None:  # fmt: skip
    text = shortened(text, size, width)
    left = place[0] + extent(text, size)[0]
    draw.text((left, place[1]), text, fill=colour, font=_font(size))


def gallery(
    title: str, note: str, rows: Sequence[tuple[str, str, Image.Image]]
) -> Image.Image:  # fmt: skip
    """Rows of `row` below each other, each with a name and a line at its left, or with none."""
    label = _LABEL if any(name for name, _, _ in rows) else 0
    width = label + max(image.width for _, _, image in rows)
    top = MARGIN + _line(_TITLE) + _line(_TEXT) + 8
    page = Image.new("RGB", (width, top + sum(image.height for _, _, image in rows)), PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, (MARGIN, MARGIN), title, _TITLE, width - 2 * MARGIN, INK)
    _write(draw, (MARGIN, MARGIN + _line(_TITLE)), note, _TEXT, width - 2 * MARGIN, SOFT)
    for name, more, image in rows:
        draw.line((MARGIN, top, width - MARGIN - 1, top), fill=RULE)
        page.paste(image.crop((0, 1, *image.size)), (label, top + 1))
        _write(draw, (MARGIN, top + MARGIN), name, _TITLE, _LABEL - MARGIN, INK)
        _write(draw, (MARGIN, top + MARGIN + _line(_TITLE)), more, _TEXT, _LABEL - MARGIN, SOFT)
        top += image.height
    return page


def panels_of(size: tuple[int, int], count: int) -> list[tuple[int, int, int, int]] | None:
    """Where so many panels stand in an image that `row` made: (left, top, right, bottom) each.

    Returns:
        None where no row of so many panels has that width and height.
    """
    side, rest = divmod(size[0] - 2 * MARGIN - (count - 1) * GAP, count)
    top = size[1] - MARGIN - side
    if rest or side < 1 or top not in (_above(True) + _CAPTION, _above(False) + _CAPTION):
        return None
    lefts = [MARGIN + place * (side + GAP) for place in range(count)]
    return [(left, top, left + side, top + side) for left in lefts]
