"""The two worked paths of docs/finetune.md, as they stand there, at small size."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch

DOCS = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text()
SIZE = 64  # 16 image tokens
CLASSES = ("auk", "emu", "jay", "tit")
# What makes a run small; the paper's augmentation and the rest stay as they are.
SMALL = {"--batch-size": "4", "--epochs": "1", "--workers": "1", "--nproc-per-node": "2"}


def block(first: str) -> list[str]:
    """The code block that starts with that command."""
    (text,) = re.findall(rf"```\n({re.escape(first)} .*?)```", DOCS, re.S)
    return text.strip().splitlines()


def small(line: str) -> list[str]:
    words = shlex.split(line)
    program, *rest = words
    for option, value in SMALL.items():
        if option in rest:
            rest[rest.index(option) + 1] = value
    if "finetune" in rest:
        extra = ["--validation-limit", "8", "--batch-size", "4", "--epochs", "1"]
        rest += [word for i in (0, 2, 4) if extra[i] not in rest for word in extra[i : i + 2]]
    python = [sys.executable, "-m"]
    return [*python, "torch.distributed.run" if program == "torchrun" else "asvit_deploy", *rest]


def run(line: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        small(line), cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert process.returncode == 0, f"{line}\n{process.stderr[-2000:]}"
    return process.stdout


def pictures(root: Path, train: int, val: int) -> None:
    """Pictures of four classes, each of another colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (70, 80, 3), dtype=np.uint8)
                pixels[20:50, 20:60, label % 3] = 255 - 60 * (label // 3)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")


def weights(path: Path, name: str, classes: int, wrap: str | None) -> None:
    """Random weights in the format of the public file of that name."""
    torch.manual_seed(0)
    model = build(arch(name).at(SIZE, classes), adaptive=False)
    for parameter in model.blocks.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(3)  # tokens that differ
    state = model.state_dict()
    torch.save({wrap: state} if wrap else state, path)


@pytest.mark.slow
def test_imagenet_from_deit_to_an_export(tmp_path):
    lines = block("torchrun")
    pictures(tmp_path / "imagenet", train=4, val=2)
    weights(tmp_path / "deit_small_patch16_224.pth", "as_deit_small", len(CLASSES), "model")
    for line in lines[:3]:
        run(line, tmp_path)
    trained = load_checkpoint(tmp_path / "as_deit_s.safetensors")
    assert trained.adaptive
    assert trained.metadata["budget"] == "0.65"
    assert (tmp_path / "as_deit_s.ema.safetensors").exists()
    assert (tmp_path / "as_deit_s.onnx").exists()
    # The last line is the mission's own, which `test_three_lines.py` runs.
    assert lines[3:] == ["asvit-deploy build-engine --fp16"]


@pytest.mark.slow
def test_classes_of_ones_own_from_lvvit(tmp_path):
    lines = block("asvit-deploy finetune --data birds")
    pictures(tmp_path / "birds", train=4, val=2)
    weights(tmp_path / "lvvit_s-26M-224-83.3.pth.tar", "as_lvvit_s", 1000, None)
    for line in lines[:2]:
        run(line, tmp_path)
    trained = load_checkpoint(tmp_path / "birds.safetensors")
    assert trained.config.name == "as_lvvit_s"
    assert trained.config.num_classes == 4
    assert "images" in run(lines[2], tmp_path)
    run(lines[3], tmp_path)
    assert (tmp_path / "birds.onnx").exists()
