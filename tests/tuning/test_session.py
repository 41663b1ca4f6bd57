"""What a run of `tune` keeps, leaves and refuses, part by part."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made import candidate, shown

from asvit_deploy.api.tune import _write, finite
from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.tuning import certify, contenders, latency, winner
from asvit_deploy.tuning.certify import Judge, Trial
from asvit_deploy.tuning.clock import Clock, OutOfTime
from asvit_deploy.tuning.graphs import BF16, INT8, Entry
from asvit_deploy.tuning.latency import Stopwatch, entries_of, pictures_for
from asvit_deploy.tuning.place import Place
from asvit_deploy.tuning.running import Crashed, Result, Runnable
from asvit_deploy.tuning.session import Session, timing_cost
from asvit_deploy.tuning.store import Store
from asvit_deploy.tuning.verdict import Verdict

MINI = arch("as_deit_mini")


def filled(folder: Path) -> Place:
    place = Place(folder, "net")
    for path in place.exported:
        path.write_text("earlier")
    return place


@pytest.mark.parametrize(("go", "stays"), [(None, True), (False, False)])
def test_a_no_go_alone_takes_an_earlier_winner_away(tmp_path, go, stays):
    said: list[str] = []
    one = SimpleNamespace(place=filled(tmp_path), say=said.append)
    Session._take_away(one, Verdict(go, "busy", ""))
    assert all(path.exists() == stays for path in one.place.exported)
    assert any("stays" in line for line in said) == stays


def test_a_winner_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    """The disk is full at the first file."""
    place, test = filled(tmp_path), shown()

    def full(*_):
        raise UserError("cannot write: no space left")

    monkeypatch.setattr(winner, "save_checkpoint", full)
    monkeypatch.setattr(winner, "fingerprint", lambda path: "0")
    monkeypatch.setattr(winner, "provenance", lambda names: {})
    none = SimpleNamespace(metadata=dict)
    graphs = SimpleNamespace(
        checkpoint=SimpleNamespace(origins=none, path=None), network=lambda one: None,
        described=lambda one: SimpleNamespace(metadata={}), artefact=lambda *_: None,
        size=lambda *_: "1", library=None,
    )  # fmt: skip
    entry = Entry("adaptive", test.candidate, "onnxruntime", "float32")
    won = SimpleNamespace(test=test, entry=entry)
    with pytest.raises(UserError, match="no space"):
        winner.write(Verdict(True, "adaptive_wins", "", won), SimpleNamespace(batch=1), graphs,
                     SimpleNamespace(source="x"), place, 1, {})  # fmt: skip
    assert [path.read_text() for path in place.exported] == ["earlier"] * len(place.exported)


class Rows:
    """Stands where runtimes run: so many rounds of each, and one that crashes the first time."""

    threads = 1

    def __init__(self, crashes: bool = False, runs: int = 40) -> None:
        self.crashes, self.runs, self.until = crashes, runs, "unset"

    def timed(self, variants, which, batch, seconds, rounds, seed, tick, until=None):
        self.until = until
        if self.crashes:
            self.crashes = False
            raise Crashed(len(variants) - 1, "SIGSEGV")
        arrays = {f"seconds_{i}": np.full(self.runs, 0.01) for i in range(len(variants))}
        arrays |= {f"lengths_{i}": np.zeros((4, 1, 0), np.int64) for i in range(len(variants))}
        said = {"warmup": 8, "described": [{}] * len(variants), "runs": self.runs, "planned": 40}
        return Result(said, arrays)


def watch(folder: Path, rows: Rows, clock: Clock) -> Stopwatch:
    graphs = SimpleNamespace(
        dense=SimpleNamespace(config=MINI),
        runnable=lambda one, batch: Runnable(one.name, one.runtime, one.precision, one.kind, ""),
        depends=lambda one, batch: {},
    )
    store = Store(folder / "measured", {}, lambda line: None)
    return Stopwatch(graphs, rows, store, [0, 1], 0, clock, lambda: None, lambda line: None)


DENSE = [Entry("dense", None, "onnxruntime", "float32"), Entry("dense", None, "torch", "float32")]


@pytest.mark.parametrize(
    ("rows", "kept"), [(Rows(), 1), (Rows(crashes=True), 0), (Rows(runs=25), 0)]
)
def test_a_timing_is_kept_only_where_every_row_ran_to_its_end(tmp_path, rows, kept):
    one = watch(tmp_path, rows, Clock(5, lambda line: None))
    timing = one.batch(DENSE, 1)
    assert one.store.added == kept
    assert len(timing.entries) == 2 - (not kept and rows.runs == 40)
    assert any("25 rounds instead of 40" in note for note in timing.notes) == (rows.runs == 25)
    assert rows.until == one.clock.end


def test_the_cost_of_timing_is_never_less_than_that_of_the_fewest_rounds():
    assert timing_cost(10, 1.0, 1000) >= latency.ROUNDS[0] * 10
    assert timing_cost(10, 0.1, 1000) >= latency.ROUNDS[0] * 1.0
    assert timing_cost(10, 0.01, 1000) >= latency.SECONDS * 0.9
    assert timing_cost(2, 0.001, 1000) < 10


def test_int8_of_several_pictures_runs_one_at_a_time_and_others_are_packed_too():
    graphs = SimpleNamespace(dense=SimpleNamespace(config=MINI), library=None)
    tests = [shown(precision=INT8), shown(precision=BF16)]
    found = entries_of(tests, ["onnxruntime", "torch"], ["float32", INT8, BF16], 8, graphs)
    int8 = [one for one in found if one.precision == INT8]
    assert {one.kind for one in int8} == {"dense", "adaptive"}
    assert all(one.singly and one.size(8) == "1" for one in int8)
    packed = [one for one in found if one.packed]
    assert {one.runtime for one in packed} == {"onnxruntime", "openvino-bf16"}
    assert all(one.size(8) == "packed" and one.name.endswith(", packed") for one in packed)
    assert len({one.name for one in found}) == len(found)
    assert not any(
        one.packed or one.singly for one in entries_of(tests, ["torch"], ["float32"], 1, graphs)
    )


def test_the_library_runs_what_takes_the_op_and_int8_has_static_rivals():
    graphs = SimpleNamespace(dense=SimpleNamespace(config=MINI), library=Path("libasvit.so"))
    own = replace(candidate(), reduction=SizePassing([0, 1, 2], None))
    tests = [Trial(own, precision, 0.1) for precision in ("float32", INT8)] + [shown(budget=0.5)]
    found = entries_of(tests, ["onnxruntime", "torch"], ["float32", INT8], 1, graphs)
    library = [one for one in found if one.library]
    assert [(one.candidate, one.precision) for one in library] == [(own, "float32"), (own, INT8)]
    assert all(one.name.endswith("op's library") for one in library)
    static = [one for one in found if one.kind == "static"]
    assert [(one.runtime, one.precision) for one in static] == [
        ("onnxruntime", "float32"), ("onnxruntime", INT8)
    ]  # fmt: skip
    assert len({one.name for one in found}) == len(found)


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
def test_a_timed_batch_holds_no_picture_twice(batch):
    assert pictures_for(MINI, batch) >= max(latency.PICTURES, 2 * batch)


@pytest.mark.parametrize("first", [True, False])
def test_a_later_batch_without_time_is_left_out_with_a_line(monkeypatch, first):
    from asvit_deploy.tuning import session

    def late(self, entries, batch, retries):
        if first or batch == 8:
            raise OutOfTime
        return SimpleNamespace(notes=[])

    monkeypatch.setattr(Stopwatch, "batch", late)
    monkeypatch.setattr(session, "entries_of", lambda *_: [])
    monkeypatch.setattr(session, "timed_tests", lambda found: [])
    means = SimpleNamespace(batches=(1, 8), runtimes=["torch"], precisions=["float32"])
    clock = Clock(5, lambda line: None)
    one = SimpleNamespace(
        certificates=None, means=means, pictures=SimpleNamespace(judging=np.arange(40)),
        checkpoint=SimpleNamespace(config=MINI), store=None, wanted=SimpleNamespace(seed=0),
        clock=clock, say=lambda line: None, timings=[], _affordable=lambda *_: means,
    )  # fmt: skip
    from asvit_deploy.tuning.clock import Steps

    graphs = SimpleNamespace(forget=lambda keep: None, dense=SimpleNamespace(config=MINI))
    run = lambda: Session._time(one, graphs, None, Steps(one.say))  # noqa: E731
    if first:
        with pytest.raises(OutOfTime):
            run()
        return
    run()
    assert len(one.timings) == 1
    assert clock.left_out == ["batch 8: --minutes ended before it was timed"]


def test_outputs_that_cannot_be_compared_cost_one_candidate_and_not_the_run(tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("picture 3 has no direction")

    monkeypatch.setattr(certify, "evidence", refuse)
    rows = SimpleNamespace(
        outputs=lambda *_: Result({"seconds": 0.1}, {"output": np.zeros((4, 2), np.float32)})
    )
    pictures = SimpleNamespace(judging=np.arange(4), labels_of=lambda which: None)
    graphs = SimpleNamespace(
        dense=SimpleNamespace(config=MINI), runnable=lambda one, batch: None,
        depends=lambda one, batch: {},
    )  # fmt: skip
    judge = Judge(pictures, graphs, rows, Store(tmp_path, {}, print), ["onnxruntime"], None,
                  Clock(None, print), lambda: None)  # fmt: skip
    notes: list[str] = []
    assert judge._tried(candidate(), "float32", "judging", notes) is None
    assert "no direction" in notes[0]


def test_outputs_that_cannot_be_compared_are_a_refusal_on_the_calibrating_pictures(monkeypatch):
    def refuse(*_):
        raise UserError("picture 3 has no direction")

    monkeypatch.setattr(contenders, "evidence", refuse)
    outcome = SimpleNamespace(output=SimpleNamespace(numpy=lambda: np.zeros((1, 2))))
    monkeypatch.setattr(contenders, "carried_out_on", lambda *_: outcome)
    dense = SimpleNamespace(config=MINI, with_reduction=lambda one: None)
    store = SimpleNamespace(measured=lambda settings, make: make())
    bench = contenders.Bench(dense, [np.zeros(3, np.float32)], None, store)
    with pytest.raises(UserError, match="no direction"):
        bench.own(candidate().reduction)


def test_the_farthest_is_what_gives_no_numbers():
    broken, whole = candidate(), candidate()
    broken.seen.apart[:] = np.nan
    assert contenders.closest([broken, whole]) is whole
    assert contenders.closer(whole, broken)
    assert not contenders.closer(broken, whole)


def test_what_json_does_not_have_is_none_and_a_page_that_fails_is_a_line(tmp_path, monkeypatch):
    from asvit_deploy.page import writing

    def large(*_, **__):
        raise UserError("the page would have more than 3 MB")

    monkeypatch.setattr(writing, "write", large)
    monkeypatch.setattr(writing, "require_extra", lambda: None)
    place, said = Place(tmp_path, "net"), list[str]()
    place.page.write_text("of an earlier run")
    report = finite({"a": [float("nan"), 1.5], "b": (float("inf"), "x", None, 3)})
    _write(place, report, said.append)
    assert json.loads(place.report.read_text()) == {"a": [None, 1.5], "b": [None, "x", None, 3]}
    assert not place.page.exists()
    assert said == ["no report.html: the page would have more than 3 MB"]
