"""`bench` from Python: what the command prints and writes, as typed results."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import raises_one_line

from asvit_deploy.evaluation.bench import as_json, bench
from asvit_deploy.evaluation.model_bench import ModelBench
from asvit_deploy.processor import usable_cores

QUICK = {"runs": 10, "warmup": 0, "limit": 2, "threads": "1"}


@pytest.fixture
def model(mini_artifacts):
    return mini_artifacts["1", "auto"]


@pytest.mark.slow
def test_a_report_and_its_file(cli, model, tmp_path):
    lines: list[str] = []
    output = tmp_path / "report.json"
    reports = bench(str(model), **QUICK, output=str(output), say=lines.append)
    (report,) = reports
    assert isinstance(report, ModelBench)
    assert output.read_text() == as_json(reports) + "\n"
    assert [line for line in lines if "images" in line] == [
        f"{model}: 2 images (2 photographs that scikit-image carries, 2 crops)"
    ]
    said = cli("bench", model, "--runs", 10, "--warmup", 0, "--limit", 2, "--threads", 1, "--json")
    (printed,) = json.loads(said.out)
    own = report.as_dict()
    assert list(own) == list(printed)
    assert list(own)[:8] == ["kind", "model", "arch", "threads", "warmup", "runs", "images",
                             "image_count"]  # fmt: skip
    measured = ("rows", "profile", "busy", "verdict")
    for name in own.keys() - set(measured):
        assert own[name] == printed[name], name
    assert [row["name"] for row in own["rows"]] == [row["name"] for row in printed["rows"]]
    for row, other in zip(own["rows"], printed["rows"]):
        assert list(row) == list(other)


@pytest.mark.slow
def test_one_core_is_benched_once(model, monkeypatch):
    monkeypatch.setattr("asvit_deploy.evaluation.bench.usable_cores", lambda: 1)
    reports = bench([model], **{**QUICK, "threads": "both"})
    assert [report.threads for report in reports] == [1]


@pytest.mark.slow
@pytest.mark.skipif(usable_cores() == 1, reason="with one core there is one count of threads")
def test_both_counts_of_threads_and_torch_gets_its_own_back(model, capfd):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        reports = bench([model], **{**QUICK, "threads": "both"})
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    one, every = reports
    assert (one.threads, every.threads) == (1, one.machine["cores"])
    assert one.profile
    assert every.profile == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("arguments", "words"), [
    ({"runs": 9}, "runs is 9; give 10 or more"),
    ({"warmup": -1}, "warmup is -1; give 0 or more"),
    ({"limit": 0}, "limit is 0; give 1 or more"),
    ({"threads": "2"}, "threads is '2'; give one of 1, all, both"),
    ({"output": "nowhere/x.json"}, "nowhere"),
])  # fmt: skip
def test_bad_arguments_are_one_line(model, arguments, words):
    raises_one_line(lambda: bench(model, **{**QUICK, **arguments}), words)


@pytest.mark.slow
def test_what_is_there_stays(model, tmp_path):
    there = tmp_path / "x.json"
    there.write_text("mine")
    raises_one_line(lambda: bench(model, **QUICK, output=there), "exists already")
    assert there.read_text() == "mine"
    raises_one_line(lambda: bench(model, **QUICK, output=model, force=True), "is the input itself")
    bench(model, **QUICK, output=there, force=True)
    assert json.loads(there.read_text())[0]["kind"] == "model"


def test_one_that_was_named_and_cannot_run_ends_it(model, tmp_path):
    paths = [tmp_path / "gone.onnx", model]
    raises_one_line(lambda: bench(paths, **QUICK), "gone.onnx does not exist")
