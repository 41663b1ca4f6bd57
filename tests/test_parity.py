"""The judge itself: what it must let pass, and what it must not."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from asvit_deploy.errors import UserError
from asvit_deploy.exporting.half import rounded, to_half
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build
from asvit_deploy.parity import LIMITS, compare
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner


@pytest.fixture
def judge(mini, photos):
    pictures = [photos[i] for i in range(len(photos))]

    def run(candidate, precision="float32", batch=1):
        return compare(
            TorchRunner(mini), TorchRunner(candidate), pictures, photos.names,
            mini.threshold_values(), precision, batch,
        )  # fmt: skip

    return run


@pytest.fixture
def altered(mini):
    return copy.deepcopy(mini)


def test_a_model_agrees_with_itself(judge, mini):
    result = judge(mini)
    assert result.passed
    assert result.equal_sets == result.top1_equal == result.images == 12
    assert result.flips == []
    assert result.logit_error == 0


def test_batches_agree_with_single_images(judge, mini):
    assert judge(mini, batch=5).passed


def test_a_moved_threshold_fails_and_is_listed(judge, mini, altered):
    with torch.no_grad():
        altered.thresholds[1].mul_(1.1)
    result = judge(altered)
    assert not result.passed
    assert {flip.stage for flip in result.flips} == {1}, "judged at the first diverging stage"
    flip = result.flips[0]
    assert flip.margin == pytest.approx(abs(flip.score - flip.threshold))
    assert not flip.borderline
    assert flip.threshold == pytest.approx(mini.threshold_values()[1])


def test_a_flip_within_rounding_is_borderline(judge, mini, altered, photos):
    # Put the reference's threshold right below a score, the candidate's right above it.
    score = TorchRunner(mini)(photos[0][None]).scores[0][0]
    target = float(np.sort(score[score > mini.threshold_values()[0]])[0])
    with torch.no_grad():
        saved = mini.thresholds[0].clone()
        mini.thresholds[0].fill_(target * (1 - 1e-6))
        altered.thresholds[0].fill_(target * (1 + 1e-6))
        result = judge(altered)
        mini.thresholds[0].copy_(saved)
    assert len(result.flips) >= 1
    assert all(flip.borderline for flip in result.flips)
    assert not any("beyond rounding" in failure for failure in result.failures)
    assert result.equal_sets < result.images


@pytest.mark.parametrize("size", [1e-2, float("nan")])
def test_wrong_logits_fail(judge, altered, size):
    with torch.no_grad():
        altered.head.bias.add_(size)
    result = judge(altered)
    assert result.equal_sets == result.images
    assert any("logits differ" in failure for failure in result.failures)


def test_another_top1_fails(judge, altered):
    with torch.no_grad():
        altered.head.weight.copy_(altered.head.weight.flip(0))
        altered.head.bias.copy_(altered.head.bias.flip(0))
    assert any("top-1" in failure for failure in judge(altered).failures)


def twin(proto, precision, change=lambda proto: None):
    """A graph in half precision, rounded as a GPU will, with a fault in it."""
    graph = to_half(proto, precision)
    change(graph)
    return OrtRunner(rounded(graph), optimize=False)


@pytest.fixture(scope="session")
def half(mini_artifacts):
    proto = onnx.load(mini_artifacts["1", "auto"])
    return lambda precision, *change: twin(proto, precision, *change)


def weights(proto, ending):
    return next(t for t in proto.graph.initializer if ending in t.name)


def scaled(ending, factor):
    def change(proto):
        tensor = weights(proto, ending)
        kind = torch.float16 if tensor.data_type == TensorProto.FLOAT16 else torch.bfloat16
        values = torch.frombuffer(bytearray(tensor.raw_data), dtype=kind)
        tensor.raw_data = (values * factor).view(torch.int16).numpy().tobytes()

    return change


def swapped(first, second):
    def change(proto):
        one, other = weights(proto, first), weights(proto, second)
        assert one.dims == other.dims
        one.raw_data, other.raw_data = other.raw_data, one.raw_data

    return change


def judged(reference, candidate, images, precision):
    return compare(
        TorchRunner(reference), candidate, list(images), images.names,
        reference.threshold_values(), precision,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("count", [1, 8, 12])
def test_half_precision_passes_with_its_flips_explained(mini, half, photos, precision, count):
    result = judged(mini, half(precision), photos[:count], precision)
    assert result.failures == []
    assert result.explained == result.judged == result.images == count
    assert all(0 < noise <= LIMITS[precision].noise for noise in result.noise)
    assert result.replayed == count - result.equal_sets
    if count == 12:
        # Random weights put scores so close to the thresholds that bfloat16 flips some of each.
        assert result.equal_sets < 12, "some images must flip, or this shows nothing"
        assert all(flip.margin <= 8 * LIMITS[precision].noise * flip.threshold
                   for flip in result.flips)  # fmt: skip


# The biases of random weights are zero.
FAULTS = {
    "logits 5 % too large": (scaled("head.weight", 1.05), "logits differ"),
    "logits 5 % too small": (scaled("head.weight", 0.95), "logits differ"),
    "a layer's weights doubled": (scaled("blocks.5.mlp.fc2.weight", 2), "logits differ"),
    "two layers' weights swapped": (
        swapped("blocks.4.mlp.fc1.weight", "blocks.5.mlp.fc1.weight"), "logits differ"),
    "two layers' weights swapped before a stage": (
        swapped("blocks.0.attn.proj.weight", "blocks.1.attn.proj.weight"), "scores at stage"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("count", [1, 8, 12])
@pytest.mark.parametrize("fault", FAULTS)
def test_half_precision_excuses_no_fault(mini, half, photos, precision, count, fault):
    change, words = FAULTS[fault]
    result = judged(mini, half(precision, change), photos[:count], precision)
    assert any(words in failure for failure in result.failures), result.failures


class Strays(TorchRunner):
    """Scores with a known noise, and `count` images on which one decision is far beyond it."""

    def __init__(self, model, count, times):
        super().__init__(model)
        self.count, self.times, self.thresholds = count, times, model.threshold_values()
        self.seen = 0

    def __call__(self, images):
        own, noise = super().__call__(images), 3.5e-3
        scores = [[row * np.float32(1 + noise) for row in stage] for stage in own.scores]
        kept = [list(stage) for stage in own.kept]
        row, threshold, alive = own.scores[2][0], self.thresholds[2], own.kept[1][0]
        far = np.abs(np.abs(row[alive] / threshold - 1) - self.times * noise)
        if self.seen < self.count and far.min() < 0.02:
            self.seen += 1
            kept[2] = [np.setxor1d(own.kept[2][0], [alive[far.argmin()]])]
        lengths = [np.array([1 + len(stage[0])]) for stage in kept]
        return replace(super().replay(images, [stage[0] for stage in kept]), kept=kept,
                       scores=scores, lengths=lengths)  # fmt: skip


@pytest.mark.parametrize(("strays", "passes"), [(1, True), (2, False), (3, False)])
def test_one_image_may_have_a_flip_beyond_the_noise(mini, photos, strays, passes):
    result = judged(mini, Strays(mini, strays, 18), photos, "fp16")
    assert result.images - result.explained == strays
    assert result.passed is passes, result.failures


def test_no_image_may_have_one_far_beyond_it(mini, photos):
    result = judged(mini, Strays(mini, 1, 80), photos, "fp16")
    assert any("1 tokens flipped beyond rounding on 1/12" in line for line in result.failures)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_excuses_no_moved_threshold(mini, half, photos, precision):
    def moved(proto):
        tensor = weights(proto, "threshold_2")
        value = numpy_helper.to_array(tensor) * np.float32(1.3)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))

    result = judged(mini, half(precision, moved), photos, precision)
    assert any("beyond rounding" in failure for failure in result.failures)
    assert {flip.stage for flip in result.flips if not flip.borderline} == {2}
    # What the wrong threshold leaves is run through the reference too, so the logits are right.
    assert not any("logits" in failure for failure in result.failures)


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_near_ties_of_classes_are_listed_and_not_counted(mini, altered, photos, precision):
    # A second class of nearly the same weights stands in front of the best one of each image.
    with torch.no_grad():
        best = {int(TorchRunner(mini)(image[None]).output.argmax()) for image in photos}
        twin = next(i for i in range(10) if i not in best)
        first = best.pop()
        mini = copy.deepcopy(mini)
        mini.head.weight[twin] = mini.head.weight[first] * (1 - 1e-5)
        mini.head.bias[twin] = mini.head.bias[first]
        altered.head.weight.copy_(mini.head.weight)
        altered.head.bias.copy_(mini.head.bias)
        altered.head.weight[twin] *= 1 + 2e-5
    result = compare(TorchRunner(mini), TorchRunner(altered), list(photos), photos.names,
                     mini.threshold_values(), precision)  # fmt: skip
    assert result.top1_equal < result.images
    assert len(result.top1_changes) == result.images - result.top1_equal
    assert all(change.borderline and change.margin > 0 for change in result.top1_changes)
    assert result.passed


@pytest.mark.slow
def test_one_logit_near_zero_is_measured_by_the_others(mini, photos):
    config = mini.config.at(num_classes=1)
    model = build(config).eval()
    kept = {k: v for k, v in mini.state_dict().items() if not k.startswith("head.")}
    model.load_state_dict(kept, strict=False)
    with torch.no_grad():
        logits = [TorchRunner(model)(image[None]).output[0, 0] for image in photos]
        model.head.bias -= float(min(logits))
    result = judged(model, twin(to_onnx(model), "fp16"), photos, "fp16")
    assert result.failures == []


def test_nothing_compared_is_a_failure(mini):
    result = compare(TorchRunner(mini), TorchRunner(mini), [], [], mini.threshold_values())
    assert not result.passed


class OnlyCounts(TorchRunner):
    """A backend that says how many tokens stay, not which."""

    def __call__(self, images):
        return replace(super().__call__(images), kept=None, scores=None)


@pytest.mark.slow
def test_counts_stand_in_for_kept_tokens(mini, altered, photos):
    pictures, thresholds = list(photos), mini.threshold_values()
    same = compare(TorchRunner(mini), OnlyCounts(mini), pictures, photos.names, thresholds)
    assert same.passed
    assert same.equal_sets == len(pictures)
    with torch.no_grad():
        altered.thresholds[1].mul_(1.1)
    known = compare(TorchRunner(mini), TorchRunner(altered), pictures, photos.names, thresholds)
    guessed = compare(TorchRunner(mini), OnlyCounts(altered), pictures, photos.names, thresholds)
    assert not guessed.passed
    # Raising a threshold drops exactly the lowest of what was kept, so the guess is right here.
    assert sorted(guessed.flips, key=str) == sorted(known.flips, key=str)


def test_int8_does_not_excuse_what_cannot_be():
    """A share of the decisions may be unexplained; tokens that come back, or none, may not."""
    from asvit_deploy.parity.judging import _too_many
    from asvit_deploy.parity.limits import LIMITS
    from asvit_deploy.parity.report import Flip, Parity

    result = Parity("int8", 100, "logits")
    result.decisions, result.explained = 100_000, 99
    far = Flip("a", 0, 1, 1.0, 0.5, 0.5, 0.1, False)
    assert not _too_many([far] * 100, result, LIMITS["int8"])
    assert _too_many([far] * 101, result, LIMITS["int8"])
    assert _too_many([Flip("a", 0, 1, 1.0, 0.5, float("inf"), 0.1, False)], result, LIMITS["int8"])


@pytest.mark.parametrize("batch", [1, 5])
def test_a_thread_that_runs_ahead_changes_nothing(mini, photos, monkeypatch, batch):
    """A runner with a thread of its own: the same verdict, every picture once and in its place."""
    monkeypatch.setattr("asvit_deploy.parity.usable_cores", lambda: 2)
    pictures = [photos[i] for i in range(len(photos))]
    proto = to_onnx(mini, "dynamic")
    kept, threads = mini.threshold_values(), torch.get_num_threads()
    found = []
    for beside in (True, False):
        candidate = OrtRunner(proto)
        assert candidate.runs_beside
        candidate.runs_beside = beside
        ran = noting(candidate)
        found.append(compare(TorchRunner(mini), ran, pictures, photos.names, kept, batch=batch))
        assert [len(given) for given in ran.seen] == [batch] * (12 // batch) + [12 % batch] * (
            12 % batch > 0
        )
        assert np.array_equal(np.concatenate(ran.seen), np.stack(pictures))
        assert ran.elsewhere == beside
    assert found[0] == found[1]
    assert found[0].passed
    assert torch.get_num_threads() == threads


def noting(runner):
    """The runner, noting what it is given and whether another thread than this one calls it."""
    own = threading.get_ident()

    class Noting(OrtRunner):
        def __call__(self, images):
            self.seen.append(images)
            self.elsewhere = threading.get_ident() != own
            return super().__call__(images)

    runner.__class__, runner.seen = Noting, []
    return runner


def test_what_fails_in_that_thread_is_raised_here(mini, photos, monkeypatch):
    monkeypatch.setattr("asvit_deploy.parity.usable_cores", lambda: 2)

    class Broken(TorchRunner):
        runs_beside = True

        def __call__(self, images):
            raise UserError("no memory is left")

    pictures, threads = [photos[0], photos[1], photos[2]], torch.get_num_threads()
    with pytest.raises(UserError, match="no memory is left"):
        compare(TorchRunner(mini), Broken(mini), pictures, photos.names, mini.threshold_values())
    assert torch.get_num_threads() == threads
