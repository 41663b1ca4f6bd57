"""The exported graph: what it computes, and how it is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import EXPORTS, sharpened
from onnx import numpy_helper

import asvit_deploy
from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.ops import onnx_op
from asvit_deploy.parity import compare
from asvit_deploy.runners.onnx_runtime import OrtRunner, load_model
from asvit_deploy.runners.pytorch import TorchRunner


@pytest.fixture
def pictures(photos):
    return [photos[i] for i in range(len(photos))]


@pytest.mark.slow
@pytest.mark.parametrize("key", [("1", "auto"), ("dynamic", "auto"), ("1", "standard")])
@pytest.mark.parametrize("batch", [1, 5])
def test_same_tokens_and_logits_as_pytorch(mini, mini_artifacts, photos, pictures, key, batch):
    runner = OrtRunner(mini_artifacts[key])
    result = compare(
        TorchRunner(mini), runner, pictures, photos.names, mini.threshold_values(), batch=batch
    )
    assert result.failures == []
    assert result.images == len(pictures)
    assert len({round(k) for k in result.mean_kept}) == 3, "the stages should keep different counts"


def test_lengths_vary_between_images(mini_artifacts, pictures):
    runner = OrtRunner(mini_artifacts["1", "auto"])
    lengths = {tuple(int(n[0]) for n in runner(image[None]).lengths) for image in pictures}
    assert len(lengths) > len(pictures) // 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("threshold", [1e9, 1e-12])
def test_one_or_all_tokens_stay(mini, photos, pictures, stage, threshold):
    # One token: nothing passes, the best stays. All: the stage changes nothing.
    torch.manual_seed(0)
    model = build(mini.config).eval()
    model.load_state_dict(mini.state_dict())
    with torch.no_grad():
        model.thresholds[stage].fill_(threshold)
    proto = to_onnx(model)
    result = compare(
        TorchRunner(model), OrtRunner(proto), pictures[:3], photos.names, model.threshold_values()
    )
    assert result.failures == []
    before = [mini.config.image_tokens, *result.mean_kept][stage]
    assert before > 1
    for kept in (result.mean_kept[stage], result.candidate_kept[stage]):
        assert kept == (1 if threshold > 1 else before)


def test_form_of_the_file(mini_artifacts):
    path = mini_artifacts["1", "auto"]
    proto = onnx.load(path, load_external_data=False)
    assert proto.ir_version == 9  # the lowest at opset 20: ONNX Runtime 1.17 reads it
    assert {o.domain: o.version for o in proto.opset_import}[""] == 20
    assert {o.domain: o.version for o in proto.opset_import}["asvit"] == 1
    assert [f.name for f in proto.functions if f.domain == "asvit"] == ["ThresholdCompact"]
    assert not any(t.data_location for t in proto.graph.initializer), "weights outside the file"
    assert [i.name for i in proto.graph.input] == ["images"]
    outputs = [o.name for o in proto.graph.output]
    assert outputs == ["logits", "length_0", "length_1", "length_2"]
    for stage, node in enumerate(onnx_op.nodes_of(proto.graph)):
        attributes = {a.name: a.s for a in node.attribute}
        assert attributes == {"plugin_version": b"1", "plugin_namespace": b""}
        assert list(node.input) == [f"{name}_{stage}" for name in onnx_op.INPUTS]
        assert list(node.output) == [f"{name}_{stage}" for name in onnx_op.OUTPUTS]


def test_no_path_of_this_machine_is_in_a_file(mini_artifacts):
    places = {Path(asvit_deploy.__file__).parents[1], Path(torch.__file__).parents[1], Path.home()}
    for key in EXPORTS:
        path = mini_artifacts[key]
        data = path.read_bytes()
        for trace in (*(str(place) for place in places), "site-packages", "stack_trace", ".py"):
            assert trace.encode() not in data, f"{path.name} holds {trace}"


_EXPORT = """
import sys
from pathlib import Path
from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.exporting.to_onnx import to_onnx
model = build_model(load_checkpoint(sys.argv[1]))
Path(sys.argv[2]).write_bytes(to_onnx(model, ops="standard").SerializeToString())
"""


@pytest.mark.slow
def test_the_same_bytes_wherever_the_package_lies(mini_checkpoint, tmp_path):
    package = Path(asvit_deploy.__file__).parent
    shutil.copytree(package, tmp_path / "else where" / package.name,
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    places = [str(tmp_path / "else where"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    other = tmp_path / "other.onnx"
    done = subprocess.run([sys.executable, "-c", _EXPORT, mini_checkpoint, other],
                          env=environment, cwd=tmp_path, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    own = to_onnx(build_model(load_checkpoint(mini_checkpoint)), ops="standard")
    assert other.read_bytes() == own.SerializeToString()


@pytest.mark.parametrize("key", [("1", "auto"), ("dynamic", "auto"), ("1", "standard")])
def test_no_zero_placeholder_in_a_reshape(mini_artifacts, key):
    proto = onnx.load(mini_artifacts[key])
    reshapes = [node for node in proto.graph.node if node.op_type == "Reshape"]
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert reshapes
    for node in reshapes:
        assert {a.name: a.i for a in node.attribute}["allowzero"] == 1
        assert 0 not in constants.get(node.input[1], [])


def test_variants_of_the_op(mini_artifacts):
    standard = onnx.load(mini_artifacts["1", "standard"])
    assert {node.domain for node in standard.graph.node} == {""}
    assert not standard.functions
    custom = onnx.load(mini_artifacts["1", "custom"])
    assert len(onnx_op.nodes_of(custom.graph)) == 3
    assert not any(f.domain == "asvit" for f in custom.functions)


@pytest.mark.slow
def test_equal_thresholds_stay_apart(mini):
    model = build(mini.config).eval()
    with torch.no_grad():
        for threshold in model.thresholds:
            threshold.fill_(0.004)
    proto = to_onnx(model)
    names = [node.input[2] for node in onnx_op.nodes_of(proto.graph)]
    assert names == ["threshold_0", "threshold_1", "threshold_2"]
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    assert [float(values[name]) for name in names] == pytest.approx([0.004] * 3)


@pytest.mark.slow
def test_dense_twin_has_no_stage(mini, pictures):
    model = build(mini.config, adaptive=False).eval()
    proto = to_onnx(model)
    assert [o.name for o in proto.graph.output] == ["logits"]
    expected = TorchRunner(model)(pictures[0][None]).output
    actual = OrtRunner(proto)(pictures[0][None]).output
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["1", "dynamic"])
@pytest.mark.parametrize(("name", "size"), [("as_lvvit_s", 224), ("as_deit_small", 384)])
def test_other_families_and_sizes(name, size, batch):
    # Five blocks and three stages of the real widths: the graph's form without the wait.
    config = replace(arch(name), depth=5, stages=(2, 3, 4), num_classes=20).at(size)
    images = open_images(None, config, limit=3)
    model = sharpened(config, images)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    result = compare(
        TorchRunner(model),
        OrtRunner(to_onnx(model, batch)),
        [images[i] for i in range(3)],
        images.names,
        model.threshold_values(),
        batch=3 if batch == "dynamic" else 1,
    )
    assert result.failures == []


def test_graph_names_survive_inlining(mini_artifacts):
    names = {o for n in load_model(mini_artifacts["1", "standard"]).graph.node for o in n.output}
    assert {f"{name}_{s}" for name in ("scores", "compact", "index") for s in range(3)} <= names
