"""LTMP: merging and pruning by hand, in every form, and what its thresholds learn from."""

from __future__ import annotations

import pytest
import torch
from by_hand import EVERY_BLOCK, network, same_by_hand, same_in_all_forms

from asvit_deploy.reduction.ltmp import LTMP, NEVER
from asvit_deploy.reduction.methods import restored

PICTURES = (4, 3, 112, 112)
MERGE, PRUNE = 0.7, 0.016


@torch.no_grad()
def made(merge=MERGE, prune=PRUNE, prefix=1, **traits):
    model = network(lambda blocks, kept, prefix: LTMP(blocks, prefix), prefix, EVERY_BLOCK[0], None,
                    **traits)  # fmt: skip
    for one, other in zip(model.reduction.merge, model.reduction.prune):
        one.fill_(merge)
        other.fill_(prune)
    return model


def cut(here, merge, prune):
    received = here.weights.mean((0, 1))
    even, odd = here.rows[::2], here.rows[1::2]
    x, size, heard = here.x.clone(), here.size.clone(), received.clone()
    best = {i: max(odd, key=lambda j, i=i: here.alike(i, j)) for i in even if odd}
    joins = [i for i in best if 1 - here.alike(i, best[i]) < merge]
    for j in odd:
        group = [j, *(i for i in joins if best[i] == j)]
        size[j] = sum(here.size[i] for i in group)
        x[j] = sum(here.size[i] * here.x[i] for i in group) / size[j]
        heard[j] = max(received[i] for i in group)
    gone = [i for i in here.rows if i in joins or heard[i] <= prune]
    assert len(gone) < len(here.rows)
    stay = [row for row in range(len(here.x)) if row not in gone]
    return x[stay], size[stay], stay


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize(("merge", "prune"), [(MERGE, PRUNE), (MERGE, NEVER), (NEVER, PRUNE)])
def test_it_is_what_the_paper_says(prefix, merge, prune):
    same_by_hand(made(merge, prune, prefix), lambda here: cut(here, merge, prune))


@pytest.mark.parametrize("prefix", [1, 3])
def test_both_thresholds_take_tokens(prefix):
    images = torch.randn(PICTURES)
    counts = [
        [int(length.sum()) for length in made(merge, prune, prefix)(images)[1].length]
        for merge, prune in ((NEVER, NEVER), (MERGE, NEVER), (NEVER, PRUNE), (MERGE, PRUNE))
    ]
    assert set(counts[0]) == {4 * (49 + prefix)}
    for neither, merging, pruning, both in zip(*counts):
        assert both < min(merging, pruning)
        assert max(merging, pruning) < neither


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize(("merge", "prune"), [(MERGE, PRUNE), (0.9, 0.03), (NEVER, 9.0)])
def test_all_forms_agree(prefix, merge, prune):
    """At the last pair one token alone stays."""
    same_in_all_forms(made(merge, prune, prefix), torch.randn(PICTURES))


def test_equal_tokens_never_merge_where_pairs_never_do():
    model = made(NEVER, NEVER)
    with torch.no_grad():
        model.pos_embed.zero_()
        for block in model.blocks:
            block.attn.qkv.weight.zero_()
    lengths = model(torch.full((1, 3, 112, 112), 0.5))[1].length
    assert [int(length) for length in lengths] == [50] * 5


def test_both_thresholds_learn_through_the_mask():
    model = made().train()
    logits, _, masks = model.forward_masked(torch.randn(PICTURES))
    sum(mask.mean() for mask in masks).backward(retain_graph=True)
    # A lower threshold keeps more.
    for one in (*model.reduction.merge, *model.reduction.prune):
        assert one.grad is not None
        assert one.grad < 0
        one.grad = None
    logits.square().sum().backward()
    assert all(one.grad.isfinite() for one in model.reduction.parameters())


def test_its_fields_restore_it():
    method = made().reduction
    again = restored(method.fields(), 1)
    assert again.fields() == method.fields()
    assert len(again.boundaries()) == 5
    assert again.taught_by(method).merge[0].item() == pytest.approx(MERGE)
