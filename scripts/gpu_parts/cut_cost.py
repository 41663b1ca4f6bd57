"""What a cut costs: a static network that passes sizes on, reduced at 11, 3 and 2 places.

All networks but the dense ones take the same multiply-accumulates, so what differs is the price of
cutting more often. Two prices are measured: keeping the highest scores alone, and size-passing,
which gives a leaving row's size to the most similar row that stays and adds log(size) to the
logits of the keys from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from asvit_deploy.models.blocks import Block
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.scoring import token_scores
from gpu_parts import networks
from gpu_parts.kit import FailPart, Kit, Report, torch_for
from gpu_parts.timing import on_device

SHARE = 0.65  # of the dense network's multiply-accumulates


def block_macs(config: ArchConfig, before: int, after: int) -> int:
    """A block that is cut between attention, on `before` rows, and MLP, on `after`."""
    d = config.dim
    return 4 * before * d * d + 2 * before * before * d + 2 * after * d * config.hidden


def places(config: ArchConfig, cuts: int) -> tuple[int, ...]:
    """The blocks to cut in: all but the last, or as many spread evenly."""
    last = config.depth - 1
    if cuts >= last:
        return tuple(range(last))
    return tuple(round((i + 1) * config.depth / (cuts + 1)) - 1 for i in range(cuts))


def rows_after(config: ArchConfig, cuts: Sequence[int], ratio: float) -> list[int]:
    """Rows behind each block where every cut keeps that share of the image tokens."""
    rows, tokens = [], float(config.image_tokens)
    for block in range(config.depth):
        tokens *= ratio if block in cuts else 1
        rows.append(1 + max(1, round(tokens)))
    return rows


def plan(config: ArchConfig, cuts: Sequence[int], share: float = SHARE) -> list[int]:
    """Rows behind each block so that the network takes `share` of the dense one's blocks."""
    full = config.image_tokens + 1
    dense = config.depth * block_macs(config, full, full)

    def macs(ratio: float) -> float:
        after = rows_after(config, cuts, ratio)
        return sum(block_macs(config, a, b) for a, b in zip([full, *after], after)) / dense

    low, high = 0.01, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if macs(middle) > share else (middle, high)
    return rows_after(config, cuts, low)


@dataclass
class CutModel:
    """The forward pass with fixed rows.

    Attributes:
        rows: behind each block; None: dense.
        bias: whether keys carry log(size), from the first block on.
        passing: size-passing in place of the highest scores.
    """

    model: ViT
    rows: Sequence[int] | None
    bias: bool
    passing: bool

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.model.embed(images)
        size = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
        for i, block in enumerate(self.model.blocks):
            cut = self.rows is not None and self.rows[i] < x.shape[1]
            x, key, score = self._attend(block, x, size, cut)  # type: ignore[arg-type]
            if cut:
                assert self.rows is not None
                assert score is not None
                choose = self._pass_sizes if self.passing else self._highest
                x, size = choose(x, size, key, score, self.rows[i])
            x = x + block.mlp(block.norm2(x))  # type: ignore[operator]
        return (self.model.classify(Rows(x)).float(),)

    def _attend(
        self, block: Block, x: Tensor, size: Tensor, cut: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v = block.attn._heads(block.norm1(x))
        bias = size.log()[:, None, None, :] if self.bias else None
        mask = None if bias is None else bias.to(q.dtype)
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = x + block.attn.proj(context.transpose(1, 2).reshape(x.shape))
        if not cut:
            return out, k, None
        logits = (q[:, :, :1].float() * k.shape[3] ** -0.5) @ k.float().transpose(2, 3)
        row = (logits if bias is None else logits + bias).softmax(3).squeeze(2)
        return out, k, token_scores(row, context)

    @staticmethod
    def _highest(
        x: Tensor, size: Tensor, key: Tensor, score: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        return _gather(x, size, score.topk(rows - 1).indices)

    @staticmethod
    def _pass_sizes(
        x: Tensor, size: Tensor, key: Tensor, score: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Among tokens at even places, those leave that are least missed."""
        q = F.normalize(key[:, :, 1:].float().mean(1), dim=2)  # (B, N, Dh)
        likeness = q[:, ::2] @ q[:, 1::2].transpose(1, 2)
        best, into = likeness.max(2)
        value = score[:, ::2] * (1 - best).clamp_min(1e-4)
        gone = value.topk(x.shape[1] - rows, largest=False).indices  # (B, r)
        moved = size.gather(1, 1 + 2 * gone)
        size = size.scatter_add(1, 2 + 2 * into.gather(1, gone), moved)
        kept = torch.ones_like(score).scatter(1, 2 * gone, -torch.inf)
        return _gather(x, size, kept.topk(rows - 1).indices)


def _gather(x: Tensor, size: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The class token and the chosen image tokens, in their order."""
    rows = F.pad(chosen.sort().values + 1, (1, 0))
    return x.gather(1, rows[:, :, None].expand(-1, -1, x.shape[2])), size.gather(1, rows)


def variants(config: ArchConfig) -> dict[str, tuple[list[int] | None, bool, bool]]:
    """Name -> rows, bias, passing."""
    made: dict[str, tuple[list[int] | None, bool, bool]] = {
        "dense": (None, False, False), "dense_with_size_bias": (None, True, False),
    }  # fmt: skip
    for cuts in (config.depth - 1, 3, 2):
        rows = plan(config, places(config, cuts))
        made[f"top_k_{cuts}_cuts"] = (rows, False, False)
        made[f"top_k_with_size_bias_{cuts}_cuts"] = (rows, True, False)
        made[f"size_passing_{cuts}_cuts"] = (rows, True, True)
    return made


def cut_cost(kit: Kit) -> Report:
    """Whole networks as one graph each, beside the dense one."""
    torch_for(kit)
    result: Report = {"unit": "ms of one replay, GPU time between events",
                      "macs_share": SHARE, "runs": []}  # fmt: skip
    for name in networks.names(kit):
        network = networks.load(kit, name)
        for batch in (1, 8):
            result["runs"].append(_measure(kit, network, kit.batch(batch)))
            kit.save(result)
    return result


def _judge(logits: dict[str, Tensor]) -> None:
    """A bias of log(1) changes nothing, and no network gives what is no number."""
    wrong = [name for name, value in logits.items() if not value.isfinite().all()]
    dense, same = logits["dense"], logits["dense_with_size_bias"]
    error = float((dense - same).abs().max() / dense.abs().max())
    if wrong or error > 2e-2:
        words = f"not finite: {', '.join(wrong)}" if wrong else f"a bias of 0 moves logits {error}"
        raise FailPart(words)


@torch.no_grad()
def _measure(kit: Kit, network: networks.Network, batch: int) -> Report:
    from asvit_deploy.runners.torch_stages import Captured

    dtype = getattr(torch, kit.half)
    model = network.model.to(kit.device, dtype)
    images = network.batch(batch).to(kit.device, dtype)
    made = variants(network.config)
    calls = {name: Captured(CutModel(model, *how), (images,), None) for name, how in made.items()}
    logits = {name: call()[0].clone() for name, call in calls.items()}
    _judge(logits)
    times = on_device(calls, kit.device, rounds=2 if kit.rehearse else 60, burst=1)
    dense = times["dense"]["p50"]
    return {
        "network": network.name, "batch": batch, "precision": kit.half,
        "variants": {
            name: {**times[name], "over_dense": round(times[name]["p50"] / dense, 4),
                   "rows": how[0]}
            for name, how in made.items()
        },
    }  # fmt: skip
