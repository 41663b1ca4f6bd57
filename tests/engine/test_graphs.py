"""The graph of every mode and precision, before anything is built from it."""

from __future__ import annotations

import onnx
import pytest

from asvit_deploy.engine.graphs import make_graph
from asvit_deploy.engine.source import open_source
from asvit_deploy.errors import UserError
from asvit_deploy.ops import onnx_op
from asvit_deploy.runners.onnx_runtime import arithmetic_of, is_padded


@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
@pytest.mark.parametrize("mode", ["dynamic", "padded", "bucketed"])
def test_mode_and_precision_are_in_the_graph(mini_artifacts, mode, precision):
    source = open_source(mini_artifacts["1", "auto"])
    before = source.model.SerializeToString()
    graph = make_graph(source, mode, precision)
    assert arithmetic_of(graph) == (precision or "float32")
    assert is_padded(graph) == (mode == "padded")
    assert len(onnx_op.nodes_of(graph.graph)) == (0 if mode == "padded" else 3)
    assert (source.model.SerializeToString() == before) is True


@pytest.mark.parametrize("mode", ["dynamic", "bucketed"])
def test_standard_ops_have_no_node_to_build_from(mini_artifacts, mode):
    source = open_source(mini_artifacts["1", "standard"])
    with pytest.raises(UserError, match=f"--ops standard, which builds no {mode} engine"):
        make_graph(source, mode, None)


@pytest.mark.parametrize(("mode", "precision"), [("padded", None), ("dynamic", "bf16")])
def test_a_foreign_file_is_built_as_it_is(tmp_path, mode, precision):
    path = tmp_path / "foreign.onnx"
    onnx.save(onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[1,8] x) => (float[1,8] y)'
        "{ y = Relu (x) }"
    ), path)  # fmt: skip
    source = open_source(path)
    assert make_graph(source, "dynamic", None) is source.model
    with pytest.raises(UserError, match=r"foreign\.onnx has no sidecar"):
        make_graph(source, mode, precision)
