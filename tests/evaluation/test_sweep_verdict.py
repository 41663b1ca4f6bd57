"""Sentences on where adaptive wins, from intervals made up for every branch."""

from __future__ import annotations

import pytest

from asvit_deploy.evaluation.sweep_verdict import outcome, sentence, verdicts

INTERVALS = {"w": (1.2, 1.1, 1.3), "l": (0.8, 0.7, 0.9), "d": (1.05, 0.9, 1.2)}
BATCHES = (1, 2, 4, 8)


def interval(letter):
    return dict(zip(("value", "low", "high"), INTERVALS[letter]))


def said(letters, over="batch", values=BATCHES, rival="dense"):
    return sentence(over, rival, [(at, interval(one)) for at, one in zip(values, letters)])


@pytest.mark.parametrize(("low", "high", "found"), [
    (1.01, 1.2, "won"), (0.8, 0.99, "lost"), (0.9, 1.1, "drawn"), (1.0, 1.2, "drawn"),
    (0.8, 1.0, "drawn"),
])  # fmt: skip
def test_the_interval_decides_and_its_edge_is_a_draw(low, high, found):
    assert outcome({"value": 1.0, "low": low, "high": high}) == found


@pytest.mark.parametrize(("letters", "wanted"), [
    ("wwww", "adaptive wins at every batch tried (1 to 8)"),
    ("llww", "adaptive wins from batch 4 on; dense wins up to batch 2"),
    ("ldww", "adaptive wins from batch 4 on; dense wins at batch 1, the smallest tried; a draw at "
             "batch 2"),
    ("wwdl", "adaptive wins up to batch 2; dense wins at batch 8, the largest tried; a draw at "
             "batch 4"),
    ("lwlw", "adaptive wins at batches 2 and 8; dense wins at batches 1 and 4"),
    ("wwlw", "adaptive wins at batches 1, 2 and 8; dense wins at batch 4"),
    ("lllw", "adaptive wins at batch 8, the largest tried; dense wins up to batch 4"),
    ("wddd", "adaptive wins at batch 1, the smallest tried; a draw from batch 2 on"),
    ("lwdd", "adaptive wins at batch 2; dense wins at batch 1, the smallest tried; a draw from "
             "batch 4 on"),
    ("llll", "adaptive wins at none of the batches tried (1 to 8): dense wins at all of them"),
    ("dddd", "adaptive wins at none of the batches tried (1 to 8): all are draws"),
    ("dlld", "adaptive wins at none of the batches tried (1 to 8): dense wins at batches 2 and 4; "
             "a draw at batches 1 and 8"),
])  # fmt: skip
def test_where_adaptive_wins(letters, wanted):
    assert said(letters) == wanted


@pytest.mark.parametrize(("letter", "wanted"), [
    ("w", "adaptive wins at batch 4, the only batch tried"),
    ("l", "adaptive does not win at batch 4, the only batch tried: dense wins"),
    ("d", "adaptive does not win at batch 4, the only batch tried: a draw"),
])  # fmt: skip
def test_a_single_value(letter, wanted):
    assert said(letter, values=(4,)) == wanted


@pytest.mark.parametrize(("over", "values", "letters", "wanted"), [
    ("budget", (0.5, 0.65, 0.8), "wwl",
     "adaptive wins up to budget 0.65; dense wins at budget 0.8, the largest tried"),
    ("budget", (0.5, 0.65, 0.8), "www", "adaptive wins at every budget tried (0.5 to 0.8)"),
    ("budget", (0.5, 0.65), "ll",
     "adaptive wins at none of the budgets tried (0.5 to 0.65): dense wins at all of them"),
    ("size", (160, 224, 384), "lww",
     "adaptive wins from 224 px on; dense wins at 160 px, the smallest tried"),
    ("size", (160, 224, 384), "wdw", "adaptive wins at 160 and 384 px; a draw at 224 px"),
    ("size", (160, 224), "ww", "adaptive wins at every size tried (160 to 224 px)"),
    ("size", (224,), "w", "adaptive wins at 224 px, the only size tried"),
])  # fmt: skip
def test_budgets_and_sizes(over, values, letters, wanted):
    assert said(letters, over, values) == wanted


@pytest.mark.parametrize(("letters", "wanted"), [
    ("wwww", "adaptive beats static counts of equal MACs at every batch tried (1 to 8)"),
    ("lldd", "adaptive beats static counts of equal MACs at none of the batches tried (1 to 8): "
             "static wins up to batch 2; a draw from batch 4 on"),
    ("llww", "adaptive beats static counts of equal MACs from batch 4 on; static wins up to "
             "batch 2"),
])  # fmt: skip
def test_against_static(letters, wanted):
    assert said(letters, rival="static") == wanted


def test_one_runtime_and_static():
    assert (said("l", values=(2,), rival="static") == "adaptive does not beat static counts of "
            "equal MACs at batch 2, the only batch tried: static wins")  # fmt: skip


def point(at, *rows):
    return {"at": at, "rows": [
        {"runtime": runtime, "kind": kind, "p50_ms": ms, **ratios}
        for runtime, kind, ms, ratios in rows
    ]}  # fmt: skip


def test_each_runtime_is_judged_by_its_fastest_adaptive_row():
    lost, won = {"speedup": interval("l")}, {"speedup": interval("w")}
    beside = {**won, "over_static": interval("d")}
    points = [
        point(1, ("torch", "dense", 1.0, {}), ("torch", "adaptive", 2.0, lost),
              ("openvino", "dense", 3.0, {}), ("openvino", "adaptive", 2.0, beside)),
        point(2, ("torch", "adaptive", 2.0, lost), ("torch", "adaptive", 1.0, won),
              ("torch", "static", 0.5, won)),
    ]  # fmt: skip
    assert verdicts("batch", points) == [
        "torch: adaptive wins at batch 2, the largest tried; dense wins at batch 1, the smallest "
        "tried",
        "openvino: adaptive wins at batch 1, the only batch tried",
        "openvino: adaptive does not beat static counts of equal MACs at batch 1, the only batch "
        "tried: a draw",
    ]
    assert verdicts("batch", []) == []
