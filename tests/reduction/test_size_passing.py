"""Size-passing with fixed counts: by hand, in both forms, and what it costs."""

from __future__ import annotations

import pytest
import torch
from by_hand import EVERY_BLOCK, network, same_by_hand, same_in_all_forms, sizes_are_whole

from asvit_deploy.models import build
from asvit_deploy.models.macs import fixed_lengths
from asvit_deploy.reduction.methods import restored
from asvit_deploy.reduction.size_passing import SizePassing

KEPT = EVERY_BLOCK[1]


def passed_on(here, kept):
    even, odd = here.rows[::2], here.rows[1::2]
    best = {j: max(odd, key=lambda o, j=j: here.alike(j, o)) for j in even if odd}
    value = {j: here.score(j) * max(1 - here.alike(j, best[j]), 1e-4) for j in best}
    gone = sorted(best, key=value.get)[: len(here.rows) - kept]
    for j in gone:
        here.size[best[j]] += here.size[j]
    return here.without(gone)


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("head", ["class", "mean"])
def test_it_is_what_its_formula_says(prefix, head):
    model = network(SizePassing, prefix, head=head)
    same_by_hand(model, lambda here: passed_on(here, KEPT[here.stage]))


@pytest.mark.parametrize("prefix", [1, 3])
def test_masked_form_batches_and_single_images_agree(prefix):
    model, images = network(SizePassing, prefix), torch.randn(4, 3, 112, 112)
    same_in_all_forms(model, images)
    sizes_are_whole(model, images)
    assert fixed_lengths(model.config, model.reduction) == [k + prefix for k in KEPT]


@torch.no_grad()
def test_sizes_matter():
    model, images = network(SizePassing), torch.randn(4, 3, 112, 112)
    logits = model(images)[0]
    model.reduction.combine = lambda stage, rows, stay, decision: rows
    assert (model(images)[0] - logits).abs().max() > 1e-3


def test_at_least_every_second_token_stays():
    config = network(SizePassing).config
    reduction = SizePassing(range(5), [1] * 5)
    assert fixed_lengths(config, reduction) == [25, 13, 7, 4, 2]
    model = build(config, reduction=reduction).eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        logits, trace = model(images)
        masked = model.forward_masked(images)[0]
    assert logits.isfinite().all()
    assert [length[0].item() for length in trace.length] == [25, 13, 7, 4, 2]
    torch.testing.assert_close(masked, logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_token_is_left_alone():
    config = network(SizePassing).config.at(16)
    model = build(config, reduction=SizePassing(range(5), [1] * 5)).eval()
    logits, trace = model(torch.randn(2, 3, 16, 16))
    assert logits.isfinite().all()
    assert [length.tolist() for length in trace.length] == [[2, 2]] * 5


def test_it_is_restored_from_its_fields():
    made = restored(SizePassing(range(5), KEPT, 3).fields(), 3)
    assert isinstance(made, SizePassing)
    assert (made.blocks, made.kept, made.prefix) == ((0, 1, 2, 3, 4), KEPT, 3)
