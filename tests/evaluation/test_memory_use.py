"""Memory of one way to run a model, measured for real."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from onnx import TensorProto, helper

from asvit_deploy.evaluation.memory_use import memory_use
from asvit_deploy.exporting.to_onnx import to_onnx

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
IMAGES = [np.full((3, 8, 8), 0.5, np.float32)] * 2
MIB = 1 << 18  # numbers of 4 bytes


def wide(mib):
    """A model whose tensors take so many MiB while it runs, and next to nothing else."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Slice", ["images", "from", "to"], ["one"]),
         helper.make_node("Expand", ["one", "shape"], ["big"]),
         helper.make_node("Erf", ["big"], ["changed"]),
         helper.make_node("ReduceMax", ["changed"], ["logits"], keepdims=0)],
        "g", [value("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, [])],
        [helper.make_tensor("shape", TensorProto.INT64, [4], [mib * MIB // 2, 1, 1, 1]),
         helper.make_tensor("from", TensorProto.INT64, [4], [0] * 4),
         helper.make_tensor("to", TensorProto.INT64, [4], [1] * 4)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.slow
def test_what_it_holds_while_it_runs_is_seen():
    small, large = (memory_use("onnxruntime", wide(mib), None, IMAGES) for mib in (2, 400))
    assert not isinstance(small, str), small
    assert not isinstance(large, str), large
    # Two tensors of 200 MiB; the arena takes powers of two.
    assert 380 < large["peak"] - small["peak"] < 1200
    assert abs(large["opened"] - small["opened"]) < 50, "not before it runs"


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_weights_are_seen_once_it_is_open(runtime, mini, photos):
    if runtime == "openvino":
        pytest.importorskip("openvino")
    found = memory_use(runtime, to_onnx(mini), None, [photos[0], photos[1]])
    assert not isinstance(found, str), found
    weights = sum(p.numel() * 4 for p in mini.parameters()) / 2**20
    assert weights < found["opened"] <= found["peak"] + 1


@pytest.mark.slow
def test_what_cannot_be_run_is_a_reason_in_one_line():
    model = wide(2)
    model.graph.node[2].op_type = "NoSuchOp"
    found = memory_use("onnxruntime", model, None, IMAGES)
    assert isinstance(found, str)
    assert "NoSuchOp" in found
    assert len(found.splitlines()) == 1
