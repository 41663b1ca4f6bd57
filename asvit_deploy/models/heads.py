"""What becomes of the last tokens: one small class a head, and the table of them.

A head's weights stand beside the network's own, under the names that checkpoints have.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from asvit_deploy.models.config import ArchConfig
from asvit_deploy.reduction.rows import Rows


class Head(Protocol):
    """Classes or an embedding from the last tokens, which the network's last norm has met."""

    @staticmethod
    def layers(config: ArchConfig) -> dict[str, int]:
        """Linear layers by their names in a checkpoint, and how wide their input is."""
        ...

    @staticmethod
    def read(network: nn.Module, rows: Rows, prefix: int) -> Tensor:
        """Rows [B, M, D] -> [B, C].

        Args:
            network: holds the layers.
            prefix: P.
        """
        ...


class ClassHead:
    """The class token through one layer."""

    @staticmethod
    def layers(config: ArchConfig) -> dict[str, int]:
        return {"head": config.dim}

    @staticmethod
    def read(network: nn.Module, rows: Rows, prefix: int) -> Tensor:
        return network.head(rows.tokens[:, 0])  # type: ignore[operator]


class Projection(ClassHead):
    """CLIP: the class token through one layer without a bias, an embedding."""


class ClassAndTokens:
    """LV-ViT: head(class token) + 0.5 max over the kept tokens of aux_head(token)."""

    @staticmethod
    def layers(config: ArchConfig) -> dict[str, int]:
        return {"head": config.dim, "aux_head": config.dim}

    @staticmethod
    def read(network: nn.Module, rows: Rows, prefix: int) -> Tensor:
        votes = network.aux_head(rows.tokens[:, prefix:])  # type: ignore[operator]  # (B, N, C)
        if rows.alive is not None:
            votes = votes.masked_fill(~rows.alive[:, prefix:, None], -torch.inf)
        return network.head(rows.tokens[:, 0]) + 0.5 * votes.amax(1)  # type: ignore[operator]


class ClassAndMean:
    """DINOv2's classifier: one layer on the class token beside the mean of the image tokens."""

    @staticmethod
    def layers(config: ArchConfig) -> dict[str, int]:
        return {"head": 2 * config.dim}

    @staticmethod
    def read(network: nn.Module, rows: Rows, prefix: int) -> Tensor:
        mean = _mean(rows, prefix)
        return network.head(torch.cat([rows.tokens[:, 0], mean], 1))  # type: ignore[operator]


class Mean(ClassHead):
    """The mean of the image tokens through one layer."""

    @staticmethod
    def read(network: nn.Module, rows: Rows, prefix: int) -> Tensor:
        return network.head(_mean(rows, prefix))  # type: ignore[operator]


class MeanNorm(ClassHead):
    """As `Mean`, where the last norm comes behind the mean: timm's `fc_norm`, MAE's fine-tuning."""

    @staticmethod
    def read(network: nn.Module, rows: Rows, prefix: int) -> Tensor:
        return network.head(network.norm(_mean(rows, prefix)))  # type: ignore[operator]


def _mean(rows: Rows, prefix: int) -> Tensor:
    """[B, D], over the image tokens in use, each as often as it stands for input tokens."""
    tokens = rows.tokens[:, prefix:]
    if rows.alive is None and rows.size is None:
        return tokens.mean(1)
    weight = rows.sizes[:, prefix:]
    if rows.alive is not None:
        weight = weight * rows.alive[:, prefix:]
    # Shares first: a sum of tokens as often as their sizes say would leave half precision.
    share = (weight / weight.sum(1, keepdim=True)).to(tokens.dtype)
    return (tokens * share[:, :, None]).sum(1)


class TwoClasses:
    """DeiT's distilled form: the mean of two layers, on the class and the distillation token."""

    @staticmethod
    def layers(config: ArchConfig) -> dict[str, int]:
        return {"head": config.dim, "head_dist": config.dim}

    @staticmethod
    def read(network: nn.Module, rows: Rows, prefix: int) -> Tensor:
        first, second = rows.tokens[:, 0], rows.tokens[:, 1]
        return (network.head(first) + network.head_dist(second)) / 2  # type: ignore[operator]


class NoHead:
    """The class token itself: an embedding."""

    @staticmethod
    def layers(config: ArchConfig) -> dict[str, int]:
        return {}

    @staticmethod
    def read(network: nn.Module, rows: Rows, prefix: int) -> Tensor:
        return rows.tokens[:, 0]


HEADS: dict[str, type[Head]] = {
    "class": ClassHead, "projection": Projection, "class_and_tokens": ClassAndTokens,
    "class_and_mean": ClassAndMean, "two_classes": TwoClasses, "mean": Mean, "mean_norm": MeanNorm,
    "none": NoHead,
}  # fmt: skip
