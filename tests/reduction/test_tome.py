"""ToMe, a pair of blocks' halves at a time and in rounds at stages: by hand, in both forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from by_hand import (
    STAGES,
    network,
    same_by_hand,
    same_in_all_forms,
    sizes_are_whole,
    walked,
)

from asvit_deploy.budget import carried_out
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import fixed_lengths
from asvit_deploy.reduction.methods import restored
from asvit_deploy.reduction.tome import ToMe, ToMeStages

PICTURES = (4, 3, 112, 112)


def step(here, count):
    """One bipartite merge of the `count` most similar pairs."""
    even, odd = here.rows[::2], here.rows[1::2]
    best = {i: max(odd, key=lambda j, i=i: here.alike(i, j)) for i in even if odd}
    near = sorted(best, key=lambda i: -here.alike(i, best[i]))[:count]
    x, key, size = here.x.clone(), here.key.clone(), here.size.clone()
    for j in odd:
        group = [j, *(i for i in near if best[i] == j)]
        total = sum(here.size[i] for i in group)
        x[j] = sum(here.size[i] * here.x[i] for i in group) / total
        key[j] = sum(here.size[i] * here.key[i] for i in group) / total
        size[j] = total
    return replace(here, x=x, key=key, size=size), near


def merged(here, kept):
    here, gone = step(here, len(here.rows) - kept)
    return here.without(gone)


def in_rounds(here, kept):
    """Steps at one place; each takes all even places while more than half must go."""
    index = list(range(len(here.x)))
    while (tokens := len(here.rows)) > kept:
        here, gone = step(here, min(tokens - kept, (tokens + 1) // 2))
        stay = [row for row in range(len(here.x)) if row not in gone]
        index = [index[row] for row in stay]
        here = replace(here, x=here.x[stay], key=here.key[stay], size=here.size[stay])
    return here.x, here.size, index


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("head", ["class", "mean_norm"])
def test_it_is_what_the_paper_says(prefix, head):
    model = network(ToMe, prefix, head=head)
    kept = model.reduction.kept
    same_by_hand(model, lambda here: merged(here, kept[here.stage]))


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("kept", [STAGES[1], (5, 4, 1), (47, 23, 11), (12, 12, 12)])
def test_at_stages_it_is_repeated_at_one_place(prefix, kept):
    model = network(ToMeStages, prefix, STAGES[0], kept)
    assert fixed_lengths(model.config, model.reduction) == [k + prefix for k in kept]
    same_by_hand(model, lambda here: in_rounds(here, kept[here.stage]))


@torch.no_grad()
def test_one_round_at_a_stage_is_tome():
    blocks, kept = (1, 3, 4), (30, 20, 12)
    one, other = network(ToMe, 1, blocks, kept), network(ToMeStages, 1, blocks, kept)
    images = torch.randn(PICTURES)
    torch.testing.assert_close(one(images)[0], other(images)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [ToMe, ToMeStages])
@pytest.mark.parametrize("prefix", [1, 3])
def test_masked_form_batches_and_single_images_agree(method, prefix):
    model, images = network(method, prefix), torch.randn(PICTURES)
    same_in_all_forms(model, images)
    sizes_are_whole(model, images)
    sizes_are_whole(model, images[:1])


@pytest.mark.parametrize("kept", [(5, 2, 1), (1, 1, 1), (49, 49, 48), (3, 3, 3)])
def test_at_stages_any_number_may_stay(kept):
    model, images = network(ToMeStages, 1, STAGES[0], kept), torch.randn(PICTURES)
    same_in_all_forms(model, images)
    sizes_are_whole(model, images)


def test_at_least_every_second_token_stays_in_one_match():
    model = network(ToMe, 1, (0, 1, 2, 3, 4), (1, 1, 1, 1, 1))
    assert fixed_lengths(model.config, model.reduction) == [25, 13, 7, 4, 2]
    same_in_all_forms(model, torch.randn(PICTURES))
    same_by_hand(model, lambda here: merged(here, len(here.rows) // 2))


@torch.no_grad()
@pytest.mark.parametrize("method", [ToMe, ToMeStages])
def test_equal_tokens_merge_alike_in_both_forms(method):
    model = network(method)
    model.pos_embed.zero_()
    images = torch.full((2, 3, 112, 112), 0.5)
    same_in_all_forms(model, images)
    sizes_are_whole(model, images)
    # Of equal scores the first stay: from both ends, alone and among others.
    flat = walked(model, images[:1])[0]
    assert flat.sizes.max() > 1


@torch.no_grad()
def test_sizes_are_a_bias_of_the_attention():
    model, images = network(ToMe), torch.randn(PICTURES)
    logits = model(images)[0]
    combine = model.reduction.combine
    model.reduction.combine = lambda *args: replace(combine(*args), size=None)
    assert (model(images)[0] - logits).abs().max() > 1e-3


def test_published_macs_of_deit_small():
    # Bolya et al., ICLR 2023, and its README: DeiT-S with r = 13 in each of 12 blocks, 2.7 G.
    kept = [196 - 13 * (block + 1) for block in range(12)]
    macs = carried_out(arch("as_deit_small"), ToMe(range(12), kept))
    assert macs == pytest.approx(2.7e9, rel=0.03)


@pytest.mark.parametrize("method", [ToMe, ToMeStages])
def test_it_is_restored_from_its_fields(method):
    made = restored(method((1, 3, 4), (30, 15, 7), 3).fields(), 3)
    assert type(made) is method
    assert (made.blocks, made.kept, made.prefix) == ((1, 3, 4), (30, 15, 7), 3)


def test_where_it_cuts_by_default():
    assert ToMe.usual_blocks((4, 7, 10), 12) == tuple(range(11))
    assert ToMeStages.usual_blocks((4, 7, 10), 12) == (3, 6, 9)
    with pytest.raises(ValueError, match="no thresholds"):
        ToMeStages((1, 3, 4))
