"""Text and layout: nothing from a file steers it, nothing is clipped."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from asvit_deploy.drawing import figure

TEXTS = [
    "cat.jpg", "x" * 5000, "\x1b[31mred\x1b[0m", "<b>bold</b> &amp;", "a\nb\tc\rd", "猫.png", "",
    "\u202egnp.exe", "\udcff broken", "e\u0301te\u0301.png", "\x00", "W" * 60, "🐈", "nb\xa0sp",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("width", [40, 192, 900])
def test_texts_fit_and_hold_no_controls(text, width):
    shown = figure.shortened(text, 14, width)
    assert shown.isprintable()
    assert figure.extent(shown, 14)[1] <= width
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_what_fits_is_shown_whole_and_what_does_not_keeps_both_ends():
    assert figure.shortened("a <b>.png", 14, 300) == "a <b>.png"
    for accented in ("Köpfe", "Ko\u0308pfe"):
        whole = "ö" if figure._has("ö") else "o"  # Pillow's own font is small
        assert figure.drawable(accented) == f"K{whole}pfe"
    assert figure.drawable("猫\u2028") == "\\u732b\\u2028"
    assert figure.drawable("\x1b[0m") == "\\x1b[0m"
    assert figure.drawable("a\udcffb") == "a\\udcffb"
    short = figure.shortened("begin" + "-" * 900 + "end.png", 14, 150)
    assert short.startswith("begin")
    assert "..." in short
    assert short.endswith("end.png")


def sample(name: str = "name", answer: str = "answer", side: int = 196) -> Image.Image:
    grey = np.full((side, side, 3), 90, np.uint8)
    panels = [figure.Panel(grey, head, "note " + head) for head in ("input", "W" * 99, "cut")]
    return figure.row(name, answer, "6 of 12 cuts", panels)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("answer", ["", "W" * 500])
def test_a_row_keeps_its_margins(text, answer):
    image = np.asarray(sample(text, answer))
    edge = np.ones(image.shape[:2], bool)
    edge[figure.MARGIN : -figure.MARGIN, figure.MARGIN : -figure.MARGIN] = False
    assert (image[edge] == 255).all()
    between = figure.MARGIN + 196
    assert (image[-196:, between : between + figure.GAP] == 255).all()


def test_captions_do_not_run_into_the_panels():
    image = np.asarray(sample())
    top = image.shape[0] - figure.MARGIN - 196
    assert (image[top - 1, :] == 255).all(), "a clear line above the panels"
    assert (image[top, figure.MARGIN : figure.MARGIN + 196] == 90).all()


def test_a_gallery_names_its_rows_at_the_left():
    row = sample()
    plain = figure.gallery("title", "note", [("", "", row)])
    assert plain.width == row.width
    named = figure.gallery("title", "note", [("easy", "12.3 of 196", row), ("hard", "", row)])
    assert named.width > row.width
    assert named.height - plain.height == row.height
    label = np.asarray(named)[:, : named.width - row.width]
    assert (label < 200).any()
    assert (np.asarray(named)[:, -figure.MARGIN :] == 255).all()
