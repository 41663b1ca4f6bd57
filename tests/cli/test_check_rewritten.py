"""`check --reference ORIGINAL MODIFIED`: files that another tool made from an artefact of ours."""

from __future__ import annotations

import json
import shutil

import onnx
import pytest
from conftest import refused
from onnx import numpy_helper

from asvit_deploy import sidecar


@pytest.fixture
def original(mini_artifacts):
    return mini_artifacts["1", "auto"]


def rewritten(source, target, change=lambda proto: None):
    """A copy without sidecar and metadata, as most tools leave it."""
    proto = onnx.load(source)
    del proto.metadata_props[:]
    change(proto)
    onnx.save(proto, target)
    return target


@pytest.mark.slow
def test_metadata_and_sidecar_lost(cli, original, tmp_path):
    model = rewritten(original, tmp_path / "plain.onnx")
    result = cli("check", "--reference", original, model, "--limit", 8, "--json")
    assert result.code == 0, result.err
    assert f"{model}: it has no sidecar; preprocessing, stages and thresholds are those of " in (
        result.err
    )
    (parity,) = {json.dumps(row["parity"]) for row in json.loads(result.out)}
    assert json.loads(parity)["equal_sets"] == 8
    refused(cli("check", model), "no sidecar")


def test_changed_in_place(cli, original, tmp_path):
    model = rewritten(original, tmp_path / "here.onnx")
    shutil.copy(sidecar.sidecar_path(original), sidecar.sidecar_path(model))
    result = cli("check", "--reference", original, model, "--limit", 4)
    assert result.code == 0, result.err
    assert "its sidecar is not its own" in result.err


def test_without_the_function(cli, original, op_library, tmp_path):
    model = rewritten(original, tmp_path / "x.onnx", lambda p: p.functions.pop())
    result = cli("check", "--reference", original, model, "--limit", 4, "--library", op_library)
    assert result.code == 0, result.err


@pytest.mark.slow
def test_quantised(cli, original, tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    def bare(proto):
        del proto.graph.value_info[:]

    quantised = tmp_path / "int8.onnx"
    quantize_dynamic(
        rewritten(original, tmp_path / "x.onnx", bare), quantised, per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
    )  # fmt: skip
    result = cli("check", "--reference", original, quantised, "--limit", 12, "--json")
    assert "judged as int8" in result.err
    parity = json.loads(result.out)[0]["parity"]
    assert parity["precision"] == "int8"
    assert all(noise > 1e-3 for noise in parity["noise"]), "int8 must show"
    assert parity["equal_sets"] < 12
    assert parity["candidate_kept"] != parity["mean_kept"]
    assert parity["judged"] == 12
    assert result.code == (0 if parity["passed"] else 1)
    table = cli("check", "--reference", original, quantised, "--limit", 12).out
    assert "moved by" in table
    assert f"{parity['candidate_kept'][2] - parity['mean_kept'][2]:+.1f}" in table


def test_wrong_weights_fail(cli, original, tmp_path):
    def change(proto):
        tensor = next(t for t in proto.graph.initializer if t.name.endswith("head.weight"))
        values = numpy_helper.to_array(tensor)[::-1].copy()
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    model = rewritten(original, tmp_path / "wrong.onnx", change)
    result = cli("check", "--reference", original, model, "--limit", 4)
    assert result.code == 1
    assert "logits differ" in result.err


def test_a_moved_threshold_fails(cli, original, tmp_path):
    def change(proto):
        tensor = next(t for t in proto.graph.initializer if t.name == "threshold_1")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 2, tensor.name))

    model = rewritten(original, tmp_path / "moved.onnx", change)
    result = cli("check", "--reference", original, model, "--limit", 4)
    assert result.code == 1
    assert "tokens flipped beyond rounding" in result.err


def lost_output(proto):
    """Its value goes too, as where a tool renames it."""
    proto.graph.output.remove(next(o for o in proto.graph.output if o.name == "length_1"))
    for node in proto.graph.node:
        node.output[:] = ["other" if v == "length_1" else v for v in node.output]


def fewer_classes(proto):
    keep = onnx.helper.make_tensor("first", onnx.TensorProto.INT64, [4], [0, 1, 2, 3])
    proto.graph.initializer.append(keep)
    for node in proto.graph.node:
        node.output[:] = ["all" if v == "logits" else v for v in node.output]
    proto.graph.node.append(onnx.helper.make_node("Gather", ["all", "first"], ["logits"], axis=1))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4
    del proto.graph.value_info[:]


def larger_pictures(proto):
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64


@pytest.mark.parametrize(("change", "words"), [
    (lost_output, "has no output length_1"),
    (fewer_classes, "the reference has 10 outputs"),
    (larger_pictures, "not pictures of 56 pixels"),
])  # fmt: skip
def test_another_network_is_refused(cli, original, tmp_path, change, words):
    model = rewritten(original, tmp_path / "x.onnx", change)
    refused(cli("check", "--reference", original, model, "--limit", 4), words)


def test_no_model_is_refused(cli, original, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no model")
    refused(cli("check", "--reference", original, "x.onnx"), "x.onnx is not a whole ONNX file")
    refused(cli("check", "--reference", original, "gone.onnx"), "gone.onnx does not exist")
    refused(cli("check", "--reference", "gone.onnx", original), "gone.onnx does not exist")
