"""Drawings on the page: their panels, and a word where there are none."""

from __future__ import annotations

import base64
import io
import os

import numpy as np
import page_reports as reports
import pytest
from PIL import Image

from asvit_deploy.drawing import figure
from asvit_deploy.page.facts import Picture
from asvit_deploy.page.pictures import SIDE, Embedded, embedded

PANELS = (("input", "16 tokens"), ("cut 1", "8"), ("cut 2", "4"))


def picture(name: str = "0001-p.png", count: int = 3) -> Picture:
    return Picture("p.jpg", name, "easy", "cat", PANELS[:count])


def test_panels_are_cut_where_they_were_drawn(tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    panels = [figure.Panel(np.full((300, 300, 3), c, "uint8"), "a", "b")
              for c in colours]  # fmt: skip
    for answer in ("", "cat"):  # another height above them
        figure.row("name", answer, "", panels).save(tmp_path / "0001-p.png")
        found = embedded(picture(), tmp_path)
        assert isinstance(found, Embedded)
        assert [caption for _, *caption in found.panels] == [list(one) for one in PANELS]
        for (address, *_), colour in zip(found.panels, colours):
            data = base64.b64decode(address.removeprefix("data:image/webp;base64,"))
            with Image.open(io.BytesIO(data)) as panel:
                assert panel.size == (SIDE, SIDE)
                low, high = zip(*panel.convert("RGB").getextrema())
                assert max(abs(a - b) for a, b in zip(low, colour)) < 8  # no paper at the edges
                assert max(abs(a - b) for a, b in zip(high, colour)) < 8


def test_small_panels_stay_as_they_are(tmp_path):
    folder = reports.drawings(tmp_path / "d", side=48).parent
    found = embedded(picture(), folder)
    assert isinstance(found, Embedded)
    data = base64.b64decode(found.panels[0][0].split(",")[1])
    with Image.open(io.BytesIO(data)) as panel:
        assert panel.size == (48, 48)


def test_drawings_that_cannot_be_shown(tmp_path):
    folder = reports.drawings(tmp_path / "d").parent
    assert embedded(picture(), None) == "which folder it lies in is not known"
    assert embedded(picture("gone.png"), folder) == "it is gone"
    assert embedded(picture(count=2), folder) == "it is no drawing of 2 panels"
    (folder / "text.png").write_text("no picture")
    assert "no whole PNG" in str(embedded(picture("text.png"), folder))
    whole = (folder / "0001-p.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    assert "no whole PNG" in str(embedded(picture("half.png"), folder))
    Image.new("RGB", (400, 300)).save(folder / "other.gif")
    (folder / "other.gif").rename(folder / "gif.png")
    assert "no whole PNG" in str(embedded(picture("gif.png"), folder))
    (folder / "sub.png").mkdir()
    assert "cannot be read" in str(embedded(picture("sub.png"), folder))


def test_links_and_pipes_are_not_followed(tmp_path):
    folder = reports.drawings(tmp_path / "d").parent
    secret = tmp_path / "secret.png"
    (folder / "0002-p.png").rename(secret)
    (folder / "link.png").symlink_to(secret)
    assert "cannot be read" in str(embedded(picture("link.png"), folder))
    os.mkfifo(folder / "pipe.png")
    assert "no whole PNG" in str(embedded(picture("pipe.png"), folder))


@pytest.mark.parametrize(("size", "count"), [((964, 345), 4), ((200, 151), 3)])
def test_where_panels_stand(size, count):
    boxes = figure.panels_of(size, count)
    side = (size[0] - 32 - (count - 1) * 12) // count
    assert boxes
    assert boxes[0] == (16, size[1] - 16 - side, 16 + side, size[1] - 16)
    assert boxes[-1][2] == size[0] - 16
    assert figure.panels_of((size[0] + 1, size[1]), count) is None
    assert figure.panels_of((size[0], size[1] + 1), count) is None
    assert figure.panels_of(size, count - 1) is None


def test_what_is_gone_is_a_line_on_the_page(tmp_path):
    path = reports.drawings(tmp_path / "d")
    for name in path.parent.glob("*.png"):
        name.unlink()
    text = reports.page_of_files(path)
    assert text.count("is not shown: it is gone.") == 5
    assert "1 other is not shown either." in text
