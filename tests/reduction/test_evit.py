"""EViT's top-k with a fused token: by hand, in both forms, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from asvit_deploy.budget import fixed_counts
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS, arch
from asvit_deploy.models.macs import (
    attend_macs,
    feed_macs,
    fixed_lengths,
    model_macs,
    stem_macs,
    teacher_macs,
)
from asvit_deploy.reduction.methods import METHODS, restored
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.topk import EViT

KEPT = (30, 15, 7)


def network(prefix: int = 1, blocks: tuple[int, ...] = (1, 3, 4), **traits):
    config = replace(arch("as_deit_tiny"), depth=6, stages=blocks, num_classes=20, image_size=112,
                     prefix=prefix, **traits)  # fmt: skip
    torch.manual_seed(prefix)
    model = build(config, reduction=EViT(blocks, KEPT[: len(blocks)], prefix)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    return model


def by_hand(model, image):
    """Block by block in float64 for one image, from the weights alone."""
    model = model.double()
    config, prefix = model.config, model.config.prefix
    x = model.embed(image[None].double())[0]
    indices = []
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, config.heads, -1).unbind(1)
        weights = (torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5).softmax(2)
        x = x + block.attn.proj(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
        if i in model.reduction.blocks:
            score = weights[:, 0, prefix:].mean(0)
            kept = score.argsort(descending=True)[: KEPT[model.reduction.blocks.index(i)]]
            gone = [j for j in range(len(score)) if j not in kept.tolist()]
            fused = sum(score[j] * x[prefix + j] for j in gone)
            rows = [*range(prefix), *sorted(prefix + j for j in kept.tolist())]
            indices.append(rows)
            x = torch.cat([x[rows], fused[None]])
        x = x + block.mlp(block.norm2(x))
    return model.classify(Rows(x[None]))[0], indices


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, 2, 5])
def test_it_is_what_the_paper_says(prefix):
    model, images = network(prefix), torch.randn(3, 3, 112, 112)
    for image in images:
        logits, trace = model(image[None])
        wanted, rows = by_hand(network(prefix), image)
        torch.testing.assert_close(logits[0].double(), wanted, rtol=1e-4, atol=1e-5)
        assert [index[0].tolist() for index in trace.index] == rows
        assert [length.item() for length in trace.length] == [k + prefix + 1 for k in KEPT]


@torch.no_grad()
@pytest.mark.parametrize("traits", [{}, {"head": "class_and_tokens", "residual": 0.5}])
def test_masked_form_batches_and_single_images_agree(traits):
    model, images = network(**traits), torch.randn(4, 3, 112, 112)
    logits, trace = model(images)
    alone = torch.cat([model(image[None])[0] for image in images])
    masked, tokens, masks = model.forward_masked(images)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(masked, logits, rtol=0, atol=1e-5)
    # The masked form carries every row and one fused row more at each cut.
    assert tokens.shape[1] == model.config.rows + len(KEPT)
    assert [mask.sum(1).tolist() for mask in masks] == [[k] * 4 for k in KEPT]
    assert [length.tolist() for length in trace.length] == [[k + 2] * 4 for k in KEPT]


@torch.no_grad()
def test_the_fused_token_counts_and_may_itself_leave():
    model, images = network(), torch.randn(8, 3, 112, 112)
    logits, trace = model(images)
    rows = [1 + 49, *(length[0].item() for length in trace.length)]
    last = [(index == before - 1).any(1) for index, before in zip(trace.index[1:], rows[1:])]
    assert not all(stays.all() for stays in last), "somewhere the fused row leaves again"
    without = network()
    without.reduction.combine = lambda stage, rows, stay, decision: rows
    assert (without(images)[0] - logits).abs().max() > 1e-3


@torch.no_grad()
def test_decisions_of_another_are_carried_out():
    model, image = network(), torch.randn(1, 3, 112, 112)
    logits, trace = model(image)
    same = model(image, decisions=[index[0] for index in trace.index])[0]
    torch.testing.assert_close(same, logits, rtol=0, atol=1e-6)
    others = [trace.index[0][0].clone(), *(index[0] for index in trace.index[1:])]
    gone = sorted(set(range(1, 50)) - set(others[0].tolist()))
    others[0][-1] = gone[-1]
    assert (model(image, decisions=[others[0].sort().values, *others[1:]])[0] - logits).abs().max()


def test_gradients_reach_all_weights():
    model = network().train()
    logits, _, _ = model.forward_masked(torch.randn(2, 3, 112, 112))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_macs_count_halves_and_fused_rows():
    config = network().config
    reduction = EViT((1, 3, 4), KEPT)
    rows = fixed_lengths(config, reduction)
    assert rows == [32, 17, 9]
    attended, fed = [50, 50, 32, 32, 17, 9], [50, 32, 32, 17, 9, 9]
    wanted = stem_macs(config) + sum(attend_macs(config, n) for n in attended)
    wanted += sum(feed_macs(config, n) for n in fed)
    assert model_macs(config, rows, reduction.cuts) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHS)
def test_counts_for_a_budget(name):
    config = arch(name)
    made = fixed_counts(config, EViT, 0.65)
    macs = model_macs(config, fixed_lengths(config, made), made.cuts)
    assert abs(macs / teacher_macs(config) - 0.65) <= 0.0065
    assert made.blocks == tuple(stage - 1 for stage in config.stages)
    with pytest.raises(UserError, match="out of reach of evit"):
        fixed_counts(config, EViT, 0.05)


def test_it_is_restored_from_its_fields():
    made = restored(EViT((1, 3, 4), KEPT, 2).fields(), 2)
    assert isinstance(made, METHODS["evit"])
    assert (made.blocks, made.kept, made.prefix, made.cuts) == ((1, 3, 4), KEPT, 2, (3, 7, 9))
    for fields in ({}, {"name": "other"}, {"name": "evit"}, {"name": "evit", "blocks": [1]},
                   {"name": "evit", "blocks": [1], "kept": [0]},
                   {"name": "evit", "blocks": [1, 2], "kept": [3]}):  # fmt: skip
        with pytest.raises(ValueError, match=r"reduction|tokens"):
            restored(fields, 1)
