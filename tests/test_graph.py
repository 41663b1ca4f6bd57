"""Surgery on graphs: what is found, what is changed, and what must stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from asvit_deploy import graph
from asvit_deploy.ops import onnx_op


@pytest.fixture
def diamond():
    """x -> a -> (b, c) -> y, a second output z from c, and a weight that nobody uses."""
    return onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 20, "gone": 1]> '
        "g (float[2,3] x) => (float[2,3] y, float[2,3] z) "
        "<float[3] w = {1, 2, 3}, float[1] unused = {5}> {"
        "a = Add (x, w) b = Relu (a) c = Neg (a) y = Mul (b, c) z = Abs (c) }"
    )


def test_notes_of_an_exporter_go_and_the_models_own_stay():
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20, "own": 1]> '
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float[2] b> "
        "{ b = Add (x, w) y = own.F (b) } "
        '<domain: "own", opset_import: ["": 20]> F (a) => (c) { c = Neg (a) }'
    )
    function = model.functions[0]
    model.metadata_props.add(key="note", value="/home/model")
    for part in (model.graph, model.graph.node[0], model.graph.value_info[0], model.graph.input[0],
                 model.graph.output[0], function, function.node[0]):  # fmt: skip
        part.metadata_props.add(key="note", value="/home/part")
        part.doc_string = "/home/doc"
    opened = graph.opened(model)
    graph.forget_notes(opened)
    clean = graph.closed(opened)
    assert [entry.value for entry in clean.metadata_props] == ["/home/model"]
    assert clean.SerializeToString().count(b"/home/") == 1
    clean.ClearField("metadata_props")
    onnx.checker.check_model(clean, full_check=True)


def named(nodes):
    return {node.op_type for node in nodes}


def test_upstream_looks_not_past_a_stop(diamond):
    whole = graph.opened(diamond).graph
    values = graph.values_of(whole)
    assert set(values) == {"x", "w", "unused", "a", "b", "c", "y", "z"}
    assert named(graph.upstream([values["y"]])) == {"Add", "Relu", "Neg", "Mul"}
    assert named(graph.upstream([values["z"]])) == {"Add", "Neg", "Abs"}
    assert named(graph.upstream([values["y"]], stop=[values["a"]])) == {"Relu", "Neg", "Mul"}
    assert graph.upstream([values["y"]], stop=[values["y"]]) == set()
    assert graph.upstream([values["x"], values["w"]]) == set()


def test_opened_and_closed_is_the_same_model(mini_artifacts):
    model = onnx.load(mini_artifacts["dynamic", "auto"])
    before = model.SerializeToString()
    again = graph.closed(graph.opened(model))
    assert model.SerializeToString() == before
    for part in ("name", "op_type", "domain", "input", "output", "attribute"):
        ours, theirs = ([getattr(n, part) for n in m.graph.node] for m in (again, model))
        assert list(map(str, ours)) == list(map(str, theirs))
    weights = [{t.name: numpy_helper.to_array(t).tobytes() for t in m.graph.initializer}
               for m in (again, model)]  # fmt: skip
    assert list(weights[0]) == list(weights[1])
    assert weights[0] == weights[1]
    assert [o.SerializeToString() for o in again.graph.output] == [
        o.SerializeToString() for o in model.graph.output
    ]
    assert [f.name for f in again.functions] == [f.name for f in model.functions]


def test_a_rewrite_leaves_the_model_alone(diamond):
    before = diamond.SerializeToString()
    copy = graph.opened(diamond)
    graph.forget_types(copy.graph)
    copy.graph.outputs.pop()
    graph.prune(copy.graph)
    result = graph.closed(copy)
    assert diamond.SerializeToString() == before
    assert [node.op_type for node in result.graph.node] == ["Add", "Relu", "Neg", "Mul"]
    assert [tensor.name for tensor in result.graph.initializer] == ["w"]
    graph.keep_standard_opset(result)
    assert [entry.domain for entry in result.opset_import] == [""]
    onnx.checker.check_model(result, full_check=True)


def test_to_take_over_is_to_have_the_name_and_the_users(diamond):
    copy = graph.opened(diamond)
    whole = copy.graph
    values = graph.values_of(whole)
    double = graph.constant(whole, ir.tensor(np.array(2, np.float32), name="two"))
    made = graph.node("Mul", [values["c"], double], "doubled")
    whole.insert_after(values["c"].producer(), made)
    graph.take_over(values["c"], made.outputs[0], "c_single", spare=[made])
    end = graph.node("Neg", [values["z"]], "z_new")
    whole.append(end)
    graph.take_over(values["z"], end.outputs[0], "z_inner", spare=[end])
    result = graph.closed(copy)
    onnx.checker.check_model(result, full_check=True)
    assert [o.name for o in result.graph.output] == ["y", "z"]
    x = np.arange(6, dtype=np.float32).reshape(2, 3) - 3
    a = x + np.array([1, 2, 3], np.float32)
    y, z = ReferenceEvaluator(result).run(["y", "z"], {"x": x})
    np.testing.assert_array_equal(y, np.maximum(a, 0) * -a * 2)
    np.testing.assert_array_equal(z, -np.abs(-a * 2))


def test_inference_goes_through_the_function_and_believes_no_file(mini_artifacts):
    model = onnx.load(mini_artifacts["1", "custom"])
    for info in model.graph.value_info:
        if info.name in ("tokens_0", "compact_0"):
            info.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    values = graph.inferred(model)
    for name in ("tokens_0", "compact_0", "scores_2", "threshold_1"):
        assert values[name].dtype == ir.DataType.FLOAT
    assert values["index_1"].dtype == ir.DataType.INT64
    assert graph.rows_of(values["tokens_0"]) == 197
    assert graph.prefix_of(values) == 1
    assert not model.functions


@pytest.mark.parametrize("key", [("1", "custom"), ("1", "auto"), ("1", "standard")])
def test_the_function_comes_and_goes(mini_artifacts, key):
    model = onnx.load(mini_artifacts[key])
    whole = graph.with_function(model)
    functions = [(f.domain, f.name) for f in whole.functions]
    assert functions == ([] if key[1] == "standard" else [(onnx_op.DOMAIN, onnx_op.OP_TYPE)])
    assert (whole is model) == (key[1] != "custom")
    bare = graph.without_function(whole)
    assert not bare.functions
    assert len(bare.graph.node) == len(model.graph.node)
    assert [len(m.functions) for m in (model, whole)] == [
        int(key[1] == "auto"), int(key[1] != "standard")
    ]  # fmt: skip


def test_what_a_model_says_of_itself(mini_artifacts):
    one, many = (onnx.load(mini_artifacts[batch, "auto"]) for batch in ("1", "dynamic"))
    assert (graph.batch_of(one), graph.batch_of(many)) == (1, None)
    assert graph.opset_of(one) == 20
    assert graph.stage_values(one, "index") == ["index_0", "index_1", "index_2"]
    assert graph.stage_values(one, "into") == []
