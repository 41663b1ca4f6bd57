"""Top-k by score or class attention, with sizes or without: by hand and in both forms."""

from __future__ import annotations

import pytest
import torch
from by_hand import (
    EVERY_BLOCK,
    STAGES,
    TOKENS,
    network,
    same_by_hand,
    same_in_all_forms,
    sizes_are_whole,
)

from asvit_deploy.reduction.methods import restored
from asvit_deploy.reduction.topk import TopK, TopKAttention, TopKNearest, TopKScalar

PICTURES = (4, 3, 112, 112)


def by_score(here, kept):
    return here.without(sorted(here.rows, key=lambda row: -here.score(row))[kept:])


def by_attention(here, kept):
    return here.without(sorted(here.rows, key=lambda row: -here.attention(row))[kept:])


def to_the_nearest(here, kept):
    falling = sorted(here.rows, key=lambda row: -here.score(row))
    stay, gone = sorted(falling[:kept]), falling[kept:]
    for row in gone:
        here.size[max(stay, key=lambda other, row=row: here.alike(row, other))] += here.size[row]
    return here.without(gone)


def alike(here, kept):
    x, size, stay = by_score(here, kept)
    size[here.prefix :] = TOKENS / kept
    return x, size, stay


BY_HAND = [(TopK, by_score), (TopKAttention, by_attention), (TopKNearest, to_the_nearest),
           (TopKScalar, alike)]  # fmt: skip
METHODS = [method for method, _ in BY_HAND]


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize(("method", "cut"), BY_HAND)
def test_it_is_what_it_says(method, cut, prefix):
    model = network(method, prefix)
    kept = model.reduction.kept
    same_by_hand(model, lambda here: cut(here, kept[here.stage]))


@pytest.mark.parametrize(("method", "cut"), BY_HAND[2:])
def test_heads_that_average_take_sizes(method, cut):
    model = network(method, head="class_and_mean")
    kept = model.reduction.kept
    same_by_hand(model, lambda here: cut(here, kept[here.stage]))


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", [None, (3, 2, 1), (TOKENS, TOKENS, 1)])
def test_masked_form_batches_and_single_images_agree(method, prefix, kept):
    model = network(method, prefix, kept and STAGES[0], kept)
    images = torch.randn(PICTURES)
    same_in_all_forms(model, images)
    if method.carries_sizes:
        sizes_are_whole(model, images)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_of_equal_scores_the_first_stay(method):
    """In every form, whatever a runtime's own top-k would take."""
    model = network(method)
    model.pos_embed.zero_()
    for block in model.blocks:
        block.attn.qkv.weight.zero_()
    images = torch.full((2, 3, 112, 112), 0.5)
    same_in_all_forms(model, images)
    _, trace = model(images)
    for index, kept in zip(trace.index, model.reduction.kept):
        assert index.tolist() == [list(range(1 + kept))] * 2


@torch.no_grad()
@pytest.mark.parametrize("method", [TopKNearest, TopKScalar])
def test_sizes_matter(method):
    model, images = network(method), torch.randn(PICTURES)
    logits = model(images)[0]
    model.reduction.combine = lambda stage, rows, stay, decision: rows
    assert (model(images)[0] - logits).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_it_is_restored_from_its_fields(method):
    made = restored(method(*EVERY_BLOCK, 3).fields(), 3)
    assert type(made) is method
    assert (made.blocks, made.kept, made.prefix) == (*EVERY_BLOCK, 3)


def test_where_they_cut_by_default():
    for method in METHODS:
        every = method in (TopKNearest, TopKScalar)
        wanted = tuple(range(11)) if every else (3, 6, 9)
        assert method.usual_blocks((4, 7, 10), 12) == wanted
