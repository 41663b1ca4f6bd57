"""`export --batch packed`: exact, cheap, and of standard nodes without a loop."""

from __future__ import annotations

import importlib.util
import json
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import raises_one_line
from onnx import TensorProto, helper

import asvit_deploy
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.exporting.masked import with_masks
from asvit_deploy.exporting.padded import to_padded
from asvit_deploy.exporting.ragged import GROUPS
from asvit_deploy.exporting.split import split_segments
from asvit_deploy.exporting.static_topk import to_static_topk
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.graph import with_decisions
from asvit_deploy.parity import compare
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.runners.onnx_bounds import VOCABULARY
from asvit_deploy.runners.onnx_runtime import PART, OrtRunner, import_onnxruntime, session_options
from asvit_deploy.runners.pytorch import TorchRunner


@pytest.fixture(scope="module")
def packed(mini):
    return to_onnx(mini, "packed")


@pytest.fixture(scope="module")
def pictures(photos):
    return [photos[i] for i in range(len(photos))]


def agrees(model, proto, pictures, names, batch, library=None):
    runner = OrtRunner(proto, library)
    return compare(TorchRunner(model), runner, pictures, names, model.boundaries(), batch=batch)


# Fewer pictures than groups, one for each, more, and a number that does not divide.
@pytest.mark.parametrize("batch", [1, 2, GROUPS, 7, 12])
def test_the_tokens_and_logits_of_each_picture_alone(mini, packed, photos, pictures, batch):
    result = agrees(mini, packed, pictures, photos.names, batch)
    assert result.failures == []
    assert result.equal_sets == 12
    assert len({round(kept) for kept in result.mean_kept}) == 3


def test_with_the_library(mini, packed, photos, pictures, op_library):
    assert agrees(mini, packed, pictures, photos.names, 5, op_library).failures == []


@pytest.mark.parametrize("count", [1, PART, PART + 1, 12])
def test_one_thread_takes_a_few_at_a_time(mini, packed, pictures, count):
    """Unless tokens are recorded: what is checked is the whole batch."""
    assert PART == GROUPS
    images = np.stack(pictures[:count])
    runner, whole = OrtRunner(packed, record=False), OrtRunner(packed)
    expected = whole(images)
    sizes: list[int] = []

    def counted(outputs, given, *options):
        sizes.append(len(given["images"]))
        return session.run(outputs, given, *options)

    session = runner.session
    runner.session = SimpleNamespace(run=counted)
    for found in (runner(images).output, runner.infer(images)[0]):
        np.testing.assert_allclose(found, expected.output, rtol=0, atol=2e-5)
    parts = [len(images[start : start + PART]) for start in range(0, count, PART)]
    assert sizes == parts * 2
    lengths = runner(images).lengths
    assert [one.tolist() for one in lengths] == [one.tolist() for one in expected.lengths]


def test_openvino_runs_it_too(mini, packed, photos, pictures):
    pytest.importorskip("openvino", reason="OpenVINO is not installed (scripts/setup)")
    from asvit_deploy.runners.openvino import OpenVinoRunner

    found = OpenVinoRunner(to_onnx(mini, "packed", "standard"))(np.stack(pictures[:5]))
    for i, own in enumerate(found.output):
        alone = TorchRunner(mini)(pictures[i][None]).output[0]
        np.testing.assert_allclose(own, alone, rtol=0, atol=1e-4)


def test_one_token_beside_all(mini, packed, pictures):
    """What stays is given: a single token of one picture, every token of the other."""
    tokens, stages = mini.config.image_tokens, len(mini.config.stages)
    shown = with_decisions(packed, stages)
    for given in shown.graph.input[1:]:
        given.type.tensor_type.shape.dim[0].dim_param = "images"
    session = import_onnxruntime().InferenceSession(shown.SerializeToString(), session_options(1))
    decisions = np.stack([np.eye(1, tokens, 5)[0], np.ones(tokens)]).astype(np.float32)
    later = np.stack([np.eye(1, tokens)[0], np.ones(tokens)]).astype(np.float32)
    names = ["logits", *(f"length_{stage}" for stage in range(stages))]
    given = {"decision_0": decisions, "decision_1": later, "decision_2": later}
    logits, *lengths = session.run(names, {"images": np.stack(pictures[:2]), **given})
    assert [length.tolist() for length in lengths] == [[2, 1 + tokens]] * stages
    for i, kept in enumerate((np.array([5]), np.arange(tokens))):
        alone = TorchRunner(mini).replay(pictures[i][None], [kept] * stages).output[0]
        np.testing.assert_allclose(logits[i], alone, rtol=0, atol=2e-5)


def test_a_batch_of_none_is_refused_in_one_line(mini, packed, pictures):
    runners = [OrtRunner(packed)]
    if importlib.util.find_spec("openvino"):
        from asvit_deploy.runners.openvino import OpenVinoRunner

        runners.append(OpenVinoRunner(to_onnx(mini, "packed", "standard")))
    for runner in runners:
        raises_one_line(lambda runner=runner: runner(np.stack(pictures[:1])[:0]),
                        "a batch of 0 pictures cannot be run")  # fmt: skip
        assert len(runner(np.stack(pictures[:1])).output) == 1  # and goes on


@pytest.mark.slow
def test_sizes_travel_in_it(mini, photos, pictures):
    """Size-passing by thresholds, whose attention adds what sizes say."""
    blocks = SizePassing.usual_blocks(mini.config.stages, mini.config.depth)
    model = mini.with_reduction(SizePassing(blocks, prefix=mini.config.prefix)).eval()
    with torch.no_grad():
        for stage, parameter in enumerate(model.reduction.parameters()):
            scores = TorchRunner(model)(pictures[0][None]).scores[stage][0]
            ordered = np.sort(scores[np.isfinite(scores)].astype(np.float64))
            parameter.fill_(float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean()))
    result = agrees(model, to_onnx(model, "packed"), pictures[:6], photos.names, 6)
    assert result.failures == []


def test_its_nodes_are_standard_and_none_is_a_loop(packed):
    for body in (packed.graph, *packed.functions):
        ops = {node.op_type for node in body.node if not node.domain}
        assert ops <= VOCABULARY
        assert not ops & {"Loop", "If", "Scan", "SequenceMap"}


def weights_of(proto):
    """What nodes that multiply rows with a matrix of weights are given, and how wide that is."""
    constants = {tensor.name: tuple(tensor.dims) for tensor in proto.graph.initializer}
    found = []
    for node in proto.graph.node:
        shape = constants.get(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
        if shape is not None and len(shape) == 2:
            turned = any(entry.name == "transB" and entry.i for entry in node.attribute)
            found.append((node.input[0], shape[turned]))
    return found


def test_linear_layers_run_on_the_rows_that_stay(mini, packed, pictures):
    """Every product with weights is given [sum of K, D], as the run itself shows."""
    shown = onnx.ModelProto()
    shown.CopyFrom(packed)
    given = weights_of(packed)
    for name in dict.fromkeys(name for name, _ in given):
        shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = OrtRunner(shown, optimize=False).session
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, {"images": np.stack(pictures[:8])})))
    totals = [int(found[f"length_{stage}"].sum()) for stage in range(3)]
    config, rows = mini.config, 8 * mini.config.rows
    dims = {config.dim, config.hidden}
    counts: dict[int, int] = {}
    for name, width in given:
        assert found[name].ndim == 2, name
        assert found[name].shape[1] == width
        assert width in dims
        counts[len(found[name])] = counts.get(len(found[name]), 0) + 1
    assert set(counts) <= {rows, *totals, 8}
    per_block = 4  # queries with keys and values, projection, and the two of the MLP
    starts = [*config.stages, config.depth]
    assert counts[rows] == per_block * config.stages[0]
    assert [counts[t] for t in totals[:2]] == [
        per_block * (end - start) for start, end in pairwise(starts[:-1])
    ]
    assert len({rows, *totals, 8}) == 5


def test_weights_are_in_the_file_once(mini, packed):
    """Of what attention needs of the lengths as well: once for each cut, not for each block."""
    single = to_onnx(mini)
    assert packed.ByteSize() < single.ByteSize() + (200 << 10)
    sorts = [node for node in packed.graph.node if node.op_type == "TopK"]
    assert len(sorts) == 2 * 3


def test_half_precision_has_its_twin(mini, packed, pictures, photos):
    from asvit_deploy.exporting.half import rounded, to_half
    from asvit_deploy.graph import with_function

    half = rounded(with_function(to_half(packed, "fp16")))
    runner = OrtRunner(half, optimize=False)
    result = compare(TorchRunner(mini), runner, pictures, photos.names, mini.boundaries(), "fp16",
                     batch=5)  # fmt: skip
    assert result.failures == []


def test_the_command_writes_it_and_what_follows_reads_it(cli, mini_checkpoint, tmp_path):
    assert cli("export", "--ckpt", mini_checkpoint, "--batch", "packed", "-o", "m.onnx").code == 0
    fields = json.loads((tmp_path / "m.onnx.json").read_text())
    assert (fields["batch"], fields["mode"]) == ("packed", "dynamic")
    checked = cli("check", "m.onnx", "--limit", "9")
    assert checked.code == 0
    assert "batch 8" in checked.out
    artefact = open_artefact(tmp_path / "m.onnx")
    assert artefact.dynamic_batch
    for rewrite in (
        to_padded,
        lambda model, name: with_masks(model, {0}, name),
        split_segments,
        lambda model, name: to_static_topk(model, [9, 6, 3], name),
    ):
        raises_one_line(
            lambda rewrite=rewrite: rewrite(artefact.model, "m.onnx"),
            "m.onnx was exported with --batch packed", "--batch dynamic",
        )  # fmt: skip


@pytest.mark.slow
def test_bench_times_it_beside_the_other_batches(cli, mini_checkpoint, tmp_path):
    assert cli("export", "--ckpt", mini_checkpoint, "-o", "m.onnx").code == 0
    done = cli("bench", "m.onnx", "--sweep-batch", "2", "--runs", "10", "--warmup", "1",
               "--threads", "1", "--limit", "4", "-o", "b.json")  # fmt: skip
    assert done.code == 0
    (report,) = json.loads((tmp_path / "b.json").read_text())
    (point,) = report["sweeps"][0]["points"]
    kinds = {(row["runtime"], row["kind"], row["singly"], row["packed"]) for row in point["rows"]}
    for runtime in ("torch", "onnxruntime"):
        for kind in ("dense", "adaptive"):
            assert {(runtime, kind, False, False), (runtime, kind, True, False),
                    (runtime, kind, False, True)} <= kinds  # fmt: skip
    own = {row["packed"]: row["gmacs"] for row in point["rows"]
           if row["kind"] == "adaptive" and row["runtime"] == "onnxruntime"
           and not row["singly"]}  # fmt: skip
    assert own[True] == pytest.approx(own[False])


def test_tensorrt_rtx_says_that_it_cannot(mini_checkpoint, tmp_path, rtx, trt_plugin):
    asvit_deploy.export(mini_checkpoint, output=tmp_path / "m.onnx", batch="packed")
    raises_one_line(
        lambda: asvit_deploy.build_engine(tmp_path / "m.onnx", output=tmp_path / "m.engine"),
        "packs pictures by NonZero", "--batch dynamic",
    )  # fmt: skip
    assert not (tmp_path / "m.engine").exists()
