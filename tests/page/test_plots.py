"""Plots: text as text, the page's own colours, numbers that hide nothing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from asvit_deploy.page.facts import Cloud, Histograms, Scatter, Series, Spans, Timed
from asvit_deploy.page.plots import described, draw, legend

SVG = "{http://www.w3.org/2000/svg}"


def timed(place: int, ms: float, role: str = "own") -> Timed:
    return Timed(place, f"variant {place}", ms, role, None)  # type: ignore[arg-type]


def value(middle: float, low: float | None = None, high: float | None = None) -> dict[str, float]:
    return {"value": middle, "low": middle if low is None else low,
            "high": middle if high is None else high}  # fmt: skip


SCATTER = Scatter("c", "ms", "same top-1", [timed(1, 5), timed(2, 9, "dense")],
                  [value(0.98, 0.9, 1.0), value(1)])  # fmt: skip
CLOUD = Cloud("c", "tokens", "ms", [Series("a", [(1, 2), (3, 4)], (1, 1)), Series("b", [(1, 1)])])
SPANS = Spans("c", "batch", "speed-up", [("a", [(1, 1.2, 1.1, 1.3), (8, 0.9, 0.8, 1.0)])])
HISTOGRAMS = Histograms("c", [("stage 1", [0, 3, 1]), ("stage 2", [4, 0, 0])])
ALL = [SCATTER, CLOUD, SPANS, HISTOGRAMS]


@pytest.mark.parametrize("plot", ALL, ids=lambda plot: type(plot).__name__)
def test_a_plot_is_an_element_of_the_page(plot):
    text = draw(plot, "p1")
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.get("viewBox", "").startswith("0 0 340")
    assert "width" not in root.attrib
    assert list(root.iter(f"{SVG}text")), "text is not drawn as outlines"
    assert not list(root.iter(f"{SVG}metadata")) + list(root.iter(f"{SVG}style"))
    assert not re.search(r"#0102[0-9a-f]{2}|<!DOCTYPE|<\?xml|font-family", text)
    assert set(re.findall(r"#[0-9a-f]{6}\b", text)) <= {"#000000", "#ffffff"}
    assert "var(--" in text
    names = [element.get("id") for element in root.iter() if "id" in element.attrib]
    assert all(name and name.startswith("p1-") for name in names)
    for used in re.findall(r'(?:url\(|href=")#([^")]+)', text):
        assert used in names
    assert draw(plot, "p1") == text
    assert len(described(plot)) > 20


def test_the_same_plot_twice_shares_no_name():
    first, second = (set(re.findall(r'id="([^"]+)"', draw(CLOUD, name))) for name in ("p1", "p2"))
    assert first
    assert not first & second


def test_hostile_names_stay_in_the_legend():
    name = "$\\x<b>\u202e"
    plot = Cloud("c", "tokens", "ms", [Series(name, [(1, 2)], None)])
    assert "<b>" not in draw(plot, "p1")
    assert legend(plot) == [("--c1", "●", name)]


def numbers_of(plot: Scatter) -> dict[str, tuple[float, float]]:
    """Where the numbers of points stand."""
    found = {}
    for element in ET.fromstring(draw(plot, "p")).iter(f"{SVG}text"):
        style = element.get("style", "")
        if "--ink" in style and (element.text or "").isdigit():
            found[str(element.text)] = float(element.get("x", "")), float(element.get("y", ""))
    return found


def test_numbers_of_points_do_not_hide_each_other():
    points = [timed(n + 1, 5 + 0.1 * (n % 4)) for n in range(7)]
    plot = Scatter("c", "ms", "same top-1", points, [value(0.97, 0.9, 1.0)] * 7)
    places = numbers_of(plot)
    assert len(places) == 7
    for one in places:
        for other in places:
            if one < other:
                (a, b), (c, d) = places[one], places[other]
                assert abs(a - c) > 6 or abs(b - d) > 8, (one, other)


@pytest.mark.parametrize("values", [
    [value(1.0), value(1.0)], [value(0.0), value(0.0)], [value(0.999, 0.998, 1), value(1)],
    [value(-0.2, -0.3, -0.1), value(1.0)],
])  # fmt: skip
@pytest.mark.parametrize("ms", [(1e-6, 1e6), (5, 5), (0, 0), (0.1, 0.1001)])
def test_odd_values_are_drawn_without_a_warning(recwarn, values, ms):
    for measure in ("same top-1 as dense", "cosine with dense"):
        points = [timed(1, ms[0]), timed(2, ms[1], "dense")]
        text = draw(Scatter("c", "ms", measure, points, values), "p")
        assert "nan" not in text.lower()
    assert not list(recwarn)


def test_histograms_of_many_stages_show_some():
    stages = [(f"stage {n}", [0] * n + [5] + [0] * (40 - n)) for n in range(30)]
    text = draw(Histograms("c", stages), "p")
    shown = re.findall(r"stage (\d+): mean", text)
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == ("0", "29")


def test_percent_ticks_end_at_all():
    text = draw(SCATTER, "p")
    ticks = [float(t) for t in re.findall(r">(-?[\d.]+) %<", text)]
    assert max(ticks) == 100
    assert len(ticks) >= 2
