"""Thresholds onto the budget: between scores, and the same however pictures are shared out."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from asvit_deploy import fitting
from asvit_deploy.budget import network_macs, trace_macs
from asvit_deploy.fitting import MOST_PASSES, Fit, Shares, fit_thresholds
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.ltmp import LTMP, NEVER
from asvit_deploy.reduction.topk import TopKNearest

BUDGET, BATCH = 0.65, 8
PICTURES = 20  # two whole batches and a part of one


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(fitting, "BATCH", BATCH)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(PICTURES, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def network() -> ViT:
    torch.manual_seed(0)
    model = build(arch("as_deit_mini"), adaptive=True).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(6)  # type: ignore[operator, union-attr]
    return model


def fitted(model: ViT, images: Tensor, shares: Shares | None = None) -> Fit:
    shares = shares or Shares(len(images))
    own = (images[numbers.start : numbers.stop] for numbers in shares.batches)
    return fit_thresholds(model, own, BUDGET, shares)


def test_they_meet_the_budget_and_lie_between_scores(images):
    model, passed = network(), []
    shares = Shares(PICTURES)
    fit = fit_thresholds(model, images.split(BATCH), BUDGET, shares, passed.append)
    assert fit.after == pytest.approx(BUDGET, rel=1e-2)
    assert (fit.pictures, fit.missed) == (PICTURES, False)
    assert PICTURES < sum(passed) <= MOST_PASSES * PICTURES
    with torch.no_grad():
        traces = [model(batch)[1] for batch in images.split(BATCH)]
    whole = torch.cat([trace_macs(model.config, trace) for trace in traces])
    assert whole.mean().item() == fit.after  # as the whole network has it
    for stage, threshold in enumerate(model.thresholds):
        scores = torch.cat([trace.scores[stage].flatten() for trace in traces])
        under, over = scores[scores <= threshold].max(), scores[scores > threshold].min()
        under = under if under.isfinite() else torch.zeros(())
        assert threshold.item() == pytest.approx((under + over).item() / 2, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("merge", [NEVER, 0.003, 0.01])
def test_of_ltmp_too_they_are_what_the_network_has(images, merge):
    """Its scores depend on both thresholds, of which one is fitted."""
    model = network().with_reduction(LTMP((0, 1, 2, 3)))
    for one, other in zip(model.reduction.merge, model.reduction.prune):
        one.fill_(merge)
        other.fill_(0.1)
    fit = fitted(model, images)
    assert fit.after == pytest.approx(BUDGET, rel=1e-2)
    assert fit.after != fit.before
    macs = [network_macs(model, model(batch)[1]) for batch in images.split(BATCH)]
    assert fit.after == torch.cat(macs).mean().item()
    assert [one.item() for one in model.reduction.merge] == pytest.approx([merge] * 4)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_find_what_one_does(world, images):
    """Threads in place of processes, which add up what each has; of five, two have no picture."""
    alone = network()
    expected = fitted(alone, images)
    given: dict[int, Tensor] = {}
    gate = threading.Barrier(world, timeout=60)

    def work(rank: int) -> tuple[Fit, list[float]]:
        def summed(own: Tensor) -> Tensor:
            given[rank] = own
            gate.wait()
            total = torch.stack([given[i] for i in range(world)]).sum(0)
            gate.wait()
            return total

        model = network_of[rank]
        return fitted(model, images, Shares(PICTURES, rank, world, summed)), (
            model.threshold_values()
        )

    network_of = [network() for _ in range(world)]
    with ThreadPoolExecutor(world) as pool:
        for fit, thresholds in pool.map(work, range(world)):
            assert fit == expected
            assert thresholds == alone.threshold_values()


def test_every_picture_is_one_processs(images):
    for world in (1, 2, 3, 7):
        shares = [Shares(PICTURES, rank, world) for rank in range(world)]
        dealt = [number for share in shares for batch in share.batches for number in batch]
        assert sorted(dealt) == list(range(PICTURES))


def count(calls: list[int], place: int, *_: object) -> None:
    calls[place] += 1


def test_the_first_blocks_run_once_as_far_as_memory_goes(images, monkeypatch):
    whole, scarce, none = network(), network(), network()
    rows = whole.config.rows * whole.config.dim * 4 * BATCH
    found = []
    for model, room in ((whole, 1 << 30), (scarce, rows + rows // 2), (none, 0)):
        monkeypatch.setattr(fitting, "_KEPT_BYTES", room)
        calls = [0, 0]
        for place in (0, -1):
            model.blocks[place].attn.register_forward_pre_hook(partial(count, calls, place))
        found.append((fitted(model, images), model.threshold_values(), calls))
    assert found[0][:2] == found[1][:2] == found[2][:2]
    assert [calls[1] for _, _, calls in found] == [0, 0, 0]  # no figure needs the last block
    assert found[0][2][0] == 3
    assert 3 < found[1][2][0] < found[2][2][0]


def test_all_that_is_kept_is_counted(images, monkeypatch):
    """Rows, and of a method that looks at pairs what it found of them."""
    model = network().with_reduction(TopKNearest((1, 2, 3)))
    start = fitting._Passes(model, images.split(BATCH), Shares(PICTURES), len)._kept[0]
    rows, decision = start
    assert decision.nearness is not None
    whole = fitting._bytes(rows) + fitting._bytes(decision)
    assert whole > rows.tokens.nbytes + decision.score.nbytes + decision.nearness.nbytes
    calls = [0]
    model.blocks[0].attn.register_forward_pre_hook(partial(count, calls, 0))
    for room, kept, worked_out in ((whole - 1, 0, 1), (whole, 1, 1), (whole + 1, 1, 2)):
        monkeypatch.setattr(fitting, "_KEPT_BYTES", room)
        calls[0] = 0
        passes = fitting._Passes(model, images.split(BATCH), Shares(PICTURES), len)
        assert sum(isinstance(one, tuple) for one in passes._kept) == kept
        assert calls[0] == worked_out


def test_it_leaves_the_mode_and_the_graph_alone(images):
    model = network().train()
    model.reduction.eval()
    fitted(model, images[:BATCH])
    assert model.training
    assert not model.reduction.training
    model.eval().reduction.train()
    fitted(model, images[:BATCH])
    assert not model.training
    assert model.reduction.training
    assert all(threshold.requires_grad for threshold in model.thresholds)
    logits, _, masks = model.forward_masked(images[:2])
    (logits.sum() + sum(mask.sum() for mask in masks)).backward()
    assert model.thresholds[0].grad is not None
