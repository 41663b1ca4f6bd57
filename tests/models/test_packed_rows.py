"""Packed batches in PyTorch: every picture as alone, and nothing worked out that pads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import sharpened
from torch.nn import functional as F

from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.ops import ragged
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.runners.pytorch import TorchRunner

ADAPTIVE = [method for method in RANKED.values() if method.adapts]


@pytest.fixture(scope="module")
def images(photos):
    return torch.from_numpy(photos.batch(range(8)))


def by_thresholds(model, method, images):
    """The network with thresholds of a method in the middle of its scores, cut after cut."""
    config = model.config
    blocks = method.usual_blocks(config.stages, config.depth)
    made = model.with_reduction(method(blocks, prefix=config.prefix)).eval()
    with torch.no_grad():
        for stage, parameter in enumerate(made.reduction.parameters()):
            scores = torch.cat([made(one[None])[1].scores[stage][0] for one in images])
            ordered = scores[scores.isfinite()].double().sort().values
            middle = len(ordered) // 2  # between two scores: rounding turns no decision
            parameter.fill_(((ordered[middle - 1] + ordered[middle]) / 2).item())
    return made


def same_as_alone(model, images):
    """Output, kept rows and scores of a packed batch are those of its pictures alone."""
    with torch.inference_mode():
        output, trace = model(images, batch_rule="packed")
        for i, image in enumerate(images):
            expected, own = model(image[None])
            torch.testing.assert_close(output[i], expected[0], rtol=0, atol=2e-5)
            for stage, length in enumerate(own.length):
                count = int(length)
                assert int(trace.length[stage][i]) == count
                # Added rows are numbered behind those of the batch, padding too.
                rows = own.scores[stage].shape[1] + model.config.prefix
                there, alone = trace.index[stage][i, :count], own.index[stage][0]
                assert torch.equal(there[alone < rows], alone[alone < rows])
    return trace


def test_thresholds_keep_what_each_picture_keeps_alone(mini, images):
    trace = same_as_alone(mini, images)
    assert all(len(set(length.tolist())) > 2 for length in trace.length), "lengths should differ"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_batches_of_any_size(mini, images, count):
    same_as_alone(mini, images[:count])


@pytest.mark.parametrize("method", ADAPTIVE, ids=lambda method: method.name)
def test_every_method_by_thresholds(mini, images, method):
    trace = same_as_alone(by_thresholds(mini, method, images[:4]), images[:4])
    assert len({tuple(length.tolist()) for length in trace.length}) > 1


@pytest.mark.parametrize("method", RANKED.values(), ids=lambda method: method.name)
def test_every_method_with_fixed_counts(mini, images, method):
    blocks = mini.config.stages
    made = mini.with_reduction(method(blocks, [30, 18, 10], mini.config.prefix))
    same_as_alone(made, images[:3])


@pytest.mark.parametrize("kind", ["lvvit", "two_classes", "mean"])
def test_heads_that_look_at_more_than_the_class_token(mini_config, kind):
    config = {
        "lvvit": arch("as_lvvit_s").at(32, 10),
        "two_classes": replace(mini_config, head="two_classes", prefix=2, positions="all"),
        "mean": replace(mini_config, head="mean"),
    }[kind]
    torch.manual_seed(0)
    images = torch.randn(4, 3, config.image_size, config.image_size)
    model = build(config).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    same_as_alone(by_thresholds(model, type(model.reduction), images), images)


def test_one_token_beside_all(mini, images):
    """A picture that keeps a single token and one that keeps all of them, in one batch."""
    with torch.inference_mode():

        def rule(stage, scores, alive):
            keep = alive.clone()
            keep[0] = F.one_hot(scores[0].argmax(), scores.shape[1]).bool()
            return keep

        output, trace = mini(images[:2], batch_rule="packed", rule=rule)
        tokens = mini.config.image_tokens
        assert [length.tolist() for length in trace.length] == [[2, 1 + tokens]] * 3
        for i in range(2):
            alone, _ = mini(images[i : i + 1], rule=lambda s, scores, alive, i=i: (
                F.one_hot(scores.argmax(1), scores.shape[1]).bool() if i == 0 else alive
            ))  # fmt: skip
            torch.testing.assert_close(output[i], alone[0], rtol=0, atol=2e-5)


def test_a_picture_of_nan_harms_no_other(mini, images):
    broken = images[:3].clone()
    broken[1] = torch.nan
    with torch.inference_mode():
        output, _ = mini(broken, batch_rule="packed")
    assert output[1].isnan().all()
    with torch.inference_mode():
        for i in (0, 2):
            torch.testing.assert_close(output[i], mini(images[i : i + 1])[0][0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("savings", [True, False])
def test_linear_layers_see_the_rows_that_stay_and_no_other(mini_config, photos, images, savings):
    """Of every linear layer behind the first cut: its input is [sum of K, D]."""
    mini = sharpened(replace(mini_config, last_block="prefix" if savings else "all"), photos)
    seen: dict[str, torch.Size] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: seen.__setitem__(name, given[0].shape)
        )
        for name, module in mini.blocks.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        with torch.inference_mode():
            _, trace = mini(images, batch_rule="packed")
    finally:
        for hook in hooks:
            hook.remove()
    totals = [int(length.sum()) for length in trace.length]
    stages, depth = mini.config.stages, mini.config.depth
    for name, shape in seen.items():
        block = int(name.split(".")[0])
        cuts = sum(block >= stage for stage in stages)
        rows = totals[cuts - 1] if cuts else len(images) * mini.config.rows
        if savings and block == depth - 1 and not name.endswith("qkv"):
            rows = len(images)  # the class tokens alone
        assert shape[0] == rows, name
        assert len(shape) == 2, name
    layers = {name.split(".", 1)[1] for name in seen}
    assert layers == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("length", [[5, 1, 20, 4], [1], [7, 7]])
def test_attention_over_packed_rows(length, biased):
    """Both forms of it, against each picture's own softmax."""
    total, heads, width = sum(length), 3, 8
    qkv = torch.randn(total, 3 * heads * width)
    bias = torch.rand(total).log() if biased else None
    made = ragged.ragged_attention(qkv, torch.tensor(length), heads, bias)
    first = 0
    for count in length:
        one = slice(first, first + count)
        q, k, v = qkv[one].unflatten(1, (3, heads, width)).permute(1, 2, 0, 3)
        logits = q @ k.transpose(1, 2) / width**0.5
        weight = (logits if bias is None else logits + bias[one]).softmax(2)
        expected = (weight @ v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(made[one], expected, rtol=0, atol=1e-6)
        first += count
    rows = qkv.unflatten(1, (3, heads, width))
    in_one_call = ragged.padded(rows, torch.tensor(length), bias)
    torch.testing.assert_close(in_one_call, made, rtol=0, atol=1e-6)


def test_packing_and_back():
    alive = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    tokens = torch.randn(3, 4, 5)
    packed = Rows(tokens, alive).packed()
    assert torch.equal(packed.tokens, tokens[alive])
    back = packed.unpacked()
    assert back.packing is None
    assert torch.equal(back.tokens[alive], tokens[alive])
    own = tokens[:, :1].expand(-1, 4, -1)
    assert torch.equal(back.tokens[~alive], own[~alive]), "padding is the picture's own first row"


def test_a_batch_of_none_is_refused_in_one_line(mini, photos):
    from asvit_deploy.errors import UserError

    for rule in ("exact", "packed"):
        with pytest.raises(UserError, match="a batch of 0 pictures"):
            TorchRunner(mini, rule)(photos.batch(range(1))[:0])


def test_an_unknown_rule_is_refused(images):
    with pytest.raises(ValueError, match="'ragged' is not one of"):
        build(arch("as_deit_mini"))(images[:1], batch_rule="ragged")
