"""The page in a browser: all there, silent, offline, legible, on a phone, in the dark, on paper."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import page_reports as reports
import pytest

from asvit_deploy.page.reading import read_files
from asvit_deploy.page.rendering import page_of
from asvit_deploy.page.writing import MOST_BYTES

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
WIDTHS, SCHEMES = (360, 1440), ("light", "dark")
LONG = "a_name_that_has_no_end_" * 12

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None or importlib.util.find_spec("selenium") is None,
        reason="no browser: apt-get install chromium chromium-driver, and pip install selenium",
    ),
]

# Elements that reach out of the window to the right, unless something around them hides that.
OVERFLOWS = """
const width = document.documentElement.clientWidth, found = [];
for (const one of document.body.querySelectorAll("*")) {
  const box = one.getBoundingClientRect();
  if (box.width && (box.right > width + 1 || box.left < -1)
      && !one.closest("thead") && !one.closest("svg"))
    found.push(one.tagName + "." + one.className + " " + box.left + " " + box.right);
}
if (document.documentElement.scrollWidth > width) found.push("the page itself scrolls");
return found;
"""
# Text and what it stands on, as WCAG 2.2 has their contrast; only what is seen.
CONTRASTS = """
const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
const light = c => { c = c / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const luminance = c => 0.2126 * light(c[0]) + 0.7152 * light(c[1]) + 0.0722 * light(c[2]);
const ground = one => {
  for (; one; one = one.parentElement) {
    const c = rgb(getComputedStyle(one).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const found = {};
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const one = walk.currentNode.parentElement;
  if (!walk.currentNode.textContent.trim() || !one.getClientRects().length) continue;
  const style = getComputedStyle(one), svg = one.closest("svg");
  const ink = rgb(svg ? style.fill : style.color), paper = ground(svg ? svg.parentElement : one);
  const [a, b] = [luminance(ink), luminance(paper)].sort((x, y) => y - x);
  const key = one.tagName + "." + (one.getAttribute("class") || "") + " " + ink + " on " + paper;
  found[key] = Math.min(found[key] || 99, (a + 0.05) / (b + 0.05));
}
return found;
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of everything, one of odd and long names that failed, and one of nothing."""
    folder = tmp_path_factory.mktemp("pages")
    every = [*reports.every(), reports.evaluate(dense=True)]
    odd = reports.changed(reports.bench(), "rows.1.name", f"onnxruntime, {LONG}")
    odd = reports.changed(odd, "model", f"{LONG}.onnx")
    odd = reports.changed(odd, "command", f"asvit-deploy bench {LONG} {'--x ' * 90}")
    odd = reports.changed(odd, "notes", [LONG, "</script><b>bold</b>"])
    failed = reports.changed(reports.check(LONG, wrong=5), "parity.flips.1.image", LONG)
    made = {
        "all": [reports.saved(folder / "all.json", every), reports.drawings(folder / "drawings")],
        "odd": [reports.saved(folder / "odd.json", [odd, failed])],
        "nothing": [reports.saved(folder / "no.json", {"kind": "model", "model": "m.onnx"})],
    }
    for name, files in made.items():
        (folder / f"{name}.html").write_text(page_of(read_files(files), MOST_BYTES))
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--hide-scrollbars", "--disable-background-networking"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture
def shown(browser: Any, pages: dict[str, Path]) -> Callable[..., Any]:
    """The browser at a page, at a width, in a scheme."""

    def show(name: str, width: int = 1440, scheme: str = "light") -> Any:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 780, "deviceScaleFactor": 1, "mobile": width < 500,
        })  # fmt: skip
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "media": "", "features": [{"name": "prefers-color-scheme", "value": scheme}],
        })  # fmt: skip
        browser.get(pages[name].as_uri())
        return browser

    return show


def test_everything_is_there_and_seen(shown):
    browser = shown("all")
    least = {"h1": 1, "h2.verdict": 2, ".card": 6, "svg": 6, "img": 18, "#run code": 6,
             ".blocks > .table caption": 6, ".blocks > .table th[scope=row]": 10}  # fmt: skip
    for selector, count in least.items():  # what is folded is not seen yet
        found = browser.find_elements("css selector", selector)
        assert len(found) >= count, (selector, len(found))
        assert all(one.is_displayed() and one.size["height"] > 0 for one in found), selector
    loaded = "return [...document.images].map(one => one.naturalWidth > 0 && one.alt.length > 5)"
    assert all(browser.execute_script(loaded))
    assert "Worth it here" in browser.find_element("css selector", "h2.verdict").text
    heading = browser.execute_script("return getComputedStyle(document.body).fontFamily")
    assert "system-ui" in heading, "the style sheet is in force"


@pytest.mark.parametrize("name", ["all", "odd", "nothing"])
def test_it_is_silent_and_asks_for_nothing(shown, name):
    browser = shown(name)
    browser.get_log("browser"), browser.get_log("performance")
    browser.refresh()
    assert browser.get_log("browser") == []
    events = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    asked = {one["params"]["request"]["url"].split(":")[0] for one in events
             if one["method"] == "Network.requestWillBeSent"}  # fmt: skip
    assert asked <= {"file", "data"}
    assert "file" in asked, "the log was on"
    files = {one["params"]["request"]["url"] for one in events
             if one["method"] == "Network.requestWillBeSent"}  # fmt: skip
    assert len([url for url in files if url.startswith("file")]) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["all", "odd", "nothing"])
def test_nothing_reaches_out_of_the_window(shown, name, width, scheme):
    browser = shown(name, width, scheme)
    assert browser.execute_script("return document.documentElement.clientWidth") == width
    for one in browser.find_elements("css selector", "summary"):
        one.click()  # what is folded too
    assert browser.execute_script(OVERFLOWS) == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["all", "odd", "nothing"])
def test_text_can_be_told_from_its_ground(shown, name, scheme):
    for width in WIDTHS:
        found = shown(name, width, scheme).execute_script(CONTRASTS)
        assert len(found) > 8
        weak = {key: round(value, 2) for key, value in found.items() if value < 4.5}
        assert weak == {}
    dark = browser_ground(shown(name, 1440, scheme))
    assert (sum(dark) < 200) == (scheme == "dark")


def browser_ground(browser: Any) -> list[int]:
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    return [int(part) for part in colour.strip("rgb()").split(",")]


@pytest.mark.parametrize("width", WIDTHS)
def test_text_of_plots_is_legible_and_lies_apart(shown, width):
    browser = shown("all", width)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].map(t => t.getBBox().height"
        " * t.ownerSVGElement.getBoundingClientRect().width / 340)"
    )
    assert min(heights) >= 10
    crossing = browser.execute_script("""
      const found = [];
      for (const svg of document.querySelectorAll("svg")) {
        const boxes = [...svg.querySelectorAll("text")].map(
            t => [t.textContent, t.getBoundingClientRect()]);
        boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
          if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3
              && q.top < p.bottom - 3) found.push([a, b]);
        }));
      }
      return found;""")
    assert crossing == []


def test_it_prints(shown, tmp_path):
    browser = shown("all", 1440, "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    ink = browser.execute_script("return getComputedStyle(document.body).color")
    assert sum(int(part) for part in ink.strip("rgb()").split(",")) < 200, (
        "dark ink, in the dark too"
    )
    made = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert made.startswith(b"%PDF-")
    assert len(made) > 20_000
