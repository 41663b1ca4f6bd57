"""A network with a ViT-S's width that is made in milliseconds, and files as others save them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.config import ArchConfig

THIN = replace(
    arch("as_deit_small"), name="as_deit_thin", depth=3, stages=(1, 2), mlp_ratio=1, image_size=32,
    num_classes=7,
)  # fmt: skip
# What timm writes beside an augreg ViT-S, both layouts.
AUGREG = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bicubic",
          "input_size": [3, 32, 32], "num_classes": 7}  # fmt: skip
TIMM = {"architecture": "vit_small_patch16_224", "num_classes": 7, "num_features": 384,
        "global_pool": "token", "pretrained_cfg": AUGREG}  # fmt: skip
FLAT = {"architecture": "vit_small_patch16_224", **AUGREG}
HF = {"model_type": "vit", "hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 6,
      "intermediate_size": 384, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "image_size": 32,
      "patch_size": 16, "id2label": {str(i): str(i) for i in range(7)}}  # fmt: skip
PREPROCESSOR = {"image_mean": [0.4] * 3, "image_std": [0.3] * 3, "resample": 2,
                "do_resize": True, "size": {"height": 32, "width": 32}}  # fmt: skip


def dense_state(seed: int = 0, config: ArchConfig = THIN) -> dict[str, Tensor]:
    """Keys as DeiT and timm write them."""
    torch.manual_seed(seed)
    return build(config, adaptive=False).state_dict()


def headless(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("head.")}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def hub_folder(folder: Path, name: str = "model.safetensors", **files: Any) -> Path:
    """A folder as hubs have it; keywords are JSON files beside the weights, text as it is."""
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(dense_state(), folder / name)
    for stem, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{stem}.json").write_text(text)
    return folder / name
