"""A schedule searched for, and pairs of thresholds: on budget, no worse than where they started."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import raises_one_line

from asvit_deploy import per_picture, scheduling, settling
from asvit_deploy.budget import carried_out, fixed_counts, macs_of
from asvit_deploy.choice import Wanted, carried_out_on, choose
from asvit_deploy.distance import distance
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import teacher_macs
from asvit_deploy.reduction.dynamicvit import DynamicViT
from asvit_deploy.reduction.ltmp import LTMP
from asvit_deploy.reduction.schedule import Schedule
from asvit_deploy.reduction.topk import TopK

CONFIG = replace(arch("as_deit_mini"), depth=4, stages=(1, 2, 3), image_size=28).saving()
IMAGES = list(np.random.default_rng(0).normal(size=(12, 3, 28, 28)).astype(np.float32))


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    model = build(CONFIG, adaptive=False).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    return model


def apart(model, method):
    twin = carried_out_on(model, IMAGES).output
    other = carried_out_on(model.with_reduction(method), IMAGES).output
    return distance(CONFIG, twin, other).mean()


def test_a_schedule_is_on_budget_and_closer_than_one_ratio(dense):
    passes = []
    found = scheduling.search(
        dense, IMAGES, 0.6, lambda twin, other: distance(CONFIG, twin, other).mean(),
        tick=lambda: passes.append(1),
    )  # fmt: skip
    start = fixed_counts(CONFIG, Schedule, 0.6)
    assert found.blocks == start.blocks == (0, 1, 2)
    assert carried_out(CONFIG, found) / teacher_macs(CONFIG) == pytest.approx(0.6, rel=0.01)
    assert apart(dense, found) < apart(dense, start)
    assert len(passes) <= scheduling.MOST_TRIED * len(IMAGES)


def test_dense_outputs_without_a_direction_are_refused(dense):
    """Not passed over as a schedule's are, where the first that was tried would win."""
    config = replace(CONFIG, head="none")
    torch.manual_seed(0)
    model = build(config, adaptive=False).eval()
    torch.nn.init.zeros_(model.norm.weight)
    words = "as_deit_mini, dense,", "embeddings that are zero or not finite"
    raises_one_line(lambda: settling.on_budget(model, Schedule, IMAGES, 0.7), *words)


@pytest.mark.parametrize("budget", [0.8, 0.55])
def test_pairs_of_thresholds_meet_a_budget(dense, budget):
    made = per_picture.fit_pairs(dense, IMAGES, budget)
    lengths = carried_out_on(dense.with_reduction(made), IMAGES).lengths
    share = macs_of(CONFIG, made, lengths).mean() / teacher_macs(CONFIG)
    assert share == pytest.approx(budget, rel=0.01)
    assert lengths[:, -1].std() > 0
    assert all(one.item() > 0 for one in made.parameters())


def test_a_budget_out_of_reach_is_refused(dense):
    for method in (Schedule, LTMP):
        raises_one_line(lambda m=method: settling.on_budget(dense, m, IMAGES, 0.01),
                        "budget 0.01 is out of reach")  # fmt: skip


@torch.no_grad()
def test_predictors_go_along_to_another_budget(dense):
    raises_one_line(lambda: settling.on_budget(dense, DynamicViT, IMAGES, 0.7),
                    "dynamicvit must be trained")  # fmt: skip
    own = DynamicViT.planned(CONFIG.dim, 1, (1, 2, 3), (30, 20, 10))
    taught = dense.with_reduction(own)
    wanted = own.predictors[0].out_conv[4].weight
    found = choose(taught, IMAGES, Wanted(DynamicViT, 0.7)).reduction
    assert carried_out(CONFIG, found) / teacher_macs(CONFIG) == pytest.approx(0.7, rel=0.01)
    assert torch.equal(found.predictors[0].out_conv[4].weight, wanted)
    found = choose(taught, IMAGES, Wanted(DynamicViT, 0.7, per_picture=True)).reduction
    assert found.kept is None
    assert torch.equal(found.predictors[0].out_conv[4].weight, wanted)


def test_predictors_stay_where_they_were_trained(dense):
    taught = dense.with_reduction(DynamicViT.planned(CONFIG.dim, 1, (1, 3), (30, 10)))
    for fit in (settling.on_budget, per_picture.fit):
        assert fit(taught, DynamicViT, IMAGES, 0.8).blocks == (1, 3)
        assert fit(taught, DynamicViT, IMAGES, 0.8, (1, 3)).blocks == (1, 3)
        raises_one_line(lambda f=fit: f(taught, DynamicViT, IMAGES, 0.8, (1, 2)),
                        "cuts 1,2 are others than the 1,3 that this dynamicvit was trained at",
                        "finetune --method dynamicvit --cuts 1,2")  # fmt: skip
        # What no cut learned anything of its own goes anywhere.
        other = taught.with_reduction(TopK((1, 3), (30, 10)))
        assert fit(other, TopK, IMAGES, 0.8, (1, 2)).blocks == (1, 2)


def test_the_report_has_what_the_search_brought(dense):
    report = choose(dense, IMAGES, Wanted(Schedule, 0.6)).report
    assert list(report["methods"]) == ["schedule", "random", "schedule, one ratio"]
    assert report["thresholds"] is None
    report = choose(dense, IMAGES, Wanted(LTMP, 0.6)).report
    assert report["method"] == "ltmp"
    raises_one_line(lambda: choose(dense, IMAGES, Wanted(LTMP, 0.6, per_picture=True)),
                    "its own number of every picture", "drop --per-picture")  # fmt: skip
