"""ONNX files that ask for more than they hold: refused, or ended, and nobody waits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import EXPORTS, signed_copy
from onnx import TensorProto, helper, numpy_helper

from asvit_deploy.exporting.padded import to_padded
from asvit_deploy.runners.onnx_bounds import VOCABULARY

OPEN = (
    "from asvit_deploy.artefacts.onnx_file import OnnxArtefact; import numpy as np\n"
    "    session = OnnxArtefact(path); s = session.config.image_size\n"
    "    session.runner(None)(np.zeros((1, 3, s, s), np.float32))"
)
FOREIGN = "from asvit_deploy.engine.source import open_source; open_source(path)"


def constant(proto: onnx.ModelProto, name: str, value) -> str:
    proto.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    return name


def through(proto: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Put nodes behind the logits: from `x` to `y`, which are added to them as a zero."""
    for node in proto.graph.node:
        node.output[:] = ["logits_0" if name == "logits" else name for name in node.output]
    constant(proto, "zero", np.float32(0))
    proto.graph.node.extend([
        *nodes,
        helper.make_node("ReduceMax", ["y"], ["most"], keepdims=0),
        helper.make_node("Mul", ["most", "zero"], ["nothing"]),
        helper.make_node("Add", ["logits_0", "nothing"], ["logits"]),
    ])  # fmt: skip


def filled(proto):
    constant(proto, "shape", np.int64([50_000, 50_000]))
    through(proto, helper.make_node("ConstantOfShape", ["shape"], ["y"]))


def expanded(proto):
    constant(proto, "shape", np.int64([100_000_000, 1, 1]))
    through(proto, helper.make_node("Expand", ["logits_0", "shape"], ["y"]))


def hidden_shape(proto):
    """A shape that no inference sees: it comes of the picture."""
    constant(proto, "many", np.int64([100_000_000]))
    constant(proto, "flat", np.int64([-1]))
    through(
        proto,
        helper.make_node("NonZero", ["zero_picture"], ["found"]),
        helper.make_node("Shape", ["found"], ["count"]),
        helper.make_node("Slice", ["count", "first", "second"], ["none"]),
        helper.make_node("Add", ["many", "none"], ["shape"]),
        helper.make_node("Expand", ["one", "shape"], ["row"]),
        helper.make_node("Concat", ["row"] * 100, ["y"], axis=0),
    )
    constant(proto, "first", np.int64([1]))
    constant(proto, "second", np.int64([2]))
    constant(proto, "one", np.float32([1]))
    proto.graph.node.insert(0, helper.make_node("Sub", ["images", "images"], ["zero_picture"]))


def multiplied(proto, picture: bool = False):
    """Matrices of a size that no inference sees, as constants or of the picture's making."""
    constant(proto, "root", np.float32([77.5] * 2))
    constant(proto, "unit", np.float32([[1]]))
    constant(proto, "none", np.float32(0))
    nodes = [
        helper.make_node("Mul", ["root", "root"], ["square"]),
        helper.make_node("ReduceMax", ["images"], ["brightest"], keepdims=0),
        helper.make_node("Mul", ["brightest" if picture else "none", "none"], ["nought"]),
        helper.make_node("Add", ["square", "nought"], ["side"]),
        helper.make_node("Cast", ["side"], ["shape"], to=TensorProto.INT64),
        helper.make_node("Expand", ["unit", "shape"], ["m0"]),
        *(helper.make_node("MatMul", [f"m{i}", f"m{i}"], [f"m{i + 1}"]) for i in range(8)),
        helper.make_node("Identity", ["m8"], ["y"]),
    ]
    through(proto, *nodes)


def doubled(proto):
    nodes = [helper.make_node("Concat", [f"d{i}"] * 2, [f"d{i + 1}"], axis=0) for i in range(40)]
    through(proto, helper.make_node("Relu", ["logits_0"], ["d0"]), *nodes,
            helper.make_node("Relu", ["d40"], ["y"]))  # fmt: skip


def looped(proto):
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []),
         helper.make_tensor_value_info("go", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []),
         helper.make_tensor_value_info("w", TensorProto.FLOAT, None)],
    )  # fmt: skip
    constant(proto, "times", np.int64(2**62))
    constant(proto, "true", np.bool_(True))
    through(proto, helper.make_node("Loop", ["times", "true", "logits_0"], ["y"], body=body))


def claimed(proto):
    """An initialiser of 40 GB with no data."""
    tensor = TensorProto(name="big", data_type=TensorProto.FLOAT, dims=[100_000, 100_000])
    proto.graph.initializer.append(tensor)
    through(proto, helper.make_node("Relu", ["big"], ["y"]))


def functions(proto, levels: int = 40, loop: bool = False):
    """Each level calls the one below twice; or the last calls the first."""
    opset = [helper.make_opsetid("", 20), helper.make_opsetid("many", 1)]
    for level in range(levels):
        below = f"F{(level - 1) % levels}" if level or loop else "Relu"
        domain = "many" if level or loop else ""
        nodes = [helper.make_node(below, ["a"], ["b"], domain=domain),
                 helper.make_node(below, ["b"], ["c"], domain=domain)]  # fmt: skip
        proto.functions.append(
            helper.make_function("many", f"F{level}", ["a"], ["c"], nodes, opset)
        )
    proto.opset_import.append(helper.make_opsetid("many", 1))
    through(proto, helper.make_node(f"F{levels - 1}", ["logits_0"], ["y"], domain="many"))


def outside(proto, location="/dev/zero"):
    tensor = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[10])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    proto.graph.initializer.append(tensor)
    through(proto, helper.make_node("Relu", ["far"], ["y"]))


CHANGES = {
    "a constant of 10 GB": (filled, "ConstantOfShape"),
    "the logits a million times": (expanded, "too large"),
    "a shape that the picture decides": (hidden_shape, "cannot be run"),
    "constants that take a minute": (multiplied, "cannot be"),
    "nodes that take a minute": (lambda p: multiplied(p, picture=True), "cannot be run"),
    "rows doubled 40 times": (doubled, "too large"),
    "a loop": (looped, "Loop"),
    "a weight without its data": (claimed, ""),
    "functions that double": (functions, "nodes, functions written out"),
    "functions in a ring": (lambda p: functions(p, 3, loop=True), "calls itself"),
    "data in a device": (outside, "outside its folder"),
    "data above the folder": (lambda p: outside(p, "../../etc/passwd"), "outside its folder"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
def test_a_file_signed_again_is_refused(ends, mini_artifacts, tmp_path, kind):
    change, words = CHANGES[kind]
    path = signed_copy(mini_artifacts["1", "auto"], tmp_path / "x.onnx", change)
    said = ends(OPEN, path, 900)
    assert str(path) in said
    assert words in said


@pytest.mark.parametrize("kind", ["functions that double", "functions in a ring",
                                  "data in a device", "data above the folder"])  # fmt: skip
def test_a_foreign_file_is_bounded_where_it_can_be(ends, mini_artifacts, tmp_path, kind):
    path = signed_copy(mini_artifacts["1", "auto"], tmp_path / "x.onnx", CHANGES[kind][0])
    Path(f"{path}.json").unlink()
    said = ends(FOREIGN, path)
    assert str(path) in said
    assert CHANGES[kind][1] in said


def test_a_graph_that_ends_the_process_ends_a_child(monkeypatch):
    """A fault in ONNX Runtime, or in the library, is one line."""
    from asvit_deploy.runners import onnx_trial

    monkeypatch.setattr(onnx_trial, "_CODE", "import os; os.kill(os.getpid(), 11)")
    assert onnx_trial.failure(b"", None, 1) == (True, "loading it ends the process (SIGSEGV)")


def test_data_in_a_pipe_is_not_waited_for(ends, mini_artifacts, tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    path = signed_copy(
        mini_artifacts["1", "auto"], tmp_path / "x.onnx", lambda p: outside(p, "pipe")
    )
    Path(f"{path}.json").unlink()
    assert "no regular file" in ends(FOREIGN, path)


def test_a_length_of_nothing_does_not_stand_for_all_of_a_file(ends, mini_artifacts, tmp_path):
    def far(proto):
        outside(proto, "w.bin")
        proto.graph.initializer[-1].external_data.add(key="length", value="0")

    with open(tmp_path / "w.bin", "wb") as file:
        file.truncate(1 << 36)
    path = signed_copy(mini_artifacts["1", "auto"], tmp_path / "x.onnx", far)
    Path(f"{path}.json").unlink()
    assert "keeps more than 2 GiB in other files" in ends(FOREIGN, path)


def test_a_file_of_more_than_any_is_not_read(ends, tmp_path):
    with open(tmp_path / "x.onnx", "wb") as file:
        file.truncate(1 << 40)
    assert "more than 2 GiB" in ends(FOREIGN, tmp_path / "x.onnx")


@pytest.mark.slow
def test_export_writes_no_op_outside_the_vocabulary(mini, mini_artifacts):
    from asvit_deploy.exporting.to_onnx import OPSETS, to_onnx
    from asvit_deploy.models import build
    from asvit_deploy.models.archs import arch

    made = [onnx.load(mini_artifacts[key]) for key in EXPORTS]
    made += [to_padded(made[0]), to_onnx(mini, "dynamic", "auto", OPSETS[0])]
    small = build(arch("as_lvvit_s").at(32, 10), adaptive=True).eval()
    made += [to_onnx(small, "1"), to_onnx(small, "dynamic")]
    for proto in made:
        for body in (proto.graph, *proto.functions):
            ops = {node.op_type for node in body.node if not node.domain}
            assert ops <= VOCABULARY, ops - VOCABULARY


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("1", "auto"), ("dynamic", "auto"), ("1", "standard")])
def test_what_export_writes_is_run(ends, mini_artifacts, kind):
    assert ends(OPEN, mini_artifacts[kind]) == "fine"
