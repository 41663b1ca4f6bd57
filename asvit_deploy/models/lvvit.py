"""LV-ViT: halved residuals (in `vit.Block`), and an output that also asks the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import AdaptiveViT


class AdaptiveLVViT(AdaptiveViT):
    """AS-LV-ViT: logits = head(class token) + 0.5 max over the kept tokens of aux_head(token)."""

    def __init__(self, config: ArchConfig, adaptive: bool = True) -> None:
        super().__init__(config, adaptive)
        self.aux_head = nn.Linear(config.dim, config.num_classes)
        nn.init.trunc_normal_(self.aux_head.weight, std=0.02)
        nn.init.zeros_(self.aux_head.bias)

    def classify(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        x = self.norm(tokens)
        votes = self.aux_head(x[:, 1:])  # (B, N, C)
        if valid is not None:
            votes = votes.masked_fill(~valid[:, 1:, None], -torch.inf)
        return self.head(x[:, 0]) + 0.5 * votes.amax(1)
