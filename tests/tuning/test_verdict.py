"""Each way in which a run may end, from certificates and timings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made import DEMAND, candidate, certificates, seen, shown, timing

from asvit_deploy.tuning.certify import Trial
from asvit_deploy.tuning.demand import Demand, judged
from asvit_deploy.tuning.verdict import decide, promise


def more(judging: int) -> int:
    return 2 * judging


def test_go_where_what_passes_is_faster():
    test = shown()
    run = timing({(None, "float32"): 10, (test.candidate, "float32"): 7})
    found = decide(run, certificates(test), DEMAND, more)
    assert (found.go, found.why, found.code) == (True, "adaptive_wins", 0)
    assert "go: onnxruntime, topk at 0.6" in found.sentence
    assert "at most 0.43 %" in found.sentence
    told = promise(found, run)
    assert told["ratio"] == pytest.approx(10 / 7, rel=0.02)
    assert told["expected_low"] <= told["agreement_low"] <= told["agreement"]


def test_of_what_passes_the_fastest_wins_not_the_one_with_the_fewest_macs():
    slow, fast = shown(budget=0.4), shown(budget=0.6)
    run = timing({(None, "float32"): 10, (slow.candidate, "float32"): 8,
                  (fast.candidate, "float32"): 6})  # fmt: skip
    found = decide(run, certificates(fast, slow), DEMAND, more)
    assert found.winner is not None
    assert found.winner.test is fast


@pytest.mark.parametrize(("adaptive", "words"), [(10, "as fast"), (13, "faster")])
def test_no_go_where_dense_is_as_fast(adaptive, words):
    test = shown()
    run = timing({(None, "float32"): 10, (test.candidate, "float32"): adaptive}, spread=0.1)
    found = decide(run, certificates(test), DEMAND, more)
    assert (found.go, found.why, found.code) == (False, "dense_as_fast", 3)
    assert f"dense is {words} here" in found.sentence
    assert promise(found, run) is None


def test_dense_wins_even_where_nothing_is_shown_of_the_output():
    """A tiny network: no number of pictures would make it faster."""
    test = shown(pictures=20)
    run = timing({(None, "float32"): 1, (test.candidate, "float32"): 1.5})
    assert decide(run, certificates(test), DEMAND, more).why == "dense_as_fast"


def test_dense_int8_that_meets_the_demand_beats_adaptive_float32():
    test = shown()
    run = timing({(None, "float32"): 10, (test.candidate, "float32"): 7, (None, "int8"): 4})
    found = decide(run, certificates(test, int8=judged(seen(700, 0), DEMAND)), DEMAND, more)
    assert (found.why, found.code) == ("dense_int8_wins", 3)
    assert "dense int8 beats adaptive float32" in found.sentence


def test_dense_int8_that_does_not_is_no_rival_and_is_named():
    test = shown()
    run = timing({(None, "float32"): 10, (test.candidate, "float32"): 7, (None, "int8"): 4})
    found = decide(run, certificates(test, int8=judged(seen(700, 30), DEMAND)), DEMAND, more)
    assert found.go
    assert "onnxruntime, dense, int8 is faster still, but not shown" in found.sentence


def test_adaptive_int8_over_dense_int8():
    test = shown(precision="int8")
    run = timing({(None, "float32"): 10, (test.candidate, "int8"): 3, (None, "int8"): 4})
    found = decide(run, certificates(test, int8=judged(seen(700, 0), DEMAND)), DEMAND, more)
    assert found.go
    assert found.winner is not None
    assert found.winner.over["value"] == pytest.approx(4 / 3, rel=0.02)


def test_not_shown_says_how_many_more_pictures_would():
    test = shown(pictures=64)
    run = timing({(None, "float32"): 10, (test.candidate, "float32"): 7})
    found = decide(run, certificates(test), DEMAND, more)
    assert (found.go, found.why, found.code) == (None, "more_pictures", 4)
    assert found.more == 2 * test.found["more"]
    assert f"about {found.more:,} more pictures would" in found.sentence
    assert "topk at 0.6" in found.sentence


def test_a_demand_that_nothing_meets_names_the_nearest():
    test = shown(changed=60)
    run = timing({(None, "float32"): 10, (test.candidate, "float32"): 7})
    found = decide(run, certificates(test), DEMAND, more)
    assert (found.go, found.why, found.code) == (False, "nothing_meets_the_demand", 3)
    assert found.nearest == "onnxruntime, topk at 0.6"
    assert "60 did of 700" in found.sentence


def test_what_passes_but_is_no_faster_does_not_hide_what_is_faster_and_not_shown():
    slow, fast = shown(budget=0.9), shown(budget=0.5, changed=3)
    run = timing({(None, "float32"): 10, (slow.candidate, "float32"): 10.2,
                  (fast.candidate, "float32"): 6})  # fmt: skip
    found = decide(run, certificates(slow, fast), DEMAND, more)
    assert found.why == "more_pictures"
    assert "topk at 0.9 passes and is no faster" in found.sentence


def test_what_was_never_tested_is_not_taken():
    """The sequence ended before it; it is faster, and nothing is known of it."""
    failed = shown(budget=0.7, changed=60)
    later = Trial(shown(budget=0.5).candidate, "float32", 0.1)
    run = timing({(None, "float32"): 10, (later.candidate, "float32"): 5})
    found = decide(run, certificates(failed, later), DEMAND, more)
    assert (found.go, found.why, found.code) == (None, "not_tested", 4)
    assert found.nearest == "onnxruntime, topk at 0.5"
    assert "was not tested, because topk at 0.7 did not pass" in found.sentence


def test_what_hardly_passes_on_the_calibrating_pictures_leaves_no_question_open():
    failed = shown(budget=0.7, changed=60)
    later = Trial(candidate(0.5, changed=20), "float32", 0.1)
    run = timing({(None, "float32"): 10, (later.candidate, "float32"): 5})
    found = decide(run, certificates(failed, later), DEMAND, more)
    assert found.why == "nothing_meets_the_demand"
    assert "topk at 0.7" in found.sentence


def test_the_nearest_is_the_fastest_row_of_what_did_not_pass():
    test = shown(changed=60)
    run = timing({(None, "float32"): 10, (test.candidate, "float32"): 7})
    slower = timing({(test.candidate, "float32"): 9})
    run.entries.append(replace(slower.entries[0], runtime="openvino"))
    run.seconds.append(slower.seconds[0])
    run.macs.append(slower.macs[0])
    run.runners.append(slower.runners[0])
    found = decide(run, certificates(test), DEMAND, more)
    assert found.nearest == "onnxruntime, topk at 0.6"
    assert found.over is not None
    assert found.over["value"] == pytest.approx(10 / 7, rel=0.02)


@pytest.mark.parametrize(
    ("demand", "words"),
    [
        (DEMAND, "top-1 may differ on at most 0.5 % of the pictures"),
        (Demand("labels", 0.5, 0.95), "accuracy may fall by at most 0.5 points"),
        (Demand("embeddings", 0.5, 0.95), "the mean cosine may not be below 0.95"),
    ],
)
def test_a_demand_in_words(demand, words):
    assert demand.said() == words


def test_a_busy_machine_is_said_instead_of_a_verdict():
    test = shown()
    run = timing({(None, "float32"): 10, (test.candidate, "float32"): 2}, spread=2.0)
    found = decide(run, certificates(test), DEMAND, more)
    assert (found.go, found.why, found.code) == (None, "busy", 4)
    assert "the machine was busy" in found.sentence


def test_nothing_ran():
    found = decide(timing({(None, "float32"): 10}), certificates(), DEMAND, more)
    assert (found.go, found.why, found.code) == (None, "nothing_ran", 4)
