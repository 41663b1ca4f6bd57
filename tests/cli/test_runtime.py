"""`--runtime` on check, bench, evaluate and predict, and the parameter of the same name."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from conftest import raises_one_line, refused

import asvit_deploy
from asvit_deploy import runtimes
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.runners import openvino

here = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason="openvino is not installed (scripts/setup cpu,openvino,train,dev)",
)


@pytest.fixture
def model(mini_artifacts):
    return mini_artifacts["1", "auto"]


@pytest.fixture
def missing(monkeypatch):
    """As where it is not installed, whether it is here or not."""
    monkeypatch.setitem(sys.modules, "openvino", None)


def rounded(model):
    if lacking := openvino.why_not("bf16"):
        pytest.skip(lacking)
    return model


def test_names():
    assert runtimes.chosen(None) == runtimes.chosen(()) == ()
    assert runtimes.chosen("openvino, onnxruntime") == ("onnxruntime", "openvino")
    assert runtimes.chosen(["torch", "openvino,torch"]) == ("openvino", "torch")
    for bad in ("", "ort", "openvino,", ["openvino", "OpenVINO"]):
        raises_one_line(lambda bad=bad: runtimes.chosen(bad), "give some of onnxruntime, openvino")
    raises_one_line(lambda: runtimes.chosen_one("torch,openvino"), "give one of them")
    raises_one_line(lambda: runtimes.of_kind("x.engine", "engine", ("openvino",)),
                    "x.engine cannot be run by openvino", "name its ONNX file")  # fmt: skip


@pytest.mark.parametrize("command", ["check", "bench", "predict", "evaluate"])
@pytest.mark.parametrize(("name", "words"), [
    ("cuda", ["runtime has 'cuda'", "onnxruntime, openvino, openvino-bf16, torch, tensorrt"]),
    ("tensorrt", ["tensorrt"]),
])  # fmt: skip
def test_what_no_onnx_file_runs_in(cli, model, tmp_path, command, name, words):
    result = cli(command, model, *more(command), "--runtime", name)
    refused(result, *words)
    if name == "tensorrt" and command in ("predict", "evaluate"):
        refused(result, "build-engine")


def more(command):
    return {"predict": ["cat.png"], "evaluate": ["--data", "digits"]}.get(command, [])


@pytest.mark.parametrize("command", ["check", "bench", "predict", "evaluate"])
@pytest.mark.parametrize("name", ["openvino", "openvino-bf16"])
def test_named_and_missing_is_one_line(cli, model, missing, command, name):
    if command == "predict":
        pytest.importorskip("skimage").io.imsave(
            "cat.png", pytest.importorskip("skimage").data.cat()
        )
    refused(cli(command, model, *more(command), "--runtime", name),
            "openvino is not installed; pip install")  # fmt: skip


@pytest.mark.slow
def test_missing_and_not_named_costs_nothing(cli, model, missing):
    result = cli("check", model, "--limit", 1, "--json")
    assert result.code == 0
    assert not any("openvino" in c["run"] for c in json.loads(result.out))
    assert "openvino" not in result.err


@pytest.mark.slow
def test_torch_is_what_check_compares_with(cli, model):
    refused(cli("check", model, "--runtime", "torch"), "compared with itself")
    result = cli("check", model, "--runtime", "torch", "--reference", model, "--limit", 2, "--json")
    (found,) = json.loads(result.out)
    assert (found["run"], found["parity"]["passed"]) == ("torch, batch 1", True)
    assert found["reference"]["backend"].startswith("onnxruntime")


def test_other_artefacts_are_refused_by_name(cli, mini_checkpoint):
    refused(cli("evaluate", mini_checkpoint, "--data", "digits", "--runtime", "openvino"),
            str(mini_checkpoint), "no ONNX file")  # fmt: skip
    refused(cli("predict", "x.onnx", "a.png", "--runtime", "torch,openvino"), "give one of them")


@here
@pytest.mark.slow
def test_a_file_without_the_function(cli, mini_artifacts, op_library):
    custom = mini_artifacts["1", "custom"]
    refused(cli("check", custom, "--runtime", "openvino"), str(custom), "--ops auto or standard")
    # Not named, it is ONNX Runtime's alone.
    assert list(open_artefact(custom, op_library).ways()) == ["library"]


@here
@pytest.mark.slow
def test_check_judges_each_way(cli, mini_artifacts):
    path = mini_artifacts["dynamic", "auto"]
    both = ("--runtime", "onnxruntime,openvino")
    found = json.loads(cli("check", path, "--limit", 8, *both, "--json").out)
    assert [c["run"] for c in found if "library" not in c["run"]] == [
        "function, batch 1", "function, batch 8", "openvino, batch 1", "openvino, batch 8"
    ]  # fmt: skip
    for comparison in found:
        assert comparison["parity"]["passed"]
        assert comparison["parity"]["precision"] == "float32"
    alone = json.loads(cli("check", path, "--limit", 2, "--runtime", "openvino", "--json").out)
    assert [c["run"] for c in alone] == ["openvino, batch 1", "openvino, batch 8"]


@here
@pytest.mark.slow
def test_bfloat16_is_judged_as_that(cli, model):
    result = cli("check", rounded(model), "--limit", 8, "--runtime", "openvino-bf16", "--json")
    (found,) = json.loads(result.out)
    assert (found["run"], found["parity"]["precision"]) == ("openvino-bf16, batch 1", "bf16")
    assert max(found["parity"]["noise"]) > 1e-4
    assert (result.code == 0) == found["parity"]["passed"]


@here
@pytest.mark.slow
def test_bench_has_a_row_and_what_new_counts_take(cli, model):
    few = ("--threads", 1, "--runs", 10, "--warmup", 1, "--limit", 4)
    result = cli("bench", model, *few, "--json")
    assert result.code == 0, result.err
    (report,) = json.loads(result.out)
    rows = {row["name"]: row for row in report["rows"]}
    assert {"onnxruntime, dense", "openvino, dense", "openvino, adaptive"} < set(rows)
    assert not any("bf16" in name for name in rows)
    assert [name for name, row in rows.items() if "first_ms" in row] == ["openvino, adaptive"]
    assert rows["openvino, adaptive"]["first_ms"] > rows["openvino, adaptive"]["min_ms"]
    assert report["warmup"] == 4
    assert any("4 warm-up rounds, one for each image" in note for note in report["notes"])
    assert report["machine"]["versions"]["openvino"]
    table = cli("bench", model, *few, "--runtime", "openvino")
    assert "openvino, adaptive:" in table.out
    assert "that it had not seen" in table.out
    assert "torch" not in table.out
    assert "onnxruntime" not in table.out


@pytest.mark.slow
def test_bench_of_other_runtimes_has_only_their_rows(cli, model):
    few = ("--threads", 1, "--runs", 10, "--warmup", 0, "--limit", 1, "--json")
    for names, rows in {
        "torch": ["torch eager, dense", "torch eager, adaptive"],
        "onnxruntime": ["onnxruntime, dense", "onnxruntime, adaptive (function)"],
    }.items():
        result = cli("bench", model, *few, "--runtime", names)
        assert result.code == 0, result.err
        (report,) = json.loads(result.out)
        assert [row["name"] for row in report["rows"] if "library" not in row["name"]] == rows
        assert report["warmup"] == 0


@pytest.mark.slow
def test_predict_and_evaluate_say_the_same_in_each(cli, model):
    skimage = pytest.importorskip("skimage")
    skimage.io.imsave("cat.png", skimage.data.cat())
    names = ["torch"] + ["openvino"] * (importlib.util.find_spec("openvino") is not None)
    (ours,) = json.loads(cli("predict", model, "cat.png", "--json").out)
    data = ("--data", "digits", "--limit", 12)
    usual = json.loads(cli("evaluate", model, *data, "--json").out)
    assert usual["runner"]["backend"].startswith("onnxruntime")
    for name in names:
        (theirs,) = json.loads(cli("predict", model, "cat.png", "--runtime", name, "--json").out)
        assert theirs["kept"] == ours["kept"]
        assert theirs["top"][0]["index"] == ours["top"][0]["index"]
        assert theirs["top"][0]["probability"] == pytest.approx(ours["top"][0]["probability"], 1e-3)
        result = cli("evaluate", model, *data, "--runtime", name, "--json")
        assert result.code == 0, result.err
        report = json.loads(result.out)
        assert report["runner"]["backend"].startswith(name if name != "torch" else "torch")
        for key in ("top1", "mean_kept", "macs_share"):
            assert report["rows"][0][key] == usual["rows"][0][key]


@pytest.mark.parametrize("command", ["check", "bench", "predict", "evaluate"])
@pytest.mark.parametrize("names", ["openvino", "torch", "openvino,torch"])
def test_a_library_that_nothing_would_load(cli, model, command, names, tmp_path):
    if names == "openvino,torch" and command in ("predict", "evaluate"):
        return
    library = tmp_path / "lib.so"
    options = ("--reference", model) if command == "check" else ()
    refused(cli(command, model, *more(command), *options, "--runtime", names, "--library", library),
            f"--library {library} is for onnxruntime alone", names.split(",")[0])  # fmt: skip


def test_a_library_for_a_checkpoint(cli, mini_checkpoint):
    refused(cli("evaluate", mini_checkpoint, "--data", "digits", "--library", "lib.so"),
            "--library lib.so is for onnxruntime alone", "leave it out")  # fmt: skip


def test_from_python(model, missing):
    for call in (
        lambda: asvit_deploy.check(model, runtime="openvino"),
        lambda: asvit_deploy.bench(model, runtime=["openvino"]),
        lambda: asvit_deploy.evaluate(model, data="digits", runtime="openvino"),
    ):
        raises_one_line(call, "openvino is not installed")
