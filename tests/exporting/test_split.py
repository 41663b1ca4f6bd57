"""Stage models: what is cut where, and that rows beyond the length change nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import sharpened

from asvit_deploy.data.images import open_images
from asvit_deploy.errors import UserError
from asvit_deploy.exporting.half import to_half
from asvit_deploy.exporting.split import rows_of, split_segments, thresholds_of
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.runners.bucketed import OrtStages


@pytest.fixture(scope="module")
def lvvit():
    """A small LV-ViT as ONNX, and pictures for it."""
    config = replace(arch("as_lvvit_s"), depth=5, stages=(2, 3, 4), num_classes=20).at(64)
    images = open_images(None, config, limit=4)
    return to_onnx(sharpened(config, images, keep=(0.8, 0.7, 0.5))), images


@pytest.fixture(scope="module")
def networks(mini_artifacts, photos, lvvit):
    return {"deit": (onnx.load(mini_artifacts["1", "auto"]), photos), "lvvit": lvvit}


def signature(values):
    return [
        (v.name, v.type.tensor_type.elem_type,
         [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim])
        for v in values
    ]  # fmt: skip


@pytest.mark.parametrize("ops", ["auto", "custom"])
@pytest.mark.parametrize(("precision", "kind"), [(None, 1), ("fp16", 10), ("bf16", 16)])
def test_inputs_and_outputs(mini_artifacts, ops, precision, kind):
    model = onnx.load(mini_artifacts["1", ops])
    model = to_half(model, precision) if precision else model
    first, *between, last = stages = split_segments(model)
    images, length = ("images", 1, [1, 3, 56, 56]), ("length", 7, [1])
    kept = ("kept", kind, [1, "rows", 128])
    assert signature(first.graph.input) == [images]
    assert signature(first.graph.output) == [("tokens", kind, [1, 197, 128]),
                                             ("scores", 1, [1, 196])]  # fmt: skip
    assert len(between) == 2
    for stage in between:
        assert signature(stage.graph.input) == [kept, length]
        assert signature(stage.graph.output) == [("tokens", kind, [1, "rows", 128]),
                                                 ("scores", 1, [1, "image_rows"])]  # fmt: skip
    assert signature(last.graph.input) == [kept, length]
    assert signature(last.graph.output) == [("logits", 1, [1, 10])]
    for number, stage in enumerate(stages):
        assert [entry.domain for entry in stage.opset_import] == [""]
        assert {node.domain for node in stage.graph.node} == {""}
        assert not stage.functions
        props = {p.key: p.value for p in stage.metadata_props}
        assert (props["asvit_mode"], props["asvit_stage"]) == ('"bucketed"', str(number))
    assert rows_of(stages) == 197
    assert sum(s.ByteSize() for s in stages) < 1.05 * model.ByteSize(), "each weight in one stage"


def test_thresholds_are_those_of_the_graph(mini, mini_artifacts):
    model = onnx.load(mini_artifacts["1", "custom"])
    assert thresholds_of(model) == mini.threshold_values()


@pytest.mark.slow
def test_the_model_itself_is_left_alone(networks):
    model, _ = networks["deit"]
    before = model.SerializeToString()
    split_segments(model)
    assert (model.SerializeToString() == before) is True


@pytest.mark.slow
def test_refuses_what_cannot_be_cut(mini, mini_artifacts):
    with pytest.raises(UserError, match=r"here\.onnx has no ThresholdCompact"):
        split_segments(onnx.load(mini_artifacts["1", "standard"]), "here.onnx")
    with pytest.raises(UserError, match="no ThresholdCompact"):
        split_segments(to_onnx(build(mini.config, adaptive=False).eval()))
    with pytest.raises(UserError, match=r"d\.onnx has a dynamic batch.*--batch 1"):
        split_segments(onnx.load(mini_artifacts["dynamic", "auto"]), "d.onnx")


def run(stage, tokens, rows):
    session = onnxruntime.InferenceSession(
        stage.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"kept": tokens, "length": np.array([rows])})


def entering(stages, thresholds, image, number):
    """Kept tokens that really enter a stage, [1, rows, D]."""
    backend = OrtStages(stages, thresholds)
    output = backend.start(image[None])
    rows = output[0].shape[1]
    for stage in range(number):
        kept = backend.compact(stage, output, rows)
        rows = kept.rows
        output = backend.run(stage + 1, rows, kept)
    return kept.tokens[:, :rows]


def with_tail(tokens, bucket, garbage):
    """The tokens in a bucket whose other rows are zero, or anything that is finite."""
    random = np.random.default_rng(0)
    shape = (1, bucket - tokens.shape[1], tokens.shape[2])
    tail = 30 * random.standard_normal(shape) if garbage else np.zeros(shape)
    return np.concatenate([tokens, tail.astype(tokens.dtype)], 1)


def errors(stage, tokens, bucket, garbage):
    """Largest difference that a tail makes to each output's rows in use, relative."""
    rows = tokens.shape[1]
    exact = run(stage, tokens, rows)
    padded = run(stage, with_tail(tokens, bucket, garbage), rows)
    found = []
    for a, b in zip(exact, padded):
        part = b[:, : a.shape[1]]
        found.append(float(np.abs(part - a).max() / np.abs(a).max()))
    return found, padded


@pytest.mark.slow
@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("family", ["deit", "lvvit"])
def test_a_tail_changes_nothing(networks, family, number, garbage):
    model, images = networks[family]
    stages = split_segments(model)
    tokens = entering(stages, thresholds_of(model), images[0], number)
    rows = tokens.shape[1]
    for bucket in (rows, rows + 1, rows + 40):
        found, padded = errors(stages[number], tokens, bucket, garbage)
        assert max(found) <= 1e-5, "rounding of sums whose other terms are exactly zero"
        if number < 3:
            scores = padded[1]
            assert scores.shape == (1, bucket - 1)
            assert np.isfinite(scores[:, : rows - 1]).all()
            assert (scores[:, rows - 1 :] == -np.inf).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deit", "lvvit"])
def test_every_mask_is_needed_and_seen(networks, family):
    """Without any one of the masks the comparison above fails."""
    model, images = networks[family]
    stages = split_segments(model)
    kinds = set()
    for number in (1, 2, 3):
        tokens = entering(stages, thresholds_of(model), images[0], number)
        masks = [n for n in stages[number].graph.node if n.name.endswith("_hidden")]
        for mask in masks:
            broken = onnx.ModelProto()
            broken.CopyFrom(stages[number])
            user = next(n for n in broken.graph.node if mask.output[0] in n.input)
            kinds.add(user.op_type)
            user.input[0] = mask.input[1]
            found, _ = errors(broken, tokens, tokens.shape[1] + 40, garbage=True)
            assert max(found) > 1e-3, f"stage {number} without {mask.name}"
        attentions = sum(n.op_type == "Softmax" for n in stages[number].graph.node)
        votes = sum(n.op_type == "ReduceMax" for n in stages[number].graph.node)
        assert len(masks) == attentions + votes > 0
    assert kinds == ({"Softmax"} if family == "deit" else {"Softmax", "ReduceMax"})


@pytest.mark.slow
def test_half_stages_mask_in_their_own_type(lvvit):
    stage = split_segments(to_half(lvvit[0], "fp16"))[3]
    constants = {t.name: t.data_type for t in stage.graph.initializer if "minus_inf" in t.name}
    assert constants == {"minus_inf_float": 1, "minus_inf_float16": 10}
    onnx.checker.check_model(stage, full_check=True)
