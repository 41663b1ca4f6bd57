"""Methods that rank, by thresholds: each picture its own number; and fixed counts for a budget."""

from __future__ import annotations

import json

import pytest
import torch
from by_hand import TOKENS, network, same_in_all_forms, sizes_are_whole

from asvit_deploy.budget import carried_out, fixed_counts
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS, arch
from asvit_deploy.models.macs import teacher_macs
from asvit_deploy.reduction import removal
from asvit_deploy.reduction.base import Decision
from asvit_deploy.reduction.methods import RANKED, restored
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.reduction.tome import ToMe
from asvit_deploy.reduction.topk import EViT, TopK

ADAPTIVE = [method for method in RANKED.values() if method.adapts]
HALF = [ToMe, SizePassing]  # of which at least every second token stays
BLOCKS = (0, 2, 3)


def adaptive(method, prefix=1, most=None, share=0.4, images=None, **traits):
    """Thresholds mid-gap at a quantile of real finite scores, cut by cut."""
    model = network(method, prefix, BLOCKS, None, **traits)
    model = model.with_reduction(method(BLOCKS, None, prefix, most)).eval()
    images = torch.randn(6, 3, 112, 112) if images is None else images
    with torch.no_grad():
        for stage, threshold in enumerate(model.reduction.boundaries()):
            scores = torch.cat([model(image[None])[1].scores[stage][0] for image in images])
            ordered = scores[scores.isfinite()].double().sort().values
            cut = int(len(ordered) * share)
            if cut > 0:  # else nothing is left that may leave
                threshold.fill_((ordered[cut - 1] + ordered[cut]) / 2)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_each_picture_keeps_its_own_number_in_every_form(method, prefix):
    model, images = adaptive(method, prefix), torch.randn(6, 3, 112, 112)
    same_in_all_forms(model, images)
    with torch.no_grad():
        lengths = model(images)[1].length
    assert all(len(set(length.tolist())) > 1 for length in lengths)
    assert model.threshold_values() == [b.item() for b in model.reduction.boundaries()]
    if method.carries_sizes:
        sizes_are_whole(model, images)
        sizes_are_whole(model, images[:1])


@pytest.mark.parametrize("head", ["class_and_mean", "class_and_tokens"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_heads_that_read_all_rows(method, head):
    same_in_all_forms(adaptive(method, head=head), torch.randn(4, 3, 112, 112))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("method", ADAPTIVE)
def test_no_picture_keeps_more_than_the_bound(method):
    images = torch.randn(6, 3, 112, 112)
    free = adaptive(method, images=images)
    kept = [length - 1 - method.appends for length in free(images)[1].length]
    most = [int(k.sort().values[1]) for k in kept]
    model = adaptive(method, most=most, images=images)
    for own, other in zip(model.reduction.boundaries(), free.reduction.boundaries()):
        own.copy_(other)
    same_in_all_forms(model, images)
    bounded = [length - 1 - method.appends for length in model(images)[1].length]
    assert all((k <= m).all() for k, m in zip(bounded, most))
    assert (bounded[0] < kept[0]).any(), "the bound bites"
    assert bounded[0].tolist() == kept[0].clamp_max(most[0]).tolist()
    if method.carries_sizes:
        sizes_are_whole(model, images)


@torch.no_grad()
@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_bound_holds_among_equals(method):
    """All tokens equal, and thresholds that all scores pass."""
    model = adaptive(method, most=(30, 17, 11))
    model.pos_embed.zero_()
    for block in model.blocks:
        block.attn.qkv.weight.zero_()
    for threshold in model.reduction.boundaries():
        threshold.fill_(-1)
    images = torch.full((2, 3, 112, 112), 0.5)
    same_in_all_forms(model, images)
    kept = [(n - 1 - method.appends).tolist() for n in model(images)[1].length]
    assert kept == [[30] * 2, [17] * 2, [11] * 2]


@torch.no_grad()
@pytest.mark.parametrize("method", HALF)
def test_a_bound_below_half_takes_no_row_that_may_not_leave(method):
    model, images = adaptive(method, most=(1, 1, 1)), torch.randn(4, 3, 112, 112)
    same_in_all_forms(model, images)
    sizes_are_whole(model, images)
    assert [(n - 1).tolist() for n in model(images)[1].length] == [[24] * 4, [12] * 4, [6] * 4]


@torch.no_grad()
@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("most", [None, (20, 15, 10), (1, 1, 1)])
def test_thresholds_above_all_scores(method, most):
    """The best stays, or what may not leave; nothing infinite comes of the others."""
    model, images = adaptive(method, most=most), torch.randn(4, 3, 112, 112)
    for threshold in model.reduction.boundaries():
        threshold.fill_(1e30)
    same_in_all_forms(model, images)
    kept = [(n - 1 - method.appends).tolist() for n in model(images)[1].length]
    tokens = TOKENS
    for count in kept:
        assert count == [method((0,), [1]).counts(0, tokens)] * 4
        tokens = count[0] + method.appends


@pytest.mark.parametrize("form", ["keep", "alive"])
def test_only_what_is_there_counts_towards_the_bound(form):
    """Rows that are dropped or that pad take no place, whatever they score."""

    class Given(Ranked):
        name, place = "given", "inside"

        def rank(self, stage, rows, seen):
            return Decision(torch.tensor([[torch.inf, 1, 8, 2, 3]]))

    there = torch.tensor([[1.0, 0, 1, 0, 1, 1]])
    rows = Rows(torch.zeros(1, 6, 1), **{form: there if form == "keep" else there > 0})
    score = Given((0,), None, 1, (2,)).decide(0, rows, None).score
    assert score.tolist() == [[-torch.inf, -torch.inf, -torch.inf, 2, 3]]


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("most", [None, (30, 17, 11)])
def test_gradients_reach_thresholds_and_weights(method, most):
    model = adaptive(method, most=most).train()
    # Gentle beside any method's scores, so that no sigmoid saturates.
    temperature = 2 / max(model.threshold_values())
    logits, _, _ = model.forward_masked(torch.randn(2, 3, 112, 112), temperature)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(threshold.grad.abs() > 0 for threshold in model.reduction.boundaries())


@torch.no_grad()
@pytest.mark.parametrize("method", [m for m in RANKED.values() if m.carries_sizes])
def test_ranks_and_sizes_are_those_of_float32_under_autocast(method):
    """At its first cut, whose tokens are given; bfloat16 has no 257, and other nearest keys."""
    model = network(method, 1, (0,), (25,))
    rows = Rows(model.embed(torch.randn(1, 3, 112, 112)), size=torch.full((1, 50), 257.0))
    rows, seen = model.segment(0, rows, masked=True)
    model.segment = lambda stage, given, masked: (rows, seen) if stage == 0 else (given, None)
    sizes, combine = [], model.reduction.combine

    def kept(*args):
        sizes.append(combine(*args).size)
        return combine(*args)

    model.reduction.combine = kept
    images = torch.randn(1, 3, 112, 112)
    masks = [model.forward_masked(images)[2][0]]
    with torch.autocast("cpu", torch.bfloat16):
        masks.append(model.forward_masked(images)[2][0])
    assert masks[0].equal(masks[1])
    assert sizes[0].equal(sizes[1])
    assert sizes[0].max() > 257


@torch.no_grad()
@pytest.mark.parametrize("method", [SizePassing, ToMe, EViT])
def test_rows_leave_by_the_op_alone_and_in_a_batch(method, monkeypatch):
    calls, op = [], removal.threshold_compact

    def counted(tokens, scores, threshold):
        calls.append(tokens.shape[0])
        return op(tokens, scores, threshold)

    monkeypatch.setattr(removal, "threshold_compact", counted)
    model, images = adaptive(method), torch.randn(4, 3, 112, 112)
    calls.clear()
    together = model(images)[1]
    alone = [model(image[None])[1] for image in images]
    assert calls == [4] * 3 + [1] * 12
    for stage in range(3):
        for picture, trace in enumerate(alone):
            kept = trace.length[stage].item() - method.appends
            index = together.index[stage][picture, :kept]
            assert index.tolist() == trace.index[stage][0, :kept].tolist()


@torch.no_grad()
@pytest.mark.parametrize("method", RANKED.values())
@pytest.mark.parametrize("kept", [(30, 20, 12), (TOKENS, 30, 29), (TOKENS, TOKENS, TOKENS)])
def test_where_tokens_go_stands_at_every_cut_or_at_none(method, kept):
    model = network(method, 1, BLOCKS, kept)
    _, trace = model(torch.randn(2, 3, 112, 112))
    assert len(trace.into) == len(trace.into_margin) == (3 if trace.into else 0)
    assert bool(trace.into) == (method.name in ("size-passing", "tome", "tome-stages",
                                                "topk-nearest", "bat"))  # fmt: skip
    for stage, into in enumerate(trace.into):
        assert into.shape[1] == trace.scores[stage].shape[1] + 1
        assert not trace.into_margin[stage].isnan().any()
        # What stays is its own, but for the partner that it would have had.
        if method.name in ("topk-nearest", "bat", "tome-stages"):
            stays = trace.index[stage]
            assert into.gather(1, stays).equal(stays)
        # What leaves goes into what stays.
        for picture in range(2):
            rows = set(range(into.shape[1])) - set(trace.index[stage][picture].tolist())
            taken = {into[picture, row].item() for row in rows}
            assert taken <= set(trace.index[stage][picture].tolist())


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.parametrize("most", [None, (30, 17, 11)])
def test_it_is_restored_from_its_fields_and_parameters(method, most):
    model = adaptive(method, 3, most)
    fields = json.loads(json.dumps(model.reduction.fields()))
    assert ("most" in fields) == (most is not None)
    again = build(model.config, reduction=restored(fields, 3)).eval()
    again.load_state_dict(model.state_dict())
    assert type(again.reduction) is method
    assert (again.reduction.kept, again.reduction.most) == (None, most)
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert again(images)[0].equal(model(images)[0])


@pytest.mark.parametrize(
    "fields",
    [
        {}, None, [], "topk", {"name": []}, {"name": "topk"}, {"name": "topk", "blocks": [1]},
        {"name": "topk", "blocks": [1], "kept": [True]},
        {"name": "topk", "blocks": [1], "kept": [2.0]},
        {"name": "topk", "blocks": [1], "kept": [-1]},
        {"name": "topk", "blocks": [1], "kept": "3"},
        {"name": "topk", "blocks": [1], "kept": 3},
        {"name": "topk", "blocks": [1.0], "kept": [3]},
        {"name": "topk", "blocks": "1", "kept": [3]},
        {"name": "topk", "blocks": [1], "kept": [3], "most": [4]},
        {"name": "topk", "blocks": [1], "kept": None, "most": [0]},
        {"name": "topk", "blocks": [1], "kept": None, "most": [4, 5]},
        {"name": "topk", "blocks": [1], "kept": None, "most": 4},
        {"name": "topk", "blocks": [1], "kept": None, "most": {"0": 4}},
        {"name": "random", "blocks": [1], "kept": None},
        {"name": "bat", "blocks": [1], "kept": None},
    ],
    ids=str,
)  # fmt: skip
def test_other_fields_are_refused(fields):
    with pytest.raises(ValueError, match=r"reduction|tokens|counts|thresholds"):
        restored(fields, 1)


@pytest.mark.parametrize("name", ARCHS)
@pytest.mark.parametrize("method", RANKED.values())
def test_counts_for_a_budget(method, name):
    for config in (arch(name), arch(name).saving()):
        made = fixed_counts(config, method, 0.65)
        assert made.blocks == method.usual_blocks(config.stages, config.depth)
        assert abs(carried_out(config, made) / teacher_macs(config) - 0.65) <= 0.0065
        # Written as they are carried out: none is raised.
        tokens = config.image_tokens
        for stage, kept in enumerate(made.kept):
            assert made.counts(stage, tokens) == kept
            tokens = kept + method.appends


@pytest.mark.parametrize("method", RANKED.values())
def test_a_budget_out_of_reach(method):
    with pytest.raises(UserError, match=f"out of reach of {method.name} with .* reaches 0"):
        fixed_counts(arch("as_deit_tiny"), method, 0.05)


@pytest.mark.parametrize("blocks", [(), (3, 3), (4, 1), (12,), (-1,), (1.0,)])
def test_cuts_that_do_not_fit(blocks):
    with pytest.raises(UserError, match="do not fit as_deit_tiny"):
        fixed_counts(arch("as_deit_tiny"), TopK, 0.65, blocks)
