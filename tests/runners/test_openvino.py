"""OpenVINO: every kind of file of ours against PyTorch, its own precisions, and what is refused."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from conftest import raises_one_line
from onnx import TensorProto, helper

from asvit_deploy.exporting.half import to_half
from asvit_deploy.exporting.padded import to_padded
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build
from asvit_deploy.ops import onnx_op
from asvit_deploy.ops.cases import CASES
from asvit_deploy.ops.reference import threshold_compact
from asvit_deploy.parity import compare
from asvit_deploy.processor import usable_cores
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.runners import openvino
from asvit_deploy.runners.openvino import OpenVinoRunner
from asvit_deploy.runners.pytorch import TorchRunner

here = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None,
    reason="openvino is not installed (scripts/setup cpu,openvino,train,dev)",
)


@pytest.fixture(scope="module")
def dense(mini_config):
    return build(mini_config, adaptive=False).eval()


@pytest.fixture(scope="module")
def exported(mini):
    return to_onnx(mini)


def agrees(network, runner, photos, batch=1, precision="float32"):
    stages = network.threshold_values() or [None] * runner.stages
    found = compare(
        TorchRunner(network), runner, [photos[i] for i in range(8)], photos.names, stages,
        precision, batch,
    )  # fmt: skip
    assert found.failures == []
    return found


@here
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("ops", ["auto", "standard"])
@pytest.mark.slow
def test_thresholds_keep_the_same_tokens(mini, photos, batch, ops):
    proto = to_onnx(mini, "dynamic" if batch > 1 else "1", ops)
    runner = OpenVinoRunner(proto)
    found = agrees(mini, runner, photos, batch)
    assert found.equal_sets == 8
    assert len({float(n) for n in np.ravel(found.mean_kept)}) > 1
    assert runner.learns_shapes
    if batch > 1:  # and one picture at a time
        assert agrees(mini, runner, photos).equal_sets == 8


@here
def test_dense(dense, photos):
    runner = OpenVinoRunner(to_onnx(dense))
    agrees(dense, runner, photos)
    assert not runner.learns_shapes
    assert runner.describe()["op"] == "none"


@here
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 8])
def test_padded_rows_stay(mini, photos, batch):
    runner = OpenVinoRunner(to_padded(to_onnx(mini, "dynamic" if batch > 1 else "1")))
    assert agrees(mini, runner, photos, batch).equal_sets == 8
    assert not runner.learns_shapes


@here
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_half_files_are_run_in_float32(mini, photos, exported, kind):
    agrees(mini, OpenVinoRunner(to_half(exported, kind)), photos, precision=kind)


@here
@pytest.mark.parametrize("batched", [False, True])
def test_every_case_of_the_op_nan_among_them(batched):
    """To OpenVINO NaN is greater than any number."""
    core = openvino._core()
    compiled = {}
    for case in CASES:
        if len(case.tokens) > 1 and not batched:
            continue
        if case.prefix not in compiled:
            proto = op_alone(batched, case.prefix)
            compiled[case.prefix] = core.compile_model(
                core.read_model(proto.SerializeToString()), "CPU",
                {"INFERENCE_PRECISION_HINT": "f32"},
            )  # fmt: skip
        for threshold in (case.threshold, np.nan, -np.inf):
            given = [case.tokens, case.scores, np.array(threshold, np.float32)]
            made = list(compiled[case.prefix](given).values())
            wanted = threshold_compact(case.tokens, case.scores, threshold)
            for got, expected in zip(made, wanted):
                if np.ndim(got) or np.ndim(expected):
                    assert np.array_equal(got, expected), (case.name, threshold)


def op_alone(batched, prefix):
    info, whole, number = helper.make_tensor_value_info, TensorProto.INT64, TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(onnx_op.OP_TYPE, onnx_op.INPUTS, onnx_op.OUTPUTS, domain=onnx_op.DOMAIN)],
        "op",
        [info("tokens", number, [None] * 3), info("scores", number, [None] * 2),
         info("threshold", number, [])],
        [info("compact", number, [None] * 3), info("index", whole, [None] * 2),
         info("length", whole, [None])],
    )  # fmt: skip
    model = helper.make_model(
        graph, functions=[onnx_op.function_body(batched, 20, prefix)], ir_version=10,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(onnx_op.DOMAIN, 1)],
    )  # fmt: skip
    return onnx.inliner.inline_local_functions(model)


@here
def test_bfloat16_only_by_name_and_said(mini, photos, exported):
    exact = OpenVinoRunner(exported)
    said = exact.describe()
    assert said["precision"] == "float32"
    assert said["precision_hint"].startswith("f32")
    if lacking := openvino.why_not("bf16"):
        assert "bfloat16" in lacking
        raises_one_line(lambda: OpenVinoRunner(exported, hint="bf16"), "bfloat16")
        pytest.skip(lacking)
    assert "its own choice here would be bf16" in said["precision_hint"]
    rough = OpenVinoRunner(exported, hint="bf16")
    assert rough.describe()["precision"] == "bfloat16"
    found = agrees(mini, rough, photos, precision="bf16")
    assert max(found.noise) > 1e-4, "it must show"
    failed = compare(
        TorchRunner(mini), rough, [photos[i] for i in range(8)], photos.names,
        mini.threshold_values(),
    ).failures  # fmt: skip
    assert failed, "as float32 it does not pass"


@here
def test_a_static_file_takes_pictures_one_by_one_and_read_only_ones(exported, photos):
    runner = OpenVinoRunner(exported)
    images = photos.batch(range(3))
    images.flags.writeable = False
    together = runner(images)
    alone = [runner(images[i : i + 1]) for i in range(3)]
    assert np.array_equal(together.output, np.concatenate([one.output for one in alone]))
    assert [len(kept) for kept in together.kept[0]] == [len(one.kept[0][0]) for one in alone]
    first = alone[0].output.copy()
    runner(images[1:2])
    assert np.array_equal(alone[0].output, first), "a prediction is not overwritten"


@here
def test_without_recording_and_warm_up(exported, photos):
    runner = OpenVinoRunner(exported, record=False)
    runner.warm_up([photos[0], photos[1]])
    made = runner(photos.batch([0]))
    assert made.kept is None
    whole = OpenVinoRunner(exported)(photos.batch([0]))
    assert [n.tolist() for n in made.lengths] == [n.tolist() for n in whole.lengths]
    assert np.abs(made.output - whole.output).max() < 1e-5


@here
def test_an_int8_file_runs(exported, photos, tmp_path):
    quantise = pytest.importorskip("onnxruntime.quantization").quantize_dynamic
    from asvit_deploy.graph import closed, forget_types, opened

    model = opened(exported)
    forget_types(model.graph)
    onnx.save(closed(model), tmp_path / "x.onnx")
    quantise(tmp_path / "x.onnx", tmp_path / "int8.onnx", op_types_to_quantize=["MatMul", "Gemm"])
    made = OpenVinoRunner(tmp_path / "int8.onnx", stages=3)(photos.batch([0]))
    exact = OpenVinoRunner(exported)(photos.batch([0]))
    error = np.abs(made.output - exact.output).max() / np.abs(exact.output).max()
    assert 1e-4 < error < 0.2


@here
def test_refusals(mini, exported, tmp_path):
    cores = usable_cores()
    raises_one_line(lambda: OpenVinoRunner(exported, threads=cores + 1),
                    f"threads is {cores + 1}; this machine has {cores} core")  # fmt: skip
    raises_one_line(lambda: OpenVinoRunner(exported, threads=-1), "threads is -1")
    raises_one_line(lambda: OpenVinoRunner(to_onnx(mini, ops="custom")), "--ops auto or standard")
    raises_one_line(lambda: OpenVinoRunner(tmp_path / "gone.onnx"), "gone.onnx does not exist")
    model = onnx.ModelProto()
    model.CopyFrom(exported)
    del model.graph.output[1]
    raises_one_line(lambda: OpenVinoRunner(model, stages=3, record=False), "no output length_0")


@here
def test_a_foreign_graph_ends_in_a_child():
    """A hundred gigabytes by a shape."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Expand", ["images", "shape"], ["big"]),
         helper.make_node("ReduceSum", ["big"], ["logits"], keepdims=0)],
        "g", [value("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, [])],
        [helper.make_tensor("shape", TensorProto.INT64, [5], [1 << 30, 1, 3, 8, 8])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    raises_one_line(lambda: OpenVinoRunner(model, foreign=True),
                    "cannot be run by OpenVINO (could not")  # fmt: skip


@here
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RANKED))
def test_fixed_counts(mini_config, photos, name):
    from asvit_deploy.budget import fixed_counts

    network = build(mini_config, adaptive=False).eval()
    network = network.with_reduction(fixed_counts(mini_config, RANKED[name], 0.7))
    runner = OpenVinoRunner(to_onnx(network), rows=(1, network.reduction.appends))
    agrees(network, runner, photos)
    assert not runner.learns_shapes


def test_missing(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    raises_one_line(lambda: OpenVinoRunner(exported), "openvino is not installed; pip install")


@here
@pytest.mark.slow
@pytest.mark.parametrize(("name", "batch"), [("size-passing", 1), ("size-passing", 8), ("tome", 1)])
def test_per_picture_counts(mini_config, photos, name, batch):
    from asvit_deploy import per_picture

    model = build(mini_config, adaptive=False).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    network = model.with_reduction(per_picture.fit(model, RANKED[name], [*photos], 0.7))
    runner = OpenVinoRunner(to_onnx(network, "dynamic" if batch > 1 else "1"))
    assert agrees(network, runner, photos, batch).equal_sets == 8
    assert runner.learns_shapes


@here
@pytest.mark.slow
def test_nothing_is_left_in_the_home_folder(exported, tmp_path):
    """OpenVINO's telemetry keeps an identifier there, as soon as it is imported."""
    home = tmp_path / "home"
    home.mkdir()
    onnx.save(exported, tmp_path / "x.onnx")
    code = (
        "import sys, numpy as np; from asvit_deploy.runners.openvino import OpenVinoRunner; "
        "r = OpenVinoRunner(__import__('pathlib').Path(sys.argv[1]), foreign=True); "
        "r.infer(np.zeros((1, 3, r.image_size, r.image_size), np.float32)); "
        "assert not any(name.startswith('openvino_telemetry') for name in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.onnx"], capture_output=True, text=True,
        env={**os.environ, "HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(home.iterdir()) == []


@here
@pytest.mark.slow
def test_static_shapes_and_one_thread_do_not_end_the_process():
    """OpenVINO 2026.4.1 generates code for the packaged network's shapes that does."""
    code = (
        "import numpy as np; from asvit_deploy.checkpoints import default_checkpoint as d; "
        "from asvit_deploy.checkpoints.load import build_model, load_checkpoint; "
        "from asvit_deploy.exporting.to_onnx import to_onnx; "
        "from asvit_deploy.runners.openvino import OpenVinoRunner; "
        "r = OpenVinoRunner(to_onnx(build_model(load_checkpoint(d()), dense=True))); "
        "r.infer(np.zeros((1, 3, r.image_size, r.image_size), np.float32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@here
@pytest.mark.slow
def test_runners_that_come_and_go_leave_signals_working(exported, tmp_path):
    """A core of OpenVINO's that ends gives back the signal stack of another that ended before it:
    Ctrl-C, or any signal that Python handles, then ended the process."""
    onnx.save(exported, tmp_path / "x.onnx")
    code = (
        "import os, signal, sys, time; from pathlib import Path; "
        "from asvit_deploy.runners.openvino import OpenVinoRunner; "
        "first, second = (OpenVinoRunner(Path(sys.argv[1])) for _ in range(2)); "
        "del first; del second; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.onnx"], capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == -signal.SIGINT, (done.returncode, done.stderr)
    assert "KeyboardInterrupt" in done.stderr
