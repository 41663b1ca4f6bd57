"""Where fewer rows begin to pay: networks of growing size, dense beside reduced.

Weights are random: what a replay takes depends on shapes alone. `slice` keeps the first rows and
chooses nothing, so no method of any kind is faster than it with the same rows.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.models import build
from asvit_deploy.models.blocks import Block
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.scoring import class_attention_row, token_scores
from gpu_parts.cut_cost import SHARE, plan
from gpu_parts.kit import Kit, Report, torch_for
from gpu_parts.timing import on_device

# (q, k T [B, H, M, Dh], context of the same shape) -> float32 [B, N]
Score = Callable[[Tensor, Tensor, Tensor], Tensor]

# Name, D, heads, depth, patch, pixels.
_SHAPES = (
    ("vit_s16_224", 384, 6, 12, 16, 224), ("vit_b16_224", 768, 12, 12, 16, 224),
    ("vit_b16_384", 768, 12, 12, 16, 384), ("vit_l16_224", 1024, 16, 24, 16, 224),
    ("vit_l16_384", 1024, 16, 24, 16, 384), ("vit_l14_518", 1024, 16, 24, 14, 518),
)  # fmt: skip
_COMPILED = ("vit_s16_224", "vit_b16_384")
BATCHES = (1, 8, 32)


def shape(name: str, dim: int, heads: int, depth: int, patch: int, pixels: int) -> ArchConfig:
    """A plain ViT with three cuts a quarter of its depth apart."""
    cuts = tuple(depth * i // 4 for i in (1, 2, 3))
    return ArchConfig(name, dim, heads, depth, 4, cuts, pixels, patch)


def shapes(kit: Kit) -> list[ArchConfig]:
    if kit.rehearse:
        return [shape("vit_xs8_32", 64, 2, 4, 8, 32)]
    return [shape(*row) for row in _SHAPES]


def rows_of(config: ArchConfig) -> list[int]:
    """Rows from each cut on, so that the blocks take `SHARE` of the dense ones' MACs."""
    behind = plan(config, [stage - 1 for stage in config.stages])
    return [behind[stage] for stage in config.stages]


def plain_score(q: Tensor, k: Tensor, context: Tensor) -> Tensor:
    """Head-weighted class attention."""
    return token_scores(class_attention_row(q, k, None), context)


@dataclass
class Reduced:
    """The forward pass with fixed rows.

    Attributes:
        rows: from each of the cuts on; None: dense.
        score: what chooses them; None keeps the first rows.
    """

    model: ViT
    rows: list[int] | None
    score: Score | None = None

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        model, cuts = self.model, self.model.config.stages if self.rows else ()
        x, scores = model.embed(images), None
        for i, block in enumerate(model.blocks):
            if i in cuts:
                x = self._cut(x, scores, self.rows[cuts.index(i)])  # type: ignore[index]
            x, scores = self._block(block, x, i + 1 in cuts)  # type: ignore[arg-type]
        return (model.classify(Rows(x)).float(),)

    @staticmethod
    def _cut(x: Tensor, scores: Tensor | None, rows: int) -> Tensor:
        if scores is None:
            return x[:, :rows].contiguous()
        kept = F.pad(scores.topk(rows - 1).indices.sort().values + 1, (1, 0))
        return x.gather(1, kept[:, :, None].expand(-1, -1, x.shape[2]))

    def _block(self, block: Block, x: Tensor, before_cut: bool) -> tuple[Tensor, Tensor | None]:
        q, k, v = block.attn._heads(block.norm1(x))
        context = F.scaled_dot_product_attention(q, k, v)
        scores = self.score(q, k, context) if before_cut and self.score else None
        x = x + block.attn.proj(context.transpose(1, 2).reshape(x.shape))
        return x + block.mlp(block.norm2(x)), scores


def _model(kit: Kit, config: ArchConfig) -> ViT:
    torch.manual_seed(0)
    with torch.device(kit.device):
        model = build(config)
    return model.to(getattr(torch, kit.half)).eval()


def noise_images(kit: Kit, config: ArchConfig, batch: int) -> Tensor:
    size = config.image_size
    return torch.randn(batch, 3, size, size, device=kit.device, dtype=getattr(torch, kit.half))


def scale(kit: Kit) -> Report:
    """Every shape and batch, one graph a variant."""
    torch_for(kit)
    result: Report = {"unit": "ms of one replay, GPU time between events", "macs_share": SHARE,
                      "runs": []}  # fmt: skip
    for config in shapes(kit):
        model = _model(kit, config)
        for batch in (2,) if kit.rehearse else BATCHES:
            result["runs"].append(_measure(kit, model, batch))
            kit.save(result)
        del model
        gc.collect()
    return result


@torch.no_grad()
def _measure(kit: Kit, model: ViT, batch: int) -> Report:
    from asvit_deploy.runners.torch_stages import Captured

    config, rows = model.config, rows_of(model.config)
    variants: dict[str, Any] = {
        "dense": Reduced(model, None), "slice": Reduced(model, rows),
        "top_k": Reduced(model, rows, plain_score),
    }  # fmt: skip
    if not kit.rehearse:  # which needs a compiler
        fused = torch.compile(plain_score, dynamic=False)
        variants["top_k_fused_score"] = Reduced(model, rows, fused)
    images = noise_images(kit, config, batch)
    calls: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for name, function in variants.items():
        try:
            calls[name] = Captured(function, (images,), None)
        except Exception as error:  # the compiler's, of many kinds
            notes[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    times = on_device(calls, kit.device, rounds=2 if kit.rehearse else 30)
    return _report(kit, config, batch, rows, times) | {"notes": notes}


def _report(kit: Kit, config: ArchConfig, batch: int, rows: list[int], times: Report) -> Report:
    dense = times["dense"]["p50"]
    return {
        "network": config.name, "pixels": config.image_size, "batch": batch,
        "precision": kit.half, "tokens": config.image_tokens + 1, "rows": rows, "ms": times,
        "speedup_over_dense": {name: round(dense / value["p50"], 4)
                               for name, value in times.items() if name != "dense"},
    }  # fmt: skip


@torch.no_grad()
def compiled(kit: Kit) -> Report:
    """Whole networks through torch.compile, which fuses as an inference compiler does."""
    from asvit_deploy.runners.torch_stages import Captured

    torch_for(kit)
    result: Report = {"unit": "ms of one replay, GPU time between events", "runs": []}
    for config in shapes(kit):
        if not (kit.rehearse or config.name in _COMPILED):
            continue
        model, rows, calls = _model(kit, config), rows_of(config), {}
        images, seconds = noise_images(kit, config, 1), {}
        for name, how in (("dense", (None, None)), ("top_k", (rows, plain_score)),
                          ("slice", (rows, None))):  # fmt: skip
            start = time.perf_counter()
            reduced = Reduced(model, *how)
            made = reduced if kit.rehearse else torch.compile(reduced.__call__, dynamic=False)
            calls[name] = Captured(made, (images,), None)
            seconds[name] = round(time.perf_counter() - start, 1)
        times = on_device(calls, kit.device, rounds=2 if kit.rehearse else 30)
        result["runs"].append(_report(kit, config, 1, rows, times) | {"compile_s": seconds})
        kit.save(result)
        torch._dynamo.reset()
    return result
