"""Methods with fixed counts all the way: export, check, bench, evaluate, an engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import asvit_deploy
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.budget import fixed_counts
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.models.macs import fixed_lengths, model_macs, teacher_macs
from asvit_deploy.ops import onnx_op
from asvit_deploy.parity import compare
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.topk import EViT
from asvit_deploy.runners.onnx_bounds import VOCABULARY
from asvit_deploy.runners.pytorch import TorchRunner

METHODS = (EViT, SizePassing)


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def checkpoint(request, tmp_path_factory) -> Path:
    """The default checkpoint's weights with another method, at f = 0.65."""
    model = build_model(load_checkpoint(default_checkpoint()), dense=True)
    path = tmp_path_factory.mktemp("static") / f"{request.param.name}.safetensors"
    method = fixed_counts(model.config, request.param, 0.65)
    save_checkpoint(path, model.with_reduction(method), {"budget": "0.65"})
    return path


@pytest.fixture(scope="module", params=["1", "dynamic"])
def artefact(request, checkpoint):
    output = checkpoint.with_name(f"{checkpoint.stem}.{request.param}.onnx")
    if not output.exists():
        asvit_deploy.export(checkpoint, output=output, batch=request.param)
    return open_artefact(output)


@pytest.mark.slow
def test_the_file_is_static_and_of_standard_ops(artefact):
    model = onnx.load(artefact.path)
    assert not onnx_op.nodes_of(model.graph)
    assert not model.functions
    assert {node.op_type for node in model.graph.node} <= VOCABULARY
    assert {entry.domain for entry in model.opset_import} == {""}
    fields = artefact.fields
    assert (fields["mode"], fields["ops"], fields["thresholds"]) == ("static", "standard", [])
    method = build_model(load_checkpoint(Path(fields["source"]["path"]))).reduction
    assert fields["reduction"] == method.fields()
    assert fields["appended"] == method.appends
    if fields["batch"] == "1":
        inferred = onnx.shape_inference.infer_shapes(model)
        shapes = [info.type.tensor_type.shape.dim for info in inferred.graph.value_info]
        assert all(dim.dim_value for dims in shapes for dim in dims), "no dynamic dimension"


@pytest.mark.slow
def test_it_keeps_what_pytorch_keeps(artefact, photos):
    for runner in artefact.ways().values():
        keeps_what_pytorch_keeps(artefact, runner, photos)


def keeps_what_pytorch_keeps(artefact, runner, photos):
    images = [photos[i] for i in range(6)]
    parity = compare(artefact.judge(), runner, images, list(map(str, range(6))),
                     artefact.boundaries)  # fmt: skip
    assert parity.passed, parity.failures
    assert (parity.equal_sets, len(parity.noise)) == (6, len(artefact.boundaries))
    lengths = fixed_lengths(artefact.config, artefact.reference.reduction)
    assert [int(n[0]) for n in runner(images[0][None]).lengths] == lengths


@pytest.mark.slow
def test_another_choice_is_seen_and_replayed(artefact, photos):
    """A network that keeps other tokens: flips are found, and logits compared along its path."""
    (runner,) = artefact.ways(runtimes=["onnxruntime"]).values()
    model = artefact.reference
    method = model.reduction
    honest = method.decide

    def other(stage, rows, seen):
        decision = honest(stage, rows, seen)
        score = decision.score.clone()
        finite = torch.where(score.isinf(), -1.0, score)
        best = finite.argmax(1, keepdim=True)
        return replace(decision, score=score.scatter(1, best, -1.0))

    images = [photos[i] for i in range(3)]
    method.decide = other
    try:
        parity = compare(TorchRunner(model), runner, images, list("abc"), artefact.boundaries)
    finally:
        del method.decide
    assert not parity.passed
    assert parity.replayed == 3
    assert any(not flip.borderline for flip in parity.flips)
    assert any("flipped" in words for words in parity.failures)


@pytest.mark.slow
def test_commands_take_it(artefact, cli):
    done = cli("check", artefact.path, "--limit", 6)
    assert done.code == 0, done.err
    assert "static, batch 1" in done.out
    done = cli("bench", artefact.path, "--runs", 10, "--warmup", 1, "--limit", 2, "--threads", 1,
               "--json")  # fmt: skip
    if artefact.dynamic_batch:
        return
    assert done.code == 0, done.err
    (report,) = json.loads(done.out)
    config, method = artefact.config, artefact.reference.reduction
    macs = model_macs(config, fixed_lengths(config, method), method.cuts)
    assert report["macs"]["adaptive_gmacs"] == pytest.approx(macs / 1e9)
    assert abs(macs / teacher_macs(config) - 0.65) < 0.0065
    names = [row["name"] for row in report["rows"]]
    assert "onnxruntime, adaptive (static)" in names


@pytest.mark.slow
def test_evaluate_counts_its_macs(checkpoint, artefact, cli):
    for model in (artefact.path, checkpoint):
        done = cli(
            "evaluate", model, "--data", "digits", "--limit", 200, "--batch-size", 1, "--json"
        )
        assert done.code == 0, done.err
        (row,) = json.loads(done.out)["rows"]
        assert row["top1"]["value"] > 0.9
        assert row["macs_share"] == pytest.approx(0.65, abs=0.0065)


@pytest.mark.slow
@pytest.mark.parametrize(("edit", "words"), [
    ({"reduction": {"name": "tome"}}, "reduction"), ({"reduction": 7}, "reduction"),
    ({"reduction": {"name": "topk", "blocks": [1, 99], "kept": [30, 20]}}, "reduction"),
    ({"appended": 5}, "appended"), ({"prefix": 2}, "prefix"),
])  # fmt: skip
def test_sidecars_that_do_not_fit_are_refused(artefact, edit, words, tmp_path):
    from asvit_deploy import sidecar
    from asvit_deploy.errors import UserError

    fields = {**artefact.fields, **edit}
    for key in ("schema", "sha256", "digest"):
        fields.pop(key, None)
    target = tmp_path / "m.onnx"
    sidecar.write(target, artefact.path.read_bytes(), fields)
    with pytest.raises(UserError, match=f"says {words}"):
        open_artefact(target)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True])
def test_engines(artefact, rtx, tmp_path, half):
    """Standard ops alone, so no plugin; on TensorRT-RTX, which needs no GPU to build."""
    if artefact.dynamic_batch:
        pytest.skip("one engine of each method is enough")
    output = tmp_path / "m.engine"
    built = asvit_deploy.build_engine(onnx=artefact.path, output=output, flavour="tensorrt-rtx",
                                      fp16=half, limit=8)  # fmt: skip
    fields = json.loads(Path(f"{output}.json").read_text())
    assert (fields["mode"], fields["plugin_layers"]) == ("static", 0)
    assert fields["reduction"] == artefact.fields["reduction"]
    if half:  # the float32 graph is the artefact's own, compared when it was exported
        assert fields["checked"]["passed"]
    assert built is not None


@pytest.mark.slow
def test_modes_that_make_no_sense_are_refused(artefact, rtx, cli):
    done = cli("build-engine", "--onnx", artefact.path, "--mode", "padded", "--no-check")
    assert done.code == 2
    assert "the rows of" in done.err
    assert "are fixed already" in done.err


@pytest.mark.slow
def test_pictures_decide_alike_in_numbers(artefact, photos):
    """`decode` and `rows_of` are each other's opposite, added rows included."""
    from asvit_deploy.runners.base import rows_of

    runner = TorchRunner(artefact.reference)
    prediction = runner(np.stack([photos[0]]))
    kept = [stage[0] for stage in prediction.kept]
    rows = rows_of(kept, artefact.config.image_tokens, *runner._rows)
    with torch.inference_mode():
        _, trace = artefact.reference(torch.from_numpy(photos[0][None]))
    assert [row.tolist() for row in rows] == [index[0].tolist() for index in trace.index]
