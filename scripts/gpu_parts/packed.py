"""Batches without padding: the rows of all pictures in one matrix, and attention by their borders.

Which rows stay is taken from the reference before the clock starts, so scoring and compacting are
not in the times of either rival: this is what packing could gain at most.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.models.blocks import Block
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.rows import Rows
from gpu_parts import networks
from gpu_parts.kit import FailPart, Kit, Report, SkipPart, target, torch_for
from gpu_parts.timing import on_device

LOGITS = 2e-2  # of the largest: what half precision may move


def varlen_attention(kit: Kit) -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]:
    """(q, k, v T [T, H, Dh], borders int32 [B+1], longest) -> T [T, H, Dh].

    Raises:
        SkipPart: this torch has no such attention.
    """
    if kit.rehearse:
        return _one_by_one
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise SkipPart(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None

    def strided(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, most: int) -> Tensor:
        return varlen_attn(q, k, v, borders, borders, most, most)  # type: ignore[return-value]

    def contiguous(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, most: int) -> Tensor:
        return strided(q.contiguous(), k.contiguous(), v.contiguous(), borders, most)

    q, k, v = torch.ones(4, 3, 2, 64, dtype=torch.float16, device=kit.device).unbind(1)
    borders = torch.tensor([0, 1, 4], dtype=torch.int32, device=kit.device)
    try:
        strided(q, k, v, borders, 3)
    except RuntimeError:
        return contiguous
    return strided


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, borders: Tensor, most: int) -> Tensor:
    """The same on a CPU."""
    ends = borders.tolist()
    parts = []
    for first, end in pairwise(ends):
        mine, keys, values = (x[first:end].transpose(0, 1)[None] for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(mine, keys, values)[0].transpose(0, 1))
    return torch.cat(parts)


class PackedModel:
    """A DeiT whose stages take all kept rows of a batch as one matrix.

    Args:
        index: per stage and picture, the rows of that stage's input that stay (int64).
    """

    def __init__(self, model: ViT, index: list[list[np.ndarray]], attend: Any) -> None:
        self.model, self.attend = model, attend
        device = model.pos_embed.device
        before = [model.config.image_tokens + 1] * len(index[0])
        self.steps: list[tuple[Tensor, Tensor, int]] = []
        for rows in index:
            starts = np.concatenate([[0], np.cumsum(before)])
            flat = np.concatenate([start + row for start, row in zip(starts, rows)])
            before = [len(row) for row in rows]
            borders = np.concatenate([[0], np.cumsum(before)]).astype(np.int32)
            self.steps.append((torch.from_numpy(flat).to(device),
                               torch.from_numpy(borders).to(device), max(before)))  # fmt: skip

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        model = self.model
        x = networks.run_stage(model, 0, model.embed(images), None)[0].flatten(0, 1)
        edges = (*model.config.stages, model.config.depth)
        for stage, (rows, borders, most) in enumerate(self.steps):
            x = x.index_select(0, rows)
            for block in model.blocks[edges[stage] : edges[stage + 1]]:
                x = self._block(block, x, borders, most)  # type: ignore[arg-type]
        first = self.steps[-1][1][:-1].long()
        return (model.classify(Rows(x.index_select(0, first)[:, None])).float(),)

    def _block(self, block: Block, x: Tensor, borders: Tensor, most: int) -> Tensor:
        heads = block.attn.heads
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, heads, -1)).unbind(1)
        x = x + block.attn.proj(self.attend(q, k, v, borders, most).flatten(1))
        return x + block.mlp(block.norm2(x))


class PaddedModel:
    """The same, padded to the longest picture of the batch and masked."""

    def __init__(self, model: ViT, index: list[list[np.ndarray]]) -> None:
        self.model = model
        device = model.pos_embed.device
        self.steps: list[tuple[Tensor, Tensor]] = []  # rows of the stage's input, which are real
        for rows in index:
            most = max(map(len, rows))
            padded = np.full((len(rows), most), -1, np.int64)
            for line, row in zip(padded, rows):
                line[: len(row)] = row
            known = torch.from_numpy(padded).to(device)
            self.steps.append((known.clamp_min(0), known >= 0))

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        x, mask = self.model.embed(images), None
        x = self.model.segment(0, Rows(x))[0].tokens
        for stage, (rows, mask) in enumerate(self.steps):
            x = x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2]))
            x = self.model.segment(stage + 1, Rows(x, alive=mask))[0].tokens
        return (self.model.classify(Rows(x, alive=mask)).float(),)


def packed(kit: Kit) -> Report:
    """B = 8 to 64: dense, padded to the longest, packed; one graph each, if it may be."""
    torch_for(kit)
    attend = varlen_attention(kit)
    result: Report = {"unit": "ms of one replay, GPU time between events",
                      "choice_of_rows": "known before", "runs": []}  # fmt: skip
    for name in networks.names(kit):
        network = networks.load(kit, name)
        logits, index = _reference(network)
        for batch in (2,) if kit.rehearse else (8, 16, 32, 64):
            run = _measure(kit, network, batch, attend, logits, index)
            result["runs"].append(run)
            kit.save(result)
    wrong = [f"{run['network']} B = {run['batch']}: {run['logit_error']['value']:.1e}"
             for run in result["runs"] if not run["logit_error"]["met"]]  # fmt: skip
    if wrong:
        raise FailPart(f"logits differ from the reference: {'; '.join(wrong)}", result)
    return result


@torch.no_grad()
def _reference(network: networks.Network) -> tuple[Tensor, list[list[np.ndarray]]]:
    """Float32 logits [n, C] and, per stage and picture, the rows that stay."""
    logits, index = [], []
    for picture in network.pictures:
        out, trace = network.model(torch.from_numpy(picture[None]))
        logits.append(out)
        index.append([rows[0].numpy() for rows in trace.index])
    return torch.cat(logits), [list(stage) for stage in zip(*index)]


@torch.no_grad()
def _measure(
    kit: Kit, network: networks.Network, batch: int, attend: Any, logits: Tensor,
    index: list[list[np.ndarray]],
) -> Report:  # fmt: skip
    from asvit_deploy.runners.torch_stages import Captured

    dtype = getattr(torch, kit.half)
    model = copy.deepcopy(network.model).to(kit.device, dtype)
    images = network.batch(batch).to(kit.device, dtype)
    chosen = [i % len(network.pictures) for i in range(batch)]
    mine = [[stage[i] for i in chosen] for stage in index]

    def dense(images: Tensor) -> tuple[Tensor, ...]:
        x = model.embed(images)
        for block in model.blocks:
            x = block.feed(block.attend(Rows(x))[0]).tokens  # type: ignore[operator]
        return (model.classify(Rows(x)).float(),)

    functions: dict[str, Any] = {"dense": dense, "padded": PaddedModel(model, mine),
                 "packed": PackedModel(model, mine, attend)}  # fmt: skip
    notes, calls = {}, {}
    for name, function in functions.items():
        try:
            calls[name] = Captured(function, (images,), None)
        except RuntimeError as error:  # an attention that cannot be captured can still be timed
            notes[name] = f"no graph: {' '.join(str(error).split())[:150]}"
            torch.cuda.synchronize()
            calls[name] = Captured(function, (images,), None, graph=False)
    wanted = logits[chosen]
    errors = {name: float((calls[name]()[0].cpu() - wanted).abs().max() / wanted.abs().max())
              for name in ("padded", "packed")}  # fmt: skip
    times = on_device(calls, kit.device, rounds=2 if kit.rehearse else 40)
    p50 = {name: value["p50"] for name, value in times.items()}
    return {
        "network": network.name, "batch": batch, "precision": kit.half, "ms": times,
        "rows": [{"sum": sum(map(len, stage)), "longest": max(map(len, stage))} for stage in mine],
        "speedup_over_dense": {name: p50["dense"] / p50[name] for name in ("padded", "packed")},
        "logit_errors": errors, "notes": notes,
        "logit_error": target(max(errors.values()), LOGITS, at_most=True),
    }  # fmt: skip
