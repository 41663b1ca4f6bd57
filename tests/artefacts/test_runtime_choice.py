"""`--runtime auto`: what a choice file says is run, and every file that cannot be gone by."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import raises_one_line, refused, signed_copy
from PIL import Image

import asvit_deploy
from asvit_deploy import sidecar
from asvit_deploy.artefacts import runtime_choice
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.artefacts.runtime_choice import choice_path, read_choice, run_as_chosen
from asvit_deploy.bounded import MOST_TEXT
from asvit_deploy.evaluation.bench import bench
from asvit_deploy.processor import cpu_name, usable_cores

here = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason="openvino is not installed (scripts/setup cpu,openvino,train,dev)",
)
TORCH = torch.__version__


def fields_for(model, **changed):
    """As bench writes them."""
    own = sidecar.read(model)
    return {
        "kind": "choice", "model": model.name, "sha256": own["sha256"], "models": [model.name],
        "lost": {}, "runtime": "onnxruntime", "way": "function", "threads": 1,
        "precision": own["precision"], "batch": 1, "p50_ms": 1.25,
        "backend": f"onnxruntime {onnxruntime.__version__}", "cpu": cpu_name(),
        "cores": usable_cores(), **changed,
    }  # fmt: skip


@pytest.fixture
def model(mini_artifacts, tmp_path):
    """A copy of its own, so that what lies beside it is of one test."""
    source, target = mini_artifacts["1", "auto"], tmp_path / "m.onnx"
    shutil.copy(source, target)
    shutil.copy(f"{source}.json", f"{target}.json")
    return target


@pytest.fixture
def picture(tmp_path):
    path, rng = tmp_path / "a.png", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    return path


def write(model, path=None, **changed):
    path = path or choice_path(model)
    path.write_text(sidecar.signed(fields_for(model, **changed)))
    return path


def test_bench_writes_all_that_is_gone_by(model):
    """And with the kinds that are asked for: the other tests write such files by hand."""
    bench(model, runs=10, warmup=0, limit=1, threads="all", runtime="onnxruntime",
          save_choice=choice_path(model))  # fmt: skip
    choice = read_choice(open_artefact(model))
    assert set(fields_for(model)) < set(choice.fields)
    assert choice.fields["threads"] == (0 if usable_cores() > 1 else 1)
    assert choice.fields["backend"] == f"onnxruntime {onnxruntime.__version__}"


@pytest.mark.parametrize("threads", [0, 1])
def test_it_is_run_so_and_one_line_says_it(model, threads):
    lines: list[str] = []
    path = write(model, threads=threads)
    ways = run_as_chosen(open_artefact(model), None, lines.append)
    assert (list(ways), ways.runtimes) == (["function"], {"function": "onnxruntime"})
    options = ways["function"].session.get_session_options()
    assert options.intra_op_num_threads == threads
    count = "1 thread" if threads else "all threads"
    assert lines == [f"{model} runs in onnxruntime (function), {count}: the fastest here at batch "
                     f"1, 1.25 ms at p50, says {path}"]  # fmt: skip


@pytest.mark.slow
def test_the_way_is_the_files(model, op_library):
    for way in ("function", "library"):
        write(model, way=way)
        ways = run_as_chosen(open_artefact(model, op_library), None, lambda line: None)
        assert ways[way].describe()["op"] == way
    raises_one_line(lambda: run_as_chosen(open_artefact(model), None, print),
                    "onnxruntime (library)", "build-plugins ort", "--save-choice")  # fmt: skip


def test_torch_gets_its_threads(model):
    write(model, runtime="torch", way="torch", threads=0, backend=f"torch {TORCH}")
    (runner,) = run_as_chosen(open_artefact(model), None, lambda line: None).values()
    assert runner._threads == usable_cores()


@here
def test_openvino(model):
    write(model, runtime="openvino", way="openvino")
    lines: list[str] = []
    (runner,) = run_as_chosen(open_artefact(model), None, lines.append).values()
    assert runner.describe()["backend"].startswith("openvino")
    assert "runs in openvino, 1 thread" in lines[0]


def test_another_version_runs_and_is_said(model):
    path = write(model, backend="onnxruntime 1.0.0")
    lines: list[str] = []
    run_as_chosen(open_artefact(model), None, lines.append)
    assert lines[1:] == [
        f"{path} is of onnxruntime 1.0.0, and onnxruntime {onnxruntime.__version__} is installed; "
        f"run `asvit-deploy bench {model} --save-choice {path} --force`"
    ]


def test_another_name_and_another_place_of_the_same_file(model, tmp_path):
    path = write(model, tmp_path / "any name.json")
    moved = tmp_path / "moved.onnx"
    shutil.copy(model, moved)
    shutil.copy(f"{model}.json", f"{moved}.json")
    assert read_choice(open_artefact(moved), path).fields["sha256"] == sidecar.read(moved)["sha256"]


def test_none_is_there(model):
    raises_one_line(lambda: read_choice(open_artefact(model)), "m.onnx.choice.json does not exist",
                    f"`asvit-deploy bench {model} --save-choice")  # fmt: skip


def odd_files():
    def text(change):
        return lambda path, fields: path.write_text(change(sidecar.signed(fields)))

    def signed(**changed):
        return lambda path, fields: path.write_text(sidecar.signed({**fields, **changed}))

    def of_engine(**changed):
        said = {"file": "m.engine", "digest": "0" * 64, "gpu": "a GPU", **changed}
        return signed(runtime="tensorrt", way="engine", engine=said)

    return {
        "empty": (lambda path, fields: path.write_bytes(b""), "is not a choice file of this tool"),
        "cut": (text(lambda t: t[:-40]), "is not a choice file of this tool"),
        "no JSON": (lambda path, fields: path.write_bytes(b"\x00\xff" * 9), "is not a choice file"),
        "a list": (text(lambda t: "[1]"), "is not a choice file of this tool"),
        "deep": (text(lambda t: "[" * 100_000), "is not a choice file of this tool"),
        "unsigned": (lambda path, fields: path.write_text(json.dumps(fields)), "not a choice file"),
        "edited": (text(lambda t: t.replace('"way": "function"', '"way": "library"')),
                   "was edited after it was written"),
        "newer": (signed(schema=2), "has schema 2, this version reads 1"),
        "large": (lambda path, fields: path.write_bytes(b" " * (MOST_TEXT + 1)), "too many"),
        "a folder": (lambda path, fields: path.mkdir(), "is a folder"),
        "a pipe": (lambda path, fields: os.mkfifo(path), "no regular file"),
        "sidecar": (signed(kind="onnx"), "is no choice file but of kind 'onnx'"),
        "kind of a list": (signed(kind=["choice"]), "is no choice file but of kind"),
        "no runtime": (signed(runtime="cuda"), "says runtime 'cuda'"),
        "tensorrt": (signed(runtime="tensorrt"), "says engine None"),
        "half an engine": (of_engine(digest=3), "says engine {"),
        "an engine elsewhere": (of_engine(file="../m.engine"), "says engine {"),
        "no engine": (of_engine(file="m.onnx"), "says engine {"),
        "engine gone": (of_engine(), "m.engine does not exist; name an artefact"),
        "number": (signed(runtime=3), "says runtime 3"),
        "no way": (signed(way="nowhere"), "has no such way"),
        "negative": (signed(threads=-1), "says threads -1"),
        "true": (signed(threads=True), "says threads True"),
        "half": (signed(threads=1.5), "says threads 1.5"),
        "more threads": (signed(threads=usable_cores() + 1), f"threads is {usable_cores() + 1}"),
        "no median": (signed(p50_ms="fast"), "says p50_ms 'fast'"),
        "no models": (signed(models=[]), "says models []"),
        "odd models": (signed(models=[1]), "says models [1]"),
        "other CPU": (signed(cpu="Another CPU"), "another machine (Another CPU"),
        "other cores": (signed(cores=usable_cores() + 1), "another machine"),
        "no core": (signed(cores="2"), "says cores '2'"),
        "other file": (signed(sha256="0" * 64), "made for another file"),
        "other precision": (signed(precision="int8"), "says int8 and the sidecar"),
    }  # fmt: skip


@pytest.mark.parametrize("name", odd_files())
def test_what_cannot_be_gone_by(cli, model, picture, name):
    make, words = odd_files()[name]
    path = choice_path(model)
    make(path, fields_for(model))
    before = None if not path.is_file() else path.read_bytes()
    refused(cli("predict", model, picture, "--runtime", "auto"), path.name, words)
    assert before is None or path.read_bytes() == before


def test_the_sidecar_itself_is_no_choice(cli, model, picture):
    refused(cli("predict", model, picture, "--runtime", "auto", "--choice", f"{model}.json"),
            "m.onnx.json is no choice file but of kind 'onnx'")  # fmt: skip


def test_a_machine_with_other_cores(model, monkeypatch):
    write(model)
    monkeypatch.setattr(runtime_choice, "usable_cores", lambda: 64)
    raises_one_line(lambda: read_choice(open_artefact(model)), "another machine", "here ",
                    "64 cores", "--force")  # fmt: skip


def test_the_file_was_exported_again(model, picture, cli):
    write(model)

    def other(proto):
        proto.producer_name = "again"

    signed_copy(model, model, other)
    refused(cli("predict", model, picture, "--runtime", "auto"), "made for another file than",
            "or it was exported again", f"bench {model}")  # fmt: skip


def test_the_file_that_lost(model, mini_artifacts):
    lost = mini_artifacts["1", "standard"]
    path = write(
        model, models=["m.onnx", lost.name], lost={lost.name: sidecar.read(lost)["sha256"]}
    )
    raises_one_line(lambda: read_choice(open_artefact(lost), path),
                    f"m.onnx is faster here than {lost.name}; name m.onnx")  # fmt: skip


def test_a_file_that_another_tool_made(model, tmp_path):
    """It has no sidecar of its own: its bytes are what counts."""
    proto = onnx.load(model)
    proto.producer_name = "another tool"
    other = tmp_path / "other.onnx"
    onnx.save(proto, other)
    path = write(model)
    artefact = open_artefact(other, original=model)
    raises_one_line(lambda: read_choice(artefact, path), "made for another file than", "other.onnx")


def test_its_runtime_is_missing(cli, model, picture, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    path = write(model, runtime="openvino", way="openvino")
    for command in ("predict", "evaluate", "check"):
        more = {"predict": [picture], "evaluate": ["--data", "digits"]}.get(command, [])
        refused(cli(command, model, *more, "--runtime", "auto"), f"{path} says openvino",
                "openvino is not installed; pip install")  # fmt: skip
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    write(model)
    refused(cli("predict", model, picture, "--runtime", "auto"), "says onnxruntime",
            "onnxruntime is not installed; pip install")  # fmt: skip


@pytest.mark.slow
def test_predict_evaluate_and_check_go_by_it(cli, model, picture, tmp_path):
    write(model, runtime="torch", way="torch", threads=1, backend=f"torch {TORCH}")
    line = "runs in torch, 1 thread: the fastest here"
    result = cli("predict", model, picture, "--runtime", "auto", "--json")
    assert (result.code, line in result.err) == (0, True)
    assert json.loads(result.out) == json.loads(
        cli("predict", model, picture, "--runtime", "torch", "--json").out
    )
    result = cli("evaluate", model, "--data", "digits", "--limit", 4, "--runtime", "auto", "--json")
    assert (result.code, line in result.err) == (0, True)
    assert json.loads(result.out)["runner"]["backend"].startswith("torch")
    refused(cli("check", model, "--runtime", "auto"), "compared with itself")
    other = write(model, tmp_path / "other.json")
    result = cli("check", model, "--limit", 2, "--runtime", "auto", "--choice", other, "--json")
    assert result.code == 0, result.err
    assert [found["run"] for found in json.loads(result.out)] == ["function, batch 1"]
    assert result.err.count("runs in onnxruntime (function)") == 1
    lines: list[str] = []
    (found,) = asvit_deploy.predict(model, picture, runtime="auto", choice=other, say=lines.append)
    assert any("runs in onnxruntime (function)" in said for said in lines)
    assert found.top


def test_what_auto_does_not_go_with(cli, model, picture, mini_checkpoint):
    choice = ("--choice", "c.json")
    refused(cli("bench", model, "--runtime", "auto"), "bench cannot be told it", "name runtimes")
    refused(cli("bench", model, "--runtime", "auto,torch"), "bench cannot be told it")
    for command in ("predict", "evaluate", "check"):
        more = {"predict": [picture], "evaluate": ["--data", "digits"]}.get(command, [])
        refused(cli(command, model, *more, *choice), "--choice c.json is read by --runtime auto")
        refused(
            cli(command, model, *more, "--runtime", "torch", *choice), "--choice c.json is read"
        )
        refused(cli(command, model, *more, "--runtime", "auto,torch"), "give it alone")
    refused(cli("evaluate", mini_checkpoint, "--data", "digits", "--runtime", "auto"),
            str(mini_checkpoint), "no ONNX file")  # fmt: skip
    refused(cli("check", model, "x.engine", "--runtime", "auto"), "auto is for ONNX files")
    refused(cli("predict", "x.onnx", picture, "--runtime", "auto"), "x.onnx does not exist")
