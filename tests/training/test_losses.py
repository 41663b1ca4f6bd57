"""Eq. 10-13 against values worked out by hand, and the gradients that they send."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import model_macs, teacher_macs
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.masking import masked_softmax
from asvit_deploy.training.losses import (
    Outputs,
    Weights,
    distillation,
    flops_loss,
    flops_weight,
    mean_macs,
    relative_macs,
    token_distillation,
    total_loss,
)

MINI = arch("as_deit_mini")


def masks_of(*counts: int) -> list[Tensor]:
    """One image, keeping the first so many of 196 tokens at each stage."""
    return [(torch.arange(196) < count).float()[None] for count in counts]


def lengths(masks: list[Tensor], prefix: int = 1) -> list[Tensor]:
    """Rows in use behind each cut."""
    return [prefix + mask.sum(1) for mask in masks]


def test_flops_loss_is_the_distance_of_the_mean_from_the_target():
    few, many = masks_of(50, 40, 30), masks_of(196, 196, 196)
    masks = [torch.cat(pair) for pair in zip(few, many)]
    share = [model_macs(MINI, n) / teacher_macs(MINI) for n in ([51, 41, 31], [197, 197, 197])]
    macs = relative_macs(MINI, lengths(masks))
    torch.testing.assert_close(macs, torch.tensor(share))
    loss = flops_loss(mean_macs(macs), 0.65).item()
    # The mean over the batch is taken before the distance: images may differ from the budget.
    assert loss == pytest.approx(abs(sum(share) / 2 - 0.65), abs=1e-6)


def test_rows_in_front_cost_too():
    config = replace(MINI, prefix=5)
    share = model_macs(config, [55, 45, 35]) / teacher_macs(config)
    rows = lengths(masks_of(50, 40, 30), prefix=5)
    assert relative_macs(config, rows).item() == pytest.approx(share, rel=1e-6)


def test_flops_weight_is_two_per_gmac_from_deit_small_on():
    assert flops_weight(arch("as_deit_small")) == pytest.approx(2 * 4.5736, abs=1e-3)
    assert flops_weight(arch("as_deit_base")) == pytest.approx(2 * 17.471, abs=1e-2)
    assert flops_weight(MINI) == flops_weight(arch("as_deit_small"))


def test_distillation_is_the_divergence_from_the_teacher():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation(student, teacher).item() == pytest.approx(expected, abs=1e-6)
    both = distillation(torch.cat([student, teacher]), torch.cat([teacher, teacher]))
    assert both.item() == pytest.approx(expected / 2, abs=1e-6)


def test_token_distillation_looks_at_kept_tokens_only():
    teacher = torch.randn(2, 4, 3)
    student = teacher.clone()
    student[0, 1] += torch.tensor([5.0, 0.0, 0.0])
    dropped, kept = torch.ones(2, 4), torch.ones(2, 4)
    dropped[0, 1] = 0
    assert token_distillation(student, teacher, dropped).item() == pytest.approx(0, abs=1e-6)
    expected = distillation(student[0, 1:2], teacher[0, 1:2]).item() / 8
    assert token_distillation(student, teacher, kept).item() == pytest.approx(expected, rel=1e-5)


def test_every_token_weighs_the_same_in_whatever_process():
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    alive = torch.tensor([[1.0, 1, 1, 1], [0, 0, 1, 0]])  # a process each: four tokens, and one
    whole = token_distillation(student, teacher, alive)
    parts = [
        token_distillation(student[i : i + 1], teacher[i : i + 1], alive[i : i + 1],
                           mean=lambda own: torch.tensor((4 + 1) / 2))
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_total_is_the_weighted_sum_and_names_its_parts():
    logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    masks = masks_of(196, 100, 50)
    macs = mean_macs(relative_macs(MINI, lengths(masks)))
    outputs = Outputs(logits, torch.zeros(1, 196, 2), macs, masks[-1])
    teacher = Outputs(torch.zeros(1, 2), torch.randn(1, 196, 2))
    weights = Weights(flops=3.0, distill=0.5, token=0.25)
    loss, parts = total_loss(MINI, outputs, teacher, labels, 0.65, weights)
    assert parts["ce"].item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)
    expected = parts["ce"] + 3 * parts["flops"] + 0.5 * parts["distill"] + 0.25 * parts["token"]
    torch.testing.assert_close(loss, expected)
    plain, parts = total_loss(MINI, outputs, None, labels, None, weights)
    assert list(parts) == ["ce"]
    torch.testing.assert_close(plain, parts["ce"])


def test_label_smoothing_mixes_in_the_uniform_distribution():
    logits = torch.tensor([[2.0, 0.0]])
    outputs = Outputs(logits)
    loss, _ = total_loss(MINI, outputs, None, torch.tensor([0]), None, Weights(1.0, smoothing=0.2))
    logs = logits.log_softmax(1)[0]
    assert loss.item() == pytest.approx(-(0.9 * logs[0] + 0.1 * logs[1]).item(), abs=1e-6)


# --- gradients through the masks ----------------------------------------------------------------


def small_model(family: str = "deit") -> ViT:
    """Three-stage network of 25 tokens whose attention differs between tokens."""
    torch.manual_seed(0)
    name = "as_lvvit_s" if family == "lvvit" else "as_deit_mini"
    size = {"deit": 20, "lvvit": 80}[family]
    config = replace(arch(name), dim=32, heads=2, depth=5, stages=(1, 2, 3), image_size=size)
    model = build(config.at(num_classes=10))
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(10)  # type: ignore[union-attr]
    return model


def with_thresholds(model: ViT, *values: float) -> ViT:
    for threshold, value in zip(model.thresholds, values):
        threshold.data.fill_(value)
    return model


@pytest.mark.parametrize(("budget", "sign"), [(0.2, -1), (1.0, 1)])
def test_budget_pulls_thresholds_the_right_way(budget, sign):
    model = with_thresholds(small_model(), 0.036, 0.036, 0.036)
    images = torch.randn(4, 3, 20, 20)
    _, _, masks = model.forward_masked(images, temperature=300.0)
    macs = relative_macs(model.config, lengths(masks))
    flops_loss(mean_macs(macs), budget).backward()
    gradients = [threshold.grad.item() for threshold in model.thresholds]
    # Too many tokens: descent raises the thresholds, so their gradient is negative.
    assert all(gradient * sign > 0 for gradient in gradients), gradients


def test_cross_entropy_reaches_every_threshold():
    model = with_thresholds(small_model(), 0.036, 0.036, 0.036)
    logits, _, _ = model.forward_masked(torch.randn(4, 3, 20, 20), temperature=300.0)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert all(threshold.grad.abs().item() > 0 for threshold in model.thresholds)


@pytest.mark.parametrize("family", ["deit", "lvvit"])
def test_a_dropped_token_never_returns(family):
    # Falling thresholds would let every token back in, were it not for the mask before.
    model = with_thresholds(small_model(family), 0.039, 0.01, 1e-6).eval()
    size = model.config.image_size
    _, _, masks = model.forward_masked(torch.randn(8, 3, size, size))
    assert 0 < masks[0].sum() < masks[0].numel()
    for before, after in pairwise(masks):
        assert (after <= before + 1e-6).all()
        assert (after.sum(1) >= 1 - 1e-6).all()


@pytest.mark.parametrize("family", ["deit", "lvvit"])
def test_masked_training_form_equals_removal(family):
    model = with_thresholds(small_model(family), 0.036, 0.04, 0.045).eval()
    size = model.config.image_size
    images = torch.randn(6, 3, size, size)
    with torch.no_grad():
        masked, _, masks = model.forward_masked(images)
        removed, trace = model(images)
    assert [m.sum(1).round().tolist() for m in masks] == [(n - 1).tolist() for n in trace.length]
    assert (masked - removed).abs().max().item() <= 1e-5  # the design's bound for this oracle


@pytest.mark.parametrize("rows", [7, 1])
def test_masked_softmax_against_its_definition(rows):
    torch.manual_seed(0)
    keep = torch.tensor([[1.0, 0, 1, 1, 0, 1, 0]])

    def definition(logits: Tensor, keep: Tensor) -> Tensor:
        weight = keep[:, None, None, :]
        if rows == 7:
            weight = weight + (1 - weight) * torch.eye(7)
        share = logits.exp() * weight
        return share / share.sum(3, keepdim=True)

    # Logits near each other: no dropped key outdoes the sum of those kept, so nothing is clamped.
    logits, gradient = torch.randn(1, 2, rows, 7) * 0.2, torch.randn(1, 2, rows, 7)
    results = []
    for function in (masked_softmax, definition):
        inputs = logits.clone().requires_grad_(), keep.clone().requires_grad_()
        out = function(*inputs)
        out.backward(gradient)
        results.append((out, inputs[0].grad, inputs[1].grad))
    ours, expected = results
    assert expected[2][0, 1].abs() > 1e-3  # a dropped key has a gradient to compare
    for a, b in zip(ours[:2], expected[:2]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours[2], expected[2], atol=1e-5, rtol=1e-4)
