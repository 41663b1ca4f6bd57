"""The networks and pictures of a prepared folder, and a plain walk over a network's stages.

A network's weights are random, with attention made peaked so that its scores differ, and rounded to
8 bits so that the file is small; thresholds lie in gaps between the scores of its pictures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.rows import Rows
from gpu_parts.kit import Kit

NETWORKS = "networks.json"
POSITIONS = "pos_embed"


@dataclass
class Network:
    """A model in float32 on the CPU, its pictures, and how many rows each of them keeps.

    Attributes:
        pictures: float32 [n, 3, H, W], normalised.
        kept: int64 [stages, n], class token included, as the model keeps them in float32.
    """

    name: str
    model: ViT
    pictures: NDArray[np.float32]
    kept: NDArray[np.int64]

    @property
    def config(self) -> ArchConfig:
        return self.model.config

    @property
    def rows(self) -> int:
        """M."""
        return self.config.rows

    @property
    def mean_kept(self) -> list[int]:
        """Rows of a static network that keeps as many on average."""
        return [round(float(mean)) for mean in self.kept.mean(1)]

    def batch(self, size: int, first: int = 0) -> Tensor:
        """float32 [B, 3, H, W]: pictures from `first` on, again and again."""
        chosen = (first + np.arange(size)) % len(self.pictures)
        return torch.from_numpy(self.pictures[chosen])


def names(kit: Kit) -> list[str]:
    """Networks to measure, the most important first."""
    return ["mini_56"] if kit.rehearse else ["deit_s_224", "deit_s_384"]


def load(kit: Kit, name: str) -> Network:
    """Read a network of the folder."""
    folder = kit.root / "data"
    row = json.loads((folder / NETWORKS).read_text())[name]
    model = model_of(folder / row["weights"], row["arch"], row["pixels"], row["classes"])
    with torch.no_grad():
        for parameter, value in zip(model.thresholds, row["thresholds"], strict=True):
            parameter.fill_(value)
    pictures = normalised(np.load(folder / row["pictures"], allow_pickle=False), model.config)
    return Network(name, model, pictures, np.array(row["kept"], np.int64))


def normalised(pixels: NDArray[np.uint8], config: ArchConfig) -> NDArray[np.float32]:
    """uint8 [n, H, W, 3] -> the network's input float32 [n, 3, H, W]."""
    rules = config.preprocessing
    mean, std = np.asarray(rules.mean, np.float32), np.asarray(rules.std, np.float32)
    values = (pixels.astype(np.float32) / 255 - mean) / std
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2))


def model_of(weights: Path, name: str, pixels: int, classes: int) -> ViT:
    """The model with the weights of a file that `packed_weights` gave; thresholds as they come."""
    model = build(arch(name).at(pixels, classes)).eval()
    with np.load(weights, allow_pickle=False) as file:
        state = {}
        for key, value in model.state_dict().items():
            stored = f"{POSITIONS}@{pixels}" if key == POSITIONS else key
            if not key.startswith("thresholds."):
                numbers = file[stored].astype(np.float32) * file[f"{stored}/step"]
                state[key] = torch.from_numpy(np.asarray(numbers)).to(value.dtype)
    model.load_state_dict(state, strict=False)
    return model


def packed_weights(state: dict[str, Tensor], pixels: int) -> dict[str, NDArray[Any]]:
    """Weights as arrays for `np.savez`: 8-bit numbers, and the step between two of them."""
    arrays: dict[str, NDArray[Any]] = {}
    for key, value in state.items():
        if key.startswith("thresholds."):
            continue
        stored = f"{POSITIONS}@{pixels}" if key == POSITIONS else key
        numbers = value.float().numpy()
        step = np.float32(max(float(np.abs(numbers).max()), 1e-12) / 127)
        arrays[stored] = np.round(numbers / step).astype(np.int8)
        arrays[f"{stored}/step"] = step
    return arrays


def run_stage(
    model: ViT, stage: int, x: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Blocks of stage `stage` (0-based) on tokens T [B, M, D]: tokens, and scores but for the last.

    Args:
        mask: bool [B, M], False where a row only pads.
    """
    rows = Rows(x, alive=mask)
    if stage < len(model.cuts):
        rows, decision = model.scored(stage, rows)
        return rows.tokens, decision.score
    return model.segment(stage, rows)[0].tokens, None
