"""What pictures show of an output, and what they do not."""

from __future__ import annotations

import numpy as np
import pytest
from made import DEMAND, seen

from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import arch
from asvit_deploy.tuning import bounds
from asvit_deploy.tuning.demand import Demand, Evidence, evidence, judged

MINI = arch("as_deit_mini")
LABELS = Demand("labels", 0.5, 0.95)
COSINE = Demand("embeddings", 0.5, 0.95)


def test_six_hundred_pictures_without_a_change_show_half_a_point():
    found = judged(seen(600, 0), DEMAND)
    assert found["passed"]
    assert found["loss_bound"] < 0.5
    assert found["more"] == 0
    assert not judged(seen(597, 0), DEMAND)["passed"]


def test_sixty_four_pictures_do_not_and_it_is_said_how_many_would():
    found = judged(seen(64, 0), DEMAND)
    assert not found["passed"]
    assert not found["refuted"]
    assert found["more"] == pytest.approx(598 - 64, abs=2)
    assert bounds.upper(0, 64 + found["more"]) <= 0.005


def test_more_pictures_that_go_alike_are_as_many_as_are_said():
    found = judged(seen(1000, 2), DEMAND)
    assert not found["passed"]
    total = 1000 + found["more"]
    assert bounds.upper(-(-2 * total // 1000), total) <= 0.005


def test_a_loss_beyond_the_demand_is_refuted_and_no_number_of_pictures_would_help():
    found = judged(seen(500, 50), DEMAND)
    assert found["refuted"]
    assert found["more"] is None
    nearly = judged(seen(500, 4), DEMAND)  # 0.8 points: above the demand, and not surely so
    assert not nearly["refuted"]
    assert nearly["more"] is None


def labelled(total: int, worse: int, better: int) -> Evidence:
    place = np.arange(total)
    bad, good = place < worse, (place >= worse) & (place < worse + better)
    return Evidence(np.zeros(total), bad | good, bad, good)


def test_accuracy_may_fall_less_than_answers_change():
    """Ten answers change for the better: agreement is low, and nothing is lost."""
    found = judged(labelled(2000, 0, 10), LABELS)
    assert found["passed"]
    assert found["loss"] == pytest.approx(-0.5)
    assert found["agreement"] == pytest.approx(0.995)
    assert not judged(seen(2000, 10), DEMAND)["passed"]


def test_accuracy_that_falls_is_refuted_where_nothing_gets_better():
    assert judged(labelled(1000, 60, 0), LABELS)["refuted"]
    assert not judged(labelled(1000, 60, 58), LABELS)["refuted"]


def test_what_changes_to_another_wrong_class_costs_no_accuracy():
    dense = np.eye(10, dtype=np.float32)[[1, 2, 3]]
    other = np.eye(10, dtype=np.float32)[[1, 5, 6]]
    found = evidence(MINI, dense, other, np.array([1, 2, 7]))
    assert found.changed is not None
    assert found.worse is not None
    assert found.better is not None
    assert found.changed.tolist() == [False, True, True]
    assert found.worse.tolist() == [False, True, False]
    assert not found.better.any()


def test_an_output_of_nan_is_no_answer():
    dense = np.eye(10, dtype=np.float32)[:2]
    broken = dense.copy()
    broken[0] = np.nan
    found = evidence(MINI, dense, broken, np.array([0, 1]))
    assert found.changed is not None
    assert found.worse is not None
    assert found.changed.tolist() == [True, False]
    assert found.worse.tolist() == [True, False]


def test_cosines_are_judged_by_the_lower_end():
    good = Evidence(np.full(40, 0.01), cosine=np.linspace(0.97, 0.999, 40), neighbour=0.9)
    found = judged(good, COSINE)
    assert found["passed"]
    assert found["expected_low"] < found["agreement_low"] < found["agreement"]
    spread = Evidence(np.zeros(40), cosine=np.linspace(0.905, 0.999, 40))
    near = judged(spread, COSINE)
    assert not near["passed"]
    assert near["more"] > 40
    low = judged(Evidence(np.zeros(40), cosine=np.full(40, 0.9)), COSINE)
    assert low["refuted"]
    assert low["more"] is None


def test_few_cosines_show_nothing():
    found = judged(Evidence(np.zeros(9), cosine=np.full(9, 0.999)), COSINE)
    assert not found["passed"]
    assert found["more"] == 16 - 9


def test_evidence_comes_back_from_its_fields():
    one = labelled(5, 2, 1)
    back = Evidence.of_fields(one.fields())
    for name, value in vars(one).items():
        if value is not None:
            assert np.array_equal(getattr(back, name), value)
            assert getattr(back, name).dtype == value.dtype


def test_embeddings_without_a_direction_are_refused():
    config = arch("as_deit_mini")
    from dataclasses import replace

    config = replace(config, head="none")
    with pytest.raises(UserError, match="no cosine"):
        evidence(config, np.zeros((3, 4), np.float32), np.ones((3, 4), np.float32), None)
