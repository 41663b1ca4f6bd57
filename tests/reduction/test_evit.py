"""EViT's top-k with a fused token: by hand, in both forms, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import STAGES, network, same_by_hand, same_in_all_forms

from asvit_deploy.budget import carried_out
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import attend_macs, feed_macs, fixed_lengths, model_macs, stem_macs
from asvit_deploy.reduction.methods import METHODS, restored
from asvit_deploy.reduction.topk import EViT

KEPT = STAGES[1]


def fused(here, kept):
    falling = sorted(here.rows, key=lambda row: -here.attention(row))
    token = sum(here.attention(row) * here.x[row] for row in falling[kept:])
    x, size, stay = here.without(falling[kept:])
    return torch.cat([x, token[None]]), torch.cat([size, size.new_ones(1)]), stay


@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_it_is_what_the_paper_says(prefix):
    model = network(EViT, prefix)
    same_by_hand(model, lambda here: fused(here, KEPT[here.stage]))


@pytest.mark.parametrize("traits", [{}, {"head": "class_and_tokens", "residual": 0.5}])
def test_masked_form_batches_and_single_images_agree(traits):
    model, images = network(EViT, **traits), torch.randn(4, 3, 112, 112)
    same_in_all_forms(model, images)
    _, tokens, _ = model.forward_masked(images)
    # The masked form carries every row and one fused row more at each cut.
    assert tokens.shape[1] == model.config.rows + len(KEPT)
    assert fixed_lengths(model.config, model.reduction) == [k + 2 for k in KEPT]


@torch.no_grad()
def test_the_fused_token_counts_and_may_itself_leave():
    model, images = network(EViT), torch.randn(8, 3, 112, 112)
    logits, trace = model(images)
    rows = [1 + 49, *(length[0].item() for length in trace.length)]
    last = [(index == before - 1).any(1) for index, before in zip(trace.index[1:], rows[1:])]
    assert not all(stays.all() for stays in last), "somewhere the fused row leaves again"
    without = network(EViT)
    without.reduction.combine = lambda stage, rows, stay, decision: rows
    assert (without(images)[0] - logits).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kept", [(49, 49, 49), None], ids=["fixed", "per picture"])
def test_where_nothing_leaves_nothing_is_added(kept):
    model, images = network(EViT, blocks=STAGES[0], kept=kept), torch.randn(3, 3, 112, 112)
    for boundary in model.reduction.boundaries():
        boundary.fill_(0)
    dense = model.with_reduction(None)(images)[0]
    for logits, lengths in ((model(images)[0], model(images)[1].length),
                            (model(images[:1])[0], model(images[:1])[1].length)):  # fmt: skip
        torch.testing.assert_close(logits, dense[: len(logits)], rtol=0, atol=1e-5)
        assert [length.tolist() for length in lengths] == [[50] * len(logits)] * 3
    torch.testing.assert_close(model.forward_masked(images)[0], dense, rtol=0, atol=1e-5)
    if kept is not None:
        assert fixed_lengths(model.config, model.reduction) == [50, 50, 50]


@torch.no_grad()
def test_one_picture_of_a_batch_loses_nothing():
    """It gets no fused row, though its batch mates do; the same alone."""
    model, images = network(EViT, blocks=STAGES[0], kept=None), torch.randn(4, 3, 112, 112)
    lowest = [model(image[None])[1].scores[0].min() for image in images]
    one, other = torch.stack(lowest).topk(2).values
    for stage, boundary in enumerate(model.reduction.boundaries()):
        boundary.fill_((one + other) / 2 if stage == 0 else 0)
    same_in_all_forms_of_one_cut(model, images)


def same_in_all_forms_of_one_cut(model, images):
    logits, trace = model(images)
    alone = [model(image[None]) for image in images]
    assert trace.length[0].tolist() == [one.length[0].item() for _, one in alone]
    assert sum(n == 50 for n in trace.length[0].tolist()) >= 1
    torch.testing.assert_close(logits, torch.cat([one for one, _ in alone]), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.forward_masked(images)[0], logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kept", [STAGES[1], None], ids=["fixed", "per picture"])
def test_masked_activations_take_what_is_added(kept):
    """The comparison of the paper's Table 3, where dropped tokens become zero."""
    model = network(EViT, blocks=STAGES[0], kept=kept)
    for boundary in model.reduction.boundaries():
        boundary.fill_(0.02)
    logits, tokens, masks = model.forward_masked(torch.randn(2, 3, 112, 112), masking="activation")
    assert logits.isfinite().all()
    assert tokens.shape[1] == 50 + 3
    assert 0 < masks[0].mean() < 1


@torch.no_grad()
def test_decisions_of_another_are_carried_out():
    model, image = network(EViT), torch.randn(1, 3, 112, 112)
    logits, trace = model(image)
    same = model(image, decisions=[index[0] for index in trace.index])[0]
    torch.testing.assert_close(same, logits, rtol=0, atol=1e-6)
    others = [trace.index[0][0].clone(), *(index[0] for index in trace.index[1:])]
    gone = sorted(set(range(1, 50)) - set(others[0].tolist()))
    others[0][-1] = gone[-1]
    assert (model(image, decisions=[others[0].sort().values, *others[1:]])[0] - logits).abs().max()


def test_gradients_reach_all_weights():
    model = network(EViT).train()
    logits, _, _ = model.forward_masked(torch.randn(2, 3, 112, 112))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_macs_count_halves_and_fused_rows():
    config = network(EViT).config
    reduction = EViT((1, 3, 4), KEPT)
    rows = fixed_lengths(config, reduction)
    assert rows == [32, 17, 9]
    attended, fed = [50, 50, 32, 32, 17, 9], [50, 32, 32, 17, 9, 9]
    wanted = stem_macs(config) + sum(attend_macs(config, n) for n in attended)
    wanted += sum(feed_macs(config, n) for n in fed)
    assert model_macs(config, rows, reduction.cuts) == wanted


@pytest.mark.parametrize(("rate", "published"), [(0.7, 3.0e9), (0.5, 2.3e9)])
def test_published_macs_of_deit_small(rate, published):
    # Liang et al., ICLR 2022, and its README: DeiT-S at a keep rate of 0.7 has 3.0 G, of 0.5 2.3 G;
    # blocks 3, 6, 9 from 0, and the fused token counts among those of which a share stays.
    kept, tokens = [], 196
    for _ in range(3):
        kept.append(math.ceil(rate * tokens))
        tokens = kept[-1] + 1
    macs = carried_out(arch("as_deit_small"), EViT((3, 6, 9), kept))
    assert macs == pytest.approx(published, rel=0.03)


def test_it_is_restored_from_its_fields():
    made = restored(EViT((1, 3, 4), KEPT, 2).fields(), 2)
    assert isinstance(made, METHODS["evit"])
    assert (made.blocks, made.kept, made.prefix, made.cuts) == ((1, 3, 4), KEPT, 2, (3, 7, 9))
    for fields in ({}, {"name": "other"}, {"name": "evit"}, {"name": "evit", "blocks": [1]},
                   {"name": "evit", "blocks": [1], "kept": [0]},
                   {"name": "evit", "blocks": [1, 2], "kept": [3]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"reduction|tokens"):
            restored(fields, 1)
