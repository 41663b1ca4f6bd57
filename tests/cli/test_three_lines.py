"""The mission's three lines, and what each command says when something is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import refused, signed_copy
from PIL import Image

from asvit_deploy import sidecar as artifact
from asvit_deploy.errors import UserError
from asvit_deploy.runners.trt_flavour import FLAVOURS


@pytest.fixture
def folder(tmp_path, mini_checkpoint):
    """The current folder, holding a released-format checkpoint."""
    shutil.copy(mini_checkpoint, tmp_path / "as_deit_s.pt")
    return tmp_path


@pytest.fixture
def exported(folder, mini_artifacts):
    """The same folder with the artefact as `export` would leave it."""
    source = mini_artifacts["1", "auto"]
    fields = artifact.read(source)
    fields["source"] = artifact.source_of(folder / "as_deit_s.pt", format="as-vit", ema=False)
    for key in ("schema", "sha256", "digest"):
        del fields[key]
    artifact.write(folder / "as_deit_s.onnx", source.read_bytes(), fields)
    return folder / "as_deit_s.onnx"


@pytest.fixture
def no_library(tmp_path_factory, monkeypatch):
    """A cache without the op's library."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
def test_the_three_lines(cli, folder):
    first = cli("export", "--ckpt", "as_deit_s.pt")
    assert first.code == 0, first.err
    assert first.out == "as_deit_s.onnx\n"
    assert "agrees with PyTorch" in first.err
    assert artifact.read(Path("as_deit_s.onnx"))["arch"] == "as_deit_mini"

    second = cli("build-engine", "--fp16")
    if any(flavour.module for flavour in FLAVOURS.values()):
        assert second.code == 0, second.err
        assert second.out == "as_deit_s.fp16.engine\n"
        assert artifact.read(Path("as_deit_s.fp16.engine"))["plugin_layers"] == 3
    else:
        refused(second, "TensorRT")

    third = cli("bench", "--runs", "10", "--warmup", "1", "--threads", "1", "--json")
    assert third.code == 0, third.err
    (report,) = json.loads(third.out)
    # OpenVINO's rows stand between them where it is installed.
    names = [row["name"] for row in report["rows"] if row["runtime"] != "openvino"]
    assert names[:4] == [
        "torch eager, dense", "torch eager, adaptive", "onnxruntime, dense",
        "onnxruntime, adaptive (function)",
    ]  # fmt: skip
    for row in report["rows"]:
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert ("speedup" in row) == row["adaptive"]
    assert report["macs"]["adaptive_gmacs"] < report["macs"]["dense_gmacs"]
    assert 0 < report["profile"][0]["both"] < 1


@pytest.mark.slow
def test_bench_prints_a_table_and_a_verdict(cli, exported):
    result = cli("bench", "--runs", "10", "--warmup", "1", "--threads", "1", "--limit", "4",
                 "-o", "report.json")  # fmt: skip
    assert result.code == 0, result.err
    assert "| onnxruntime, dense" in result.out
    assert "verdict: " in result.out
    assert json.loads(Path("report.json").read_text())[0]["runs"] == 10


@pytest.mark.slow
def test_bench_goes_on_without_the_checkpoint(cli, exported):
    Path("as_deit_s.pt").unlink()
    result = cli("bench", "--runs", "10", "--warmup", "1", "--threads", "1", "--limit", "2")
    assert result.code == 0, result.err
    assert "no torch and no dense rows" in result.out
    assert "as_deit_s.pt" in result.out


def test_check_passes_and_says_so(cli, exported):
    result = cli("check", "--limit", "6", "--json")
    assert result.code == 0, result.err
    first, *_ = json.loads(result.out)
    assert first["parity"]["passed"]
    assert first["parity"]["equal_sets"] == 6


@pytest.mark.slow
def test_check_fails_on_another_model(cli, exported):
    def move_threshold(proto):
        for tensor in proto.graph.initializer:
            if tensor.name == "threshold_1":
                value = onnx.numpy_helper.to_array(tensor) * np.float32(1.2)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))

    signed_copy(exported, exported, move_threshold)
    result = cli("check", "--limit", "6")
    assert result.code == 1
    assert "BEYOND ROUNDING" in result.out
    assert "flipped beyond rounding" in result.err


@pytest.mark.slow
def test_check_against_another_artefact(cli, exported, mini_artifacts):
    result = cli("check", exported, "--reference", mini_artifacts["1", "standard"], "--limit", "4")
    assert result.code == 0, result.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "word"), [(["--image-size", "64"], "image_size is 64"), (["--dense"], "stages")]
)
def test_check_refuses_a_reference_of_another_network(cli, exported, option, word):
    assert cli("export", "--ckpt", "as_deit_s.pt", "-o", "other.onnx", *option).code == 0
    refused(cli("check", exported, "--reference", "other.onnx"), "other.onnx", word, "as_deit_s")
    refused(cli("check", "other.onnx", "--reference", exported), "other.onnx", word.split()[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [("arch", "as_deit_tiny"), ("num_classes", 11), ("preprocessing", {"crop_pct": 1.0})],
)
def test_check_compares_what_the_sidecars_say(cli, exported, field, value):
    signed_copy(exported, Path("other.onnx"), **{field: value})
    refused(cli("check", exported, "--reference", "other.onnx"), "other.onnx", field)


def _unloadable(path, good):
    node = onnx.helper.make_node("Magic", ["logits"], ["nothing"], domain="other")
    opset = onnx.helper.make_opsetid("other", 1)
    signed_copy(good, path, lambda p: (p.graph.node.append(node), p.opset_import.append(opset)))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path, good: shutil.copy(good, path), "no sidecar"),
        (
            lambda path, good: signed_copy(good, path, source={"path": "gone.pt", "sha256": ""}),
            "gone",
        ),
        (lambda path, good: artifact.write(path, b"", {"kind": "engine"}), "name an .onnx file"),
        (_unloadable, "cannot be loaded"),
    ],
)
def test_check_opens_all_before_it_runs_any(cli, exported, spoil, words):
    spoil(Path("second.onnx"), exported)
    result = cli("check", exported, "second.onnx", "--limit", "2")
    refused(result, "second.onnx", words)
    assert "2 images" not in result.err, "the first ran"


@pytest.mark.slow
def test_check_of_several_reports_each(cli, exported):
    signed_copy(exported, Path("second.onnx"))
    result = cli("check", exported, "second.onnx", "--limit", "2", "--json")
    assert result.code == 0, result.err
    models = [report["model"] for report in json.loads(result.out)]
    assert list(dict.fromkeys(models)) == [str(exported), "second.onnx"]


@pytest.mark.slow
def test_check_against_an_artefact_that_only_the_library_runs(cli, exported, mini_artifacts,
                                                              op_library):  # fmt: skip
    result = cli("check", exported, "--reference", mini_artifacts["1", "custom"], "--limit", "2",
                 "--library", op_library)  # fmt: skip
    assert result.code == 0, result.err


@pytest.mark.slow
@pytest.mark.parametrize(("ops", "noted"), [("auto", True), ("standard", False)])
def test_bench_names_the_library_only_where_it_helps(
    cli, folder, mini_artifacts, no_library, ops, noted
):
    signed_copy(mini_artifacts["1", ops], Path("m.onnx"))
    result = cli("bench", "--runs", "10", "--warmup", "0", "--threads", "1", "--limit", "2")
    assert result.code == 0, result.err
    assert ("build-plugins ort" in result.out) is noted


def test_predict(cli, exported):
    Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 60).save("picture.png")
    result = cli("predict", "as_deit_s.onnx", "picture.png")
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 7
    assert "kept tokens per stage" in result.out
    data = json.loads(cli("predict", "as_deit_s.onnx", "picture.png", "--json").out)
    assert sum(guess["probability"] for guess in data[0]["top"]) <= 1 + 1e-9
    assert set(data[0]["kept"][2]) <= set(data[0]["kept"][1]) <= set(data[0]["kept"][0])


def test_export_keeps_an_existing_file(cli, exported):
    before = exported.read_bytes()
    refused(cli("export", "--ckpt", "as_deit_s.pt"), "as_deit_s.onnx", "--force")
    assert exported.read_bytes() == before


@pytest.mark.slow
def test_export_refuses_a_dense_checkpoint(cli, folder, mini):
    dense = {k: v for k, v in mini.state_dict().items() if not k.startswith("thresholds")}
    torch.save({"model": dense}, "deit.pt")
    refused(cli("export", "--ckpt", "deit.pt"), "deit.pt", "calibrate", "--dense")
    assert cli("export", "--ckpt", "deit.pt", "--dense").out == "deit.dense.onnx\n"


def test_export_refuses_a_size_the_patch_does_not_divide(cli, folder):
    refused(cli("export", "--ckpt", "as_deit_s.pt", "--image-size", "57"), "57", "56")


def test_export_to_nowhere(cli, folder):
    refused(cli("export", "--ckpt", "as_deit_s.pt", "-o", "no/such/x.onnx"), "no/such", "exist")
    Path("there").mkdir()
    refused(cli("export", "--ckpt", "as_deit_s.pt", "-o", "there"), "folder")


@pytest.mark.slow
def test_export_keeps_a_file_with_the_sidecars_name(cli, folder):
    mine = Path("as_deit_s.onnx.json")
    mine.write_text("my own notes")
    refused(cli("export", "--ckpt", "as_deit_s.pt"), "as_deit_s.onnx.json exists", "--force")
    assert mine.read_text() == "my own notes"
    assert not Path("as_deit_s.onnx").exists()
    assert cli("export", "--ckpt", "as_deit_s.pt", "--force").code == 0
    assert artifact.read(Path("as_deit_s.onnx"))["arch"] == "as_deit_mini"


@pytest.mark.parametrize("name", ["x", "x.engine", "x.onnx.bak", "x.ONNX"])
def test_export_refuses_another_ending(cli, folder, name):
    refused(cli("export", "--ckpt", "as_deit_s.pt", "-o", name), name, "a name in .onnx")
    assert [path.name for path in folder.iterdir()] == ["as_deit_s.pt"]


@pytest.mark.slow
def test_a_model_that_disagrees_is_not_written(cli, exported, monkeypatch):
    from asvit_deploy.exporting import export

    real = export.to_onnx

    def wrong(*given):  # a fault in the exporter: one weight differs
        proto = real(*given)
        for tensor in proto.graph.initializer:
            if tensor.name.endswith("head.weight"):
                value = onnx.numpy_helper.to_array(tensor) * np.float32(1.5)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        return proto

    monkeypatch.setattr(export, "to_onnx", wrong)
    before = exported.read_bytes()
    result = cli("export", "--ckpt", "as_deit_s.pt", "--force")
    assert result.code == 1
    assert "does not match PyTorch" in result.err
    assert exported.read_bytes() == before
    assert artifact.read(exported)["arch"] == "as_deit_mini"


def test_several_artefacts_need_a_name(cli, exported):
    shutil.copy("as_deit_s.onnx", "other.onnx")
    shutil.copy("as_deit_s.onnx.json", "other.onnx.json")
    refused(cli("bench", "--runs", "10"), "as_deit_s.onnx", "other.onnx")


@pytest.mark.parametrize("command", ["bench", "check", "build-engine"])
def test_empty_folder(cli, command):
    refused(cli(command), "export --ckpt")


def test_foreign_onnx_without_a_sidecar(cli, exported):
    shutil.copy("as_deit_s.onnx", "foreign.onnx")
    refused(cli("check", "foreign.onnx"), "foreign.onnx", "sidecar")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.replace('"thresholds": [', '"thresholds": [9.0, '), "edited"),
        (lambda t: t[: len(t) // 2], "not a sidecar"),
        (lambda t: "[]", "not a sidecar"),
        (lambda t: t.replace('"schema": 1', '"schema": 99'), "schema 99"),
    ],
)
def test_tampered_sidecar(cli, exported, damage, words):
    sidecar = artifact.sidecar_path(exported)
    sidecar.write_text(damage(sidecar.read_text()))
    for command in ("check", "bench"):
        refused(cli(command), "as_deit_s.onnx.json", words)


def test_replaced_artefact(cli, exported):
    exported.write_bytes(exported.read_bytes() + b"\0")
    refused(cli("check"), "sha256")


def test_changed_checkpoint(cli, exported):
    Path("as_deit_s.pt").write_bytes(b"something else")
    refused(cli("check"), "as_deit_s.pt", "changed")


def test_library_that_is_none(cli, exported):
    Path("lib.so").write_text("not a library")
    refused(cli("check", "--library", "lib.so", "--limit", "2"), "lib.so", "build-plugins")
    refused(cli("check", "--library", "nowhere.so"), "nowhere.so")


def _export_process(folder: Path) -> subprocess.Popen:
    """Put a model for any batch in the place of the one for batch 1."""
    command = [sys.executable, "-m", "asvit_deploy", "export", "--ckpt", "as_deit_s.pt",
               "--batch", "dynamic", "--force"]  # fmt: skip
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "after"),
    [(signal.SIGKILL, 3.0), (signal.SIGINT, 6.0), (signal.SIGKILL, "writing")],
)
def test_killed_export_loses_nothing(exported, signum, after):
    before = exported.read_bytes()
    process = _export_process(exported.parent)
    if after == "writing":
        # As soon as a temporary file shows up, the artefact is being written.
        while process.poll() is None and not list(exported.parent.glob(".*.tmp")):
            time.sleep(0.0005)
    else:
        time.sleep(after)
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    kept = exported.read_bytes() == before
    onnx.checker.check_model(onnx.load(exported))
    try:
        found = artifact.read(exported)["batch"]
    except UserError as refusal:
        found = str(refusal)
    if "sha256 differs" in found:  # hit between the two renames
        assert not kept
    else:
        assert found == ("1" if kept else "dynamic")
    # What a killed run left behind is swept by the next one.
    process = _export_process(exported.parent)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert list(exported.parent.glob(".*.tmp")) == []
    assert artifact.read(exported)["batch"] == "dynamic"


def test_export_never_replaces_its_own_checkpoint(cli, folder):
    for name in ("odd.onnx", "new.onnx.json"):  # the output, or the sidecar of new.onnx
        shutil.copy("as_deit_s.pt", name)
        target = name.removesuffix(".json")
        refused(cli("export", "--ckpt", name, "-o", target, "--force"), name, "input itself")
        same = Path(name).read_bytes() == Path("as_deit_s.pt").read_bytes()
        assert same
