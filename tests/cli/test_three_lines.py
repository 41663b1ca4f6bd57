"""The mission's three lines, and what each command says when something is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
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
from PIL import Image

from asvit_deploy import artifact


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


def refused(result, *words):
    """Exit 2, one line, no traceback, nothing on stdout."""
    assert result.code == 2, result
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert word in lines[0], lines[0]


def test_the_three_lines(cli, folder):
    first = cli("export", "--ckpt", "as_deit_s.pt")
    assert first.code == 0, first.err
    assert first.out == "as_deit_s.onnx\n"
    assert "agrees with PyTorch" in first.err
    assert artifact.read(Path("as_deit_s.onnx"))["arch"] == "as_deit_mini"

    # With TensorRT the second line builds, or refuses random weights in half precision:
    # `test_build_engine.py` sees to that.
    if not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        refused(cli("build-engine", "--fp16"), "TensorRT")

    third = cli("bench", "--runs", "10", "--warmup", "1", "--threads", "1", "--json")
    assert third.code == 0, third.err
    (report,) = json.loads(third.out)
    names = [row["name"] for row in report["rows"]]
    assert names[:4] == [
        "torch eager, dense", "torch eager, adaptive", "onnxruntime, dense",
        "onnxruntime, adaptive (function)",
    ]  # fmt: skip
    for row in report["rows"]:
        assert 0 < row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert ("speedup" in row) == row["adaptive"]
    assert report["macs"]["adaptive_gmacs"] < report["macs"]["dense_gmacs"]
    assert 0 < report["profile"][0]["both"] < 1


def test_bench_prints_a_table_and_a_verdict(cli, exported):
    result = cli("bench", "--runs", "10", "--warmup", "1", "--threads", "1", "--limit", "4",
                 "-o", "report.json")  # fmt: skip
    assert result.code == 0, result.err
    assert "| onnxruntime, dense" in result.out
    assert "verdict: " in result.out
    assert json.loads(Path("report.json").read_text())[0]["runs"] == 10


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


def test_check_fails_on_another_model(cli, exported):
    proto = onnx.load(exported)
    for tensor in proto.graph.initializer:
        if tensor.name == "threshold_1":
            value = onnx.numpy_helper.to_array(tensor) * np.float32(1.2)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    fields = artifact.read(exported)
    for key in ("schema", "sha256", "digest"):
        del fields[key]
    artifact.write(exported, proto.SerializeToString(), fields)
    result = cli("check", "--limit", "6")
    assert result.code == 1
    assert "BEYOND ROUNDING" in result.out
    assert "flipped beyond rounding" in result.err


def test_check_against_another_artefact(cli, exported, mini_artifacts):
    result = cli("check", exported, "--reference", mini_artifacts["1", "standard"], "--limit", "4")
    assert result.code == 0, result.err


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_export_without_permission(cli, folder):
    Path("closed").mkdir(mode=0o500)
    refused(cli("export", "--ckpt", "as_deit_s.pt", "-o", "closed/x.onnx"), "permission")


def test_a_model_that_disagrees_is_not_written(cli, exported, monkeypatch):
    from asvit_deploy.export import pipeline

    real = pipeline.to_onnx

    def wrong(model, batch, ops):  # a fault in the exporter: one weight differs
        proto = real(model, batch, ops)
        for tensor in proto.graph.initializer:
            if tensor.name.endswith("head.weight"):
                value = onnx.numpy_helper.to_array(tensor) * np.float32(1.5)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        return proto

    monkeypatch.setattr(pipeline, "to_onnx", wrong)
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
    command = [sys.executable, "-m", "asvit_deploy", "export", "--ckpt", "as_deit_s.pt", "--force"]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("after", [3.0, 6.0, "writing"])
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
    if exported.read_bytes() == before:
        assert artifact.read(exported)["arch"] == "as_deit_mini"
    else:  # it had finished its rename
        onnx.checker.check_model(onnx.load(exported))
    # What a killed run left behind is swept by the next one.
    process = _export_process(exported.parent)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert list(exported.parent.glob(".*.tmp")) == []
    assert artifact.read(exported)["arch"] == "as_deit_mini"


def test_export_never_replaces_its_own_checkpoint(cli, folder):
    before = Path("as_deit_s.pt").read_bytes()
    refused(
        cli("export", "--ckpt", "as_deit_s.pt", "-o", "as_deit_s.pt", "--force"), "input itself"
    )
    assert Path("as_deit_s.pt").read_bytes() == before
