"""Parity of embeddings: cosine, norm and nearest neighbour, along the candidate's own path."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from embedding_files import CONFIGS, network

from asvit_deploy.data.images import open_images
from asvit_deploy.parity import LIMITS, compare
from asvit_deploy.runners.base import Prediction
from asvit_deploy.runners.pytorch import TorchRunner

COUNT = 8


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    return network(request.param)


@pytest.fixture(scope="module")
def pictures(model):
    return open_images(None, model.config, limit=COUNT)


class Changed(TorchRunner):
    """The reference, its output changed."""

    def __init__(self, model, change):
        super().__init__(model)
        self.change = change

    def __call__(self, images):
        made = super().__call__(images)
        return replace(made, output=np.stack([self.change(one) for one in made.output]))


def judged(model, candidate, pictures, precision="float32"):
    loaded, names = pictures.loaded()
    return compare(TorchRunner(model), candidate, loaded, names, model.threshold_values(),
                   precision, output="embedding")  # fmt: skip


def turned(vector, angle, seed=0):
    """By that angle in some direction, as long as before."""
    vector = vector.astype(np.float64)
    other = np.random.default_rng(seed).normal(size=len(vector))
    other -= other @ vector / (vector @ vector) * vector
    other *= np.linalg.norm(vector) / np.linalg.norm(other)
    return (np.cos(angle) * vector + np.sin(angle) * other).astype(np.float32)


def test_the_network_itself_passes(model, pictures):
    result = judged(model, TorchRunner(model), pictures)
    assert result.passed
    assert (result.output, result.judged, result.neighbours_equal) == ("embedding", COUNT, COUNT)
    assert result.cosine_error < 1e-12
    assert 0 < result.mean_kept[0] < 49, "image tokens, the prefix not among them"
    kept = [len(k) for k in TorchRunner(model)(pictures.batch(range(COUNT))).kept[0]]
    assert result.mean_kept[0] == pytest.approx(np.mean(kept))


@pytest.mark.parametrize(("precision", "within", "beyond"), [
    ("float32", 1.3e-3, 1.5e-3), ("fp16", 0.044, 0.046), ("bf16", 0.044, 0.046),
])  # fmt: skip
def test_an_embedding_may_turn_so_far(model, pictures, precision, within, beyond):
    """1 - cos(angle) is the limit of the design: 1e-6 in float32, 1e-3 in half precision."""
    assert LIMITS[precision].cosine == {"float32": 1e-6}.get(precision, 1e-3)
    good = judged(model, Changed(model, lambda v: turned(v, within)), pictures, precision)
    assert not any("cosine" in failure for failure in good.failures)
    bad = judged(model, Changed(model, lambda v: turned(v, beyond)), pictures, precision)
    assert any("the cosine with the reference falls to 1 - " in f for f in bad.failures)


def test_one_wrong_picture_of_many_fails(model, pictures):
    first = TorchRunner(model)(pictures[0][None]).output[0]
    wrong = Changed(model, lambda v: turned(v, 0.2) if np.array_equal(v, first) else v)
    result = judged(model, wrong, pictures, "fp16")
    assert result.typical_cosine_error < 1e-12
    assert not result.passed


def test_a_scaled_embedding_fails_whatever_its_cosine(model, pictures):
    result = judged(model, Changed(model, lambda v: 2 * v), pictures, "fp16")
    assert result.cosine_error < 1e-12
    assert [f for f in result.failures if "norm differs by 1.0e+00" in f]


class Given:
    """A network without stages that returns given rows, one picture after another."""

    def __init__(self, rows):
        self.rows, self.at = np.asarray(rows, np.float32), -1

    def __call__(self, images):
        self.at += 1
        return Prediction(self.rows[self.at][None], [], [], [])


def compared(ours, theirs, precision="fp16"):
    pictures = [np.zeros((3, 2, 2), np.float32)] * len(ours)
    names = [f"p{i}" for i in range(len(ours))]
    return compare(Given(ours), Given(theirs), pictures, names, [], precision, output="embedding")


def at(*degrees):
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1)


def test_a_neighbour_that_nearly_ties_is_listed_and_not_counted():
    # p1 lies 20 degrees from p0 and 21 from p2; the allowed angle of half precision is 2.56.
    result = compared(at(0, 20, 41), at(0, 20.6, 40.9))
    (change,) = result.neighbour_changes
    assert (change.image, change.reference, change.candidate) == ("p1", "p0", "p2")
    assert change.borderline
    assert change.margin == pytest.approx(np.cos(np.radians(20)) - np.cos(np.radians(21)), abs=1e-6)
    assert result.passed
    assert result.neighbours_equal == 2


def test_a_neighbour_that_changes_beyond_rounding_fails():
    # Each turns by 2.5 degrees, less than allowed, but together they bridge a gap of 4.
    result = compared(at(0, 20, 44), at(-2.5, 22.5, 41.5))
    (change,) = result.neighbour_changes
    assert not change.borderline
    assert result.cosine_error <= LIMITS["fp16"].cosine
    assert result.failures == ["the nearest neighbour changed beyond rounding on 1/3 images"]


@pytest.mark.parametrize("count", [1, 2])
def test_neighbours_take_three_pictures(count):
    result = compared(at(0, 20)[:count], at(0, 20)[:count])
    assert result.passed
    assert (result.neighbours_equal, result.neighbour_changes) == (0, [])


@pytest.mark.parametrize("odd", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 0.0]])
@pytest.mark.parametrize("side", [0, 1])
def test_zero_and_nan_have_no_cosine(odd, side):
    rows = [at(0, 20, 41), at(0, 20, 41)]
    rows[side][1] = odd
    result = compared(*rows)
    assert not result.passed
    (failure,) = result.failures
    assert "embeddings of 1/3 images are zero or not finite (p1 first)" in failure


def test_zero_on_both_sides_proves_nothing():
    result = compared(np.zeros((3, 2)), np.zeros((3, 2)))
    assert not result.passed


def test_a_wrong_network_does_not_hide_behind_its_flips(model, pictures):
    """It keeps other tokens; along its own path the reference says something else."""
    altered = copy.deepcopy(model)
    with torch.no_grad():
        altered.blocks[5].mlp.fc2.weight.mul_(1.5)
        altered.thresholds[0].mul_(1 + 1e-7)
    result = judged(altered, TorchRunner(model), pictures)
    assert not result.passed
    flipped = copy.deepcopy(model)
    with torch.no_grad():
        flipped.thresholds[1].mul_(1.2)
    other = judged(model, TorchRunner(flipped), pictures)
    assert other.replayed > 0
    assert other.cosine_error < 1e-10, "given the same tokens, it is the same network"
    assert [f for f in other.failures if "flipped" in f]
    assert not [f for f in other.failures if "cosine" in f or "norm" in f]


def test_reports_speak_of_embeddings_alone(model, pictures):
    said = judged(model, TorchRunner(model), pictures).as_dict()
    assert said["output"] == "embedding"
    assert {"cosine_error", "neighbours_equal", "neighbour_changes", "norm_error"} <= set(said)
    assert not {"top1_equal", "logit_error", "top1_changes"} & set(said)
    logits = compare(TorchRunner(model), TorchRunner(model), *pictures.loaded(),
                     model.threshold_values()).as_dict()  # fmt: skip
    assert {"top1_equal", "logit_error", "top1_changes"} <= set(logits)
    assert not {"output", "cosine_error", "neighbours_equal"} & set(logits)


class OnlyCounts(TorchRunner):
    """As an engine without stage outputs: how many tokens stay, not which."""

    def __call__(self, images):
        return replace(super().__call__(images), kept=None, scores=None)


def test_counts_alone_are_judged_less_the_whole_prefix(model, pictures):
    result = judged(model, OnlyCounts(model), pictures)
    assert result.passed
    assert (result.judged, result.flips) == (COUNT, [])
    altered = copy.deepcopy(model)
    with torch.no_grad():
        altered.thresholds[0].mul_(1.3)
    fewer = judged(model, OnlyCounts(altered), pictures)
    lost = sum(flip.stage == 0 for flip in fewer.flips)
    expected = COUNT * (fewer.mean_kept[0] - fewer.candidate_kept[0])
    assert lost == round(expected) > 0
