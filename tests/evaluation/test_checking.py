"""`check` from Python: what the command prints, as typed results."""

from __future__ import annotations

import json
import sys

import onnx
import pytest
from conftest import raises_one_line
from onnx import numpy_helper

from asvit_deploy.artefacts import onnx_file
from asvit_deploy.artefacts.onnx_file import Runtime
from asvit_deploy.evaluation import checking
from asvit_deploy.evaluation.bench import bench
from asvit_deploy.evaluation.checking import check
from asvit_deploy.parity import Parity
from asvit_deploy.runners.onnx_runtime import OrtRunner


@pytest.mark.slow
def test_the_same_as_the_command(cli, mini_artifacts):
    paths = [mini_artifacts["dynamic", "auto"], mini_artifacts["1", "standard"]]
    lines: list[str] = []
    found = check([str(path) for path in paths], limit=3, runtime="onnxruntime", say=lines.append)
    result = cli("check", *paths, "--limit", 3, "--runtime", "onnxruntime", "--json")
    assert json.loads(result.out) == json.loads(json.dumps([c.as_dict() for c in found]))
    assert lines == result.err.splitlines()
    runs = [(c.model, c.run) for c in found if "library" not in c.run]
    assert runs == [(str(paths[0]), "function, batch 1"), (str(paths[0]), "function, batch 8"),
                    (str(paths[1]), "function, batch 1")]  # fmt: skip
    for comparison in found:
        assert comparison.passed
        assert isinstance(comparison.parity, Parity)
        assert comparison.parity.images == 3
        assert comparison.account["skipped"] == 0
        assert comparison.reference["provider"] == "eager"


def test_silent_by_default_and_the_folder_s_artefacts(mini_artifacts, tmp_path, monkeypatch, capfd):
    source = mini_artifacts["1", "standard"]
    for path in (source, source.with_name(source.name + ".json")):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    (comparison,) = check(limit=1, runtime="onnxruntime")
    assert (comparison.model, comparison.passed) == (source.name, True)
    assert capfd.readouterr() == ("", "")


def test_a_wrong_network_is_a_result_and_no_exception(mini_artifacts, tmp_path):
    proto = onnx.load(mini_artifacts["1", "auto"])
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("head.weight"))
    values = numpy_helper.to_array(tensor)[::-1].copy()
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    found = check(tmp_path / "wrong.onnx", reference=str(mini_artifacts["1", "auto"]), limit=2)
    assert found
    for comparison in found:
        assert not comparison.passed
        assert any("logits differ" in failure for failure in comparison.parity.failures)
        assert comparison.reference["backend"].startswith("onnxruntime")


def test_a_bad_one_is_refused_before_the_first_has_run(mini_artifacts, tmp_path):
    lines: list[str] = []
    paths = [mini_artifacts["1", "auto"], tmp_path / "gone.onnx"]
    raises_one_line(lambda: check(paths, say=lines.append), "gone.onnx does not exist")
    assert not any("images" in line for line in lines)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"limit": 0}, "limit is 0; give 1 or more"),
    ({"skip_limit": -1}, "skip_limit is -1; give 0 or more"),
    ({"images": "nowhere"}, "nowhere"),
    ({"library": "nowhere.so"}, "nowhere.so"),
    ({"plugin": "nowhere.so"}, "nowhere.so cannot be used"),
])  # fmt: skip
def test_bad_arguments_are_one_line(mini_artifacts, arguments, words):
    raises_one_line(lambda: check(mini_artifacts["1", "auto"], **arguments), words)


@pytest.mark.slow
def test_a_further_runtime_is_one_row(mini_artifacts, monkeypatch):
    """ONNX Runtime without its optimiser stands for a runtime that is not there yet."""

    def plain(model):
        return OrtRunner(model, optimize=False)

    further = Runtime(
        lacks=lambda artefact: None,
        ways=lambda artefact, threads, record: {"plain": lambda: plain(artefact.model)},
        model=lambda model, threads: plain(model),
    )
    monkeypatch.setitem(onnx_file.RUNTIMES, "other", further)
    monkeypatch.setattr(checking, "CHECKED", ())  # all that are there
    monkeypatch.setitem(sys.modules, "openvino", None)
    path = mini_artifacts["1", "standard"]
    found = {comparison.run: comparison.passed for comparison in check(path, limit=2)}
    assert found == {"function, batch 1": True, "plain, batch 1": True}
    (report,) = bench(path, runs=10, warmup=0, limit=1, threads="1")
    rows = {row["name"]: row for row in report.rows}
    assert list(rows) == ["torch eager, dense", "torch eager, adaptive", "onnxruntime, dense",
                          "other, dense", "onnxruntime, adaptive (function)",
                          "other, adaptive (plain)"]  # fmt: skip
    ratio = rows["other, dense"]["p50_ms"] / rows["other, adaptive (plain)"]["p50_ms"]
    assert rows["other, adaptive (plain)"]["speedup"]["value"] == pytest.approx(ratio)
