"""Adaptive ViT in plain PyTorch: DeiT blocks, three places where tokens leave.

    images -> patch tokens -> [block]* -> (score > theta: keep) -> [block]* -> ... -> logits

One class serves the DeiT family; LV-ViT (`lvvit.py`) changes the output.
Parameters carry timm's names, so dense checkpoints load as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.stem import build_stem
from asvit_deploy.ops.torch_op import threshold_compact
from asvit_deploy.reduction.scoring import class_attention_row, token_scores
from asvit_deploy.reduction.threshold import (
    TEMPERATURE,
    compact_masked,
    mean_k_keep_mask,
    soft_keep_mask,
)

# Where the paper's fine-tuning starts: 0.001, 0.002, 0.003. A fresh adaptive model carries these.
INITIAL_THRESHOLD = 0.001

# How the images of a batch go together.
BatchRule = Literal["exact", "mean-k"]

# What a token that was dropped loses in the training form: the others' attention, or its features.
Masking = Literal["attention", "activation"]

# (stage, scores float32 [B, N], alive float32 [B, N]) -> keep mask float32 [B, N]
Selector = Callable[[int, Tensor, Tensor], Tensor]


@dataclass
class Trace:
    """What happened at each stage, in stage order.

    `index` and `length` follow the op's contract (rows of that stage's input, class token
    included); `scores` are float32 [B, rows-1], -inf where a row only pads the batch.
    """

    scores: list[Tensor] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)
    length: list[Tensor] = field(default_factory=list)


class Attention(nn.Module):
    """Multi-head self-attention that can also score its tokens."""

    def __init__(self, config: ArchConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.family == "deit")
        self.proj = nn.Linear(config.dim, config.dim)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if x.dim() == 2:  # (M, 3, H, Dh)
            q, k, v = qkv.permute(1, 2, 0, 3).chunk(3)
        else:  # (B, M, 3, H, Dh)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v  # each (B, H, M, Dh)

    def forward(
        self, x: Tensor, key_mask: Tensor | None, score: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Inference form.

        Args:
            x: T [B, M, D], or [M, D] for one image.
            key_mask: bool [B, M], False where a row only pads the batch.

        Returns:
            T of the shape of `x`, and float32 scores [B, M-1] on request.
        """
        q, k, v = self._heads(x)
        mask = None if key_mask is None else key_mask[:, None, None, :]
        context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.proj(context.transpose(1, 2).reshape(x.shape))
        if not score:
            return out, None
        scores = token_scores(class_attention_row(q, k, key_mask), context)
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, 1:], -torch.inf)
        return out, scores

    def forward_masked(
        self, x: Tensor, keep: Tensor | None, score: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Training form: keys weighted by `keep` float32 [B, M] inside the softmax.

        A dropped token still attends to itself, so that no row of the softmax is empty.
        """
        q, k, v = self._heads(x)
        # Not the fused attention: on a CPU its backward pass is three times slower than this.
        logits = (q * k.shape[3] ** -0.5) @ k.transpose(2, 3)  # (B, H, M, M)
        weights = logits.softmax(3) if keep is None else masked_softmax(logits, keep)
        context = weights @ v
        out = self.proj(context.transpose(1, 2).flatten(2))
        return out, token_scores(_class_row(q, k, keep), context) if score else None


def _class_row(q: Tensor, k: Tensor, keep: Tensor | None) -> Tensor:
    """The class token's row of the masked softmax, float32 [B, H, M] under autocast too."""
    with torch.autocast(q.device.type, enabled=False):
        if keep is None:
            return class_attention_row(q, k, None)
        logits = (q[:, :, 0:1].float() * k.shape[3] ** -0.5) @ k.float().transpose(2, 3)
        return masked_softmax(logits, keep).squeeze(2)


class _MaskedSoftmax(torch.autograd.Function):
    """Softmax of a factor times an exponential, w_j exp(l_ij), differentiable in w at w = 0 too.

    Written out because autograd's version of it costs three times the memory traffic.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
        dropped = keep[:, None, None, :] < 0.5
        if logits.shape[2] == logits.shape[3]:
            own = torch.eye(logits.shape[3], dtype=torch.bool, device=logits.device)
            dropped = dropped & ~own  # (B, 1, M, M)
        masked = logits.masked_fill(dropped, -torch.inf)
        weights = masked.softmax(3)
        ctx.save_for_backward(logits, masked.logsumexp(3, keepdim=True), weights)
        return weights

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        logits, log_sum, weights = ctx.saved_tensors
        inner = grad - (grad * weights).sum(3, keepdim=True)
        if not ctx.needs_input_grad[1]:
            return inner * weights, None
        # d weights_ij / d w_j; a dropped key may outdo all that are kept, so its share is bounded.
        share = (logits - log_sum).clamp(max=0).exp() * inner
        if logits.shape[2] == logits.shape[3]:
            share.diagonal(dim1=2, dim2=3).zero_()  # a token sees itself whatever the mask says
        return inner * weights, share.sum((1, 2), dtype=torch.float32)


def masked_softmax(logits: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the kept keys and oneself; the mask is a factor, so its gradient lives.

    Args:
        logits: T [B, H, M, M], or [B, H, 1, M] for the class token's row alone.
        keep: float32 [B, M], 1 or 0; the class token's is 1.

    Returns:
        The shape of `logits`, in T; in float32 where autocast on a GPU has its softmax so.
    """
    return _MaskedSoftmax.apply(logits, keep)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, config: ArchConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; LV-ViT halves both residual branches."""

    def __init__(self, config: ArchConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = Mlp(config)
        self.halve = config.family == "lvvit"

    def _branch(self, x: Tensor) -> Tensor:
        return x * 0.5 if self.halve else x

    def forward(
        self, x: Tensor, mask: Tensor | None, score: bool, masked: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """`mask` is the key mask (inference) or the keep mask (`masked`, training)."""
        attend = self.attn.forward_masked if masked else self.attn
        out, scores = attend(self.norm1(x), mask, score)
        x = x + self._branch(out)
        return x + self._branch(self.mlp(self.norm2(x))), scores


class AdaptiveViT(nn.Module):
    """A ViT whose image tokens leave at `config.stages`; dense when `adaptive` is False."""

    def __init__(self, config: ArchConfig, adaptive: bool = True) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = build_stem(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.image_tokens, config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.head = nn.Linear(config.dim, config.num_classes)
        self.thresholds = nn.ParameterList(
            nn.Parameter(torch.tensor(INITIAL_THRESHOLD * (stage + 1)))
            for stage in range(len(config.stages) if adaptive else 0)
        )
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def adaptive(self) -> bool:
        """Whether tokens leave at all."""
        return len(self.thresholds) > 0

    def threshold_values(self) -> list[float]:
        """The thresholds as plain numbers, in stage order; empty when dense."""
        return [threshold.item() for threshold in self.thresholds]

    def embed(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] -> tokens [B, M, D], class token first."""
        tokens = self.patch_embed(images)
        cls_token = self.cls_token.expand(images.shape[0], -1, -1)
        return torch.cat([cls_token, tokens], 1) + self.pos_embed

    def classify(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """tokens [B, M, D] -> logits [B, C]; `valid` bool [B, M] names the rows in use."""
        return self.head(self.norm(tokens)[:, 0])

    def _scored_by(self, block: int) -> bool:
        return self.adaptive and block + 1 in self.config.stages

    def forward(
        self,
        images: Tensor,
        batch_rule: BatchRule = "exact",
        padded: bool | None = None,
        decisions: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Trace]:
        """Inference form: tokens are really removed.

        Args:
            images: float [B, 3, H, W], normalised.
            batch_rule: "exact" keeps for each image what it would keep alone (rows are padded to
                the batch's maximum and masked); "mean-k" is the paper's rule.
            padded: whether rows can pad the batch; by default, where B > 1.
            decisions: of one image, what stays in place of what the thresholds say: per stage
                int64 [K], rows of that stage's input, the class token's 0 first.

        Returns:
            logits [B, C] and the trace of the stages.

        Raises:
            ValueError: an unknown batch rule, or decisions for several images.
        """
        if decisions is not None and images.shape[0] != 1:
            raise ValueError(f"decisions are of one image, not of {images.shape[0]}")
        if batch_rule not in get_args(BatchRule):
            raise ValueError(f"batch rule {batch_rule!r} is not one of {get_args(BatchRule)}")
        padded = images.shape[0] > 1 if padded is None else padded
        mean_k = batch_rule == "mean-k"
        # One image goes through the blocks without its batch axis: its linear layers are then
        # plain matrix products with a bias, which runtimes fuse whatever the number of tokens.
        single = not padded and images.shape[0] == 1
        x, key_mask, scores, trace = self.embed(images), None, None, Trace()
        x = x.squeeze(0) if single else x
        for i, block in enumerate(self.blocks):
            if self.adaptive and i in self.config.stages:
                stage = len(trace.length)
                threshold = self.thresholds[stage]
                assert scores is not None
                x = x.unsqueeze(0) if single else x
                if decisions is not None:
                    index = decisions[stage][None]
                    x, length = x[:, decisions[stage]], torch.full_like(index[:, 0], index.shape[1])
                elif mean_k:
                    x, index, length = compact_masked(x, mean_k_keep_mask(scores, threshold))
                else:
                    x, index, length, _ = threshold_compact(x, scores, threshold)
                trace.scores.append(scores)
                trace.index.append(index)
                trace.length.append(length)
                if padded and not mean_k:
                    key_mask = index >= 0
                x = x.squeeze(0) if single else x
            x, scores = block(x, key_mask, self._scored_by(i))
        return self.classify(x.unsqueeze(0) if single else x, key_mask), trace

    def forward_masked(
        self,
        images: Tensor,
        temperature: float = TEMPERATURE,
        selector: Selector | None = None,
        masking: Masking = "attention",
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Training form: every token stays in place, dropped ones are hidden from attention.

        Args:
            images: float [B, 3, H, W], normalised.
            temperature: T of Eq. 9.
            selector: another rule in place of the thresholds (random, top-k), for ablations.
            masking: "activation" multiplies dropped tokens by zero once and lets all attend to
                them (Table 3's comparison); the inference form is then another function.

        Returns:
            logits [B, C], final tokens [B, M, D] after the last norm, and per stage the keep mask
            float32 [B, N] (1 or 0; gradients reach thresholds and scores).
        """
        x, scores, keep = self.embed(images), None, None
        masks: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if self.adaptive and i in self.config.stages:
                stage = len(masks)
                assert scores is not None
                alive = masks[-1] if masks else torch.ones_like(scores)
                if selector is None:
                    mask = soft_keep_mask(scores, self.thresholds[stage], alive, temperature)
                else:
                    mask = selector(stage, scores, alive)
                masks.append(mask)
                padded = F.pad(mask, (1, 0), value=1.0)
                if masking == "activation":
                    x = x * padded.unsqueeze(2).to(x.dtype)
                else:
                    keep = padded
            x, scores = block(x, keep, self._scored_by(i), masked=True)
        valid = F.pad(masks[-1].detach(), (1, 0), value=1.0) > 0.5 if masks else None
        return self.classify(x, valid), self.norm(x), masks
