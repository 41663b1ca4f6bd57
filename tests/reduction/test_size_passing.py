"""Size-passing with fixed counts: by hand, in both forms, and what it costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from asvit_deploy.budget import fixed_counts
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS, arch
from asvit_deploy.models.macs import fixed_lengths, model_macs, teacher_macs
from asvit_deploy.reduction.methods import restored
from asvit_deploy.reduction.removal import remove
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.size_passing import SizePassing

KEPT = (40, 31, 27, 20, 12)


def network(prefix: int = 1, **traits):
    config = replace(arch("as_deit_tiny"), depth=6, stages=(2, 3, 5), num_classes=20,
                     image_size=112, prefix=prefix, **traits)  # fmt: skip
    torch.manual_seed(prefix)
    model = build(config, reduction=SizePassing(range(5), KEPT, prefix)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    return model


def by_hand(model, image):
    """One image in float64, row by row, from the weights alone."""
    model = model.double()
    config, prefix = model.config, model.config.prefix
    x = model.embed(image[None].double())[0]
    size = torch.ones(len(x), dtype=torch.float64)
    sizes = []
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, config.heads, -1).unbind(1)
        logits = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5 + size.log()
        weights = logits.softmax(2)
        context = torch.einsum("hij,jhd->ihd", weights, v)
        x = x + block.attn.proj(context.flatten(1))
        if i < len(KEPT):
            norm = context.norm(dim=2)
            score = ((norm / norm.sum(1, keepdim=True)).T * weights[:, 0]).sum(0)
            key = k.mean(1) / k.mean(1).norm(dim=1, keepdim=True)
            even = list(range(prefix, len(x), 2))
            odd = list(range(prefix + 1, len(x), 2))
            best = {j: max(odd, key=lambda o, j=j: float(key[j] @ key[o])) for j in even}
            value = {j: float(score[j] * max(1 - key[j] @ key[best[j]], 1e-4)) for j in even}
            gone = sorted(even, key=value.get)[: len(x) - prefix - KEPT[i]]
            for j in gone:
                size[best[j]] += size[j]
            rows = [r for r in range(len(x)) if r not in gone]
            x, size = x[rows], size[rows]
            sizes.append(size.clone())
        x = x + block.mlp(block.norm2(x))
    return model.classify(Rows(x[None]))[0], sizes


@torch.no_grad()
@pytest.mark.parametrize("prefix", [1, 3])
def test_it_is_what_its_formula_says(prefix):
    for image in torch.randn(3, 3, 112, 112):
        model = network(prefix)
        wanted, sizes = by_hand(network(prefix), image)
        torch.testing.assert_close(model(image[None])[0][0].double(), wanted, rtol=1e-4, atol=1e-5)
        # Nothing is lost: all sizes together are the tokens of the input.
        assert all(size[prefix:].sum() == 49 for size in sizes)
        rows = Rows(model.embed(image[None])[0])
        for stage, size in enumerate(sizes):
            rows, decision = model.scored(stage, rows)
            rows, _ = remove(model.reduction, stage, rows, decision, padded=False)
            assert rows.size[0].tolist() == size.tolist()


@torch.no_grad()
def test_masked_form_batches_and_single_images_agree():
    model, images = network(), torch.randn(4, 3, 112, 112)
    logits, trace = model(images)
    alone = torch.cat([model(image[None])[0] for image in images])
    masked, _, masks = model.forward_masked(images)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(masked, logits, rtol=0, atol=1e-5)
    assert [mask.sum(1).tolist() for mask in masks] == [[k] * 4 for k in KEPT]
    assert [length.tolist() for length in trace.length] == [[k + 1] * 4 for k in KEPT]


@torch.no_grad()
def test_sizes_matter():
    model, images = network(), torch.randn(4, 3, 112, 112)
    logits = model(images)[0]
    model.reduction.combine = lambda stage, rows, stay, decision: rows
    assert (model(images)[0] - logits).abs().max() > 1e-3


def test_at_least_every_second_token_stays():
    config = network().config
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
    config = network().config.at(16)
    model = build(config, reduction=SizePassing(range(5), [1] * 5)).eval()
    logits, trace = model(torch.randn(2, 3, 16, 16))
    assert logits.isfinite().all()
    assert [length.tolist() for length in trace.length] == [[2, 2]] * 5


@pytest.mark.parametrize("name", ARCHS)
def test_counts_for_a_budget(name):
    config = arch(name)
    made = fixed_counts(config, SizePassing, 0.65)
    assert made.blocks == tuple(range(config.depth - 1))
    macs = model_macs(config, fixed_lengths(config, made), made.cuts)
    assert abs(macs / teacher_macs(config) - 0.65) <= 0.0065


def test_it_is_restored_from_its_fields():
    made = restored(SizePassing(range(5), KEPT, 3).fields(), 3)
    assert isinstance(made, SizePassing)
    assert (made.blocks, made.kept, made.prefix) == ((0, 1, 2, 3, 4), KEPT, 3)
