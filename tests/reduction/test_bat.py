"""BAT's clean-room form, (B1) to (B10): by hand, at its edges, in both forms, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import STAGES, network, same_by_hand, same_in_all_forms, walked

from asvit_deploy.budget import carried_out
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import fixed_lengths
from asvit_deploy.reduction.bat import BAT
from asvit_deploy.reduction.methods import restored

PICTURES = (4, 3, 112, 112)


def decoupled(here, kept):
    """A cut row by row."""
    tokens = len(here.rows)
    if kept >= tokens:
        return here.without([])
    a = {i: here.attention(i) for i in here.rows}
    count = max(1, min(math.ceil(tokens / 10), tokens - kept - 1, kept // 2))
    falling = sorted(here.rows, key=lambda i: -a[i])  # stable: the first of equals first
    attentive = sorted(falling[: kept if kept > 1 else 0])  # (B1)
    rest = [i for i in here.rows if i not in attentive]

    def d(i, j):  # (B2)
        return float((here.x[i] - here.x[j]).norm()) / here.x.shape[1] ** 0.5

    rho = {}
    for i in rest:  # (B3)
        near = sorted(d(i, j) ** 2 for j in rest)[:5]
        rho[i] = math.exp(-sum(near) / len(near))
    delta = {}
    for i in rest:  # (B4)
        above = [j for j in rest if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        delta[i] = min(d(i, j) for j in above) if above else max(d(i, j) for j in rest)
    centres = sorted(rest, key=lambda i: -rho[i] * delta[i])[:count]  # (B5)
    groups = {c: [c] for c in centres}
    for i in rest:  # (B6)
        if i not in centres:
            groups[min(sorted(centres), key=lambda c: d(i, c))].append(i)

    def cosine(i, j):
        return float(here.x[i] @ here.x[j] / here.x[i].norm() / here.x[j].norm())

    even, odd = attentive[::2], attentive[1::2]  # (B8)
    best = {i: max(odd, key=lambda j, i=i: cosine(i, j)) for i in even if odd}
    matched = sorted(best, key=lambda i: -cosine(i, best[i]))[: count if attentive else 0]
    for j in odd:
        groups[j] = [j, *(i for i in matched if best[i] == j)]
    out = here.x.clone()
    for own, group in groups.items():  # (B7), (B9)
        out[own] = sum(a[i] * here.x[i] for i in group) / sum(a[i] for i in group)
    gone = [i for i in rest if i not in centres] + matched
    here.x = out
    assert tokens - len(gone) == kept
    return here.without(gone)  # (B10)


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("kept", [STAGES[1], (44, 26, 13), (48, 47, 3), (3, 2, 1), (49, 1, 1)])
def test_it_is_what_its_formulas_say(prefix, kept):
    model = network(BAT, prefix, STAGES[0], kept)
    same_by_hand(model, lambda here: decoupled(here, kept[here.stage]))


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize(
    "kept", [STAGES[1], (3, 2, 1), (2, 2, 1), (49, 49, 49), (1, 1, 1), (48, 47, 46), (31, 5, 4)]
)
def test_masked_form_batches_and_single_images_agree(prefix, kept):
    model = network(BAT, prefix, STAGES[0], kept)
    assert fixed_lengths(model.config, model.reduction) == [k + prefix for k in kept]
    same_in_all_forms(model, torch.randn(PICTURES))


@torch.no_grad()
@pytest.mark.parametrize("kept", [STAGES[1], (3, 2, 1), (1, 1, 1)])
@pytest.mark.parametrize("zero", [False, True])
def test_equal_tokens(kept, zero):
    """All the same, or all nothing at all: as many stay, and they still are the same."""
    model = network(BAT, 1, STAGES[0], kept)
    model.pos_embed.zero_()
    if zero:
        for parameter in model.parameters():
            parameter.zero_()
    images = torch.full((2, 3, 112, 112), 0.5)
    # Which of them stay, the rounding of equal attentions says; nobody can tell.
    same_in_all_forms(model, images, places=zero)
    for rows, count in zip(walked(model, images), kept):
        tokens = rows.tokens[:, 1:]
        assert tokens.shape[1] == count
        torch.testing.assert_close(tokens, tokens[:, :1].expand_as(tokens), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [16, 32, 48])
def test_few_tokens_from_the_start(size):
    model = network(BAT, 1, STAGES[0], (3, 2, 1))
    small = network(BAT, 1, STAGES[0], (3, 2, 1)).config.at(size)
    model = type(model)(small, model.reduction).eval()
    logits, trace = model(torch.randn(2, 3, size, size))
    masked = model.forward_masked(torch.randn(2, 3, size, size))[0]
    assert logits.isfinite().all()
    assert masked.isfinite().all()
    tokens = (size // 16) ** 2
    assert [n[0].item() - 1 for n in trace.length] == [min(k, tokens) for k in (3, 2, 1)]


@torch.no_grad()
def test_far_tokens_have_densities_too():
    """Their exp(-d^2) is 0 in float32; what ranks is still its order."""
    model, kept = network(BAT), STAGES[1]
    model.patch_embed.proj.weight.mul_(24)
    x = model.embed(torch.randn(1, 3, 112, 112))[0, 1:]
    apart = torch.cdist(x, x).square() / x.shape[1] + 1e6 * torch.eye(49)
    assert apart.min() > 5 / 4 * 110
    assert apart.min() < 500  # which float64, the hand's, still tells apart
    same_by_hand(model, lambda here: decoupled(here, kept[here.stage]))
    same_in_all_forms(model, torch.randn(PICTURES))


@torch.no_grad()
def test_what_it_scores_says_which_side():
    model, images = network(BAT), torch.randn(PICTURES)
    _, trace = model(images)
    for stage, kept in enumerate(model.reduction.kept):
        score = trace.scores[stage]
        assert (score > 0).all()
        assert ((score > 1).sum(1) == kept).all()
        for picture, index in enumerate(trace.index[stage]):
            assert (score[picture] > 1).nonzero()[:, 0].tolist() == (index[1:] - 1).tolist()


def test_gradients_reach_all_weights():
    model = network(BAT).train()
    model.forward_masked(torch.randn(2, 3, 112, 112))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("rate", "published"), [(0.7, 3_004_791_637), (0.6, 2_583_245_078), (0.5, 2_344_407_958)]
)
def test_published_macs_of_deit_small(rate, published):
    # The logs of the authors' repository, BWLONG/BeyondAttentiveTokens; blocks 3, 6, 9 from 0.
    kept = [196]
    for _ in range(3):
        kept.append(math.ceil(rate * kept[-1]))
    macs = carried_out(arch("as_deit_small"), BAT((3, 6, 9), kept[1:]))
    assert macs == pytest.approx(published, rel=0.03)


def test_it_is_restored_from_its_fields():
    made = restored(BAT((1, 3, 4), (30, 15, 7), 3).fields(), 3)
    assert type(made) is BAT
    assert (made.blocks, made.kept, made.prefix) == ((1, 3, 4), (30, 15, 7), 3)
    with pytest.raises(ValueError, match="no thresholds"):
        restored({"name": "bat", "blocks": [1, 3], "kept": None}, 1)


@pytest.mark.slow
@torch.no_grad()
def test_a_graph_says_where_tokens_go_at_cuts_that_keep_all():
    """As every method's does: without one stage's, no other's would be compared."""
    from asvit_deploy.exporting.to_onnx import to_onnx
    from asvit_deploy.graph import stage_values

    graph = to_onnx(network(BAT, blocks=(1, 3, 4), kept=(49, 49, 20)))
    assert stage_values(graph, "into") == ["into_0", "into_1", "into_2"]
