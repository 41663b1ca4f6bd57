"""How each method trains: the form it takes, where it starts, what learns, and at which pace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from asvit_deploy.budget import fixed_counts
from asvit_deploy.checkpoints.load import Checkpoint, load_checkpoint, save_checkpoint
from asvit_deploy.data.batches import Batch
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import model_macs, teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.base import Learning, Passed
from asvit_deploy.reduction.methods import METHODS, RANKED
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.training.losses import Outputs, Weights, output_distance, total_loss
from asvit_deploy.training.recipe import FIT, Recipe
from asvit_deploy.training.start import adaptive_start, load_teacher, settled
from asvit_deploy.training.trainer import Trainer
from asvit_deploy.training.validation import _fitted

CONFIG = replace(
    arch("as_deit_mini").at(28, 10), stem="patch", dim=48, heads=3, depth=5, stages=(1, 2, 3)
)
TRAINED = [*(name for name, method in RANKED.items() if method.trains), "schedule"]
ADAPTING = [name for name in TRAINED if METHODS[name].adapts]


@pytest.fixture
def dense() -> ViT:
    torch.manual_seed(0)
    model = build(CONFIG, adaptive=False).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(10)  # type: ignore[operator, union-attr]
    return model


@pytest.fixture
def saved(dense, tmp_path) -> Checkpoint:
    save_checkpoint(tmp_path / "dense.safetensors", dense, {})
    return load_checkpoint(tmp_path / "dense.safetensors")


def a_batch() -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 2, 3]))


def trainer_of(checkpoint: Checkpoint, recipe: Recipe) -> Trainer:
    recipe = settled(CONFIG, checkpoint, recipe)
    return Trainer(*adaptive_start(CONFIG, checkpoint, recipe), recipe)


def thresholds_at(trainer: Trainer, share: float = 0.3) -> None:
    """Each threshold where so many of the scores that are finite lie below it."""
    model = trainer.model
    for stage, threshold in enumerate(model.reduction.boundaries()):  # type: ignore[union-attr]
        with torch.no_grad():
            score = model(a_batch().images)[1].scores[stage]
        threshold.data.copy_(score[score.isfinite()].quantile(share))


# --- the form -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_fixed_counts_train_in_the_form_that_runs(dense, name):
    model = dense.with_reduction(fixed_counts(CONFIG, METHODS[name], 0.7))
    images = a_batch().images
    walk = model.forward_training(images)
    logits, trace = model(images)
    # Products in another order; the same rows, since none of these scores is a near tie.
    torch.testing.assert_close(walk.logits, logits, atol=1e-5, rtol=1e-5)
    assert walk.masks == []
    assert [length.tolist() for length in walk.lengths] == [n.tolist() for n in trace.length]
    assert walk.tokens.shape[1] == int(trace.length[-1][0]) < CONFIG.rows
    walk.logits.square().sum().backward()
    slopes = [parameter.grad for parameter in model.parameters()]
    assert all(slope is not None and slope.isfinite().all() for slope in slopes)


@pytest.mark.parametrize("name", ["topk", "evit"])
def test_rows_are_known_by_their_place(dense, name):
    model = dense.with_reduction(fixed_counts(CONFIG, METHODS[name], 0.7))
    walk, trace = model.forward_training(a_batch().images), model(a_batch().images)[1]
    place = torch.arange(CONFIG.rows).expand(4, -1)
    for index in trace.index:
        place = torch.nn.functional.pad(
            place.gather(1, index), (0, model.reduction.appends), value=-1
        )
    assert torch.equal(walk.place, place)
    assert torch.equal(walk.alive, place >= 0)


@pytest.mark.parametrize("name", ["threshold", *ADAPTING])
def test_thresholds_of_each_picture_learn_through_masks(saved, name):
    own = name != "threshold"  # which has no other form
    recipe = Recipe(steps=9, budget=0.6, method=name, per_picture=own, train="thresholds",
                    lr=1e-3, temperature=METHODS[name].temperature)  # fmt: skip
    trainer = trainer_of(saved, recipe)
    thresholds_at(trainer)
    before, weights = trainer.model.threshold_values(), trainer.model.head.weight.clone()
    figures = trainer.step(0, a_batch())
    assert figures["flops"] == pytest.approx(abs(figures["macs"] - 0.6), abs=1e-5)
    after = trainer.model.threshold_values()
    # AdamW's first step is a full one for whatever has a slope: a hundredth of itself.
    moved = [abs(b / a - 1) for a, b in zip(before, after)]
    assert all(move == pytest.approx(0.01, rel=0.02) for move in moved), moved
    assert torch.equal(trainer.model.head.weight, weights)


def test_counts_leave_nothing_to_pull_towards_the_budget(saved):
    trainer = trainer_of(saved, Recipe(steps=9, budget=0.7, method="tome"))
    figures = trainer.step(0, a_batch())
    assert "flops" not in figures
    assert "thresholds" not in figures
    assert figures["macs"] == pytest.approx(0.7, rel=0.01)
    assert len(figures["kept"]) == 4


def test_token_logits_meet_the_teachers_of_their_place():
    teacher = torch.randn(1, 5, 3)
    student = Outputs(torch.zeros(1, 3), teacher[:, [3, 1]], alive=torch.tensor([[True, True]]),
                      place=torch.tensor([[3, 1]]))  # fmt: skip
    mine = Outputs(torch.zeros(1, 3), teacher)
    _, parts = total_loss(CONFIG, student, mine, torch.tensor([0]), None, Weights(1.0))
    assert parts["token"].item() == pytest.approx(0, abs=1e-6)
    turned = replace(student, place=torch.tensor([[1, 3]]))
    _, parts = total_loss(CONFIG, turned, mine, torch.tensor([0]), None, Weights(1.0))
    assert parts["token"] > 0.01
    # Rows that a method added stand behind those of the input, and nobody teaches them.
    longer = Outputs(torch.zeros(1, 3), torch.cat([teacher, torch.randn(1, 2, 3)], 1))
    _, parts = total_loss(CONFIG, longer, mine, torch.tensor([0]), None, Weights(1.0))
    assert parts["token"].item() == pytest.approx(0, abs=1e-6)


# --- without labels -----------------------------------------------------------------------------


def test_without_labels_the_dense_network_is_all_there_is(saved):
    recipe = Recipe(steps=9, budget=0.7, method="topk", labels="none", distill_weight=2.0)
    trainer = trainer_of(saved, recipe)
    figures = trainer.step(0, a_batch())
    assert figures.keys() == {"loss", "distill", "macs", "kept", "lr"}
    assert figures["loss"] == pytest.approx(2 * figures["distill"], rel=1e-5)
    wrong = Batch(a_batch().images, torch.tensor([9, 9, 9, 9]))
    assert trainer_of(saved, recipe).step(0, wrong)["loss"] == figures["loss"]


def test_outputs_are_compared_as_what_they_are():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 3.0], [0.0, 1.0]])
    embedding = replace(CONFIG, head="projection")
    assert output_distance(embedding, a, b).item() == pytest.approx((1 + 0) / 2)
    assert output_distance(CONFIG, a, a).item() == pytest.approx(0, abs=1e-7)
    assert output_distance(CONFIG, a[:, :1], b[:, :1]).item() == pytest.approx(0.5)


# --- where it starts ----------------------------------------------------------------------------


def test_counts_follow_from_the_budget(saved):
    student, _ = adaptive_start(CONFIG, saved, Recipe(steps=1, budget=0.7, method="bat"))
    assert student.reduction.fields() == fixed_counts(CONFIG, RANKED["bat"], 0.7).fields()
    cut = Recipe(steps=1, budget=0.8, method="topk", cuts=(0, 2))
    assert adaptive_start(CONFIG, saved, cut)[0].reduction.blocks == (0, 2)


def test_a_checkpoint_of_the_method_starts_from_its_own(saved, dense, tmp_path):
    made = RANKED["topk"]((0, 2), None)
    for threshold, value in zip(made.boundaries(), (0.01, 0.02)):
        threshold.data.fill_(value)
    path = tmp_path / "topk.safetensors"
    save_checkpoint(path, dense.with_reduction(made), {})
    own = load_checkpoint(path)
    recipe = Recipe(steps=1, budget=0.8, method="topk", per_picture=True)
    assert settled(CONFIG, own, recipe) == recipe
    student, _ = adaptive_start(CONFIG, own, recipe)
    assert student.reduction.blocks == (0, 2)
    assert student.threshold_values() == pytest.approx([0.01, 0.02])
    # Anything else has no scores to go by before the pictures have been seen.
    for other, given in ((recipe, saved), (replace(recipe, cuts=(1, 2)), own)):
        assert settled(CONFIG, given, other).thresholds == FIT
    fixed, _ = adaptive_start(CONFIG, own, replace(recipe, per_picture=False))
    assert fixed.reduction.kept is not None


def test_a_start_on_the_budget_counts_with_the_checkpoints_bounds(dense):
    """Bounds so near to the mean that without them fewer MACs than the budget would be left."""
    images = torch.randn(24, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    plan = fixed_counts(CONFIG, RANKED["topk"], 0.7)
    bounds = [kept + 1 for kept in plan.kept]
    model = dense.with_reduction(RANKED["topk"](plan.blocks, None, 1, bounds))
    found = _fitted(model, model.reduction, [one.numpy() for one in images], 0.7, lambda: None)
    model.reduction.load_state_dict(found)
    lengths = model(images)[1].length
    assert all((n - 1 <= most).all() for n, most in zip(lengths, bounds))
    assert (lengths[-1] < lengths[-1].max()).any()
    macs = model_macs(CONFIG, [n.double() for n in lengths], model.reduction)
    assert macs.mean().item() / teacher_macs(CONFIG) == pytest.approx(0.7, rel=0.01)


def test_frozen_weights_start_on_the_budget(saved):
    recipe = Recipe(steps=1, budget=0.8, train="thresholds")
    assert settled(CONFIG, saved, recipe).thresholds == FIT
    assert settled(CONFIG, saved, replace(recipe, train="all")).thresholds is None


# --- a method with parameters and a loss of its own ---------------------------------------------


class Judged(Threshold):
    """Thresholds in their own unit, and a predictor whose output is the score."""

    name: ClassVar[str] = "judged"
    steers = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(CONFIG.stages)
        self.judge = nn.Linear(CONFIG.dim, 1)
        self.sampled = 0

    def decide(self, stage, rows, seen):
        score = self.judge(rows.batched[:, self.prefix :]).squeeze(2).sigmoid()
        return replace(super().decide(stage, rows, seen), score=score)

    def mask(self, stage, decision, alive, temperature):
        self.sampled += self.training
        return super().mask(stage, decision, alive, temperature)

    def learning(self) -> list[Learning]:
        return [Learning(tuple(self), least=0.1),
                Learning(tuple(self.judge.parameters()), decayed=True)]  # fmt: skip

    def own_loss(self, passed: Passed) -> dict[str, Tensor]:
        assert passed.target is not None
        assert passed.tokens.shape == passed.target.shape
        return {"ratio": 2 * (passed.masks[-1].mean() - 0.4) ** 2, "pull": passed.macs - 1}


def test_a_method_says_what_learns_and_adds_to_the_loss(dense):
    method = Judged()
    for threshold, value in zip(method, (0.5, 0.5, 0.1)):
        threshold.data.fill_(value)
    method.judge.weight.data.mul_(10)
    student = build(CONFIG, True, method)
    student.load_state_dict(dense.state_dict(), strict=False)
    recipe = Recipe(steps=9, budget=0.6, train="thresholds", lr=1e-3, temperature=10,
                    weight_decay=0.5)  # fmt: skip
    trainer = Trainer(student, dense.requires_grad_(False), recipe)
    before, judge = [t.item() for t in method], method.judge.weight.detach().clone()
    figures = trainer.step(0, a_batch())
    assert {"ratio", "pull"} <= figures.keys()
    assert "flops" not in figures
    total = figures["ce"] + 0.5 * figures["distill"] + figures["ratio"] + figures["pull"]
    assert figures["loss"] == pytest.approx(total, abs=1e-5)
    assert method.sampled == 3
    moved = [abs(t.item() - b) for t, b in zip(method, before)]
    assert moved[:2] == pytest.approx([1e-3, 1e-3], rel=0.02)
    assert method[2].item() >= 0.1
    assert 5e-4 < (method.judge.weight - judge).abs().max().item() < 2e-3  # and its decay
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    assert decays == [0.0, 0.5, 0.0]  # thresholds, the matrix, its bias
    assert torch.equal(student.head.weight, dense.head.weight)


# --- LTMP, DynamicViT, schedules ----------------------------------------------------------------


def test_both_thresholds_of_ltmp_learn_over_frozen_weights(saved):
    recipe = Recipe(steps=9, budget=0.6, method="ltmp", train="thresholds", lr=1e-3)
    assert settled(CONFIG, saved, recipe).thresholds == FIT
    trainer = trainer_of(saved, recipe)
    method = trainer.model.reduction
    for merge, prune in zip(method.merge, method.prune):
        merge.data.fill_(0.2)
        prune.data.fill_(0.01)
    before, weights = [t.item() for t in method.parameters()], trainer.model.head.weight.clone()
    figures = trainer.step(0, a_batch())
    assert figures["flops"] == pytest.approx(10 * (figures["macs"] - 0.6) ** 2, rel=1e-3)
    total = figures["ce"] + 0.5 * figures["distill"] + figures["flops"]
    assert figures["loss"] == pytest.approx(total, abs=1e-5)
    moved = [abs(t.item() / b - 1) for t, b in zip(method.parameters(), before)]
    assert all(move == pytest.approx(0.01, rel=0.05) for move in moved), moved
    assert torch.equal(trainer.model.head.weight, weights)


def test_dynamicvit_draws_in_training_and_learns_its_share(saved):
    recipe = Recipe(steps=9, budget=0.8, method="dynamicvit", lr=1e-3)
    trainer = trainer_of(saved, recipe)
    method = trainer.model.reduction
    kept = [figure / CONFIG.image_tokens for figure in method.kept]
    before = method.predictors[0].in_conv[1].weight.clone()
    figures = trainer.step(0, a_batch())
    # Of each picture, so that it is more than that of their mean.
    shares = [(figure / CONFIG.image_tokens) for figure in figures["kept"]]
    assert figures["ratio"] > 2 * sum((a - b) ** 2 for a, b in zip(shares, kept)) / len(kept)
    assert figures["tokens"] > 0
    assert "flops" not in figures
    assert not torch.equal(method.predictors[0].in_conv[1].weight, before)
    # Another draw, and as it will run: as many of every picture.
    images = a_batch().images

    def drawn(first: int, seed: int = 0) -> Tensor:
        method.before_pass(seed, first)
        return trainer.model.forward_training(images).masks[0]

    one = drawn(0)
    assert torch.equal(one, drawn(0))
    assert not torch.equal(one, drawn(4))
    assert not torch.equal(one, drawn(0, seed=1))
    method.eval()
    assert trainer.model.forward_training(images).masks[0].sum(1).tolist() == [method.kept[0]] * 4


def test_the_share_is_each_pictures_and_tokens_weigh_alike():
    method = METHODS["dynamicvit"]((1, 2), (20, 10), dim=8)
    mask = torch.zeros(2, 40)
    mask[0, :30] = mask[1, :10] = 1
    tokens = torch.randn(2, 41, 8)
    passed = Passed(0.7, torch.tensor(0.7), [mask, mask], tokens, tokens + 2)
    terms = method.own_loss(passed)
    assert terms["ratio"].item() == pytest.approx(2 * (2 * 0.25**2 + 0.5**2) / 4)
    assert terms["tokens"].item() == pytest.approx(2, rel=1e-5)
    # Another process has three times as many.
    halves = replace(passed, mean=lambda own: own * 2)
    assert method.own_loss(halves)["tokens"].item() == pytest.approx(1, rel=1e-5)


def test_what_dynamicvit_draws_follows_from_the_step_alone(saved):
    recipe = Recipe(steps=9, budget=0.8, method="dynamicvit", lr=1e-3)
    found = []
    for before in (0, 5):
        trainer = trainer_of(saved, recipe)
        torch.rand(before)  # by whatever else
        found.append([trainer.step(step, a_batch()) for step in (3, 4)])
    assert found[0] == found[1]
    assert found[0][0]["kept"] != trainer_of(saved, recipe).step(4, a_batch())["kept"]


def test_a_schedule_keeps_the_counts_it_was_searched_for(saved, dense, tmp_path):
    searched = METHODS["schedule"]((0, 1, 2, 3), (45, 30, 20, 12), merged=(2, 10, 5, 1))
    path = tmp_path / "s.safetensors"
    save_checkpoint(path, dense.with_reduction(searched), {})
    own = load_checkpoint(path)
    with pytest.raises(UserError, match=r"keeps the counts of its schedule, 0\.577 of .*--budget"):
        adaptive_start(CONFIG, own, Recipe(steps=1, budget=0.8, method="schedule"))
    macs = model_macs(CONFIG, [46, 31, 21, 13], searched.cuts) / teacher_macs(CONFIG)
    student, _ = adaptive_start(CONFIG, own, Recipe(steps=1, budget=macs, method="schedule"))
    assert student.reduction.fields() == searched.fields()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "random"}, "--method random has no training form: it is what methods must"),
        ({"method": "min-k"}, "--method min-k has no training form"),
        ({"method": "nonsense"}, "--method nonsense is not known; pass one of threshold, "),
        ({"method": "bat", "per_picture": True}, "no thresholds to fit; drop --per-picture"),
        ({"method": "ltmp", "per_picture": True}, "its own number of every picture anyway; drop"),
        ({"per_picture": True}, "threshold keeps its own number of every picture anyway; drop"),
        ({"train": "thresholds", "ema": 0.9}, "--ema-decay averages weights, and --train thr"),
        ({"labels": "none", "smoothing": 0.1}, "--smoothing is of a loss on labels, and"),
        ({"labels": "none", "distill_weight": 0.0}, "--distill-weight 0 leaves nothing of it"),
        ({"labels": "some"}, "--labels some cannot be used; pass one of data, none"),
        ({"train": "head"}, "--train head cannot be used; pass one of all, thresholds"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        Recipe(steps=1, budget=0.7, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": "thresholds"}, "nothing of its own to learn, and .* pass --per-picture, or"),
        ({"masking": "activation"}, "its rows are gathered; drop --masking"),
        ({"thresholds": (0.1, 0.1, 0.1)}, "has no thresholds; drop --thresholds"),
        ({"per_picture": True, "thresholds": (0.1,)}, "1 threshold for the 3 cuts of as_deit_mini"),
        ({"cuts": (3, 1)}, "cuts 3,1 do not fit as_deit_mini; pass rising block numbers"),
        ({"budget": 0.1}, "budget 0.1 is out of reach of topk with 3 cuts"),
    ],
)
def test_what_a_method_cannot_do_is_refused_before_it_starts(saved, options, words):
    recipe = Recipe(**{"steps": 1, "budget": 0.7, "method": "topk", **options})
    with pytest.raises(UserError, match=words):
        adaptive_start(CONFIG, saved, recipe)


def test_a_teacher_of_other_embeddings_is_refused(tmp_path):
    config = replace(CONFIG, head="projection", num_classes=24, norm_pre=True, patch_bias=False)
    torch.manual_seed(0)
    path = Path(tmp_path / "clip.safetensors")
    save_checkpoint(path, build(replace(config, name="vit_48x5_patch4_clip"), False), {})
    with pytest.raises(UserError, match=r"gives 24 numbers and .* 32, so it cannot teach it"):
        load_teacher(replace(config, num_classes=32), load_checkpoint(path))
