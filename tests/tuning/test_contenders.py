"""What stands for a budget: fitted and compared on the calibrating pictures alone."""

from __future__ import annotations

import numpy as np
import pytest

from asvit_deploy.budget import fixed_counts
from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.topk import TopK
from asvit_deploy.tuning.clock import Clock, OutOfTime
from asvit_deploy.tuning.contenders import (
    Bench,
    Candidate,
    Way,
    closest,
    other_placements,
    reduction_of,
    state_of,
    usual_ways,
    with_values,
)
from asvit_deploy.tuning.demand import Demand, Evidence
from asvit_deploy.tuning.means import means
from asvit_deploy.tuning.search import Search
from asvit_deploy.tuning.store import Store

MINI, SMALL = arch("as_deit_mini"), arch("as_deit_small")


@pytest.fixture(scope="module")
def bench(mini, photos, tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("measured"), {}, print)
    return Bench(mini.with_reduction(None), list(photos), None, store)


def at(apart: float, own: bool, spread: float = 0.001) -> Candidate:
    reduction = TopK([1, 3], None if own else [30, 20])
    distances = apart + spread * np.linspace(-1, 1, 40)
    seen = Evidence(distances, np.zeros(40, bool))
    return Candidate(Way("topk", per_picture=own), 0.6, reduction, 0.6, [30.0], 0.3, seen)


def test_the_closest_wins_and_counts_of_their_own_only_beyond_chance():
    fixed, worse, better = at(0.10, False), at(0.12, False), at(0.05, True)
    assert closest([worse, fixed]) is fixed
    assert closest([worse, fixed, better]) is better
    hardly = at(0.099, True, spread=0.5)
    assert closest([worse, fixed, hardly]) is fixed
    assert closest([hardly]) is hardly


def test_a_contender_is_on_budget_and_costs_what_it_says(bench):
    one = bench.fitted(Way("topk"), 0.6)
    assert one.share == pytest.approx(0.6, rel=0.01)
    assert len(one.seen.apart) == 12
    assert not one.varies
    own = bench.fitted(Way("topk", per_picture=True), 0.6)
    assert own.share == pytest.approx(0.6, rel=0.02)
    assert own.spread > 0
    again = bench.fitted(Way("topk"), 0.6)
    assert bench.store.reused == 1
    assert np.array_equal(again.seen.apart, one.seen.apart)


def test_what_cannot_meet_a_budget_is_remembered_too(bench):
    for _ in range(2):
        with pytest.raises(UserError, match="out of reach"):
            bench.fitted(Way("size-passing"), 0.05)


def test_what_cannot_be_kept_ends_the_search(mini, photos, tmp_path):
    """A full disk in the middle leaves no method out: the run ends, with that line."""
    store = Store(tmp_path, {}, print)
    bench = Bench(mini.with_reduction(None), list(photos[:2]), None, store)
    way = Way("topk")
    settings = {"step": "fitted", **way.fields(), "budget": 0.9}
    store._path(settings).mkdir()
    search = Search(bench, ["topk"], Demand("classes", 5.0, 0.95), Clock(None, print), None,
                    lambda: 0.0, print)  # fmt: skip
    with pytest.raises(UserError, match="it is a folder"):
        search.run()
    assert search.found.notes == []


def test_a_reduction_comes_back_with_its_thresholds():
    made = with_values(SizePassing([0, 1, 2], None), [0.1, 0.2, 0.3])
    back = reduction_of(state_of(made), 1)
    assert [one.item() for one in back.boundaries()] == pytest.approx([0.1, 0.2, 0.3])
    counts = fixed_counts(MINI, TopK, 0.6)
    assert reduction_of(state_of(counts), 1).fields() == counts.fields()


def test_other_placements_are_elsewhere_and_inside_the_network():
    for name in ("size-passing", "topk", "evit"):
        ways = other_placements(SMALL, Way(name))
        assert ways
        assert len({way.blocks for way in ways}) == len(ways)
        for way in ways:
            assert way.blocks is not None
            assert all(0 <= block < SMALL.depth for block in way.blocks)
    assert other_placements(SMALL, Way("threshold")) == []


def test_methods_that_are_named_are_tried_and_no_others():
    assert usual_ways(MINI, ["bat"]) == [Way("bat")], "it has no thresholds"
    assert usual_ways(MINI, ["topk"]) == [Way("topk"), Way("topk", per_picture=True)]
    assert {way.method for way in usual_ways(MINI, [])} >= {"size-passing", "tome"}


def test_a_clock_says_what_it_left_out():
    said: list[str] = []
    clock = Clock(1.0, said.append)
    assert clock.allows(5, "a little")
    assert not clock.allows(100, "much")
    assert len(clock.left_out) == len(said) == 1
    assert "much" in clock.left_out[0]
    clock.end = 0.0
    with pytest.raises(OutOfTime):
        clock.require()
    assert Clock(None, print).allows(1e9, "anything")


def test_the_least_useful_is_dropped_first():
    found = means("onnxruntime,torch", "float32,int8", "1,8")
    order = []
    while (less := found.cheaper()) is not None:
        order.append((less.batches, less.runtimes, less.precisions))
        found = less
    assert [len(one) for one in order[0]] == [1, 2, 2]
    assert [len(one) for one in order[1]] == [1, 1, 2]
    assert order[-1] == ((1,), ("onnxruntime",), ("float32",))
