"""Files as they come: one line for each that is no report of ours, and nothing written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import page_reports as reports
import pytest
from conftest import raises_one_line

import asvit_deploy
from asvit_deploy.page.reading import of_dicts, read_files


def made(tmp_path: Path, value: object, name: str = "a.json") -> Path:
    return reports.saved(tmp_path / name, value)


def line(path: Path, *words: str) -> None:
    """Refused by `report`, in a line that names the file; no page is there."""
    target = path.parent / "page.html"
    raises_one_line(lambda: asvit_deploy.report(path, output=target), path.name, *words)
    assert not target.exists()


@pytest.mark.parametrize(("value", "words"), [
    ([], "its list is empty"),
    ({}, "has no kind"),
    ([1], "has no kind"),
    ("text", "has no kind"),
    (None, "has no kind"),
    ({"kind": 3}, "is of kind '3'"),
    ({"kind": "onnx", "schema": 1}, "is of kind 'onnx'"),
    ({"kind": "\u202e<b>" * 100}, "which no page shows"),
    ({"kind": ["model"]}, "which no page shows"),
    ({"kind": "model"}, "has no 'model'"),
    ({"kind": "check", "model": 7}, "model is 7, where a text"),
    ([[reports.bench()]], "has no kind"),
])  # fmt: skip
def test_json_of_another_schema(tmp_path, value, words):
    line(made(tmp_path, value), words)


@pytest.mark.parametrize(
    "text", ["", "{", "not json", '[{"kind": "model"', "\0\0", "[1,]", "\ufeff{"]
)
def test_what_is_no_whole_json(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    line(path, "is no whole JSON", "cut off")


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00{")
    line(path, "is no whole JSON")


@pytest.mark.parametrize("depth", [45, 900, 200_000])
def test_brackets_too_deep(tmp_path, depth):
    path = tmp_path / "a.json"
    path.write_text('{"kind": "model", "model": "m", "notes": ' + "[" * depth + "]" * depth + "}")
    line(path, "brackets too deep")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", '"fast"', "null", "{}",
                                  "-3", "9" * 5000])  # fmt: skip
def test_numbers_that_are_none(tmp_path, text):
    whole = json.dumps(reports.changed(reports.bench(), "rows.0.p50_ms", "HERE"))
    path = tmp_path / "a.json"
    path.write_text(whole.replace('"HERE"', text))
    words = (
        ["is no whole JSON"] if len(text) > 4300 else ["rows[0].p50_ms is", "asvit-deploy bench"]
    )
    line(path, *words)


PLACES = {
    "model": ["rows", "rows.1.speedup", "rows.1.speedup.low", "macs", "macs.mean_kept.0",
              "agreement",
              "agreement.top1", "methods", "methods.topk", "notes", "notes.0", "busy", "verdict",
              "machine", "machine.versions", "histogram_kept.0.3", "sweeps.0.over",
              "sweeps.0.points.0.rows.0.kind", "rows.1.over_kept.points.0", "profile.0.scoring",
              "command", "threads", "images"],
    "engine": ["rows.0.wall_ms", "rows.0.kind", "against_kept", "gpu",
               "against_kept.dynamic.0.kept"],
    "check": ["parity", "parity.images", "parity.passed", "parity.flips", "parity.flips.0.margin",
              "parity.failures", "reference", "parity.noise.0", "parity.top1_changes.0.image"],
    "evaluate": ["rows.0.top1", "rows.0.images", "rows.0.histogram_kept", "data",
                 "rows.0.mean_kept"],
    "calibrate": ["methods", "methods.tome.distance", "kept_tokens", "thresholds", "budget"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "place"), [(k, p) for k, ps in PLACES.items() for p in ps])
def test_a_wrong_value_in_any_place_is_named(tmp_path, kind, place):
    whole = next(one for one in reports.every() if one["kind"] == kind)
    wrong = reports.changed(whole, place, True if place != "parity.passed" else "yes")
    name = place.split(".")[0]
    line(made(tmp_path, wrong), name, "belongs", "make it again")


def test_what_cannot_be_read(tmp_path):
    line(tmp_path / "gone.json", "does not exist")
    (tmp_path / "folder").mkdir()
    line(tmp_path / "folder", "is a folder")
    os.mkfifo(tmp_path / "pipe")
    line(tmp_path / "pipe", "a pipe")


def test_files_too_large_or_too_many(tmp_path):
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(1 << 30)
    line(large, "too many")
    many = [reports.changed(reports.check(), "run", f"way {n}") for n in range(61)]
    raises_one_line(lambda: read_files([made(tmp_path, many)]), "61 reports are too many")


def test_none_and_twice(tmp_path):
    raises_one_line(lambda: read_files([]), "no JSON file")
    one = made(tmp_path, reports.bench())
    (tmp_path / "link.json").symlink_to(one)
    for twin in (one, tmp_path / "." / "a.json", tmp_path / "link.json"):
        raises_one_line(lambda twin=twin: read_files([one, twin]), "named twice")
    copy = made(tmp_path, [reports.check(), reports.bench()], "b.json")
    raises_one_line(lambda: read_files([one, copy]), "b.json says what", "a.json says already")


def test_dicts_are_judged_as_files_are(tmp_path):
    every = reports.every()
    path = made(tmp_path, every)
    assert [one.fields for one in of_dicts(every)] == [one.fields for one in read_files([path])]
    raises_one_line(lambda: of_dicts([{"kind": "odd"}]), "is of kind 'odd'")


def test_drawings_that_were_edited(tmp_path):
    path = reports.drawings(tmp_path / "drawings")
    assert read_files([path])[0].folder == path.parent
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "image_tokens": 99}))
    line(path, "was edited")


@pytest.mark.parametrize(("change", "words"), [
    ({"pictures": []}, "pictures has none"),
    ({"image_tokens": 0}, "image_tokens is 0"),
    ({"image_tokens": 1}, "more tokens than there are"),
    ({"image_tokens": 10**9}, "image_tokens is"),
    ({"panels": [7]}, "panels names a cut"),
    ({"image_tokens": "many"}, "where a whole number"),
])  # fmt: skip
def test_drawings_that_do_not_add_up(tmp_path, change, words):
    line(reports.drawings(tmp_path / "drawings", **change), words)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/b.png", ".."])
def test_drawings_from_elsewhere_are_refused(tmp_path, name):
    path = reports.drawings(tmp_path / "drawings")
    fields = json.loads(path.read_text())
    fields["pictures"][0]["file"] = name
    for key in ("digest", "schema"):
        del fields[key]
    from asvit_deploy import sidecar

    path.write_text(sidecar.signed(fields))
    line(path, "pictures[0].file", "in the same folder")
