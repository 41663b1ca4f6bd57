"""Sweeps of `bench`: what they run, at which batch, budget and size, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import raises_one_line, refused

import asvit_deploy
from asvit_deploy import per_picture
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.budget import carried_out, fixed_counts, macs_of
from asvit_deploy.calibration import on_budget
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.evaluation import sweep_points
from asvit_deploy.evaluation.bench import bench
from asvit_deploy.evaluation.sweep import OneAtATime, Rounds, batches_of, run_sweep
from asvit_deploy.evaluation.sweep_points import Asked, FixedScore, asked, plans, split_of
from asvit_deploy.models.macs import dense_macs, model_macs, teacher_macs
from asvit_deploy.reduction.bat import BAT
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.reduction.tome import ToMe
from asvit_deploy.reduction.topk import EViT, TopK
from asvit_deploy.runners import onnx_bounds
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

QUICK = {"runs": 10, "warmup": 0, "limit": 10, "threads": "1"}
TORCH = {**QUICK, "runtime": "torch"}


@pytest.fixture
def model(mini_artifacts):
    return mini_artifacts["1", "auto"]


@pytest.fixture
def shapes(monkeypatch):
    """What the runners are given, by their class."""
    seen = {OrtRunner: set(), TorchRunner: set()}
    for kind in seen:
        real = kind.infer

        def infer(self, images, kind=kind, real=real):
            seen[kind].add(images.shape)
            return real(self, images)

        monkeypatch.setattr(kind, "infer", infer)
    return seen


# --- what is asked for --------------------------------------------------------------------------


def test_values_in_every_form_once_and_rising():
    assert asked("8, 1,2,2", 0.5, [224, 160]) == Asked((1, 2, 8), (0.5,), (160, 224))
    assert asked({3, 1}, range(0)) == Asked((1, 3))
    assert asked(np.array([4, 2]), ("0.65", 0.5), 32) == Asked((2, 4), (0.5, 0.65), (32,))
    assert asked((), None, []) == Asked()
    assert not asked()
    assert asked(size="224")


@pytest.mark.parametrize(("name", "given", "words"), [
    ("batch", "1,0", "sweep_batch has '0'; give whole numbers from 1 to 256 such as 1,2,4"),
    ("batch", "", "sweep_batch has ''"),
    ("batch", "1,,2", "sweep_batch has ''"),
    ("batch", "-1", "sweep_batch has '-1'"),
    ("batch", "1.5", "sweep_batch has '1.5'"),
    ("batch", [2.0], "sweep_batch has '2.0'"),
    ("batch", [True], "sweep_batch has 'True'"),
    ("batch", 257, "sweep_batch has '257'"),
    ("batch", "9" * 5000, "sweep_batch has '9999"),
    ("batch", [None], "sweep_batch has 'None'"),
    ("budget", "0", "sweep_budget has '0'; give numbers between 0 and 1 such as 0.5,0.65"),
    ("budget", "0.5,1", "sweep_budget has '1'"),
    ("budget", "nan", "sweep_budget has 'nan'"),
    ("budget", [10**400], "sweep_budget has '1000"),
    ("budget", "half", "sweep_budget has 'half'"),
    ("size", "0", "sweep_size has '0'; give pixels such as 160,224"),
    ("size", "224px", "sweep_size has '224px'"),
    ("batch", range(1, 20), "sweep_batch has 19 values; give 16 at most"),
])  # fmt: skip
def test_values_that_are_none(name, given, words):
    raises_one_line(lambda: asked(**{name: given}), words)


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "words"), [
    ({"sweep_size": 58}, "sweep_size 58: image size 58 is not a multiple of the 4-pixel patch"),
    ({"sweep_size": 5000}, "sweep_size 5000: image size 5000 is too large"),
    ({"sweep_size": 4096}, "sweep_size 4096 would take about"),
    ({"sweep_batch": (1, 16)}, "sweep_batch has 16, and there are 10 pictures"),
    ({"sweep_budget": 0.2}, "sweep_budget 0.2: budget 0.2 is out of reach for as_deit_mini"),
    ({"sweep_budget": 0.95}, "sweep_budget 0.95: budget 0.95 is out of reach"),
    ({"sweep_budget": 0.7, "limit": 3}, "sweep_budget 0.7: 3 images are too few"),
    ({"sweep_size": 48, "limit": 3}, "sweep_size 48: 3 images are too few"),
])  # fmt: skip
def test_what_cannot_be_made_is_refused_before_anything_runs(model, shapes, arguments, words):
    raises_one_line(lambda: bench(model, **{**QUICK, **arguments}), words)
    assert not shapes[OrtRunner]


@pytest.mark.slow
def test_dense_files_and_engines_have_nothing_to_sweep(cli, mini_checkpoint, tmp_path):
    dense = tmp_path / "dense.onnx"
    asvit_deploy.export(mini_checkpoint, output=dense, dense=True)
    refused(cli("bench", dense, "--limit", 2, "--threads", 1, "--sweep-batch", 2), "dense.onnx",
            "is dense", "name an adaptive file")  # fmt: skip
    engine = tmp_path / "mini.engine"
    engine.write_bytes(b"")
    refused(cli("bench", dense, engine, "--sweep-size", 48), "mini.engine is an engine",
            "sweeps take its ONNX file")  # fmt: skip


@pytest.mark.slow
def test_without_its_checkpoint_there_is_no_other_size(cli, mini_checkpoint, tmp_path):
    weights = tmp_path / "weights.pt"
    weights.write_bytes(mini_checkpoint.read_bytes())
    asvit_deploy.export(weights, output=tmp_path / "mini.onnx")
    weights.unlink()
    refused(cli("bench", "mini.onnx", "--limit", 2, "--sweep-size", 48), "weights.pt, is gone")


def test_the_command_refuses_in_one_line(cli, model):
    refused(cli("bench", model, "--sweep-budget", "1.5"), "sweep_budget has '1.5'")


# --- its parts ----------------------------------------------------------------------------------


def test_batches_hold_different_pictures_and_all_of_them():
    images = [np.full((3, 2, 2), i, np.float32) for i in range(5)]
    made = batches_of(images, 2)
    assert [batch[:, 0, 0, 0].tolist() for batch in made] == [[0, 1], [2, 3], [4, 0]]
    assert [len(batch) for batch in batches_of(images, 5)] == [5]


def test_rounds_are_a_quarter_of_the_pictures_and_ten_at_least():
    assert Rounds(50, 200).of(1) == (13, 50)
    assert Rounds(50, 200).of(4) == (4, 13)
    assert Rounds(0, 200).of(64) == (1, 10)


def test_one_at_a_time_gives_what_a_batch_gives(mini, photos):
    batch = photos.batch(range(3))
    whole, single = TorchRunner(mini)(batch), OneAtATime(TorchRunner(mini))(batch)
    assert [n.tolist() for n in whole.lengths] == [n.tolist() for n in single.lengths]
    np.testing.assert_allclose(whole.output, single.output, atol=1e-4)


def test_static_rows_rank_as_the_thresholds_do(mini, photos):
    image = torch.from_numpy(photos[0])[None]
    own, trace = mini(image)
    kept = [int(n) - mini.config.prefix for n in trace.length]
    assert kept[0] < mini.config.image_tokens
    static = mini.with_reduction(FixedScore(mini.config.stages, kept, mini.config.prefix))
    assert static.cuts == mini.cuts
    torch.testing.assert_close(static(image)[0], own, rtol=0, atol=0)


def test_a_split_is_kept_at_another_budget(mini, photos):
    lengths = sweep_points.lengths_of(mini, photos)
    split = split_of(1, mini.config.image_tokens, lengths)
    assert sum(split) == pytest.approx(1)
    found = on_budget(mini, photos, 0.75, split)
    made = Threshold(mini.config.stages)
    for threshold, value in zip(made, found.thresholds):
        threshold.data.fill_(value)
    after = sweep_points.lengths_of(mini.with_reduction(made), photos)
    share = model_macs(mini.config, list(after.T.astype(float))).mean() / teacher_macs(mini.config)
    assert share == pytest.approx(0.75, rel=0.01)
    assert split_of(1, mini.config.image_tokens, after) == pytest.approx(split, abs=0.05)
    assert split_of(1, 10, np.full((2, 3), 11)) == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_macs_of_fixed_counts_are_those_carried_out(mini_config):
    for method in (ToMe, EViT, TopK):
        made = fixed_counts(mini_config, method, 0.7)
        from asvit_deploy.models.macs import fixed_lengths

        lengths = np.array([fixed_lengths(mini_config, made)] * 2)
        assert macs_of(mini_config, made, lengths) == pytest.approx(carried_out(mini_config, made))


# --- real sweeps --------------------------------------------------------------------------------


@pytest.mark.slow
def test_batches_run_as_asked(model, shapes):
    (report,) = bench(model, **{**QUICK, "runtime": "onnxruntime,torch"}, sweep_batch="4,1")
    (sweep,) = report.sweeps
    assert (sweep["over"], [point["at"] for point in sweep["points"]]) == ("batch", [1, 4])
    assert sweep["notes"] == []
    single, four = sweep["points"]
    several = [(False, False), (True, False), (False, True)]  # padded, one by one, packed
    for point, ways in ((single, several[:1]), (four, several)):
        assert point["batch"] == point["at"]
        assert len(point["rows"]) == 2 * 3 * len(ways)
        for kind in ("dense", "adaptive", "static"):
            own = [row for row in point["rows"] if row["kind"] == kind]
            assert [(row["singly"], row["packed"]) for row in own] == ways * 2
            for row in own:
                assert ("speedup" in row, "over_static" in row) == (
                    kind != "dense", kind == "adaptive"
                )  # fmt: skip
    side = report.sweeps[0]["points"][0]["image_size"]
    for kind in (OrtRunner, TorchRunner):
        assert shapes[kind] == {(1, 3, side, side), (4, 3, side, side)}
    assert len(sweep["verdict"]) == 4
    assert single["macs"]["share"] == four["macs"]["share"]
    assert four["macs"]["adaptive_gmacs"] == pytest.approx(report.macs["adaptive_gmacs"])
    for row in four["rows"]:
        if row["kind"] == "dense":
            assert row["gmacs"] == pytest.approx(report.macs["dense_gmacs"])
        else:
            assert row["gmacs"] == pytest.approx(report.macs["adaptive_gmacs"], rel=0.02)
    json.dumps(report.as_dict())


@pytest.mark.slow
def test_budgets_are_reached_by_what_runs(model, mini_config):
    (report,) = bench(model, **{**QUICK, "runtime": "onnxruntime"}, sweep_budget=(0.6, 0.75))
    (sweep,) = report.sweeps
    assert [point["at"] for point in sweep["points"]] == [0.6, 0.75]
    assert "for speed only" in sweep["notes"][0]
    config = open_artefact(model).config
    for point in sweep["points"]:
        assert point["macs"]["asked"] == point["at"]
        assert point["macs"]["share"] == pytest.approx(point["at"], rel=0.02)
        assert len(point["rows"]) == 3
        for row in point["rows"]:
            share = row["gmacs"] * 1e9 / teacher_macs(config)
            wanted = dense_macs(config) / teacher_macs(config)
            wanted = wanted if row["kind"] == "dense" else point["at"]
            assert share == pytest.approx(wanted, rel=0.02), row["name"]


@pytest.mark.slow
def test_sizes_are_taken_and_keep_the_share(model, shapes):
    (report,) = bench(model, **{**QUICK, "runtime": "onnxruntime"}, sweep_size=[80, 56])
    (sweep,) = report.sweeps
    config = open_artefact(model).config
    assert [point["image_size"] for point in sweep["points"]] == [56, 80]
    assert shapes[OrtRunner] == {(1, 3, size, size) for size in (56, 80)}
    own = sweep["points"][0]["macs"]
    assert own["asked"] is None
    for point in sweep["points"]:
        macs, at = point["macs"], config.at(point["image_size"])
        assert macs["image_tokens"] == (point["image_size"] // 4) ** 2
        assert macs["dense_gmacs"] == pytest.approx(dense_macs(at) / 1e9)
        assert macs["share"] == pytest.approx(own["share"], rel=0.02)
        assert [row["kind"] for row in point["rows"]] == ["dense", "adaptive", "static"]
        for row in point["rows"][1:]:
            assert row["gmacs"] * 1e9 / teacher_macs(at) == pytest.approx(macs["share"], rel=0.02)


@pytest.fixture(scope="module")
def with_method(tmp_path_factory):
    """The default weights with another method, exported, by what makes it of the network and
    pictures."""

    def made(name, make):
        checkpoint = load_checkpoint(default_checkpoint())
        network = build_model(checkpoint, dense=True)
        images = open_images(None, network.config, 10)
        folder = tmp_path_factory.mktemp(name)
        reduction = make(network, [images[i] for i in range(10)])
        weights = folder / f"{name}.safetensors"
        save_checkpoint(weights, network.with_reduction(reduction), {"budget": "0.75"})
        asvit_deploy.export(weights, output=folder / f"{name}.onnx")
        return folder / f"{name}.onnx"

    return made


@pytest.mark.slow
def test_every_file_is_looked_at_before_the_first_is_timed(with_method, model, shapes):
    other = with_method("tome", lambda network, images: fixed_counts(network.config, ToMe, 0.75))
    seen = set(shapes[OrtRunner])
    raises_one_line(lambda: bench([other, model], **{**QUICK, "sweep_budget": 0.45}),
                    f"{model}: sweep_budget 0.45: budget 0.45 is out of reach")  # fmt: skip
    assert shapes[OrtRunner] == seen


@pytest.mark.slow
def test_fixed_counts_are_their_own_static_form(with_method):
    path = with_method("evit", lambda network, images: fixed_counts(network.config, EViT, 0.75))
    (report,) = bench(path, **TORCH, sweep_budget=0.8, sweep_size=64)
    for sweep in report.sweeps:
        (point,) = sweep["points"]
        assert [row["kind"] for row in point["rows"]] == ["dense", "adaptive"]
        assert point["notes"] == ["no static rows: it keeps as many tokens of every picture itself"]
        assert sweep["notes"][0].startswith("counts are fitted")
        assert len(sweep["verdict"]) == 1
    (budget, size) = (sweep["points"][0]["macs"] for sweep in report.sweeps)
    assert budget["share"] == pytest.approx(0.8, rel=0.02)
    assert size["share"] == pytest.approx(0.75, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("bounded", [False, True])
def test_methods_that_rank_picture_by_picture(with_method, bounded):
    def make(network, images):
        plan = fixed_counts(network.config, EViT, 0.75)
        most = int(plan.kept[-1] * 1.3) + network.config.prefix + 1 if bounded else None
        return per_picture.fit(network, EViT, images, 0.75, None, most)

    path = with_method(f"adaptive{bounded}", make)
    artefact = open_artefact(path)
    pictures = open_images(None, artefact.config, 10)
    made = plans(artefact, pictures, Asked((2,), (0.8,), (64,)), lambda line: None)
    for plan in made:
        for point in plan.points:
            assert type(point.adaptive) is type(point.static) is EViT
            assert (point.adaptive.most is not None) == bounded
            wanted = point.at if plan.over == "budget" else 0.75
            assert point.share == pytest.approx(wanted, rel=0.02)
            static = carried_out(point.config, point.static) / teacher_macs(point.config)
            assert static == pytest.approx(wanted, rel=0.02)
    runtime = "onnxruntime" if bounded else "torch"
    run = run_sweep(artefact, pictures, made[1], 1, Rounds(0, 40), (runtime,), print)
    for point in run["points"]:
        assert [row["kind"] for row in point["rows"]] == ["dense", "adaptive", "static"]
        for row in point["rows"][1:]:
            assert row["gmacs"] == pytest.approx(point["macs"]["adaptive_gmacs"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_int8_is_compared_with_int8_and_takes_no_batch(tmp_path, kind):
    path = tmp_path / "int8.onnx"
    asvit_deploy.export(default_checkpoint(), output=path, int8=kind)
    options = {**QUICK, "runtime": "onnxruntime,torch"}
    raises_one_line(lambda: bench(path, **options, sweep_batch="1,2"), "sweep_batch has 2",
                    "computes in int8, for one picture")  # fmt: skip
    given = {"sweep_batch": 1} if kind == "dynamic" else {"sweep_budget": 0.75}
    (report,) = bench(path, **options, **given)
    for sweep in report.sweeps:
        (point,) = sweep["points"]
        assert [(row["runtime"], row["precision"]) for row in point["rows"]] == [
            *[("torch", "float32")] * 3, *[("onnxruntime", "int8")] * 3,
        ]  # fmt: skip
        assert sweep["notes"][-1] == "torch computes in float32, beside dense torch in float32"
        for row in point["rows"]:
            if row["kind"] != "dense":  # int8 moves a token here and there
                assert row["gmacs"] == pytest.approx(point["macs"]["adaptive_gmacs"], rel=0.02)


@pytest.mark.slow
def test_a_runtime_that_fails_costs_its_rows_and_a_note(model, monkeypatch):
    artefact = open_artefact(model)
    pictures = open_images(None, artefact.config, 10)
    (plan,) = plans(artefact, pictures, Asked(batch=(1,)), lambda line: None)
    monkeypatch.setattr(onnx_bounds, "SECONDS", 1e-6)
    sweep = run_sweep(artefact, pictures, plan, 1, Rounds(0, 40), ("onnxruntime", "torch"), print)
    (point,) = sweep["points"]
    assert {row["runtime"] for row in point["rows"]} == {"torch"}
    assert point["notes"][0].startswith("no rows of onnxruntime: ")


@pytest.mark.slow
def test_a_method_whose_counts_cannot_be_met_has_no_static_rows(mini_config):
    assert BAT.adapts is False
    tiny = replace(mini_config, image_size=8)
    reduction = Threshold(tiny.stages)
    found, notes = sweep_points.static_rival(tiny, reduction, 0.01)
    assert found is None
    assert notes[0].startswith("no static rows: budget 0.01 is out of reach")


@pytest.mark.slow
def test_the_command_prints_a_table_and_verdicts(cli, model):
    options = ["--runs", 10, "--warmup", 0, "--limit", 10, "--threads", 1, "--runtime", "torch"]
    plain = cli("bench", model, *options)
    assert plain.code == 0
    assert "sweep" not in plain.out
    done = cli("bench", model, *options, "--sweep-batch", "2", "--sweep-size", "48,56")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("sweep over ")]
    assert [lines[i].split(",")[0] for i in starts] == ["sweep over batch", "sweep over size"]
    assert lines[starts[0] + 3].startswith("| batch 2, torch")
    assert lines[starts[1] + 3].startswith("| size 48, torch")
    assert lines[starts[1] + 4].startswith("| size 56, torch")
    said = [line for line in lines[starts[0] :] if line.startswith("verdict: ")]
    assert len(said) == 4
    assert all(line.startswith("verdict: torch: adaptive ") for line in said)
