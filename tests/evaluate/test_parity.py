"""The judge itself: what it must let pass, and what it must not."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from asvit_deploy.evaluate.parity import compare
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


@pytest.mark.parametrize(("precision", "factor", "explained"), [
    ("fp16", 1.002, True), ("fp16", 1.1, False), ("bf16", 1.02, True), ("bf16", 1.3, False),
])  # fmt: skip
def test_half_precision_explains_flips_by_its_own_rounding(
    judge, altered, precision, factor, explained
):
    with torch.no_grad():
        for threshold in altered.thresholds:
            threshold.mul_(factor)
    result = judge(altered, precision)
    assert len(result.flips) > 0
    assert (result.explained == result.images) is explained
    assert any("beyond rounding" in failure for failure in result.failures) is not explained


def test_half_precision_needs_most_tokens_and_some_images_to_agree(judge, altered):
    with torch.no_grad():
        altered.thresholds[0].mul_(3)
    failures = judge(altered, "bf16").failures
    assert any("token decisions" in failure for failure in failures)
    assert any("images keep the same tokens, 10% needed" in failure for failure in failures)


def test_nothing_compared_is_a_failure(mini):
    result = compare(TorchRunner(mini), TorchRunner(mini), [], [], mini.threshold_values())
    assert not result.passed


class OnlyCounts(TorchRunner):
    """A backend that says how many tokens stay, not which."""

    def __call__(self, images):
        return replace(super().__call__(images), kept=None, scores=None)


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
