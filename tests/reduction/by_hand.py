"""A network whose tokens leave, worked out for one picture in float64 from its weights alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.reduction.removal import remove
from asvit_deploy.reduction.rows import Rows

TOKENS = 49
EVERY_BLOCK = ((0, 1, 2, 3, 4), (40, 31, 27, 20, 12))  # blocks, image tokens that stay
STAGES = ((1, 3, 4), (30, 15, 7))


@dataclass
class Here:
    """What a method sees at a cut.

    Attributes:
        stage: the number of the cut.
        x: [M, D].
        size: [M].
        weights: the softmax, [H, M, M].
        context: [M, H, Dh].
        key: mean over heads, [M, Dh].
        prefix: P.
    """

    stage: int
    x: Tensor
    size: Tensor
    weights: Tensor
    context: Tensor
    key: Tensor
    prefix: int

    @property
    def rows(self) -> range:
        """Image rows."""
        return range(self.prefix, len(self.x))

    def score(self, row: int) -> float:
        """AS-ViT's, Eq. 5-7."""
        heads = [self.context[row, h].norm() for h in range(len(self.weights))]
        share = [float(norm / sum(heads)) for norm in heads]
        return sum(s * float(self.weights[h, 0, row]) for h, s in enumerate(share))

    def attention(self, row: int) -> float:
        """The class token's, mean over heads."""
        return float(self.weights[:, 0, row].mean())

    def alike(self, one: int, other: int) -> float:
        """Cosine of two keys."""
        a, b = self.key[one], self.key[other]
        return float(a @ b / a.norm() / b.norm())

    def without(self, gone: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """What a cut returns where those rows leave."""
        stay = [row for row in range(len(self.x)) if row not in gone]
        return self.x[stay], self.size[stay], stay


# What is seen -> tokens and sizes that go on, and the rows of this cut that are among them.
Cut = Callable[[Here], tuple[Tensor, Tensor, list[int]]]


def network(method: type[Ranked], prefix: int = 1, blocks=None, kept=None, **traits) -> ViT:
    """Random weights with peaked attention, 49 image tokens.

    Args:
        blocks, kept: by default those of `EVERY_BLOCK` or `STAGES`, whichever is the method's.
    """
    config = replace(arch("as_deit_tiny"), depth=6, stages=(2, 4, 5), num_classes=20,
                     image_size=112, prefix=prefix, **traits)  # fmt: skip
    if blocks is None:
        blocks, kept = STAGES if len(method.usual_blocks((2, 4, 5), 6)) == 3 else EVERY_BLOCK
    torch.manual_seed(prefix)
    model = build(config, reduction=method(blocks, kept, prefix)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    return model


@torch.no_grad()
def by_hand(model: ViT, image: Tensor, cut: Cut) -> tuple[Tensor, list[Tensor], list[list[int]]]:
    """Logits [C] of one image; at each cut the sizes behind it and the rows that stay."""
    model = copy.deepcopy(model).double()
    config = model.config
    x = model.embed(image[None].double())[0]
    size = torch.ones(len(x), dtype=torch.float64)
    sizes, indices = [], []
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, config.heads, -1).unbind(1)
        logits = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5 + size.log()
        weights = logits.softmax(2)
        context = torch.einsum("hij,jhd->ihd", weights, v)
        x = x + config.residual * block.attn.proj(context.flatten(1))
        if i in model.reduction.blocks:
            here = Here(model.reduction.blocks.index(i), x, size.clone(), weights, context,
                        k.mean(1), config.prefix)  # fmt: skip
            x, size, index = cut(here)
            sizes.append(size.clone())
            indices.append(index)
        x = x + config.residual * block.mlp(block.norm2(x))
    return model.classify(Rows(x[None], size=size[None]))[0], sizes, indices


@torch.no_grad()
def same_by_hand(model: ViT, cut: Cut, pictures: int = 3) -> None:
    """One picture at a time: the same rows stay, with the same sizes, and the output agrees."""
    for image in torch.randn(pictures, 3, 112, 112):
        wanted, sizes, indices = by_hand(model, image, cut)
        logits, trace = model(image[None])
        assert [index[0].tolist() for index in trace.index] == indices
        torch.testing.assert_close(logits[0].double(), wanted, rtol=1e-4, atol=1e-5)
        found = [rows.sizes[0].double() for rows in walked(model, image[None])]
        torch.testing.assert_close(found, sizes, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def walked(model: ViT, images: Tensor) -> list[Rows]:
    """The rows behind each cut."""
    single = images.shape[0] == 1
    x = model.embed(images)
    rows, found = Rows(x[0] if single else x), []
    for stage in range(len(model.cuts)):
        rows, decision = model.scored(stage, rows)
        rows, _ = remove(model.reduction, stage, rows, decision, padded=not single)
        found.append(rows)
    return found


@torch.no_grad()
def same_in_all_forms(model: ViT, images: Tensor, places: bool = True) -> None:
    """A picture alone, in a batch, and the training form: the same decisions and output.

    Args:
        places: whether the same rows stay, and not only as many.
    """
    logits, trace = model(images)
    alone = [model(image[None]) for image in images]
    masked, _, masks = model.forward_masked(images)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, torch.cat([one for one, _ in alone]), rtol=0, atol=1e-5)
    torch.testing.assert_close(masked, logits, rtol=0, atol=1e-5)
    appended, prefix = model.reduction.appends, model.config.prefix
    for stage, mask in enumerate(masks):
        length = trace.length[stage].tolist()
        assert length == [one.length[stage].item() for _, one in alone]
        assert length == (mask.sum(1) + prefix + appended).tolist()
        for picture, (_, one) in enumerate(alone):
            kept = length[picture] - appended
            index = trace.index[stage][picture, :kept].tolist()
            assert not places or index == one.index[stage][0, :kept].tolist()


def sizes_are_whole(model: ViT, images: Tensor, tokens: int = TOKENS) -> None:
    """No input token is lost or counted twice: sizes of image rows sum to the tokens."""
    for rows in walked(model, images):
        total = (rows.sizes[:, model.config.prefix :] * rows.living(model.config.prefix)).sum(1)
        torch.testing.assert_close(total, torch.full_like(total, tokens), rtol=0, atol=1e-4)
