"""LV-ViT: a convolutional stem, halved residuals, and an output that also asks the tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asvit_deploy.models.registry import ArchConfig
from asvit_deploy.models.vit import AdaptiveViT

_STEM_WIDTH = 64


class ConvStem(nn.Module):
    """Three convolutions at half resolution, then a patch projection."""

    def __init__(self, config: ArchConfig) -> None:
        super().__init__()
        width, half = _STEM_WIDTH, config.patch_size // 2
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, config.dim, half, half)

    def forward(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] -> [B, N, D]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class AdaptiveLVViT(AdaptiveViT):
    """AS-LV-ViT: logits = head(class token) + 0.5 max over the kept tokens of aux_head(token)."""

    def __init__(self, config: ArchConfig, adaptive: bool = True) -> None:
        super().__init__(config, adaptive)
        self.aux_head = nn.Linear(config.dim, config.num_classes)
        nn.init.trunc_normal_(self.aux_head.weight, std=0.02)
        nn.init.zeros_(self.aux_head.bias)

    def _stem(self) -> nn.Module:
        return ConvStem(self.config)

    def classify(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        x = self.norm(tokens)
        votes = self.aux_head(x[:, 1:])  # (B, N, C)
        if valid is not None:
            votes = votes.masked_fill(~valid[:, 1:, None], -torch.inf)
        return self.head(x[:, 0]) + 0.5 * votes.amax(1)
