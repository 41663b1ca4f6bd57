"""`tune` from end to end on the packaged network, in one runtime and few rounds.

Nothing here is said of how fast anything is, but that three cuts at 0.4 of the MACs beat none.
"""

from __future__ import annotations

import html
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import raises_one_line, refused
from embedding_files import written
from PIL import Image

import asvit_deploy
from asvit_deploy import sidecar
from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library
from asvit_deploy.artefacts.runtime_choice import choice_path, read_choice
from asvit_deploy.runners import trt_plan
from asvit_deploy.tuning import engines, latency
from asvit_deploy.tuning.place import Place

FEW = {"images": "digits", "methods": "topk", "runtime": "onnxruntime", "precision": "float32",
       "limit": 48}  # fmt: skip
NAME = "as_vit_digits"


@pytest.fixture(scope="module")
def quick():
    """Few rounds, and no word on how busy the machine is."""
    patch = pytest.MonkeyPatch()
    patch.setattr(latency, "SECONDS", 1.0)
    patch.setattr(latency, "ROUNDS", (40, 60))
    patch.setattr(latency, "too_busy", lambda rounds: None)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def gone(quick, tmp_path_factory):
    """A go: 24 pictures show that fewer than 40 in a hundred change."""
    folder = tmp_path_factory.mktemp("tune") / "out"
    said: list[str] = []
    found = asvit_deploy.tune("default", output=folder, max_drop=40, say=said.append, **FEW)
    return found, said


@pytest.mark.slow
def test_a_go_names_its_winner_and_what_it_promises(gone):
    found, _ = gone
    assert found.go
    assert found.verdict["exit_code"] == 0
    assert found.verdict["why"] == "adaptive_wins"
    assert found.promise is not None
    promise = found.promise
    assert promise["low"] <= promise["ratio"] <= promise["high"]
    assert promise["expected_low"] <= promise["agreement_low"] <= promise["agreement"]
    assert promise["loss_bound"] <= 40
    best = next(point for point in found.points if point["certified"])
    assert best["candidate"] == found.verdict["candidate"]


@pytest.mark.slow
def test_the_winner_is_a_whole_artefact_that_runs_as_chosen(gone):
    found, _ = gone
    artefact = OnnxArtefact(found.model, find_op_library(None))
    assert artefact.adaptive
    assert artefact.fields["tuned"] == found.promise
    assert artefact.reference.adaptive
    choice = read_choice(artefact)
    assert choice.fields["runtime"] == "onnxruntime"
    assert len(choice.ways(artefact)) == 1
    shown = asvit_deploy.evaluate(found.model, data="digits", limit=20, runtime="auto")
    assert shown.rows[0]["images"] == 20
    assert abs(shown.rows[0]["macs_share"] - found.promise["macs_share"]) < 0.1


@pytest.mark.slow
def test_check_passes_on_the_winner(gone):
    found, _ = gone
    (verdict,) = asvit_deploy.check([found.model], limit=8)
    assert verdict.passed


@pytest.mark.slow
def test_the_report_is_whole_and_signed_for_the_next_tool(gone):
    found, _ = gone
    report = json.loads((found.output / "tune.json").read_text())
    assert report == found.report
    assert report["kind"] == "tune"
    page = html.unescape((found.output / "report.html").read_text())
    assert found.verdict["sentence"].removeprefix("go: ") in page
    assert report["pictures"]["calibrating"] + report["pictures"]["judging"] == 48
    sequence = report["sequence"]
    distances = [test["distance"] for test in sequence]
    assert distances == sorted(distances), "the closest to dense is tested first"
    tested = [test["tested"] for test in sequence]
    assert tested == sorted(tested, reverse=True), "nothing is tested after what did not pass"
    assert all(test["passed"] for test in sequence[: sum(tested) - 1])
    kinds = {row["kind"] for row in report["latency"][0]["rows"]}
    assert kinds >= {"dense", "adaptive"}
    own = [one for one in report["candidates"] if one["own"]]
    assert [one["method"] for one in own] == ["threshold"], "the checkpoint's own is one of them"


@pytest.mark.slow
def test_the_same_again_measures_nothing(gone, quick):
    found, _ = gone
    said: list[str] = []
    before = {path.name for path in (found.output / "measured").iterdir()}
    again = asvit_deploy.tune("default", output=found.output, max_drop=40, say=said.append, **FEW)
    assert again.report["measurements"]["new"] == 0
    assert {path.name for path in (found.output / "measured").iterdir()} == before
    assert any("were taken up" in line for line in said)
    assert again.verdict == found.verdict
    assert sidecar.read(again.model)["sha256"] == sidecar.read(found.model)["sha256"]


@pytest.mark.slow
def test_a_smaller_demand_is_not_shown_and_a_no_go_takes_the_model_away(gone, quick, cli):
    """The measurements of the go are taken up; 24 pictures show nothing of half a point."""
    found, _ = gone
    result = cli("tune", "--ckpt", "default", "--images", "digits", "--methods", "topk",
                 "--runtime", "onnxruntime", "--precision", "float32", "--limit", "48",
                 "-o", found.output)  # fmt: skip
    assert result.code in (3, 4)
    verdict = json.loads((found.output / "tune.json").read_text())["verdict"]
    assert verdict["exit_code"] == result.code
    assert f"verdict: {verdict['sentence']}" in result.out
    assert verdict["why"] in ("more_pictures", "nothing_meets_the_demand")
    assert verdict["nearest"] is not None
    model = found.output / f"{NAME}.tuned.onnx"
    stays = result.code == 4  # a no go alone takes it away
    assert model.exists() == choice_path(model).exists() == stays
    assert bool(list(found.output.glob("*.safetensors"))) == stays


@pytest.fixture
def few_pictures(tmp_path):
    """Sixteen digits as files."""
    from asvit_deploy.data.digits import write_placements

    write_placements(tmp_path / "pictures", 16)
    return tmp_path / "pictures"


def run(cli, *args: object):
    return cli("tune", "--ckpt", "default", "--runtime", "onnxruntime", "--precision", "float32",
               "--methods", "topk", *args)  # fmt: skip


@pytest.mark.slow
def test_minutes_that_are_too_few_are_said_and_measurements_stay(cli, few_pictures):
    result = run(cli, "--images", few_pictures, "--minutes", "0.0001", "--json")
    assert result.code == 4
    report = json.loads(result.out)
    assert report["verdict"]["why"] == "out_of_time"
    assert "--minutes 0.0001" in report["verdict"]["sentence"]
    assert Path(f"{NAME}.tune/tune.json").is_file()


BAD = [
    (["--max-drop", "0"], "max_drop is 0"),
    (["--max-drop", "100"], "max_drop is 100"),
    (["--min-cosine", "1"], "min_cosine is 1"),
    (["--minutes", "0"], "minutes is 0"),
    (["--minutes", "nan"], "minutes is nan"),
    (["--batch", "0"], "batch has '0'"),
    (["--batch", "1,x"], "batch has 'x'"),
    (["--batch", "9"], "batch has 9, and 8 pictures judge"),
    (["--precision", "fp8"], "precision has 'fp8'"),
    (["--precision", "fp16", "--runtime", "onnxruntime"], "fp16 is run by tensorrt"),
    (["--runtime", "cuda"], "runtime has 'cuda'"),
    (["--runtime", "torch", "--precision", "int8"], "int8 is run by onnxruntime"),
    (["--methods", "magic"], "methods='magic'"),
    (["--limit", "15"], "15 pictures"),
    (["--labels"], "class folder"),
    (["--threads", "4096"], "threads is 4096"),
]


@pytest.mark.parametrize(("more", "words"), BAD, ids=lambda one: str(one)[:30])
def test_bad_input_is_one_line_and_leaves_nothing(cli, few_pictures, more, words):
    result = cli("tune", "--ckpt", "default", "--images", few_pictures, *more)
    refused(result, words)
    assert not Path(f"{NAME}.tune").exists()


@pytest.mark.parametrize(
    "more",
    [["--runtime", "tensorrt"], ["--precision", "fp16"], ["--runtime", "onnxruntime,tensorrt"]],
)
def test_engines_that_are_named_where_there_is_no_gpu(cli, few_pictures, monkeypatch, more):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = cli("tune", "--ckpt", "default", "--images", few_pictures, *more)
    refused(result, "tensorrt", "NVIDIA GPU", "or leave it out")
    assert not Path(f"{NAME}.tune").exists()


def test_no_pictures_one_picture_and_all_alike(cli, tmp_path):
    place = tmp_path / "a"
    place.mkdir()
    refused(run(cli, "--images", place), "holds no picture")
    Image.new("RGB", (56, 56), (9, 80, 3)).save(place / "0.png")
    refused(run(cli, "--images", place), "1 picture of", "at least 16")
    for i in range(1, 20):
        (place / f"{i}.png").write_bytes((place / "0.png").read_bytes())
    refused(run(cli, "--images", place), "20 were found, 1 of them distinct")


def test_a_folder_of_others_files_is_refused(cli, few_pictures, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    refused(run(cli, "--images", few_pictures, "-o", out), "thesis.txt", "--force")
    (tmp_path / "file").write_text("")
    refused(run(cli, "--images", few_pictures, "-o", tmp_path / "file"), "is a file")
    refused(run(cli, "--images", few_pictures, "-o", tmp_path / "no" / "where"), "does not exist")
    below = tmp_path / "file" / "a" / "b"
    refused(run(cli, "--images", few_pictures, "-o", below), f"{tmp_path / 'file'} is no folder")
    (tmp_path / "link").symlink_to("nowhere")
    refused(run(cli, "--images", few_pictures, "-o", tmp_path / "link"), "is a link to nothing")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (out / "thesis.txt").rename(out / "measured")
    refused(run(cli, "--images", few_pictures, "-o", out), "measured is no folder")


def test_a_folder_that_was_there_stays_though_nothing_comes_into_it(tmp_path):
    for there in (True, False):
        folder = tmp_path / "out"
        if there:
            folder.mkdir()
        with Place(folder, "m").claimed(False, ()):
            assert (folder / "measured").is_dir()
        assert folder.exists() == there
        assert not list(folder.glob("*"))
        if there:
            folder.rmdir()


@pytest.mark.slow
def test_a_full_disk_is_one_line(few_pictures, tmp_path):
    """No file may be larger than what a graph of this network takes."""
    code = "from asvit_deploy.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "tune",
        "--ckpt",
        "default",
        "--images",
        few_pictures,
        *["--runtime", "onnxruntime", "--precision", "float32", "--methods", "topk"],
    ]
    size = 400_000
    done = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert "cannot write" in line
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.slow
def test_the_choice_of_another_machine_is_refused(gone, quick, monkeypatch):
    found, _ = gone
    asvit_deploy.tune("default", output=found.output, max_drop=40, **FEW)
    artefact = OnnxArtefact(found.output / f"{NAME}.tuned.onnx")
    monkeypatch.setattr("asvit_deploy.artefacts.runtime_choice.cpu_name", lambda: "another")
    raises_one_line(lambda: read_choice(artefact), "another machine")


@pytest.mark.slow
def test_embeddings_are_judged_by_cosine_and_neighbour(quick, tmp_path):
    """A CLIP-shaped network on photographs; 24 cosines show a mean of 0 or more."""
    found = asvit_deploy.tune(
        written(tmp_path, "clip", dense=True), limit=48, methods="size-passing", min_cosine=0.0,
        runtime="onnxruntime", output=tmp_path / "out",
    )  # fmt: skip
    report = found.report
    assert report["demand"]["task"] == "embeddings"
    assert report["demand"]["min_cosine"] == 0.0
    first = report["sequence"][0]
    assert first["passed"]
    assert 0 <= first["neighbour"] <= 1
    assert first["agreement_low"] <= first["agreement"] <= first["agreement_high"] <= 1
    assert not any(one["own"] for one in report["candidates"]), "the checkpoint is dense"
    assert {"float32", "int8"} <= {test["precision"] for test in report["sequence"]}
    assert found.verdict["why"] in ("adaptive_wins", "dense_as_fast", "dense_int8_wins")
    assert (found.model is None) == (not found.go)


@pytest.mark.slow
def test_labels_judge_accuracy(quick, tmp_path):
    found = asvit_deploy.tune("default", output=tmp_path / "out", max_drop=45, labels=True, **FEW)
    first = found.report["sequence"][0]
    assert {"worse", "better", "changed"} <= set(first)
    assert first["loss"] == pytest.approx(100 * (first["worse"] - first["better"]) / 24)
    assert found.report["pictures"]["labelled"]


@pytest.mark.slow
def test_a_runtime_that_crashes_ends_its_rows_and_the_run_goes_on(quick, tmp_path, monkeypatch):
    package = tmp_path / "fake" / "openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os, signal\ndef Core():\n    os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    rest = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), rest]))
    more = {**FEW, "runtime": "onnxruntime,openvino"}
    found = asvit_deploy.tune("default", output=tmp_path / "out", max_drop=40, **more)
    (timing,) = found.report["latency"]
    assert {row["runtime"] for row in timing["rows"]} == {"onnxruntime"}
    assert any("openvino" in note and "SIGSEGV" in note for note in timing["notes"])
    assert found.go


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where engines run")
def test_engines_that_do_not_run_end_their_rows_and_the_run_goes_on(
    quick, rtx, tmp_path, monkeypatch
):  # fmt: skip
    """As on a machine whose GPU cannot run what was built for it."""
    monkeypatch.setattr(trt_plan, "why_not", lambda: None)
    monkeypatch.setattr(engines, "_targets", lambda flavour: ("86",))
    said: list[str] = []
    more = {**FEW, "runtime": "onnxruntime,tensorrt", "precision": "float32,fp16"}
    found = asvit_deploy.tune("default", output=tmp_path / "out", max_drop=40, say=said.append,
                              **more)  # fmt: skip
    report = found.report
    assert report["runtimes"] == ["onnxruntime", "tensorrt"]
    assert report["precisions"] == ["float32", "float32 engine", "fp16 engine"]
    built = [line for line in said if line.startswith("built tensorrt, dense")]
    assert len(built) == 2, "each once, and none of what cannot be judged"
    for precision in ("float32 engine", "fp16 engine"):
        words = f"no {precision} of tensorrt, dense"
        assert any(words in note and "NVIDIA GPU" in note for note in report["notes"])
        assert precision not in report["dense_precisions"]
    (timing,) = report["latency"]
    assert {row["runtime"] for row in timing["rows"]} == {"onnxruntime"}
    assert any("no rows of tensorrt, dense" in note for note in timing["notes"])
    assert found.go
    assert read_choice(OnnxArtefact(found.model, find_op_library(None))).fields["runtime"] == (
        "onnxruntime"
    )


@pytest.mark.slow
def test_batches_are_timed_and_the_first_decides(quick, tmp_path):
    found = asvit_deploy.tune("default", output=tmp_path / "out", max_drop=40, batch="4,1", **FEW)
    first, second = found.report["latency"]
    assert (first["batch"], second["batch"]) == (4, 1)
    assert any(row["singly"] for row in first["rows"])
    assert found.promise is not None
    assert found.promise["batch"] == 4
    fields = sidecar.read(found.model)
    assert any(row["packed"] for row in first["rows"])
    winner = found.verdict["winner"]
    size = "1" if "one at a time" in winner else "packed" if "packed" in winner else "dynamic"
    assert fields["batch"] == size
    assert read_choice(OnnxArtefact(found.model)).fields["batch"] == 4
