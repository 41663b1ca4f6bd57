"""The page itself: the same bytes each time, nothing of a file as HTML, never too large."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import page_reports as reports
import pytest
from conftest import raises_one_line

from asvit_deploy.errors import UserError
from asvit_deploy.page.reading import of_dicts, read_files
from asvit_deploy.page.rendering import page_of
from asvit_deploy.page.writing import MOST_BYTES

ROOT = Path(__file__).parents[2]
HOSTILE = (
    "<script>alert(1)</script>", "</script><b>", "</style><img src=x onerror=alert(1)>",
    "\"><svg onload=alert(1)>", "' onmouseover='alert(1)", "javascript:alert(1)", "{{ 7 * 7 }}",
    "{% raw %}", "]]><x>", "<!--", "&lt;b&gt;", "$\\frac{1}{0}$", "$unbalanced", "\x1b[31m",
    "\u202etxt", "\u2066", "\0", "\ud800", "https://example.com/x", "url(http://example.com)",
    "@import 'x'", "a" * 5000, "猫" * 400, "%s%n", "",
)  # fmt: skip
ALLOWED = {
    "html", "head", "meta", "title", "link", "style", "body", "header", "main", "nav",
    "section", "p", "h1", "h2", "h3", "ul", "ol", "li", "a", "strong", "b", "span", "small",
    "div", "dl", "dt", "dd", "code", "table", "caption", "thead", "tbody", "tr", "th", "td",
    "figure", "figcaption", "details", "summary", "img", "svg", "g", "path", "defs", "use",
    "text", "clippath", "rect", "tspan",
}  # fmt: skip


class Elements(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def harmless(text: str) -> Elements:
    """A page of known tags alone, which asks for nothing and has nothing that runs."""
    page = Elements(text)
    assert {tag for tag, _ in page.found} <= ALLOWED
    for tag, attributes in page.found:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag == "a" or "href" not in attributes or attributes["href"] == "data:,"
        for name in ("href", "src", "xlink:href"):
            if value := attributes.get(name):
                assert re.match(r"#|data:,$|data:image/webp;base64,", value), value
        style = attributes.get("style") or ""
        assert not re.search(r"url\((?!#)|expression|@import|javascript", style), style
    sheet = re.search(r"<style>(.*?)</style>", text, re.S)
    assert sheet
    assert "http" not in sheet[1]
    assert text.count("<style>") == text.count("</style>") == 1
    return page


def everywhere(value: object, text: str) -> object:
    """A report whose every text and every name of a table holds another."""
    if isinstance(value, dict):
        fixed = ("kind", "over", "output")
        return {key if key in KEYS else key + text:
                inner if key in fixed else everywhere(inner, text)
                for key, inner in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [everywhere(one, text) for one in value]
    return value + text if isinstance(value, str) else value


def _keys(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(_keys, value.values()))
    return set().union(*map(_keys, value)) if isinstance(value, list) else set()


FREE = {"topk", "tome", "size-passing", "onnxruntime", "asvit-deploy", "dynamic", "backend"}
KEYS = set().union(*map(_keys, reports.every())) - FREE


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_in_a_file_becomes_html(text):
    made = [everywhere(one, text) for one in reports.every()]
    page = harmless(reports.page(*made))  # type: ignore[arg-type]
    for character in ("\x1b", "\u202e", "\u2066", "\0"):
        assert character not in page.text
    if text.startswith("<script>"):
        assert "library, batch 1<script>alert(1)</script>" in page.text  # as text it is there


def test_names_of_pictures_and_classes_are_text(tmp_path):
    path = reports.drawings(tmp_path / "drawings")
    fields = json.loads(path.read_text())
    for picture, text in zip(fields["pictures"], HOSTILE):
        picture["image"] = picture["answer"]["label"] = text
    for key in ("schema", "digest"):
        del fields[key]
    from asvit_deploy import sidecar

    path.write_text(sidecar.signed({**fields, "images": HOSTILE[2]}))
    page = harmless(reports.page_of_files(path))
    assert sum(tag == "img" for tag, _ in page.found) == 6 * 3


_RENDER = """
import sys
from pathlib import Path
import page_reports as reports
sys.stdout.write(reports.page_of_files(*map(Path, sys.argv[1:])))
"""


@pytest.mark.slow
def test_the_same_files_make_the_same_bytes_in_any_process(tmp_path):
    files = [reports.saved(tmp_path / "all.json", reports.every()),
             reports.drawings(tmp_path / "drawings")]  # fmt: skip
    paths, pages = os.pathsep.join([str(ROOT), str(ROOT / "tests")]), set()
    for seed in ("1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8",
                       "PYTHONPATH": paths}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", _RENDER, *files], env=environment,
                              capture_output=True, check=True)  # fmt: skip
        pages.add(done.stdout)
    (page,) = pages
    assert page == reports.page_of_files(*files).encode()
    assert reports.page_of_files(*files) == reports.page_of_files(*files)
    assert not re.search(rb"20\d\d-\d\d-\d\d|dc:date", page)


def test_it_asks_for_nothing_and_runs_nothing():
    text = reports.page(*reports.every())
    page = harmless(text)
    assert "script" not in {tag for tag, _ in page.found}
    assert "default-src 'none'" in text
    assert text.startswith("<!DOCTYPE html>")


def test_every_part_is_there():
    text = reports.page(*reports.every())
    page = Elements(text)
    names = {attributes.get("id") for _, attributes in page.found}
    assert {"quality", "kept", "variants", "sweeps", "histograms", "parity", "accuracy",
            "calibration", "run"} <= names  # fmt: skip
    assert "gallery" not in names  # there is nothing to show
    for said in ("asvit-deploy bench as_deit_s.onnx", "AMD EPYC", "the machine was busy",
                 "no openvino rows", "adaptive wins at batch 1",
                 "size-passing (chosen)"):  # fmt: skip
        assert said in page.text
    images = [attributes for _, attributes in page.found if attributes.get("role") == "img"]
    assert len(images) >= 5
    assert all(len(attributes["aria-label"] or "") > 30 for attributes in images)
    identifiers = [a["id"] for _, a in page.found if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    assert len(text.encode()) < 300_000


def test_parts_without_data_are_absent_or_say_why():
    text = reports.page({"kind": "model", "model": "m.onnx"})
    page = Elements(text)
    names = {attributes.get("id") for _, attributes in page.found}
    assert "quality" not in names
    assert "Nothing was timed: " in page.text
    assert "Nothing was compared with PyTorch" in page.text
    assert "no variant was timed" in page.text
    assert "No report says what it ran on." in page.text
    assert "figure" not in {tag for tag, _ in page.found}


def test_a_failed_check_lists_wrong_flips_and_folds_near_ties():
    text = reports.page(reports.check(wrong=30))
    page = Elements(text)
    assert "FAILED" in page.text
    assert "30 flips that rounding does not explain" in page.text
    assert "and 18 more, in the JSON" in page.text
    assert [tag for tag, _ in page.found].count("details") == 2  # near ties, and a change at one
    broken = reports.changed(reports.check(wrong=1), "parity.logit_error", float("nan"))
    assert "not finite" in Elements(reports.page(broken)).text


def test_pictures_are_thinned_to_what_a_page_may_have(tmp_path):
    files = [reports.drawings(tmp_path / f"d{n}", side=96, model=f"m{n}.onnx") for n in range(3)]
    most = 320_000
    text = page_of(read_files(files), most)
    assert 0.7 * most < len(text.encode()) <= most
    page = harmless(text)
    assert page.text.count("pictures are here, as a page has 3 MB at most") == 3
    shown = sum(tag == "img" for tag, _ in page.found)
    assert 9 * 3 <= shown < 18 * 3
    kinds = re.findall('class="chip">(.*?)<', text)
    assert set(kinds) == {"easy", "normal", "hard"}
    assert MOST_BYTES == 3_000_000
    assert "as a page has" not in reports.page_of_files(*files)


def test_what_is_too_much_without_pictures_is_refused():
    raises_one_line(lambda: page_of(of_dicts(reports.every()), 40_000), "40,000 bytes",
                    "join fewer")  # fmt: skip


def test_many_rows_are_a_table_and_some_of_them_a_plot():
    rows = [{**reports.bench()["rows"][1], "name": f"{n} " * 40} for n in range(200)]
    text = reports.page(reports.changed(reports.bench(), "rows", rows))
    assert "the first 30 of 200 rows" in text
    assert text.count('<tr role="row">') > 200


def extreme(value: object, rng: random.Random) -> object:
    """A report whose numbers are of any size that its schema takes, and whose parts are missing."""
    if isinstance(value, dict):
        return {key: None if rng.random() < 0.03 and key not in ("kind", "model", "output")
                else extreme(inner, rng) for key, inner in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [extreme(one, rng) for one in value if rng.random() > 0.05]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    odd = [0, 1, 7, 10**12] if isinstance(value, int) else [0.0, 1.0, 1e-300, 1e15, -1e15, 0.5]
    return rng.choice(odd) if rng.random() < 0.2 else value


@pytest.mark.slow
def test_odd_numbers_and_missing_parts_make_a_page_or_a_line():
    pages, lines = 0, list[str]()
    for seed in range(60):
        rng = random.Random(seed)
        made = [extreme(one, rng) for one in (*reports.every(), reports.check(wrong=3))]
        for one in made:
            try:
                harmless(reports.page(one))  # type: ignore[arg-type]
                pages += 1
            except UserError as error:
                lines.append(str(error))
    assert pages > 20
    assert len(lines) > 20
    assert not [line for line in lines if "\n" in line]
