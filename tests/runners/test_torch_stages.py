"""Stages in PyTorch in the bucketed runner; on a CPU without graphs, otherwise the same code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import sharpened

from asvit_deploy.data.images import open_images
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.parity import compare
from asvit_deploy.runners.bucketed import BucketedRunner, Cut, smallest
from asvit_deploy.runners.pytorch import TorchRunner
from asvit_deploy.runners.torch_stages import DeviceStages, StaticModel, TorchStages

NAN, INF = float("nan"), float("inf")
BUCKETS = [32, 64, 96, 128, 160, 197]


@pytest.fixture(scope="module")
def small() -> ArchConfig:
    return ArchConfig("as_small", 64, 2, 6, 2, (2, 3, 5), image_size=56, patch_size=4,
                      num_classes=10)  # fmt: skip


@pytest.fixture(scope="module")
def model(small):
    return sharpened(small, open_images(None, small, limit=8))


@pytest.fixture(scope="module")
def pictures(small) -> np.ndarray:
    return open_images(None, small, limit=8).batch(range(8))


def bucketed(model, batch: int = 1, buckets=BUCKETS) -> BucketedRunner:
    return BucketedRunner(TorchStages(model, buckets, batch), 3, buckets)


def test_equals_the_model_one_image_at_a_time(model, pictures):
    reference = TorchRunner(model)
    names = [str(i) for i in range(len(pictures))]
    result = compare(reference, bucketed(model), pictures, names, model.threshold_values())
    assert result.passed, result.failures
    assert result.images == len(pictures)


def test_runs_the_smallest_bucket_that_holds_what_stays(model, pictures):
    runner, seen = bucketed(model), set()
    for picture in pictures:
        lengths = [int(n[0]) for n in runner(picture[None]).lengths]
        wanted = [(1, smallest(BUCKETS, n), model.config.dim) for n in lengths]
        assert runner.executed == wanted
        seen |= {bucket for _, bucket, _ in wanted}
    assert len(seen) > 1, "the pictures say nothing if all fill one bucket"


@pytest.mark.parametrize("batch", [2, 8])
def test_batch_equals_its_images_alone(model, pictures, batch):
    runner = bucketed(model, batch)
    logits = runner.infer(pictures[:batch])
    with torch.no_grad():
        alone = np.concatenate([model(torch.from_numpy(p[None]))[0].numpy() for p in pictures])
    # Rounding of other matrix shapes; sets are equal, or the difference would be 1e-2 or more.
    np.testing.assert_allclose(logits, alone[:batch], atol=1e-4 * np.abs(alone).max(), rtol=0)
    assert all(shape[0] == batch for shape in runner.executed)


def test_what_an_earlier_image_left_behind_changes_nothing(model, pictures):
    runner = bucketed(model)
    first = runner.infer(pictures[:1])
    for picture in pictures[1:]:
        runner.infer(picture[None])
    np.testing.assert_array_equal(runner.infer(pictures[:1]), first)


def test_stage_that_ignored_the_length_would_be_seen(model, pictures, monkeypatch):
    """The zero rows of a bucket are tokens like any other where nothing hides them."""
    runner = bucketed(model, buckets=[197])
    right = runner.infer(pictures[:1])
    monkeypatch.setattr(
        TorchStages,
        "_padded_stage",
        lambda self, stage, tokens, _: self._stage(stage, tokens, None),
    )
    wrong = bucketed(model, buckets=[197]).infer(pictures[:1])
    assert np.abs(right - wrong).max() > 1e-3 * np.abs(right).max()


def test_dense_equals_the_model_without_thresholds(model, pictures):
    with torch.no_grad():
        wanted = model.with_reduction(None)(torch.from_numpy(pictures[:2]))[0].numpy()
    mine = StaticModel(model, None, 2).infer(pictures[:2])
    np.testing.assert_allclose(mine, wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)


def test_top_k_of_the_kept_number_equals_the_thresholds(model, pictures):
    """For one image, keeping its own number of best tokens is what its thresholds do."""
    with torch.no_grad():
        wanted, trace = model(torch.from_numpy(pictures[:1]))
    lengths = [int(length[0]) for length in trace.length]
    mine = StaticModel(model, lengths).infer(pictures[:1])
    np.testing.assert_allclose(mine, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=0)
    fewer = StaticModel(model, [max(n // 2, 2) for n in lengths]).infer(pictures[:1])
    assert np.abs(fewer - wanted.numpy()).max() > 1e-3 * wanted.abs().max().item()


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([NAN, NAN, -INF, -INF], [0, 1]),  # not row 3, which only fills the bucket
        ([-INF, NAN, -INF, -INF], [0, 2]),
        ([0.1, NAN, -INF, -INF], [0, 1]),
        ([NAN, 0.1, -INF, -INF], [0, 2]),
        ([-INF, -INF, -INF, -INF], [0, 1]),
    ],
)
def test_rows_that_fill_a_bucket_never_come_back(scores, kept):
    """Three rows in a bucket of five; the runner hands over the whole bucket."""
    stages = DeviceStages([0.5], [2, 5], 4, 8, 1, torch.float32, torch.float32, "cpu")
    tokens = torch.arange(20.0).reshape(1, 5, 4)
    found = stages.compact(0, Cut(tokens, torch.tensor([scores])), 3)
    assert (found.rows, found.index[0, : found.rows].tolist()) == (2, kept)
    assert found.tokens[0, : found.rows].equal(tokens[0, kept])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 8])
def test_graphs_on_a_gpu_equal_the_model(model, pictures, batch):
    if not torch.cuda.is_available():
        pytest.skip("this torch finds no GPU")
    runner = BucketedRunner(TorchStages(model, BUCKETS, batch, device="cuda"), 3, BUCKETS)
    with torch.no_grad():
        wanted = np.concatenate([model(torch.from_numpy(p[None]))[0].numpy() for p in pictures])
    for _ in range(2):  # a graph is replayed
        for first in range(0, len(pictures), batch):
            mine = runner.infer(pictures[first : first + batch])
            right = wanted[first : first + batch]
            np.testing.assert_allclose(mine, right, atol=1e-3 * np.abs(wanted).max(), rtol=0)
