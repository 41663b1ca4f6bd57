"""Plots as inline SVG, by matplotlib: text stays text, colours are the page's own variables.

A figure is as wide as a phone shows it, so that its text is as large there as the page's. The same
data gives the same bytes: no date, a fixed salt for identifiers, and a prefix for each figure's.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from asvit_deploy.drawing.choosing import shown
from asvit_deploy.page.facts import Cloud, Histograms, Plot, Scatter, Spans
from asvit_deploy.page.wording import ms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 340  # CSS pixels
_MOST_STAGES = 12  # rows of a histogram
_MOST_SERIES = 5
_BINS = 49  # of a histogram
# Colours that no plot has by itself stand for the page's variables until they are replaced.
_VARIABLES = {
    "#010203": "--ink", "#010204": "--soft", "#010205": "--rule", "#010206": "--paper",
    "#010211": "--c1", "#010212": "--c2", "#010213": "--c3", "#010214": "--c4", "#010215": "--c5",
}  # fmt: skip
_INK, _SOFT, _RULE, _PAPER, *_COLOURS = _VARIABLES
_MARKERS = "osD^v"
GLYPHS = "●■◆▲▼"  # what a legend shows for these
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "asvit-deploy", "text.parse_math": False,
    "axes.formatter.use_mathtext": False, "axes.unicode_minus": False,
    "font.family": "DejaVu Sans", "font.size": 10.5, "axes.titlesize": 10.5,
    "axes.labelsize": 10.5, "text.color": _INK, "axes.labelcolor": _SOFT,
    "axes.titlecolor": _SOFT, "xtick.labelcolor": _SOFT, "ytick.labelcolor": _SOFT,
    "xtick.color": _RULE, "ytick.color": _RULE, "axes.edgecolor": _RULE, "grid.color": _RULE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "grid.linewidth": 0.8, "axes.linewidth": 0.8, "lines.linewidth": 1.6,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


def draw(plot: Plot, name: str) -> str:
    """An `<svg>` element; all its identifiers begin with `name`."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn, height = _DRAWN[type(plot)], 230
    if isinstance(plot, Histograms):
        height = 44 + 52 * min(len(plot.stages), _MOST_STAGES)
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that its font lacks: the page's has them
        matplotlib.rcdefaults()  # whatever a file of the user's says
        matplotlib.rcParams.update(_STYLE)  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        drawn(figure, plot)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _inline(file.getvalue(), name)


def _inline(data: bytes, name: str) -> str:
    """The element alone, of the page: its identifiers, its variables, its font."""
    ET.register_namespace("", _SVG[1:-1])
    ET.register_namespace("xlink", _LINK[1:-5])
    root = ET.fromstring(data)
    for metadata in root.findall(f"{_SVG}metadata"):
        root.remove(metadata)
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.get('id')}")
        if (link := element.get(_LINK, "")).startswith("#"):
            element.set(_LINK, f"#{name}-{link[1:]}")
        for key in ("style", "clip-path"):
            if key in element.attrib:
                element.set(key, _styled(element.attrib[key], name))
        if element.tag == f"{_SVG}style":
            element.text = ""  # for the whole page, otherwise
    for style in (parent for parent in root.iter(f"{_SVG}defs") if parent.find(f"{_SVG}style")
                  is not None):  # fmt: skip
        style.remove(style.find(f"{_SVG}style"))  # type: ignore[arg-type]
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("aria-hidden", "true")
    root.set("focusable", "false")
    return ET.tostring(root, encoding="unicode")


def _styled(style: str, name: str) -> str:
    style = re.sub(r"url\(#", f"url(#{name}-", style)
    style = re.sub(r"font: (?:\S+ )*?([\d.]+)px [^;]*", r"font-size: \1px", style)
    style = re.sub(r"font-family: [^;]*;?", "", style)
    style = re.sub("#[0-9a-f]{6}", lambda m: _variable(m[0]), style)
    return style.replace("stroke-linejoin: miter", "stroke-linejoin: round")


def _variable(colour: str) -> str:
    return f"var({_VARIABLES[colour]})" if colour in _VARIABLES else colour


def legend(plot: Plot) -> list[tuple[str, str, str]]:
    """For each thing in a plot: its colour's variable, its sign, its name."""
    if isinstance(plot, Scatter):
        return [(_role_colour(one.role), str(one.number), one.name) for one in plot.points]
    if isinstance(plot, (Cloud, Spans)):
        names = [one.name for one in plot.series] if isinstance(plot, Cloud) else [
            name for name, _ in plot.series]  # fmt: skip
        return [(_VARIABLES[_COLOURS[place]], GLYPHS[place], name)
                for place, name in enumerate(names[:_MOST_SERIES])]  # fmt: skip
    return []


def described(plot: Plot) -> str:
    """What a plot shows, for those who do not see it."""
    if isinstance(plot, Scatter):
        said = [f"{one.name}, {ms(one.ms)} ms, {value['value']:.4g}"
                for one, value in zip(plot.points, plot.values)]  # fmt: skip
        return f"{plot.y} over {plot.x}. {'; '.join(said[:12])}."
    if isinstance(plot, Cloud):
        said = []
        for one in plot.series[:_MOST_SERIES]:
            xs, ys = [x for x, _ in one.points], [y for _, y in one.points]
            said.append(f"{one.name}: {len(xs)} points, {min(xs):.0f} to {max(xs):.0f} tokens, "
                        f"{ms(min(ys))} to {ms(max(ys))} ms")  # fmt: skip
        return f"{plot.y} over {plot.x}. {'; '.join(said)}."
    if isinstance(plot, Spans):
        said = [f"{name}: " + ", ".join(f"{at:g} {value:.2f}" for at, value, _, _ in spans)
                for name, spans in plot.series[:_MOST_SERIES]]  # fmt: skip
        return f"{plot.y} over {plot.x}. {'; '.join(said)}."
    said = [f"{name}: mean {_mean(counts):.1f}, {_ends(counts)}" for name, counts in plot.stages]
    return f"How many of {plot.pictures:,} pictures keep so many tokens. {'; '.join(said)}."


def _mean(counts: Sequence[int]) -> float:
    return sum(k * n for k, n in enumerate(counts)) / max(1, sum(counts))


def _ends(counts: Sequence[int]) -> str:
    there = [k for k, n in enumerate(counts) if n]
    return f"{there[0]} to {there[-1]}" if there else "none"


def _role_colour(role: str) -> str:
    return {"own": "--c1", "dense": "--c2", "other": "--c3"}[role]


def _sentinel(variable: str) -> str:
    return next(colour for colour, name in _VARIABLES.items() if name == variable)


# --- each kind -----------------------------------------------------------------------------------


def _axes(figure: Figure, title: str, x: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", pad=8)
    axes.set_xlabel(x, loc="right")
    axes.tick_params(length=3)
    return axes


def _scatter(figure: Figure, plot: Scatter) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes = _axes(figure, plot.y, plot.x)
    xs, values = [one.ms for one in plot.points], plot.values
    for one, value in zip(plot.points, values):
        colour = _sentinel(_role_colour(one.role))
        if value["low"] < value["high"]:
            axes.plot([one.ms] * 2, [value["low"], value["high"]], color=colour, lw=1.2, alpha=0.6)
        axes.plot(one.ms, value["value"], "o", color=colour, ms=7, mec=_PAPER, mew=1)
    low = min(value["low"] for value in values)
    high = max(value["high"] for value in values)
    pad = max(0.16 * (high - low), 0.004)
    axes.set_ylim(low - pad, high + 2 * pad)
    _ms_axis(axes, xs)
    below = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, 1 - low + pad)  # all or nothing less
    axes.set_yticks([1 - y for y in below if y >= 0 and low - pad <= 1 - y <= high + 2 * pad])
    digits = 0 if high + 2 * pad - low > 0.08 else 1
    cosine = plot.y.startswith("cosine")
    axes.yaxis.set_major_formatter(FuncFormatter(
        lambda y, _: f"{y:.3f}" if cosine else f"{100 * y:.{digits}f} %"
    ))  # fmt: skip
    _number(figure, axes, plot)


def _ms_axis(axes: Axes, xs: Sequence[float]) -> None:
    """Milliseconds from 0, or by powers where they are of very different size."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if min(xs) > 0 and max(xs) > 12 * min(xs):
        axes.set_xscale("log")
        axes.set_xlim(min(xs) / 1.5, max(xs) * 1.5)
        few = max(xs) < 300 * min(xs)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if few else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.08 * max(xs) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.6g}"))


# Where the number of a point may stand, from its middle, in points: the first that is free.
_PLACES = ((0, 8), (0, -16), (9, -4), (-9, -4), (9, 8), (-9, 8), (9, -16), (-9, -16), (0, 19),
           (0, -27))  # fmt: skip


def _number(figure: Figure, axes: Axes, plot: Scatter) -> None:
    """A number at each point, which hides no other."""
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    dots = [tuple(scale * axes.transData.transform((one.ms, value["value"])))
            for one, value in zip(plot.points, plot.values)]  # fmt: skip
    taken = [(x, y, 5.0, 5.0) for x, y in dots]  # middle, and half of width and height
    for (x, y), one, value in zip(dots, plot.points, plot.values):
        label, half = str(one.number), 3.6 * len(str(one.number))
        for dx, dy in _PLACES:
            middle = x + dx, y + dy + 4
            if all(abs(middle[0] - a) > half + w or abs(middle[1] - b) > 5 + h
                   for a, b, w, h in taken if (a, b) != (x, y)):  # fmt: skip
                break
        taken.append((*middle, half, 5.0))
        axes.annotate(label, (one.ms, value["value"]), (dx, dy), textcoords="offset points",
                      ha="center", va="bottom", color=_INK)  # fmt: skip


def _cloud(figure: Figure, plot: Cloud) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = _axes(figure, plot.y, plot.x)
    for place, one in enumerate(plot.series[:_MOST_SERIES]):
        xs, ys = [x for x, _ in one.points], [y for _, y in one.points]
        colour = _COLOURS[place]
        axes.plot(xs, ys, _MARKERS[place], color=colour, ms=3.6, alpha=0.75, mew=0)
        if one.line is not None:
            ends = [min(xs), max(xs)]
            axes.plot(ends, [one.line[0] * x + one.line[1] for x in ends], color=colour)
    axes.set_ylim(0, None)
    axes.margins(x=0.06)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _plain(axes)


def _plain(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _spans(figure: Figure, plot: Spans) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes = _axes(figure, plot.y, plot.x)
    series = plot.series[:_MOST_SERIES]
    ats = sorted({at for _, spans in series for at, *_ in spans})
    axes.axhline(1, color=_SOFT, lw=1, ls=(0, (3, 3)))
    for place, (_, spans) in enumerate(series):
        shift = 0.09 * (place - (len(series) - 1) / 2)
        xs = [ats.index(at) + shift for at, *_ in spans]
        colour = _COLOURS[place]
        for x, (_, _, low, high) in zip(xs, spans):
            axes.plot([x, x], [low, high], color=colour, lw=1.2)
        axes.plot(xs, [value for _, value, _, _ in spans], f"{_MARKERS[place]}-", color=colour,
                  ms=4.5, mew=0, lw=1.2)  # fmt: skip
    axes.set_xlim(-0.5, len(ats) - 0.5)
    few = [ats.index(at) for at in (ats[place] for place in shown(len(ats), 8))]
    axes.set_xticks(few, [f"{ats[place]:g}" for place in few])
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}×"))


def _histograms(figure: Figure, plot: Histograms) -> None:
    from matplotlib.ticker import MaxNLocator

    stages = [plot.stages[place] for place in shown(len(plot.stages), _MOST_STAGES)]
    tokens = max(len(counts) for _, counts in stages) - 1
    size = max(1, -(-(tokens + 1) // _BINS))
    every = figure.subplots(len(stages), sharex=True, squeeze=False)[:, 0]
    for axes, (name, counts) in zip(every, stages):
        bins = [sum(counts[start : start + size]) for start in range(0, len(counts), size)]
        lefts = [size * place - 0.5 for place in range(len(bins))]
        axes.bar(lefts, bins, width=size * 0.92, align="edge", color=_COLOURS[0])
        axes.set_title(f"{name}: mean {_mean(counts):.1f}", loc="left", pad=3)
        axes.grid(False)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(0, max(1, *bins) * 1.05)
        axes.tick_params(length=0)
    last = every[-1]
    last.set_xlim(-0.5 - size, tokens + 0.5 + size)
    last.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    last.tick_params(axis="x", length=3)
    last.set_xlabel("image tokens kept", loc="right")


_DRAWN: dict[type, Callable[[Figure, Any], None]] = {
    Scatter: _scatter, Cloud: _cloud, Spans: _spans, Histograms: _histograms,
}  # fmt: skip
