"""Engines against each other: what needs no GPU of it, and the refusal where there is none."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import refused

from asvit_deploy import files, sidecar
from asvit_deploy.artefacts.engine_file import EngineArtefact
from asvit_deploy.artefacts.opening import engines_of, open_artefact
from asvit_deploy.cli import bench
from asvit_deploy.data.images import open_images
from asvit_deploy.engine.bucketed import build_bucketed
from asvit_deploy.engine.build import Options, build_engine
from asvit_deploy.engine.source import open_source
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation import engine_bench
from asvit_deploy.evaluation.engine_bench import EngineVariant
from asvit_deploy.ops import trt_library
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.tensorrt import Times
from asvit_deploy.runners.trt_plan import Allowed, load_plan, plugin_for

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def engine(rtx, trt_plugin, mini_artifacts, tmp_path, monkeypatch):
    """A real engine of the small model beside its ONNX file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    onnx = tmp_path / "mini.onnx"
    for path in (mini_artifacts["1", "auto"], sidecar.sidecar_path(mini_artifacts["1", "auto"])):
        (tmp_path / path.name.replace("mini_1_auto", "mini")).write_bytes(path.read_bytes())
    output = tmp_path / "mini.fp16.engine"
    options = Options("fp16", plugin=trt_plugin, target_sms=("86",), checked=False)
    build_engine(open_source(onnx), output, rtx, options)
    return output


def clocked(runner):
    """A real runner on the CPU under the bench's clocks."""

    def timed(image):
        start = time.perf_counter()
        runner.infer(image)
        took = (time.perf_counter() - start) * 1e3
        return Times(took, took / 2, took)

    return timed


def test_measure_summarise_and_verdict(mini_artifacts, mini, photos):
    fast = OrtRunner(mini_artifacts["1", "auto"], record=False)

    def twice(image):
        first, second = clocked(fast)(image), clocked(fast)(image)
        return Times(first.gpu + second.gpu, first.enqueue, first.wall + second.wall)

    variants = [EngineVariant("dynamic", "adaptive", clocked(fast)),
                EngineVariant("dense", "dense", twice)]  # fmt: skip
    seen = []
    times = engine_bench.measure(variants, list(photos), 2, 24, progress=lambda: seen.append(1))
    assert len(seen) == 26
    assert (times["dynamic"]["wall"] > 0).all()
    rows = engine_bench.summarise(variants, times)
    assert "speedup" not in rows[1]
    gain = rows[0]["speedup"]
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert gain["value"] == pytest.approx(
        rows[1]["wall_ms"]["p50"] / rows[0]["wall_ms"]["p50"], rel=1e-6
    )
    # Made up: a busy machine's interval may well hold 1.
    fast_rows = [{**rows[0], "speedup": {"value": 2.0, "low": 1.5, "high": 2.5}}, rows[1]]
    assert engine_bench.verdict(fast_rows).startswith("dynamic wins over the fastest dense engine")
    slow = [{**rows[0], "speedup": {"value": 0.8, "low": 0.7, "high": 0.9}}, rows[1]]
    assert engine_bench.verdict(slow).startswith("dense wins")
    assert "nothing to compare" in engine_bench.verdict(rows[1:])


def test_latency_against_kept_tokens_has_a_point_per_image():
    variants = [EngineVariant("dynamic", "adaptive", lambda image: Times(1, 1, 1)),
                EngineVariant("dense", "dense", lambda image: Times(1, 1, 1))]  # fmt: skip
    clocks = {"gpu": np.array([1.0, 2, 3, 4, 5]), "wall": np.arange(5.0)}
    kept = np.array([[9, 4], [19, 14]])
    points = engine_bench.against_kept(variants, {"dynamic": clocks, "dense": clocks}, kept)
    assert list(points) == ["dynamic"]
    assert points["dynamic"] == [{"kept": [9, 4], "gpu_ms": 3.0, "wall_ms": 2.0},
                                 {"kept": [19, 14], "gpu_ms": 3.0, "wall_ms": 2.0}]  # fmt: skip


@pytest.mark.slow
def test_peers_are_engines_of_the_same_precision(engine, tmp_path):
    opened = EngineArtefact(engine)
    photos = open_images(None, opened.config, limit=2)
    folder = tmp_path / "peers"
    folder.mkdir()
    dense = sidecar.read(engine_bench.dense_peer(opened, photos, folder))
    topk_path = engine_bench.topk_peer(opened, [90, 40, 20], folder)
    topk = sidecar.read(topk_path)
    assert (dense["mode"], dense["precision"]) == ("dense", "float16")
    assert dense["target_sms"] == topk["target_sms"] == ["86"]
    assert dense["plugin"] is topk["plugin"] is None
    assert topk_path.stat().st_size < engine.stat().st_size * 1.2, "half weights, no more"


@pytest.mark.slow
def test_an_engine_knows_where_an_engine_comes_from(engine, mini_artifacts):
    opened = EngineArtefact(engine)
    onnx = Path("mini.onnx")
    assert opened.parity == "fp16"
    assert not opened.graphs
    assert opened.built_from(onnx)
    assert opened.onnx.samefile(onnx)
    assert len(opened.reference.thresholds) == 3
    assert engines_of(Path(), onnx) == [Path("mini.fp16.engine")]


@pytest.mark.slow
def test_bundles_are_found_too(rtx, engine):
    options = Options(mode="bucketed", target_sms=("86",), checked=False, buckets=(64, 197))
    build_bucketed(open_source(Path("mini.onnx")), Path("mini.bucketed"), rtx, options)
    assert engines_of(Path(), Path("mini.onnx")) == [Path("mini.fp16.engine"),
                                                     Path("mini.bucketed")]  # fmt: skip
    opened = open_artefact(Path("mini.bucketed"))
    assert (opened.parity, opened.graphs) == ("float32", True)


@pytest.mark.slow
@no_gpu
@pytest.mark.parametrize("command", ["bench", "check"])
def test_without_a_gpu_one_line(cli, engine, command):
    refused(cli(command, engine), "mini.fp16.engine is an engine", "NVIDIA GPU",
            "or name the .onnx file")  # fmt: skip


@pytest.mark.slow
@no_gpu
def test_the_third_line_says_which_engines_it_did_not_run(cli, engine):
    result = cli("bench", "--runs", 10, "--warmup", 0, "--limit", 2, "--threads", "1", "--json")
    assert result.code == 0, result.err
    assert "not run, for want of an NVIDIA GPU that PyTorch sees: mini.fp16.engine" in result.err
    assert [report["kind"] for report in json.loads(result.out)] == ["model"]


@pytest.mark.slow
def test_the_host_twin_is_no_plugin_to_run_with(engine, tmp_path, monkeypatch):
    fields = sidecar.read(engine)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"plugin, which is not built here; run .*build-plugins"):
        plugin_for(fields, "mini.engine")
    assert plugin_for({**fields, "plugin": {**fields["plugin"], "embedded": True}}, "x") is None
    assert plugin_for({**fields, "plugin": None}, "x") is None


@pytest.mark.slow
def test_the_plugin_is_the_one_named_else_the_cache_s(engine, tmp_path, monkeypatch, capsys):
    """What the sidecar says of the one that it was built with is compared and reported."""
    ours, named = tmp_path / "libours.so", tmp_path / "libnamed.so"
    ours.write_bytes(b"ours")
    named.write_bytes(b"named")
    monkeypatch.setattr(trt_library, "find_trt_plugin", lambda: ours)
    record = {"sha256": files.sha256(ours), "embedded": False}
    fields = {**sidecar.read(engine), "plugin": record}
    assert plugin_for(fields, "first.engine") == ours
    assert capsys.readouterr().err == ""
    assert plugin_for(fields, "first.engine", Allowed(named)) == named
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"first.engine was built with another file of the plugin than {named}, which is used"
    )


@pytest.mark.slow
@no_gpu
def test_what_is_odd_in_the_folder_costs_a_line_each(cli, engine, rtx):
    """An engine of a foreign file, one without its source's file, an empty bundle, other JSON."""
    onnx.save(onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[1,8] x) => (float[1,8] y)'
        "{ y = Relu (x) }"
    ), "foreign.onnx")  # fmt: skip
    build_engine(open_source(Path("foreign.onnx")), Path("foreign.engine"), rtx, Options())
    Path("foreign.onnx").unlink()
    Path("other.engine").write_bytes(b"somebody else's")
    Path("other.engine.json").write_text("{}")
    Path("odd.bucketed").mkdir()
    said = []
    assert engines_of(Path(), Path("mini.onnx"), said.append) == [Path("mini.fp16.engine")]
    words = ["foreign.engine was built from a foreign", "other.engine.json is not a sidecar",
             "odd.bucketed holds no manifest.json"]  # fmt: skip
    assert len(said) == len(words)
    for line, word in zip(said, words):
        assert word in line
    shutil.copy("mini.onnx", "broken.onnx")
    Path("broken.onnx.json").write_text("{}")
    result = cli("bench", "--runs", 10, "--warmup", 0, "--limit", 2, "--threads", "1", "--json")
    assert result.code == 0, result.err
    for word in (*words, "not run: broken.onnx.json is not a sidecar"):
        assert word in result.err
    assert [Path(report["model"]).name for report in json.loads(result.out)] == ["mini.onnx"]
    refused(cli("bench", "odd.bucketed"), "odd.bucketed holds no manifest.json")
    Path("mini.onnx.json").write_text("{}")
    refused(cli("bench"), "broken.onnx.json is not a sidecar")


def test_bucketed_has_one_clock_that_means_what_the_others_mean(capsys):
    def timed(image):
        return Times(1.0, 1.0, 2.0)

    variants = [EngineVariant("bucketed", "adaptive", timed, ("wall",)),
                EngineVariant("dense", "dense", timed)]  # fmt: skip
    times = engine_bench.measure(variants, [np.zeros((3, 2, 2), np.float32)], 0, 10)
    assert list(times["bucketed"]) == ["wall"]
    rows = engine_bench.summarise(variants, times)
    assert "gpu_ms" not in rows[0]
    points = engine_bench.against_kept(variants, times, np.array([[9, 4]]))
    assert points == {"bucketed": [{"kept": [9, 4], "wall_ms": 2.0}]}
    report = engine_bench.EngineBench(
        "x", "a", "f", "1", "float16", "bucketed", "g", 0, 10, "photos", 1, {"skipped": 0}, None,
        {"top1": 0.75, "top5": 1.0, "kl": 0.1},
        rows, points, "none", {},
    )  # fmt: skip
    bench._print_engine(report)
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-2]]
             for line in capsys.readouterr().out.splitlines() if line.startswith("|")}  # fmt: skip
    assert cells["bucketed"] == ["-", "2.000", "2.000", "2.000", "-"]
    assert cells["dense"] == ["1.000", "2.000", "2.000", "2.000", "1.000"]


@pytest.mark.slow
def test_a_dense_peer_is_built_like_the_engine(rtx, trt_plugin, mini_artifacts, tmp_path):
    options = Options("fp16", batch=(1, 2, 4), plugin=trt_plugin, target_sms=("86",), level=2,
                      workspace=512, checked=False)  # fmt: skip
    path = tmp_path / "x.engine"
    build_engine(open_source(mini_artifacts["dynamic", "auto"]), path, rtx, options)
    opened = EngineArtefact(path)
    photos = open_images(None, opened.config, limit=2)
    peer = sidecar.read(engine_bench.dense_peer(opened, photos, tmp_path))
    assert (peer["mode"], peer["level"], peer["workspace"]) == ("dense", 2, 512)
    assert peer["profile"] == opened.fields["profile"]


def test_peers_of_an_engine_keep_what_its_sidecar_says():
    fields = {"target_sms": [], "level": 4, "workspace": 64, "version_compatible": True,
              "hardware_compatible": True, "profile": None}  # fmt: skip
    options = engine_bench.peer_options(fields, "bf16")
    assert options == Options("bf16", workspace=64, level=4, version_compatible=True,
                              hardware_compatible=True, checked=False)  # fmt: skip
    assert engine_bench.peer_options({"target_sms": ["86"]}, "float32") == Options(
        target_sms=("86",), checked=False
    )


@pytest.mark.parametrize("more", [{}, {"version_compatible": True, "hardware_compatible": True}])
def test_a_plan_that_is_not_taken_costs_one_line_and_prints_nothing(rtx, capfd, more):
    trt = importlib.import_module(rtx.module)
    fields = {"flavour_version": "1.2", "target_sms": [], "plugin": None, **more}
    allowed = Allowed(engine_code=bool(more))
    with pytest.raises(UserError) as error:
        load_plan(trt, rtx, b"no plan" * 100, fields, "x.engine", allowed)
    message = str(error.value)
    assert "cannot load x.engine, which 1.2 built for the GPUs of its own list (" in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"built for SM 86, SM 89"):
        load_plan(trt, rtx, b"", {**fields, "target_sms": ["86", "89"]}, "x.engine", allowed)
    assert capfd.readouterr() == ("", "")
