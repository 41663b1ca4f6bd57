"""The page of `tune`: its verdict, what was judged, what was timed."""

from __future__ import annotations

from typing import Any

import page_reports as reports
import pytest
from conftest import raises_one_line

from asvit_deploy.page.reading import of_dicts
from asvit_deploy.page.rendering import page_of
from asvit_deploy.page.writing import MOST_BYTES

ROW = "onnxruntime, tome at 0.6"
FAILED = reports.check(wrong=9) | {"model": "vit.onnx"}
SPAN = reports.interval(1.4, 1.3, 1.5)


def report(go: bool | None = True, task: str = "classes", **more: Any) -> dict[str, Any]:
    """As `tune.json` has it, in short."""
    tested = {"name": "tome at 0.6", "macs_share": 0.6, "tested": True, "agreement": 0.99,
              "agreement_low": 0.98, "agreement_high": 1.0, "passed": bool(go),
              "pictures": 700, "loss_bound": 0.01 if task == "embeddings" else 1.25}  # fmt: skip
    rows = [{"name": "onnxruntime, dense", "kind": "dense", "p50_ms": 9.0, "p99_ms": 9.9},
            {"name": "onnxruntime, tome at 0.6", "kind": "adaptive", "p50_ms": 6.0, "p99_ms": 7.0,
             "speedup": SPAN, "speedup_p99": SPAN}]  # fmt: skip
    promise = {"ratio": 1.4, "low": 1.3, "high": 1.5, "agreement": 0.99, "agreement_low": 0.98,
               "agreement_high": 1.0, "expected_low": 0.975, "expected_high": 1.0,
               "pictures": 700, "p50_ms": 6.0, "runtime": "onnxruntime", "over": "dense",
               "candidate": "tome at 0.6"}  # fmt: skip
    return {
        "kind": "tune", "model": "vit.safetensors",
        "demand": {"task": task, "max_drop_points": 0.5},
        "pictures": {"source": "digits", "calibrating": 96, "judging": 700},
        "verdict": {
            "go": go, "why": "x", "sentence": f"{'go' if go else 'no go'}: so it is",
            "winner": ROW if go else None, "nearest": None if go else ROW,
            "over_fastest_dense": SPAN, "fastest_dense": "openvino, dense",
        },
        "frontier": [{"name": ROW, "agreement": 0.99, "agreement_low": 0.98,
                      "agreement_high": 1.0, "pictures": 700, "loss": 0.2, "loss_bound": 1.25,
                      "certified": bool(go)}],
        "promise": promise if go else None,
        "sequence": [tested, {"name": "tome at 0.4", "macs_share": 0.4, "tested": False}],
        "latency": [{"batch": 1, "runs": 40, "rows": rows, "notes": ["no rows of torch"],
                     "busy": None}],
        "notes": ["nearly alike"], "left_out": ["bf16: no time left"], **more,
    }  # fmt: skip


def shown(*made: dict[str, Any]) -> str:
    return page_of(of_dicts(list(made)), MOST_BYTES)


def test_a_go_shows_what_is_promised():
    page = shown(report())
    for words in ("so it is", "tome at 0.6", "1.40", "97.5", ">does not pass<", "not tested",
                  "no rows of torch", "left out: bf16", "96 others calibrated"):  # fmt: skip
        assert (words in page) == (words != ">does not pass<"), words


@pytest.mark.parametrize(
    ("go", "lead"),
    [(True, "Worth it here"), (False, "Not worth it here"), (None, "Not shown yet")],
)
@pytest.mark.parametrize("task", ["classes", "embeddings"])
def test_the_first_screen_has_the_verdict_and_three_figures(go, lead, task):
    first = shown(report(go, task)).split("<nav")[0]
    assert f"<strong>{lead}</strong>: so it is." in first
    for words in ("1.40×", "the speed of openvino, dense", ">700<", "digits; 96 others"):
        assert words in first
    assert ("0.9900" if task == "embeddings" else "1.00\u00a0%") in first
    assert "Nothing was" not in shown(report(go, task))


def test_a_failed_parity_outweighs_a_go():
    for both in ([report(), FAILED], [FAILED, report()]):
        first = shown(*both).split("<nav")[0]
        assert "<strong>Not to be trusted yet</strong>" in first
        assert "so it is" in first


@pytest.mark.parametrize("go", [False, None])
def test_without_a_go_there_is_no_promise(go):
    page = shown(report(go))
    assert "Promised of" not in page
    assert ">does not pass<" in page


def test_embeddings_are_shown_as_cosines():
    page = shown(report(task="embeddings"))
    assert "0.9900" in page
    assert "cosine (95" in page


def test_labels_show_the_accuracy_that_was_judged_and_not_how_many_answers_changed():
    first = shown(report(task="labels")).split("<nav")[0]
    assert "0.20 points" in first
    assert "at most 1.25 by the one-sided 95" in first
    assert "another top-1" not in first


def test_the_interval_of_the_first_screen_is_the_reports_own():
    first = shown(report()).split("<nav")[0]
    assert "interval 0.00\u00a0% to 2.00\u00a0%, 700 pictures" in first


def test_what_is_no_report_of_tune_is_refused():
    raises_one_line(lambda: shown(report(latency=[{"batch": "x", "runs": 1, "rows": []}])),
                    "batch")  # fmt: skip
