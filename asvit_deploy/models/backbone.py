"""What every network has, whether tokens leave or not: stem, embeddings, blocks, head.

What an architecture is, traits say (`models.config`). Parameters carry timm's names, so dense
checkpoints load as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from asvit_deploy.models.blocks import Block
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.heads import HEADS
from asvit_deploy.models.stem import build_stem
from asvit_deploy.reduction.rows import Rows


class Backbone(nn.Module):
    """The parts of a ViT."""

    def __init__(self, config: ArchConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = build_stem(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        if config.prefix > 1:
            self.reg_token = nn.Parameter(torch.zeros(1, config.prefix - 1, config.dim))
        placed = config.rows if config.positions == "all" else config.image_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, placed, config.dim))
        if config.norm_pre:
            self.norm_pre = nn.LayerNorm(config.dim, eps=config.eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        heads = HEADS[config.head].layers(config)
        if "head" in heads:
            bias = config.head != "projection"
            self.head = nn.Linear(heads.pop("head"), config.num_classes, bias=bias)
        self._initialise()
        # Behind the others, so that the random numbers of a seed stay theirs.
        for name, width in heads.items():
            self.add_module(name, layer := nn.Linear(width, config.num_classes))
            _initialise_linear(layer)

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.config.prefix > 1:
            nn.init.trunc_normal_(self.reg_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _initialise_linear(module)

    def embed(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] -> tokens [B, M, D], class token first."""
        tokens = self.patch_embed(images)
        if self.config.positions == "image":
            tokens = tokens + self.pos_embed
        first = [self.cls_token.expand(images.shape[0], -1, -1)]
        if self.config.prefix > 1:
            first.append(self.reg_token.expand(images.shape[0], -1, -1))
        tokens = torch.cat([*first, tokens], 1)
        if self.config.positions == "all":
            tokens = tokens + self.pos_embed
        return self.norm_pre(tokens) if self.config.norm_pre else tokens

    def classify(self, rows: Rows) -> Tensor:
        """The rows that are left -> logits or an embedding [B, C]."""
        x = rows.batched if self.config.head == "mean_norm" else self.norm(rows.batched)
        return HEADS[self.config.head].read(self, replace(rows, tokens=x), self.config.prefix)


def _initialise_linear(layer: nn.Linear) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
