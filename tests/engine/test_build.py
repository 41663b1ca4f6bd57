"""Engines built by TensorRT-RTX on a machine without a GPU, through the op's compiled plugin."""

from __future__ import annotations

import onnx
import pytest
import torch
from conftest import cpu_seconds, released_format, sharpened

from asvit_deploy import sidecar as artifact
from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.engine import graphs
from asvit_deploy.engine.build import Options, build_engine
from asvit_deploy.engine.process import Outcome
from asvit_deploy.engine.source import open_source
from asvit_deploy.engine.warnings import EXPECTED, unexpected
from asvit_deploy.errors import CheckFailed, UserError
from asvit_deploy.exporting.export import export
from asvit_deploy.models.archs import arch

ALL_SMS = ("86", "89", "120")


def built(path, output, flavour, options):
    """Build, and look at what every engine must have."""
    result = build_engine(open_source(path), output, flavour, options)
    assert result.warnings == []
    assert output.stat().st_size > 500_000
    fields = artifact.read(output)
    assert fields["kind"] == "engine"
    assert fields["flavour"] == "tensorrt-rtx"
    assert fields["flavour_version"][0].isdigit()
    assert fields["source"]["sha256"] == artifact.read(path)["sha256"]
    return fields


# Random weights put tokens too close to the thresholds for the parity rule in half precision; the
# check before the build has its own tests.
@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
@pytest.mark.parametrize("batch", ["1", "dynamic"])
@pytest.mark.parametrize("mode", ["dynamic", "padded"])
def test_builds_for_every_gpu(request, rtx, mini_artifacts, tmp_path, mode, batch, precision):
    plugin = request.getfixturevalue("trt_plugin") if mode == "dynamic" else None
    options = Options(
        precision, mode, target_sms=ALL_SMS, plugin=plugin, checked=False,
        batch=(1, 4, 8) if batch == "dynamic" else None,
    )  # fmt: skip
    fields = built(mini_artifacts[batch, "auto"], tmp_path / "x.engine", rtx, options)
    assert fields["plugin_layers"] == (3 if mode == "dynamic" else 0)
    assert fields["mode"] == mode
    kind, *shape = fields["outputs"]["logits"]
    assert (kind, shape) == ("FLOAT", [1 if batch == "1" else -1, 10])
    assert fields["outputs"]["length_2"] == ["INT64", shape[0]]
    assert (
        fields["precision"] == {None: "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    )
    assert fields["target_sms"] == list(ALL_SMS)
    if batch == "dynamic":
        shapes = fields["profile"]["images"]
        assert [shape[0] for shape in shapes] == [1, 4, 8]
    if mode == "dynamic":
        assert len(fields["plugin"]["sha256"]) == 64


@pytest.mark.slow
@pytest.mark.parametrize("sm", [*ALL_SMS, "80"])
def test_builds_for_one_gpu(rtx, mini_artifacts, tmp_path, sm):
    options = Options(mode="padded", target_sms=(sm,), checked=False)
    built(mini_artifacts["1", "auto"], tmp_path / "x.engine", rtx, options)


@pytest.mark.slow
def test_function_is_not_taken_where_the_node_stands_alone(
    rtx, trt_plugin, mini_artifacts, tmp_path
):
    options = Options(plugin=trt_plugin)
    fields = built(mini_artifacts["1", "custom"], tmp_path / "x.engine", rtx, options)
    assert fields["plugin_layers"] == 3


@pytest.mark.slow
def test_embedded_plugin(rtx, trt_plugin, mini_artifacts, tmp_path):
    options = Options(plugin=trt_plugin, embed_plugin=True)
    fields = built(mini_artifacts["1", "auto"], tmp_path / "x.engine", rtx, options)
    assert fields["plugin"]["embedded"]
    assert trt_plugin.read_bytes()[:4] in (tmp_path / "x.engine").read_bytes()


@pytest.mark.slow
def test_workspace_level_and_progress(rtx, mini_artifacts, tmp_path):
    seen = []
    options = Options(mode="padded", workspace=256, level=2, checked=False)
    build_engine(
        open_source(mini_artifacts["1", "auto"]), tmp_path / "x.engine", rtx, options,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    fields = artifact.read(tmp_path / "x.engine")
    assert (fields["workspace"], fields["level"]) == (256, 2)
    assert not fields["version_compatible"]
    assert not fields["hardware_compatible"]
    phases = {phase for phase, _, _ in seen}
    assert len(phases) == 1
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2] > 1


@pytest.mark.slow
def test_padded_graph_is_checked_against_pytorch(rtx, mini_artifacts, tmp_path):
    said = []
    build_engine(
        open_source(mini_artifacts["1", "auto"]), tmp_path / "x.engine", rtx,
        Options(mode="padded", limit=16), say=said.append,
    )  # fmt: skip
    result = artifact.read(tmp_path / "x.engine")["checked"]
    assert result["passed"]
    assert (result["reference"], result["images"]) == ("PyTorch", 16)
    assert "agrees with PyTorch on 16 images" in said[-1]


@pytest.mark.slow
def test_checked_against_the_onnx_file_where_the_checkpoint_is_gone(
    rtx, mini_artifacts, tmp_path, monkeypatch
):
    source = open_source(mini_artifacts["1", "custom"])
    source.fields["source"] = {"path": "/gone/as_mini.pt", "sha256": "0"}
    build_engine(source, tmp_path / "x.engine", rtx, Options(mode="padded", limit=4))
    result = artifact.read(tmp_path / "x.engine")["checked"]
    assert result["passed"]
    assert "checkpoint is gone" in result["reference"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dynamic", "padded"])
def test_a_graph_that_disagrees_is_not_built(rtx, mini_artifacts, tmp_path, monkeypatch, mode):
    real = graphs.to_half

    def wrong(model, precision, name):  # a fault in the rewrite: one weight differs
        half = real(model, precision, name)
        tensor = next(t for t in half.graph.initializer if t.name.startswith("model.head.weight"))
        tensor.raw_data = bytes(len(tensor.raw_data))
        return half

    monkeypatch.setattr(graphs, "to_half", wrong)
    options = Options("fp16", mode, plugin=tmp_path / "unused.so", limit=4)
    with pytest.raises(CheckFailed, match=r"logits differ.*nothing was built"):
        build_engine(open_source(mini_artifacts["1", "auto"]), tmp_path / "x.engine", rtx, options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_dense_model_needs_no_plugin(rtx, mini_checkpoint, tmp_path):
    checkpoint = load_checkpoint(mini_checkpoint)
    path = tmp_path / "dense.onnx"
    export(checkpoint, path, open_images(None, checkpoint.config, limit=2), dense=True)
    fields = built(path, tmp_path / "x.engine", rtx, Options("fp16", limit=16))
    assert (fields["mode"], fields["plugin"]) == ("dense", None)
    assert fields["checked"]["passed"]


def test_foreign_model_is_built_as_it_is(rtx, tmp_path):
    path = tmp_path / "foreign.onnx"
    onnx.save(onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[B,8] x) => (float[B,8] y)'
        "{ y = Relu (x) }"
    ), path)  # fmt: skip
    result = build_engine(open_source(path), tmp_path / "x.engine", rtx, Options(batch=(1, 2, 3)))
    assert result.fields["mode"] == "foreign"
    assert result.fields["profile"] == {"x": ((1, 8), (2, 8), (3, 8))}
    assert (tmp_path / "x.engine").stat().st_size > 1000


def test_warnings_beyond_the_list_are_shown_once():
    known = "ModelImporter.cpp:1303: Make sure output length_0 has Int64 binding."
    outcome = Outcome(warnings=[known, "something new", known, "something new"])
    assert unexpected(outcome.warnings) == ["something new"]
    assert all(reason for _, reason in EXPECTED)


@pytest.fixture(scope="session")
def small_artifact(tmp_path_factory):
    """A whole AS-DeiT-S, random weights."""
    config = arch("as_deit_small")
    folder = tmp_path_factory.mktemp("small")
    pictures = open_images(None, config, limit=2)
    torch.save(released_format(sharpened(config, pictures)), folder / "as_deit_s.pt")
    path = folder / "as_deit_s.onnx"
    export(load_checkpoint(folder / "as_deit_s.pt"), path, pictures)
    return path


@pytest.mark.slow
def test_as_deit_s_in_fp16_takes_seconds(rtx, trt_plugin, small_artifact, tmp_path):
    options = Options("fp16", plugin=trt_plugin, target_sms=("86",), checked=False)
    start = cpu_seconds()
    fields = built(small_artifact, tmp_path / "x.engine", rtx, options)
    assert cpu_seconds() - start <= 30, "of processor time; ten seconds on a quiet machine"
    assert fields["plugin_layers"] == 3


def test_options_of_the_other_flavour_are_refused(rtx, mini_artifacts, tmp_path):
    source = open_source(mini_artifacts["1", "auto"])
    wrong = {
        "--layers": Options(layers=tmp_path / "layers.json"),
        "--version-compatible": Options(version_compatible=True),
        "--hardware-compatible": Options(hardware_compatible=True),
    }
    for name, options in wrong.items():
        with pytest.raises(UserError, match=f"{name} needs --flavour tensorrt;"):
            build_engine(source, tmp_path / "x.engine", rtx, options)
