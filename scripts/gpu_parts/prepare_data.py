"""Weights, pictures, cases and a model as files: everything that is made on a CPU machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asvit_deploy.data.images import open_images
from asvit_deploy.models.archs import arch
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.ops import cases
from gpu_parts import networks
from gpu_parts.calls import CASES
from gpu_parts.kit import Report
from gpu_parts.sharpen import set_thresholds, sharpened

# Name, architecture, pixels, file of the weights, pictures.
NETWORKS = (
    ("deit_s_224", "as_deit_small", 224, "deit_s", 24),
    ("deit_s_384", "as_deit_small", 384, "deit_s", 16),
)
REHEARSED = ("mini_56", "as_deit_mini", 56, "mini", 8)
MODEL, MODEL_PICTURES = "data/digits.onnx", 24
CHECKPOINT = "data/digits.safetensors"


def write_all(
    folder: Path, checkout: Path, rehearse: bool, export: subprocess.Popen[str]
) -> tuple[dict[str, str], Report]:
    """Fill `folder`/data.

    Args:
        export: from `start_export`.

    Returns:
        paths by role, and what could not be made, with its reason.
    """
    data = folder / "data"
    write_networks(data, [*NETWORKS, *([REHEARSED] if rehearse else [])])
    write_cases(folder / CASES)
    pixels = uint8_pictures(arch("as_deit_mini"), MODEL_PICTURES)
    np.save(data / "model_pictures.npy", pixels)
    shutil.copyfile(_checkpoint(checkout), folder / CHECKPOINT)
    roles = {"model_pictures": "data/model_pictures.npy", "checkpoint": CHECKPOINT}
    said = export.communicate()[1].strip().splitlines()
    if export.returncode:
        return roles, {"model": (said or ["export gives no reason"])[-1][:300]}
    return roles | {"model": MODEL}, {}


def uint8_pictures(config: ArchConfig, count: int) -> np.ndarray:
    """uint8 [n, H, W, 3]: the sample photographs as the network takes them, in 8 bits."""
    images, rules = open_images(None, config, limit=count), config.preprocessing
    values = images.batch(range(len(images))).transpose(0, 2, 3, 1)
    return np.round((values * np.array(rules.std) + np.array(rules.mean)) * 255).astype(np.uint8)


def write_networks(data: Path, wanted: Sequence[tuple[str, str, int, str, int]]) -> None:
    """Weights, pictures, and a table of thresholds and kept rows."""
    table: Report = {}
    weights: dict[str, dict[str, Any]] = {}
    for _, name, pixels, stem, _ in wanted:
        model = sharpened(arch(name).at(pixels))
        known = weights.setdefault(stem, {})
        # Of a second size only the positions are new; all else is the first's.
        packed = networks.packed_weights(model.state_dict(), pixels)
        known.update({key: value for key, value in packed.items() if key not in known})
    for stem, arrays in weights.items():
        np.savez(data / f"{stem}.npz", **arrays)
    for title, name, pixels, stem, count in wanted:
        config = arch(name).at(pixels)
        pictures = uint8_pictures(config, count)
        np.save(data / f"pictures_{pixels}.npy", pictures)
        model = networks.model_of(data / f"{stem}.npz", name, pixels, config.num_classes)
        kept = set_thresholds(model, networks.normalised(pictures, config))
        table[title] = {
            "arch": name, "pixels": pixels, "classes": config.num_classes,
            "weights": f"{stem}.npz", "pictures": f"pictures_{pixels}.npy",
            "thresholds": model.threshold_values(), "kept": kept,
        }  # fmt: skip
    (data / networks.NETWORKS).write_text(json.dumps(table, indent=1) + "\n")


def write_cases(path: Path) -> None:
    """The cases that every form of the op is tested with, as arrays."""
    np.savez_compressed(
        path,
        names=np.array([case.name for case in cases.CASES]),
        shapes=np.array([case.tokens.shape for case in cases.CASES], np.int64),
        prefixes=np.array([case.prefix for case in cases.CASES], np.int64),
        thresholds=np.array([case.threshold for case in cases.CASES], np.float64),
        scores=np.concatenate([case.scores.ravel() for case in cases.CASES]).astype(np.float32),
    )


def _checkpoint(checkout: Path) -> Path:
    return checkout / "asvit_deploy" / "checkpoints" / "as_vit_digits.safetensors"


def start_export(folder: Path, checkout: Path) -> subprocess.Popen[str]:
    """The default checkpoint as ONNX, in a process of its own while others compile."""
    (folder / "data").mkdir()
    words = [
        "export",
        "--ckpt",
        str(_checkpoint(checkout)),
        "-o",
        str(folder / MODEL),
        "--batch",
        "1",
    ]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, "-m", "asvit_deploy", *words], env=environment, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
