"""What the first screen says, and what takes several reports."""

from __future__ import annotations

import page_reports as reports
import pytest

from asvit_deploy.page.facts import Histograms, Lines, Scatter, Table
from asvit_deploy.page.joined import Page, joined, stem
from asvit_deploy.page.kinds import KINDS
from asvit_deploy.page.reading import of_dicts


def page_of(*made: dict) -> Page:
    return joined([KINDS[one.kind].tell(one.fields) for one in of_dicts(made)])


def verdict(*made: dict) -> str:
    (summary,) = page_of(*made).summaries
    return f"{summary.lead}: {summary.rest}"


def gain(value: float, low: float, high: float) -> dict:
    return reports.changed(reports.bench(), "rows.1.speedup", reports.interval(value, low, high))


def test_worth_it():
    said = verdict(reports.bench(), reports.check())
    assert said == (
        "Worth it here: 1.48 times as fast as dense in onnxruntime; another top-1 than dense on "
        "1.6\u00a0% of the pictures; PyTorch keeps the same tokens on 199 of 200 pictures, and "
        "rounding explains the others"
    )
    (summary,) = page_of(reports.bench(), reports.check()).summaries
    speed, loss, proof = (card.figure for card in summary.cards)
    assert speed
    assert loss
    assert proof
    assert (speed.value, speed.mood) == ("1.48×", "good")
    assert "1.44–1.50; 64.5 ms in place of 95.4 ms, 1 thread, 150 rounds" in speed.span
    assert "0.3–8.3\u00a0%, 64 pictures" in loss.span  # Wilson, of 1 of 64
    assert (proof.value, proof.mood) == ("199/200", "good")
    assert "97.2–99.9\u00a0%" in proof.span


def test_not_worth_it_and_a_draw():
    assert verdict(gain(0.9, 0.85, 0.95)).startswith("Not worth it here: dense is faster")
    assert verdict(gain(1.02, 0.97, 1.06)).startswith("No clear gain here: as fast as dense")
    assert verdict(gain(1.02, 0.97, 1.06)).endswith("parity with PyTorch was not checked")


def test_dense_elsewhere_may_be_faster():
    rival = reports.changed(reports.bench(), "rows.1", {
        **reports.bench()["rows"][1], "over_others": {
            "torch eager, dense": reports.interval(1.9, 1.8, 2.0),
            "openvino, dense": reports.interval(0.8, 0.75, 0.85),
        },
    })  # fmt: skip
    said = verdict(rival)
    assert said.startswith("No clear gain here: 1.48 times as fast")
    assert "but openvino, dense is faster still" in said


def test_what_answers_differently_or_is_wrong():
    lost = reports.changed(reports.bench(), "agreement.top1", 0.5)
    assert verdict(lost).startswith("Faster, but it answers differently")
    failed = verdict(reports.bench(), reports.check(), reports.check("function, batch 1", wrong=3))
    assert failed.startswith(
        "Not to be trusted yet: parity with PyTorch failed (function, batch 1)"
    )
    unknown = reports.changed(reports.bench(), "agreement", None)
    assert verdict(unknown).startswith("Faster, at a cost that was not measured")


def test_what_was_not_measured():
    assert verdict(reports.evaluate()).startswith("Speed was not measured: top-1 79.00\u00a0%")
    assert verdict(reports.check()).startswith("Parity holds: ")
    (summary,) = page_of(reports.check()).summaries
    assert summary.cards == []  # a sentence is enough
    cards = page_of(reports.bench()).summaries[0].cards
    assert [card.figure is None for card in cards] == [False, False, True]
    assert "asvit-deploy check" in cards[2].absent
    assert page_of({"kind": "model", "model": "m.onnx"}).summaries[0].lead == "Nothing was measured"


def test_accuracy_beside_dense_says_what_is_lost():
    (summary,) = page_of(reports.bench(), reports.evaluate(), reports.evaluate(True)).summaries
    loss = summary.cards[1].figure
    assert loss
    assert loss.value == "−0.80 points"
    assert "−4.34 to 2.74" in loss.span  # Newcombe, by hand
    (summary,) = page_of(reports.bench(), reports.evaluate()).summaries
    assert summary.cards[1].figure
    assert (
        summary.cards[1].figure.value == "1.6\u00a0%"
    )  # agreement: of accuracy alone none is lost
    other = reports.changed(reports.evaluate(True), "data", "elsewhere")
    (summary,) = page_of(reports.evaluate(), other).summaries
    assert summary.cards[1].figure
    assert "nothing dense beside it" in summary.cards[1].figure.says


def test_quality_over_latency_is_accuracy_where_both_have_it():
    def scatter(*made: dict) -> Scatter:
        (group,) = next(s for s in page_of(*made).sections if s.name == "quality").groups
        (block,) = group.blocks
        assert isinstance(block, Scatter)
        return block

    found = scatter(reports.bench())
    assert found.y == "same top-1 as dense"
    assert [point.number for point in found.points] == [1, 2, 3]
    assert [round(value["value"], 3) for value in found.values] == [1, 0.984, 0.875]
    found = scatter(reports.bench(), reports.evaluate(), reports.evaluate(True))
    assert found.y == "top-1 on imagenet/val"
    assert [(p.number, v["value"]) for p, v in zip(found.points, found.values)] == [
        (1, 0.798), (2, 0.79)]  # fmt: skip
    assert scatter(reports.engine()).y == "cosine with dense"


def test_histograms_are_of_the_most_pictures_and_vary():
    def block(*made: dict) -> object:
        (group,) = next(s for s in page_of(*made).sections if s.name == "histograms").groups
        return group.blocks[0]

    found = block(reports.bench(), reports.changed(reports.engine(), "model", "as_deit_s.engine"))
    assert isinstance(found, Histograms)
    assert found.pictures == 64
    fixed = block(reports.bench(), reports.evaluate())
    assert isinstance(fixed, Lines)  # a bar alone is no histogram
    assert fixed.lines[0].startswith("Every picture keeps as many tokens: 12, 12 (1,000 pictures")


def test_models_are_told_apart():
    assert stem("/a/b/as_deit_s.onnx") == stem("C:\\x\\as_deit_s.safetensors") == "as_deit_s"
    assert stem("as_deit_s.fp16.engine") == "as_deit_s.fp16"
    assert stem("bundle.engines/") == "bundle.engines"
    assert stem(".onnx") == ".onnx"
    page = page_of(reports.bench(), reports.engine(), reports.check())
    assert page.models == ["as_deit_s", "as_deit_s.fp16"]
    assert [summary.model for summary in page.summaries] == page.models
    assert any("as_deit_s.onnx, bench" in whose for whose, _ in page.notes)


def test_other_files_of_one_name_are_said():
    assert page_of(reports.bench(), reports.check()).summaries[0].warnings == []
    other = reports.changed(reports.check(), "sha256", "cd" * 32)
    (warning,) = page_of(reports.bench(), other).summaries[0].warnings
    assert warning.startswith("as_deit_s.onnx was another file")


def test_ways_of_one_file_share_a_table():
    ways = [reports.check(run) for run in ("function, batch 1", "library, batch 1")]
    (group,) = next(s for s in page_of(*ways).sections if s.name == "parity").groups
    first = group.blocks[0]
    assert isinstance(first, Table)
    assert [row[0] for row in first.rows] == ["function, batch 1", "library, batch 1"]
    assert page_of(*ways).summaries[0].rest.count("PyTorch keeps") == 1


def test_commands_and_machines_once():
    page = page_of(*reports.every())
    assert len(page.environments) == 2  # the engine's has a GPU
    assert dict(page.environments[1].rows)["GPU"] == "NVIDIA L4"
    assert len(page_of(reports.check("a"), reports.check("b")).commands) == 1
    nothing = reports.changed(reports.bench(), "command", None)
    assert page_of(nothing).without == ["bench, 1 thread: no exact command"]


@pytest.mark.parametrize("kind", ["model", "engine", "check", "evaluate"])
def test_a_report_of_nothing_but_its_model_is_shown_and_says_so(kind):
    page = page_of({"kind": kind, "model": "m.onnx"})
    ((_, lines),) = page.notes
    assert any(line.startswith("its JSON has no") for line in lines)
