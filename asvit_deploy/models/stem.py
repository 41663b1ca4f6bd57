"""From pixels to patch tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from asvit_deploy.models.config import STEM_WIDTH, ArchConfig


def exact_convolutions() -> None:
    """Have this process's cuDNN compute float32 convolutions in float32.

    By default it rounds their inputs to TF32, ten bits, and moves scores across thresholds.
    """
    torch.backends.cudnn.allow_tf32 = False


class PatchEmbed(nn.Module):
    """Non-overlapping patches, one linear map."""

    def __init__(self, config: ArchConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            3, config.dim, config.patch_size, config.patch_size, bias=config.patch_bias
        )

    def forward(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] -> [B, N, D]."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """Three convolutions at half resolution, then a patch projection."""

    def __init__(self, config: ArchConfig) -> None:
        super().__init__()
        width, half = STEM_WIDTH, config.patch_size // 2
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


def build_stem(config: ArchConfig) -> nn.Module:
    """The stem that the architecture's row names."""
    return (ConvStem if config.stem == "conv" else PatchEmbed)(config)
