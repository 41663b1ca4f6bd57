"""The networks: training form against inference form, batches against single images, edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.removal import mean_k_keep_mask
from asvit_deploy.reduction.rows import Rows

# Rows shrunk so that a forward pass takes milliseconds; 49 image tokens.
SMALL = {"dim": 128, "heads": 2, "depth": 6, "stages": (2, 3, 5), "image_size": 112}
CONFIGS = {
    "deit": replace(arch("as_deit_tiny"), num_classes=20, **SMALL),
    "lvvit": replace(arch("as_lvvit_s"), num_classes=20, **SMALL),
}
# Of the logits' own scale: both forms round differently, nothing else.
TOLERANCE = 1e-5


def pictures(config, count, seed=1):
    """Smooth random fields: neighbouring patches are alike, images differ in contrast."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 9, 9, generator=generator)
    size = (config.image_size, config.image_size)
    fields = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return fields * torch.linspace(0.3, 2.5, count)[:, None, None, None]


@pytest.fixture(params=CONFIGS)
def model(request):
    """Peaked attention, and thresholds between two scores that occur (two thirds stay)."""
    config = CONFIGS[request.param]
    network = build(config).eval()
    images = pictures(config, 8)
    with torch.no_grad():
        for block in network.blocks:
            block.attn.qkv.weight.mul_(4)
        for stage, threshold in enumerate(network.thresholds):
            scores = [network(one[None])[1].scores[stage][0] for one in images]
            ordered = torch.cat(scores).sort().values
            cut = len(ordered) // 3
            threshold.fill_((ordered[cut - 1] + ordered[cut]) / 2)
    return network


def set_thresholds(model, value):
    for threshold in model.thresholds:
        threshold.data.fill_(value)


def close(a, b):
    return (a - b).abs().max() <= TOLERANCE * max(1.0, b.abs().max().item())


@torch.inference_mode()
def test_counts_vary_between_images(model):
    counts = torch.stack([model(one[None])[1].length[0] for one in pictures(model.config, 8)])
    assert counts.unique().numel() > 2  # or the tests below would prove little


@torch.inference_mode()
def test_masked_equals_compacted(model):
    for one in pictures(model.config, 8):
        logits, trace = model(one[None])
        masked, _, keeps = model.forward_masked(one[None])
        assert close(masked, logits)
        for keep, length in zip(keeps, trace.length):
            assert keep.sum() + 1 == length[0]


@torch.inference_mode()
@pytest.mark.parametrize(("threshold", "kept"), [(2.0, 1), (0.0, 49)])
def test_masked_equals_compacted_at_the_edges(model, threshold, kept):
    set_thresholds(model, threshold)
    images = pictures(model.config, 3)
    for one in images:
        logits, trace = model(one[None])
        assert [length.item() for length in trace.length] == [1 + kept] * 3
        assert close(model.forward_masked(one[None])[0], logits)
    batched, _ = model(images)
    assert close(batched, torch.cat([model(one[None])[0] for one in images]))


@torch.inference_mode()
def test_keeping_everything_is_the_dense_network(model):
    set_thresholds(model, 0.0)
    dense = build(model.config, adaptive=False).eval()
    dense.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("thresholds")}
    )
    images = pictures(model.config, 2)
    logits, trace = dense(images)
    assert trace.length == []
    assert close(model(images)[0], logits)


@torch.inference_mode()
def test_an_image_does_not_depend_on_its_batch_mates(model):
    images = pictures(model.config, 8)
    logits, trace = model(images)
    for b, one in enumerate(images):
        alone, own = model(one[None])
        assert close(logits[b : b + 1], alone)
        for stage in range(3):
            length = own.length[stage].item()
            assert trace.length[stage][b] == length
            assert trace.index[stage][b, :length].equal(own.index[stage][0])
            assert (trace.index[stage][b, length:] == -1).all()
            padding = trace.scores[stage][b, own.scores[stage].shape[1] :]
            assert (padding == -torch.inf).all()


@torch.inference_mode()
def test_padded_form_of_one_image_is_the_plain_form(model):
    one = pictures(model.config, 1)
    assert close(model(one, padded=True)[0], model(one, padded=False)[0])


@torch.inference_mode()
def test_scores_of_both_forms_agree(model):
    one = pictures(model.config, 1)
    seen = []

    def selector(stage, scores, alive):
        seen.append(scores[0, alive[0] > 0.5])
        return alive * (scores > model.thresholds[stage])

    model.forward_masked(one, selector=selector)
    for masked, compacted in zip(seen, model(one)[1].scores):
        # Near 1/49 a score is 0.02; 1e-7 is a few units in the last place.
        torch.testing.assert_close(masked, compacted[0], atol=1e-7, rtol=1e-5)


@torch.inference_mode()
def test_mean_k_keeps_the_batch_mean_by_descending_score(model):
    images = pictures(model.config, 6)
    # Thresholds with exactly so many scores of the batch above them: 33.3, 21.8 and 10.8 an image.
    for stage, above in enumerate((200, 131, 65)):
        scores = model(images, batch_rule="mean-k")[1].scores[stage]
        falling = scores.flatten().sort(descending=True).values
        model.thresholds[stage].fill_((falling[above - 1] + falling[above]) / 2)
    _, trace = model(images, batch_rule="mean-k")
    for stage, count in enumerate((33, 21, 10)):
        assert trace.length[stage].tolist() == [1 + count] * 6
        for scores, index in zip(trace.scores[stage], trace.index[stage]):
            assert index[0] == 0
            assert (index.diff() > 0).all()
            dropped = torch.ones_like(scores, dtype=torch.bool)
            dropped[index[1:] - 1] = False
            assert scores[~dropped].min() >= scores[dropped].max()


@torch.inference_mode()
def test_mean_k_mixes_batch_mates_but_twins_agree_with_one_alone(model):
    images = pictures(model.config, 8)
    mixed = model(images, batch_rule="mean-k")[0]
    alone = torch.cat([model(one[None])[0] for one in images])
    assert not close(mixed, alone)
    twins = model(images[3:4].expand(4, -1, -1, -1), batch_rule="mean-k")[0]
    assert close(twins, alone[3:4].expand(4, -1))


def test_mean_k_keeps_at_least_one():
    scores = torch.rand(4, 9)
    assert mean_k_keep_mask(scores, torch.tensor(9.0)).sum(1).tolist() == [1, 1, 1, 1]
    assert mean_k_keep_mask(scores, torch.tensor(-1.0)).all()


def test_mean_k_keeps_what_may_not_leave():
    """One image has more of them than the batch keeps on average."""
    scores = torch.tensor([[torch.inf, 0.1, torch.inf, torch.inf], [0.1, 0.3, 0.2, 0.1]])
    kept = mean_k_keep_mask(scores, torch.tensor(0.5))
    assert kept.tolist() == [[True, False, True, True], [True, True, True, False]]


def test_unknown_batch_rule(model):
    with pytest.raises(ValueError, match=r"'mean_k' is not one of \('exact', 'packed', 'mean-k'\)"):
        model(pictures(model.config, 1), batch_rule="mean_k")


@pytest.mark.parametrize("stages", [(3,), (1, 3), (1, 2, 3, 5)])
def test_as_many_thresholds_as_stages(stages):
    network = build(replace(CONFIGS["deit"], stages=stages)).eval()
    expected = [0.001, 0.002, 0.003, 0.004][: len(stages)]
    assert network.threshold_values() == pytest.approx(expected, rel=1e-6)
    with torch.inference_mode():
        _, trace = network(pictures(network.config, 2))
    assert len(trace.length) == len(stages)


def test_lvvit_votes_are_those_of_the_kept_tokens():
    model = build(CONFIGS["lvvit"]).eval()
    tokens = torch.randn(1, 5, 128)
    valid = torch.tensor([[True, True, True, True, False]])
    with torch.inference_mode():
        kept = model.norm(tokens[:, :4])
        expected = model.head(kept[:, 0]) + 0.5 * model.aux_head(kept[:, 1:]).amax(1)
        assert close(model.classify(Rows(tokens, alive=valid)), expected)
        assert close(model.classify(Rows(tokens[:, :4])), expected)
        assert not close(model.classify(Rows(tokens)), expected)  # the fifth would have won


def test_gradients_reach_every_threshold_and_every_weight(model):
    logits, tokens, masks = model.forward_masked(pictures(model.config, 4), temperature=50.0)
    (logits.square().sum() + tokens.mean() + sum(m.mean() for m in masks)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert all(threshold.grad.abs() > 0 for threshold in model.thresholds)


def test_scores_by_hand():
    """Equation 7 by hand for one block, from the block's own weights."""
    model = build(CONFIGS["deit"]).eval()
    attention, x = model.blocks[1].attn, torch.randn(1, 50, 128)
    with torch.inference_mode():
        seen = attention(x, Rows(x), False)[1]()
        scores = model.reduction.decide(0, seen.rows, seen).score
        q, k, v = attention.qkv(x).reshape(1, 50, 3, 2, 64).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / 8).softmax(3)
        norm = (weights @ v)[:, :, 1:].square().sum(3).sqrt()
        expected = (norm / norm.sum(1, keepdim=True) * weights[:, :, 0, 1:]).sum(1)
    torch.testing.assert_close(scores, expected, atol=1e-7, rtol=1e-5)
