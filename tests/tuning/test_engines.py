"""Engines of candidates: which there are, how they are judged, timed and shipped. All are built by
TensorRT-RTX without a GPU, and none is run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from conftest import raises_one_line
from made import DEMAND, candidate, certificates, seen, shown, timing

from asvit_deploy import sidecar
from asvit_deploy.artefacts import bundle, runtime_choice
from asvit_deploy.artefacts.engine_file import BundleArtefact, EngineArtefact
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.artefacts.runtime_choice import read_choice, run_as_chosen
from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.reduction.topk import EViT, TopK
from asvit_deploy.runners import trt_plan
from asvit_deploy.runners.onnx_runtime import arithmetic_of
from asvit_deploy.tuning import means as means_of
from asvit_deploy.tuning.certify import Certificates, Judge, Trial
from asvit_deploy.tuning.clock import Clock
from asvit_deploy.tuning.contenders import Bench, Way
from asvit_deploy.tuning.demand import Demand, Evidence, judged, together
from asvit_deploy.tuning.engines import (
    EXACT,
    Engines,
    as_engine,
    compact_at,
    graphs_of,
    is_engine,
    modes_of,
    option_of,
    options_for,
    source_size,
)
from asvit_deploy.tuning.graphs import INT8, Entry, Graphs, artefacts_of
from asvit_deploy.tuning.latency import Timing, entries_of
from asvit_deploy.tuning.means import means
from asvit_deploy.tuning.place import Place
from asvit_deploy.tuning.running import Crashed, Result, Workshop
from asvit_deploy.tuning.session import frontier
from asvit_deploy.tuning.store import Store
from asvit_deploy.tuning.verdict import decide, promise
from asvit_deploy.tuning.winner import write

MINI = arch("as_deit_mini")
FP16 = as_engine("fp16")
OWN = SizePassing([0, 1, 2, 3], None)


def varying(pictures: int = 700, changed: int = 0, precision: str = FP16) -> Trial:
    """Of a candidate whose pictures keep counts of their own."""
    one = replace(candidate(), reduction=OWN, way=Way("size-passing", per_picture=True))
    return Trial(one, precision, 0.01, judged(seen(pictures, changed), DEMAND))


def test_an_engines_precision_has_a_name_of_its_own():
    assert (EXACT, FP16) == ("float32 engine", "fp16 engine")
    assert option_of(FP16) == "fp16"
    assert is_engine(FP16)
    assert not is_engine("bf16")


def test_the_modes_of_a_network_and_where_cuda_graphs_go():
    assert modes_of(None) == ("dense",)
    assert modes_of(TopK([1, 3], [30, 20])) == ("static",)
    assert modes_of(Threshold([1, 3])) == ("dynamic", "padded", "bucketed")
    assert modes_of(EViT([1, 3], None)) == ("dynamic", "padded"), "it adds rows"
    assert graphs_of("dynamic") == (False,)
    assert graphs_of("padded") == graphs_of("bucketed") == graphs_of("static") == (False, True)


def test_what_an_engine_is_built_from():
    few, many = Threshold(MINI.stages), SizePassing(range(MINI.depth - 1), None)
    assert source_size(few, "dynamic", 1, MINI) == "1"
    assert source_size(many, "dynamic", 1, MINI) == "dynamic", "rows are hidden at some cuts"
    assert source_size(few, "bucketed", 8, MINI) == "1"
    for mode in ("padded", "bucketed"):
        assert source_size(many, mode, 1, MINI) == "dynamic", "it looks at rows that only fill"
    assert source_size(few, "padded", 1, MINI) == "1"
    assert source_size(None, "dense", 1, MINI) == "1"
    assert source_size(None, "dense", 8, MINI) == "dynamic"


def test_rows_leave_for_good_where_that_pays():
    assert compact_at(Threshold(MINI.stages), [9.0] * 3, MINI) == "all"
    many = SizePassing(range(MINI.depth - 1), None)
    kept = np.linspace(MINI.image_tokens, 20, MINI.depth - 1).tolist()
    blocks = compact_at(many, kept, MINI)
    assert isinstance(blocks, tuple)
    assert set(blocks) < set(many.blocks)


def test_what_is_asked_of_the_builder():
    found = options_for("padded", FP16, "dynamic", 8, ("86",), None)
    assert (found.precision, found.mode, found.batch) == ("fp16", "padded", (1, 8, 8))
    assert (found.target_sms, found.checked, found.compact_at) == (("86",), False, None)
    assert options_for("static", EXACT, "1", 1, (), None).mode == "dynamic"
    assert options_for("dense", EXACT, "1", 1, (), None).precision is None
    assert options_for("bucketed", FP16, "dynamic", 1, (), None).batch is None
    assert options_for("dynamic", FP16, "dynamic", 1, (), (1, 2)).compact_at == (1, 2)


def test_every_mode_is_timed_with_and_without_cuda_graphs():
    graphs = SimpleNamespace(dense=SimpleNamespace(config=MINI), library=None)
    tests = [varying(), shown(precision=FP16), shown(precision="float32")]
    found = entries_of(tests, ["onnxruntime"], ["float32", FP16], 1, graphs)
    engines = [one for one in found if one.runtime == "tensorrt"]
    assert len({one.name for one in found}) == len(found)
    dense = [one for one in engines if one.kind == "dense"]
    assert [(one.precision, one.graph) for one in dense] == [
        (EXACT, False), (EXACT, True), (FP16, False), (FP16, True)
    ], "dense float32 is always there"  # fmt: skip
    own = [one for one in engines if one.candidate is tests[0].candidate]
    assert [(one.kind, one.mode, one.graph) for one in own if one.kind == "adaptive"] == [
        ("adaptive", "dynamic", False), ("adaptive", "padded", False), ("adaptive", "padded", True),
        ("adaptive", "bucketed", False), ("adaptive", "bucketed", True),
    ]  # fmt: skip
    static = [one for one in own if one.kind == "static"]
    assert [(one.mode, one.graph) for one in static] == [("static", False), ("static", True)]
    assert "tensorrt, size-passing, per picture at 0.6, fp16 engine, padded, CUDA graph" in {
        one.name for one in own
    }
    fixed = [one for one in engines if one.candidate is tests[1].candidate]
    assert [(one.kind, one.mode) for one in fixed] == [("adaptive", "static")] * 2
    several = entries_of(tests, ["onnxruntime"], ["float32", FP16], 8, graphs)
    assert all(one.singly == (one.mode == "bucketed") for one in several if one.mode)
    assert not any(one.mode for one in entries_of(tests, ["onnxruntime"], ["float32"], 1, graphs))


def test_a_picture_counts_as_the_worst_of_the_engines():
    one = Evidence(np.array([0.1, 0.2]), np.array([True, False]), np.array([True, False]),
                   np.array([False, True]))  # fmt: skip
    two = Evidence(np.array([0.3, 0.1]), np.array([False, False]), np.array([False, False]),
                   np.array([False, False]))  # fmt: skip
    both = together([one, two])
    assert both.apart.tolist() == [0.3, 0.2]
    assert both.changed.tolist() == [True, False]
    assert both.worse.tolist() == [True, False]
    assert both.better.tolist() == [False, False], "what one of them gets right is not all's"
    assert both.cosine is None
    close = Evidence(np.array([0.1]), cosine=np.array([0.9]), neighbour=0.8)
    far = Evidence(np.array([0.2]), cosine=np.array([0.8]), neighbour=1.0)
    assert together([close, far]).cosine.tolist() == [0.8]
    assert together([close, far]).neighbour == 0.8


class Answers:
    """Stands where engines run: dense answers, and one mode that changes a picture or crashes."""

    def __init__(self, crashes: str = "") -> None:
        self.crashes, self.ran = crashes, list[str]()

    def outputs(self, one, which, tick):
        self.ran.append(one.mode)
        if one.mode and one.mode == self.crashes:
            raise Crashed(0, "SIGSEGV")
        made = np.tile(np.eye(4, dtype=np.float32)[0], (len(which), 1))
        if one.mode == "padded":
            made[0] = np.eye(4, dtype=np.float32)[1]
        return Result({"seconds": 0.1}, {"output": made})


def judge(folder, rows, refused):
    pictures = SimpleNamespace(calibrating=np.arange(4), judging=np.arange(4, 12),
                               labels_of=lambda which: None)  # fmt: skip
    graphs = SimpleNamespace(
        dense=SimpleNamespace(config=MINI), runnable=lambda one, batch: one,
        depends=lambda one, batch: {"batch": batch}, build_seconds=lambda *_: 0.0,
        refuse=lambda one, batch, why: refused.append((one.mode, batch)),
    )  # fmt: skip
    return Judge(pictures, graphs, rows, Store(folder, {}, print), ["onnxruntime"],
                 Demand("classes", 50, 0.95), Clock(None, print), lambda: None, 8)  # fmt: skip


def test_engines_of_every_mode_are_judged_as_one(tmp_path):
    one = replace(candidate(), reduction=OWN)
    assert [entry.mode for entry in artefacts_of(one, FP16, ["onnxruntime"])] == [
        "dynamic", "padded", "bucketed"
    ]  # fmt: skip
    rows, refused = Answers(), []
    found = judge(tmp_path, rows, refused).certify([one], ["float32", FP16])
    fp16 = next(test for test in found.tests if test.precision == FP16)
    assert fp16.found["changed"] == 1, "by the padded engine"
    assert fp16.found["pictures"] == 8
    assert found.dense[FP16]["changed"] == 0
    assert rows.ran.count("dense") == 2, "on both parts"
    assert not refused


def test_a_mode_that_does_not_run_is_not_timed_either(tmp_path):
    refused: list = []
    one = replace(candidate(), reduction=OWN)
    found = judge(tmp_path, Answers("padded"), refused).certify([one], [FP16])
    assert refused == [("padded", 8)]
    assert found.tests[0].found["changed"] == 0
    assert any("padded" in note and "SIGSEGV" in note for note in found.notes)


def engine_rows(adaptive: float, dense: float, precision: str = FP16) -> tuple[Trial, Timing]:
    """ONNX Runtime's dense network, dense engines and an adaptive one with a CUDA graph."""
    test = varying(precision=precision)
    run = timing({(None, "float32"): 10, (None, EXACT): 1.4, (None, precision): dense,
                  (test.candidate, precision): adaptive})  # fmt: skip
    own = [one if not is_engine(one.precision) else replace(one, runtime="tensorrt")
           for one in run.entries]  # fmt: skip
    own[-1] = replace(own[-1], mode="bucketed", graph=True)
    return test, replace(run, entries=own)


def test_an_engine_wins_over_the_fastest_dense_engine():
    test, run = engine_rows(0.5, 0.8)
    found = decide(run, certificates(test, **{FP16: judged(seen(700, 0), DEMAND)}), DEMAND, int)
    assert found.go
    assert found.winner is not None
    assert found.winner.entry.mode == "bucketed"
    assert found.dense == "tensorrt, dense, fp16 engine"
    assert found.winner.over["value"] == pytest.approx(1.6, rel=0.02)
    told = promise(found, run)
    assert told["over"] == "dense in tensorrt, fp16 engine"
    assert told["ratio"] == pytest.approx(1.6, rel=0.02)


def test_a_dense_engine_that_is_faster_is_a_no_go():
    test, run = engine_rows(1.0, 0.8)
    found = decide(run, certificates(test, **{FP16: judged(seen(700, 0), DEMAND)}), DEMAND, int)
    assert (found.go, found.why) == (False, "dense_as_fast")
    assert "dense is faster here: tensorrt, dense, fp16 engine takes 0.80 ms" in found.sentence


def test_dense_fp16_that_is_not_shown_is_no_rival_and_float32_engines_are():
    test, run = engine_rows(1.0, 0.8)
    found = decide(run, certificates(test), DEMAND, int)
    assert found.go
    assert found.dense == "tensorrt, dense, float32 engine"
    assert "tensorrt, dense, fp16 engine is faster still, but not shown" in found.sentence


def test_engines_for_a_later_batch_are_not_those_that_were_judged():
    test, run = engine_rows(0.5, 0.8)
    later = replace(run, batch=8)
    rows = frontier([run, later], Certificates([test]))
    assert {row["batch"]: row["certified"] for row in rows} == {1: True, 8: False}


def test_what_is_measured_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(trt_plan, "why_not", lambda: None)
    monkeypatch.setattr(means_of.openvino, "why_not", lambda hint="f32": "not here")
    usual = means(None, None, 1)
    assert usual.precisions == ("float32", EXACT, FP16, INT8)
    assert usual.runtimes == ("onnxruntime", "torch")
    assert usual.engines
    only = means("tensorrt", None, 1)
    assert (only.runtimes, only.precisions) == ((), (EXACT, FP16))
    assert means(None, "fp16", 1).precisions == (FP16,)
    assert means(None, "bf16", 1).precisions == (as_engine("bf16"),), "OpenVINO cannot"
    assert means("onnxruntime", None, 1).precisions == ("float32", INT8)
    raises_one_line(lambda: means("onnxruntime", "fp16", 1), "fp16 is run by tensorrt")
    raises_one_line(lambda: means("tensorrt", "int8", 1), "int8 is run by onnxruntime")
    order = []
    while (less := usual.cheaper()) is not None:
        usual = less
        order.append(usual.precisions[-1])
    assert order[-3:] == [FP16, EXACT, "float32"]


def test_without_a_gpu_a_line_says_that_engines_are_left_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = means(None, None, 1)
    assert not found.engines
    (line,) = [line for line in found.left_out if line.startswith("tensorrt: ")]
    assert "NVIDIA GPU" in line
    for more in (("tensorrt", None), (None, "fp16")):
        raises_one_line(lambda more=more: means(*more, 1), "tensorrt", "NVIDIA GPU")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small dense network's checkpoint, itself, and pictures."""
    folder = tmp_path_factory.mktemp("network")
    config = replace(MINI, depth=5, stages=(1, 2), image_size=28).saving()
    torch.manual_seed(0)
    dense = build(config, adaptive=False).eval()
    with torch.no_grad():
        for block in dense.blocks:
            block.attn.qkv.weight.mul_(4)
    save_checkpoint(folder / "net.safetensors", dense, {})
    return load_checkpoint(folder / "net.safetensors"), dense, list(open_images(None, config, 16))


@pytest.fixture(scope="module")
def graphs(rtx, trt_plugin, small, tmp_path_factory):
    checkpoint, dense, pictures = small
    said: list[str] = []
    made = Graphs(tmp_path_factory.mktemp("graphs"), checkpoint, dense, pictures,
                  [str(i) for i in range(16)], said.append,
                  Engines(said.append, rtx, ("86",)))  # fmt: skip
    made.said = said
    return made


@pytest.fixture(scope="module")
def found(small, tmp_path_factory):
    """A candidate whose rows carry sizes, with cuts at every block but the last."""
    _, dense, pictures = small
    bench = Bench(dense, pictures, None, Store(tmp_path_factory.mktemp("measured"), {}, print))
    return bench.fitted(Way("size-passing", (0, 1, 2, 3), per_picture=True), 0.75)


ENTRIES = [
    (kind, mode, precision)
    for precision in (EXACT, FP16)
    for kind, mode in (("dense", "dense"), ("static", "static"), ("adaptive", "dynamic"),
                       ("adaptive", "padded"), ("adaptive", "bucketed"))
]  # fmt: skip


def entry_of(graphs, found, kind, mode, precision, graph=False):
    fixed = [
        one
        for one in entries_of([Trial(found, precision, 0.1)], [], [precision], 1, graphs)
        if (one.kind, one.mode, one.precision, one.graph) == (kind, mode, precision, graph)
    ]
    return fixed[0]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode", "precision"), ENTRIES, ids=lambda one: str(one))
def test_every_entry_is_an_engine_of_its_kind(graphs, found, kind, mode, precision):
    entry = entry_of(graphs, found, kind, mode, precision)
    path = graphs.engine(entry, 1)
    artefact = open_artefact(path)
    assert type(artefact) is (BundleArtefact if mode == "bucketed" else EngineArtefact)
    fields = artefact.fields
    assert (fields["mode"], artefact.precision.option) == (mode, option_of(precision))
    assert fields["target_sms"] == ["86"]
    assert artefact.adaptive == (kind != "dense")
    assert (fields["checked"], fields["flavour"]) == (None, "tensorrt-rtx")
    assert graphs.engine(entry, 1) == path, "built once"
    run = graphs.runnable(entry)
    assert (run.model, run.runtime, run.graph) == (path.name, "tensorrt", False)
    assert graphs.depends(entry, 1)["plans"]
    if mode == "dynamic":
        assert fields["plugin_layers"] == len(fields["compactions"]) < 4
    if kind == "static":
        assert "reduction" in fields
        assert fields["plugin_layers"] == 0


@pytest.mark.slow
def test_engines_for_several_pictures_take_one_too(graphs, found):
    entry = entry_of(graphs, found, "adaptive", "padded", EXACT)
    before = graphs.builder.count
    fields = sidecar.read(graphs.engine(entry, 4))
    assert graphs.builder.count == before + 1
    assert [shape[0] for shape in fields["profile"]["images"]] == [1, 4, 4]
    assert graphs.build_seconds([entry], 4) == 0
    assert graphs.build_seconds([entry], 2) > 0
    bucketed = entry_of(graphs, found, "adaptive", "bucketed", EXACT)
    assert graphs.engine(replace(bucketed, singly=True), 4) == graphs.engine(bucketed, 1)


@pytest.mark.slow
def test_an_engine_that_cannot_be_built_is_a_line_each_time(small, rtx, found, tmp_path):
    checkpoint, dense, pictures = small
    made = Graphs(tmp_path, checkpoint, dense, pictures, [str(i) for i in range(16)], print,
                  Engines(print, rtx, ("90",)))  # fmt: skip
    entry = Entry("dense", None, "tensorrt", FP16, mode="dense")
    for _ in range(2):
        raises_one_line(lambda: made.runnable(entry), "SM90")
    assert "SM90" in made.depends(entry, 1)["refused"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_engine_in_the_worker_costs_its_row_where_there_is_no_gpu(graphs, found, small):
    workshop = Workshop(graphs.folder, np.stack(small[2]), 1)
    entry = entry_of(graphs, found, "adaptive", "padded", FP16, graph=True)
    try:
        with pytest.raises(Crashed, match="runs on an NVIDIA GPU") as caught:
            workshop.outputs(graphs.runnable(entry), [0], lambda: None)
    finally:
        workshop.close()
    assert "\n" not in caught.value.why


@pytest.mark.slow
def test_engines_of_what_is_not_timed_are_removed(graphs, found):
    other = replace(found, budget=0.9)
    gone = graphs.engine(entry_of(graphs, other, "adaptive", "bucketed", EXACT), 1)
    stays = graphs.engine(entry_of(graphs, found, "adaptive", "bucketed", EXACT), 1)
    assert gone != stays
    graphs.forget([found])
    assert not gone.exists()
    assert stays.exists()


def won(graphs, place, test, entry):
    """Write such a winner; the promise."""
    run = timing({(None, EXACT): 2, (None, test.precision): 2, (test.candidate, test.precision): 1})
    own = [replace(one, runtime="tensorrt") for one in run.entries]
    own[-1] = entry
    runner = {"backend": "TensorRT-RTX 1", "precision": "float16"}
    run = replace(run, entries=own, runners=[runner] * len(own))
    verdict = decide(run, certificates(test), DEMAND, int)
    assert verdict.winner is not None
    told = promise(verdict, run)
    pictures = SimpleNamespace(source="photographs", account={})
    write(verdict, run, graphs, pictures, place, 1, told)
    return told


@pytest.mark.slow
def test_the_winner_is_the_engine_that_was_judged_and_auto_runs_it(
    graphs, found, small, tmp_path, monkeypatch
):  # fmt: skip
    monkeypatch.setattr(runtime_choice, "gpu_name", lambda: "GPU of a test")
    place = Place(tmp_path, "net")
    test = Trial(found, FP16, 0.1, judged(seen(700, 0), DEMAND))
    dense = Trial(found, EXACT, 0.1, judged(seen(700, 0), DEMAND))
    for trial, mode, target in ((test, "bucketed", place.bundle), (test, "padded", place.engine),
                                (dense, "bucketed", place.bundle)):  # fmt: skip
        entry = entry_of(graphs, found, "adaptive", mode, trial.precision, graph=True)
        told = won(graphs, place, trial, entry)
        artefact, engine = OnnxArtefact(place.model), open_artefact(target)
        assert isinstance(engine, EngineArtefact)
        assert [path for path in (place.engine, place.bundle) if path.exists()] == [target]
        assert engine.built_from(place.model)
        assert engine.onnx.samefile(place.model)
        assert engine.reference.adaptive
        assert engine.fields["tuned"] == artefact.fields["tuned"] == told
        assert artefact.fields["precision"] == "float32"
        built = open_artefact(graphs.engine(entry, 1)).fields
        for name in ("sha256", "files"):
            assert engine.fields.get(name) == built.get(name), "the very plans"
        choice = read_choice(artefact)
        assert (choice.fields["runtime"], choice.fields["way"]) == (
            "tensorrt",
            "engine, CUDA graph",
        )
        assert f"runs in tensorrt ({target.name}, CUDA graph)" in choice.line(place.model)
    place.check(False, ())
    if not torch.cuda.is_available():
        raises_one_line(lambda: run_as_chosen(artefact, None, print), "says tensorrt",
                        "NVIDIA GPU", "`asvit-deploy tune` again")  # fmt: skip
    monkeypatch.setattr(EngineArtefact, "require_runnable", lambda self: None)
    ways = read_choice(artefact).ways(artefact)
    assert (ways.runtimes, ways.parity) == (
        {"engine, CUDA graph": "tensorrt"}, {"engine, CUDA graph": "float32"}
    )  # fmt: skip
    monkeypatch.setattr(runtime_choice, "gpu_name", lambda: "another")
    raises_one_line(lambda: read_choice(artefact).ways(artefact), "timed on GPU of a test",
                    "here is another")  # fmt: skip
    monkeypatch.setattr(runtime_choice, "gpu_name", lambda: "GPU of a test")
    fields = {**engine.fields, "level": 3}
    files = {name: (place.bundle / name).read_bytes() for name in fields["files"]}
    bundle.write(place.bundle, files, fields)
    raises_one_line(lambda: read_choice(artefact).ways(artefact), "another engine than the one")
    place.clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_static_rivals_of_int8_are_int8(small, found, tmp_path):
    checkpoint, dense, pictures = small
    made = Graphs(tmp_path, checkpoint, dense, pictures, [str(i) for i in range(16)], print)
    entries = entries_of([Trial(found, INT8, 0.1)], [], [INT8], 1, made)
    (static,) = [one for one in entries if one.kind == "static"]
    rival = made.runnable(static)
    assert arithmetic_of(onnx.load(tmp_path / rival.model)) == "int8"
    workshop = Workshop(tmp_path, np.stack(pictures), 1)
    try:
        run = workshop.timed([made.runnable(one) for one in entries], [0, 1], 1, 0.1, (10, 10), 0,
                             lambda: None)  # fmt: skip
    finally:
        workshop.close()
    assert len(run.arrays["seconds_2"]) == 10


def test_a_bundle_of_others_is_not_taken_away(tmp_path):
    place = Place(tmp_path, "net")
    place.clear_engines()
    bundle.write(place.bundle, {"stage_0.engine": b"plan"}, {"kind": "bucketed"})
    (place.bundle / "notes.txt").write_text("mine")
    raises_one_line(place.clear_engines, "notes.txt")
    with pytest.raises(UserError, match=r"notes\.txt"):
        place.check(False, ())
    assert len(list(place.bundle.iterdir())) == 3
    (place.bundle / "notes.txt").unlink()
    place.clear_engines(keep=place.bundle)
    assert place.bundle.exists()
    place.clear_engines()
    assert not place.bundle.exists()
