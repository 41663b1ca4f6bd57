"""Accuracy, MACs and kept tokens over labelled pictures."""

from __future__ import annotations

import numpy as np
import pytest

from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.accuracy import joined, score, summarise
from asvit_deploy.intervals import wilson
from asvit_deploy.models.macs import dense_macs, model_macs, teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.runners.base import Prediction
from asvit_deploy.runners.pytorch import TorchRunner


def labelled(photos, labels, size):
    pictures = np.stack(list(photos))
    return [(pictures[i : i + size], labels[i : i + size]) for i in range(0, len(pictures), size)]


@pytest.fixture
def guesses(mini, photos):
    return np.array([int(TorchRunner(mini)(p[None]).output.argmax()) for p in photos])


def test_the_models_own_guesses_are_all_right(mini, photos, guesses):
    config = mini.config
    scored = score(TorchRunner(mini), labelled(photos, guesses, 1), config)
    report = summarise(scored, config)
    assert report["top1"]["value"] == report["top5"]["value"] == 1
    lengths = [TorchRunner(mini)(p[None]).lengths for p in photos]
    macs = [model_macs(config, [int(n[0]) for n in stages]) for stages in lengths]
    assert report["gmacs"] * 1e9 == pytest.approx(np.mean(macs))
    assert report["macs_share"] == pytest.approx(np.mean(macs) / teacher_macs(config))
    for stage, histogram in enumerate(report["histogram_kept"]):
        assert sum(histogram) == len(photos)
        counts = np.array([int(stages[stage][0]) - 1 for stages in lengths])
        assert np.array_equal(np.flatnonzero(histogram), np.unique(counts))
        assert report["mean_kept"][stage] == pytest.approx(counts.mean())


def test_wrong_labels_are_counted(mini, photos, guesses):
    wrong = guesses.copy()
    wrong[:3] = (wrong[:3] + 1) % mini.config.num_classes
    report = summarise(score(TorchRunner(mini), labelled(photos, wrong, 1), mini.config),
                       mini.config)  # fmt: skip
    assert report["top1"]["value"] == 9 / 12
    assert report["top1"]["low"] < 0.75 < report["top1"]["high"]


def test_exact_batches_keep_what_single_images_keep(mini, photos, guesses):
    alone = score(TorchRunner(mini), labelled(photos, guesses, 1), mini.config)
    batched = score(TorchRunner(mini), labelled(photos, guesses, 5), mini.config)
    assert np.array_equal(alone.kept, batched.kept)
    assert np.array_equal(alone.rank, batched.rank)


def test_mean_k_gives_a_batch_one_count(mini, photos, guesses):
    runner = TorchRunner(mini, "mean-k")
    scored = score(runner, labelled(photos, guesses, 6), mini.config)
    assert len(np.unique(scored.kept[:6], axis=0)) == 1
    assert len(np.unique(score(runner, labelled(photos, guesses, 1), mini.config).kept, axis=0)) > 1


def test_a_dense_model_has_no_stages(mini, photos, guesses):
    dense = ViT(mini.config, None)
    report = summarise(score(TorchRunner(dense), labelled(photos, guesses, 4), mini.config),
                       mini.config)  # fmt: skip
    assert report["gmacs"] * 1e9 == dense_macs(mini.config)
    assert report["mean_kept"] == report["histogram_kept"] == []


def test_no_pictures_are_refused(mini):
    nothing = score(TorchRunner(mini), [], mini.config)
    assert nothing.rank.shape == nothing.macs.shape == (0,)
    with pytest.raises(UserError, match="no picture"):
        joined([nothing, nothing])


def test_shares_join_to_the_whole(mini, photos):
    labels = np.arange(len(photos)) % 10
    whole = score(TorchRunner(mini), labelled(photos, labels, 1), mini.config)
    shares = [score(TorchRunner(mini), labelled(photos[r::2], labels[r::2], 1), mini.config)
              for r in (0, 1)]  # fmt: skip
    empty = score(TorchRunner(mini), [], mini.config)
    both = joined([shares[0], empty, shares[1]])
    order = np.r_[0 : len(photos) : 2, 1 : len(photos) : 2]
    for name in ("rank", "kept", "macs"):
        assert np.array_equal(getattr(both, name), getattr(whole, name)[order]), name


def test_wilson_reproduces_known_intervals():
    # R: prop.test(x, n, correct = FALSE)
    for hits, total, low, high in ((0, 20, 0.0, 0.1611), (10, 20, 0.2993, 0.7007),
                                   (97, 100, 0.9155, 0.9897)):  # fmt: skip
        found = wilson(hits, total)
        assert (found["low"], found["high"]) == pytest.approx((low, high), abs=2e-4)


def test_a_model_that_says_nothing_is_not_right(mini):
    """Equal logits and NaN are no answer: the true class stands behind them all."""
    nan = float("nan")
    rows = [[2, 1, 0], [1, 1, 0], [1, 1, 1], [1, nan, 0], [nan, 1, 0], [nan, nan, nan]]

    def says(images):
        return Prediction(np.array(rows, np.float32), [])

    batch = [(np.zeros((len(rows), 3, 1, 1), np.float32), np.zeros(len(rows), np.int64))]
    scored = score(says, batch, mini.config)
    assert scored.rank.tolist() == [0, 1, 2, 1, 3, 3]
    # Three classes: all are among the five best, yet NaN has named none.
    assert summarise(scored, mini.config.at(num_classes=3))["top5"]["value"] == 4 / 6
