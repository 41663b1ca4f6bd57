"""`bench --save-choice`: what is a candidate, what is written, and what is refused beforehand."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
from conftest import raises_one_line, refused, signed_copy

from asvit_deploy import sidecar
from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.evaluation import bench as bench_module
from asvit_deploy.evaluation.bench import bench
from asvit_deploy.evaluation.model_bench import ModelBench
from asvit_deploy.evaluation.saved_choice import candidates, choose
from asvit_deploy.exporting.export import export
from asvit_deploy.processor import cpu_name, usable_cores

QUICK = {"runs": 10, "warmup": 0, "limit": 2, "threads": "1", "runtime": "onnxruntime"}


@pytest.fixture
def model(mini_artifacts):
    return mini_artifacts["1", "auto"]


@pytest.fixture
def never_timed(monkeypatch):
    """Whatever is timed fails the test."""

    def timed(*given, **named):
        pytest.fail("it was timed")

    monkeypatch.setattr(bench_module, "bench_model", timed)


def row(name, p50, *, way=None, adaptive=True, runtime="onnxruntime", speedup=None):
    found = {"name": name, "runtime": runtime, "adaptive": adaptive, "precision": "float32",
             "runner": {"backend": f"{runtime} 1", "precision": "float32"}, "p50_ms": p50,
             "p90_ms": p50, "p99_ms": p50, "min_ms": p50}  # fmt: skip
    if way:
        found["way"] = way
    if speedup:
        found["speedup"] = dict(zip(("value", "low", "high"), speedup))
    return found


def report(model, rows, threads=1, cores=8):
    machine = {"cpu": "some CPU", "cores": cores, "system": "Linux", "python": "3", "versions": {}}
    return ModelBench(str(model), "as_deit_mini", threads, 0, 10, "pictures", 2, {}, {}, rows, None,
                      {}, [], [], None, "", machine)  # fmt: skip


FIELDS = {"sha256": "a" * 64, "precision": "float32", "adaptive": True,
          "source": {"path": "/x/net.pt", "sha256": "0"}}  # fmt: skip
OTHER = {**FIELDS, "sha256": "b" * 64}


def test_the_fastest_row_of_the_file_itself():
    one = report("m.onnx", [
        row("onnxruntime, dense", 1.0, adaptive=False),
        row("onnxruntime, tome", 0.5),
        row("onnxruntime, adaptive (function)", 4.0, way="function", speedup=(0.25, 0.2, 0.3)),
        row("openvino, adaptive", 3.0, way="openvino", runtime="openvino"),
    ])  # fmt: skip
    every = report("m.onnx", [
        row("onnxruntime, adaptive (function)", 2.0, way="function", speedup=(1.5, 1.4, 1.6)),
    ], threads=8)  # fmt: skip
    made = choose([one, every], {"m.onnx": FIELDS})
    found = json.loads(made.text)
    assert (found["runtime"], found["way"], found["threads"]) == ("onnxruntime", "function", 0)
    assert (found["p50_ms"], found["batch"], found["verdict"]) == (2.0, 1, "adaptive")
    assert found["runner_up"] == {"model": "m.onnx", "row": "openvino, adaptive", "threads": 1,
                                  "p50_ms": 3.0}  # fmt: skip
    assert (found["cpu"], found["cores"], found["backend"]) == ("some CPU", 8, "onnxruntime 1")
    assert found["fastest_dense"]["p50_ms"] == 1.0
    assert "8 threads, 2.00 ms at p50; next: m.onnx in openvino, adaptive" in made.lines[0]
    assert made.lines[1] == (
        "the dense network is faster here (onnxruntime, dense, 1 thread, 1.00 ms); `asvit-deploy "
        "export --ckpt /x/net.pt --dense` writes it as a file"
    )


@pytest.mark.parametrize(("speedup", "verdict"), [
    ((0.8, 0.7, 0.9), "dense"), ((1.0, 0.9, 1.1), "draw"), ((1.2, 1.1, 1.3), "adaptive"),
    (None, None),
])  # fmt: skip
def test_whether_dense_won(speedup, verdict):
    rows = [row("onnxruntime, dense", 3.0, adaptive=False),
            row("onnxruntime, adaptive", 3.0, way="function", speedup=speedup)]  # fmt: skip
    made = choose([report("m.onnx", rows)], {"m.onnx": FIELDS})
    found = json.loads(made.text)
    assert found["verdict"] == verdict
    assert (found["speedup"] or {}).get("low") == (speedup[1] if speedup else None)
    assert found["runtime"] == "onnxruntime", "it says how to run the file nevertheless"
    assert any("--dense" in line for line in made.lines) == (verdict == "dense")


def test_one_core_is_one_thread_and_not_all():
    made = choose([report("m.onnx", [row("a", 1.0, way="function")], 1, 1)], {"m.onnx": FIELDS})
    assert json.loads(made.text)["threads"] == 1


def test_of_several_files_the_faster():
    reports = [report("m.onnx", [row("a", 2.0, way="function")]),
               report("m.int8.onnx", [row("b", 1.0, way="library")])]  # fmt: skip
    found = json.loads(choose(reports, {"m.onnx": FIELDS, "m.int8.onnx": OTHER}).text)
    assert (found["model"], found["sha256"]) == ("m.int8.onnx", "b" * 64)
    assert found["models"] == ["m.onnx", "m.int8.onnx"]
    assert found["lost"] == {"m.onnx": "a" * 64}
    assert found["runner_up"]["model"] == "m.onnx"


def test_a_dense_file_that_beats_the_adaptive_one():
    reports = [report("m.onnx", [row("a", 2.0, way="function")]),
               report("d.onnx", [row("b", 1.0, way="dense", adaptive=False)])]  # fmt: skip
    made = choose(reports, {"m.onnx": FIELDS, "d.onnx": {**OTHER, "adaptive": False}})
    assert json.loads(made.text)["verdict"] == "dense"


def test_a_dense_file_that_won_is_not_told_to_export_its_twin():
    reports = [report("m.onnx", [row("a", 2.0, way="function"),
                                 row("twin", 1.5, adaptive=False)]),
               report("d.onnx", [row("b", 1.0, way="dense", adaptive=False)])]  # fmt: skip
    made = choose(reports, {"m.onnx": FIELDS, "d.onnx": {**OTHER, "adaptive": False}})
    assert not any("export" in line for line in made.lines)


def test_nothing_was_measured():
    raises_one_line(lambda: choose([report("m.onnx", [row("twin", 1.0)])], {"m.onnx": FIELDS}),
                    "m.onnx", "nothing to choose")  # fmt: skip


def test_files_of_one_network(mini_artifacts, mini_checkpoint, tmp_path):
    one, two = mini_artifacts["1", "auto"], mini_artifacts["1", "standard"]
    checkpoint = load_checkpoint(mini_checkpoint)
    dense = tmp_path / "dense.onnx"
    export(checkpoint, dense, open_images(None, checkpoint.config, limit=1), dense=True)
    assert list(candidates([one, two, dense])) == list(map(str, (one, two, dense)))


def test_files_of_several_networks(cli, model, tmp_path, never_timed):
    fields = sidecar.read(model)
    others = {
        "checkpoint": {"source": {**fields["source"], "sha256": "0" * 64}},
        "averaged weights": {"source": {**fields["source"], "ema": True}},
        "thresholds": {"thresholds": [t / 2 for t in fields["thresholds"]]},
        "preprocessing": {"preprocessing": {**fields["preprocessing"], "crop_pct": 0.5}},
    }
    for name, changed in others.items():
        other = signed_copy(model, tmp_path / f"{name.replace(' ', '_')}.onnx", **changed)
        result = cli("bench", model, other, "--save-choice", "x.json")
        refused(result, str(model), other.name, "differ in", name, "one by one")
        assert not (tmp_path / "x.json").exists()


def test_outputs_are_refused_before_anything_is_timed(cli, model, tmp_path, never_timed):
    there = tmp_path / "there.json"
    there.write_text("mine")
    link = tmp_path / "link.json"
    link.symlink_to("x.json")
    for options, words in (
        (("--save-choice", "there.json"), ["there.json exists already; pass --force"]),
        (("--save-choice", "x.json", "-o", "x.json"), ["both name x.json", "two files"]),
        (("--save-choice", "x.json", "-o", "./x.json"), ["both name x.json"]),
        (("--save-choice", "x.json", "-o", "link.json", "--force"), ["both name x.json"]),
        (("--save-choice", model, "--force"), [str(model), "is the input itself"]),
        (("--save-choice", f"{model}.json", "--force"), ["is the input itself"]),
        (("--save-choice", "nowhere/x.json"), ["nowhere"]),
        (("--save-choice", "."), ["it is a folder"]),
        (("--save-choice", ""), ["an empty path"]),
    ):
        refused_or_usage(cli("bench", model, *options), *words)
    assert there.read_text() == "mine"
    assert sidecar.read(model)
    assert not (tmp_path / "x.json").exists()


def refused_or_usage(result, *words):
    assert result.code == 2
    for word in words:
        assert word in result.err
    assert "Traceback" not in result.err


def test_of_the_current_folder_too(cli, model, tmp_path, never_timed):
    """Where no model is named, neither output may replace the one that is found."""
    shutil.copy(model, tmp_path / "m.onnx")
    shutil.copy(f"{model}.json", tmp_path / "m.onnx.json")
    for option in ("--save-choice", "--output"):
        for name in ("m.onnx", "m.onnx.json"):
            refused(cli("bench", option, name, "--force"), name, "is the input itself")
    assert sidecar.read(tmp_path / "m.onnx")


def test_engines_alone_have_no_choice(cli, never_timed):
    refused(cli("bench", "x.engine", "y.bucketed", "--save-choice", "x.json"),
            "only engines are named")  # fmt: skip


def test_torch_does_not_run_an_int8_file(cli, model, tmp_path, never_timed):
    other = signed_copy(model, tmp_path / "i.onnx", precision="int8")
    refused(cli("bench", other, "--runtime", "torch", "--save-choice", "x.json"),
            "runs the checkpoint", "nothing to choose")  # fmt: skip


@pytest.mark.slow
def test_written_once_all_is_measured(cli, model, tmp_path, monkeypatch):
    target = tmp_path / "c.json"
    result = cli("bench", model, "--runs", 10, "--warmup", 0, "--limit", 2, "--save-choice", target,
                 "--runtime", "onnxruntime,torch", "--threads", "both", "--json")  # fmt: skip
    assert result.code == 0, result.err
    found, reports = json.loads(target.read_text()), json.loads(result.out)
    own = [(r["threads"], line) for r in reports for line in r["rows"] if "way" in line]
    assert {line["way"] for _, line in own} - {"library"} == {"function", "torch"}
    assert not any("way" in line for r in reports for line in r["rows"] if not line["adaptive"])
    threads, best = min(own, key=lambda pair: pair[1]["p50_ms"])
    assert (found["p50_ms"], found["way"]) == (best["p50_ms"], best["way"])
    assert found["threads"] == (0 if threads == usable_cores() > 1 else threads)
    assert (found["cpu"], found["cores"]) == (cpu_name(), usable_cores())
    assert found["sha256"] == sidecar.read(model)["sha256"]
    assert f"{target}: fastest: {model} in {best['name']}" in result.err
    # One that fails leaves what was there.
    before = target.read_text()
    monkeypatch.setattr(bench_module, "choose", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench(model, **QUICK, save_choice=target, output=tmp_path / "r.json", force=True)
    assert target.read_text() == before
    assert (tmp_path / "r.json").exists(), "what was measured is kept"


@pytest.mark.slow
def test_a_runtime_that_is_missing_has_a_line_for_its_rows(model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    (found,) = bench(model, **{**QUICK, "runtime": None})
    (note,) = [note for note in found.notes if "openvino" in note]
    assert note.startswith("no openvino rows: openvino is not installed; pip install")
    assert {row["runtime"] for row in found.rows} == {"torch", "onnxruntime"}
    (named,) = bench(model, **QUICK)
    assert not any("openvino" in note for note in named.notes), "it was not asked for"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="no openvino here")
def test_without_onnx_runtime(model, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (found,) = bench(model, **{**QUICK, "runtime": None})
    assert {row["runtime"] for row in found.rows} == {"torch", "openvino"}
    assert [note for note in found.notes if note.startswith("no onnxruntime rows: onnxruntime is")]
    raises_one_line(lambda: bench(model, **QUICK), "onnxruntime is not installed; pip install")
    monkeypatch.setitem(sys.modules, "openvino", None)
    raises_one_line(lambda: bench(model, **{**QUICK, "runtime": None}), "nothing", str(model),
                    "onnxruntime is not installed", "openvino is not installed")  # fmt: skip
