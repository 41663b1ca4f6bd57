"""The state of an unfinished run: whole, this run's own, or refused in one line."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from asvit_deploy.checkpoints.damage import digest
from asvit_deploy.data.batches import Batch
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.training.recipe import Recipe
from asvit_deploy.training.state import load_state, save_state
from asvit_deploy.training.trainer import Trainer


def small_trainer(recipe: Recipe, name: str = "as_deit_mini", size: int = 20) -> Trainer:
    torch.manual_seed(0)
    config = replace(arch(name), dim=32, heads=2, depth=5, stages=(1, 2, 3), image_size=size)
    model, teacher = build(config.at(num_classes=10)), build(config.at(num_classes=10), False)
    return Trainer(model, teacher.requires_grad_(False).eval(), recipe)


def a_batch(size: int = 20) -> Batch:
    torch.manual_seed(1)
    return Batch(torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 3]))


def test_damaged_or_missing_state_is_refused(tmp_path):
    trainer, path = small_trainer(Recipe(steps=10, budget=0.65)), tmp_path / "x.unfinished.pt"
    with pytest.raises(UserError, match=r"nothing to resume: .* does not exist"):
        load_state(path, trainer, {})
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"nothing to resume: .* is no file"):
        load_state(path, trainer, {})
    path.unlink()
    save_state(path, 7, trainer, {"seed": 1, "lr": 0.1})
    assert load_state(path, trainer, {"seed": 1, "lr": 0.1}) == 7
    with pytest.raises(UserError, match=r"with seed 1, not 2, lr 0.1, not 0.2; use the same"):
        load_state(path, trainer, {"seed": 2, "lr": 0.2})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged; delete it"):
        load_state(path, trainer, {"seed": 1})


@pytest.mark.slow
def test_flipped_bytes_in_a_state(tmp_path):
    """Refused, or the run goes on as if nothing had happened."""
    recipe = Recipe(steps=10, budget=0.65, ema=0.9)
    trainer, path = small_trainer(recipe), tmp_path / "x.unfinished.pt"
    trainer.step(0, a_batch())
    save_state(path, 1, trainer, {"seed": 1, "lr": 0.1})

    def loaded() -> str:
        fresh = small_trainer(recipe)
        step = load_state(path, fresh, {"seed": 1, "lr": 0.1})
        parts = [fresh.model, fresh.optimizer, fresh.scaler, fresh.average]
        return digest([step, torch.get_rng_state(), *(part.state_dict() for part in parts)])

    data, before, refused = path.read_bytes(), loaded(), 0
    random = np.random.default_rng(0)
    # All over the file, and in the directory at its end.
    offsets = [
        *random.integers(0, len(data), 120),
        *random.integers(len(data) - 9000, len(data), 80),
    ]
    for offset in offsets:
        flipped = bytearray(data)
        flipped[offset] ^= int(random.choice([0xFF, 0x01, 0x10, 0x80]))
        path.write_bytes(flipped)
        try:
            after = loaded()
        except UserError as error:
            # Or what else is wrong with it: a flipped size claims more than there is.
            assert re.fullmatch(rf"{path} [^\n]+; delete it and start over", str(error))  # noqa: PT017
            refused += 1
        else:
            assert after == before
    assert refused > 100


def test_a_state_whose_content_was_changed(tmp_path):
    """Its archive is whole then, and only the digest shows it; states of before have none."""
    trainer, path = small_trainer(Recipe(steps=10, budget=0.65)), tmp_path / "x.unfinished.pt"
    save_state(path, 7, trainer, {"seed": 1})
    content = torch.load(path, weights_only=True)
    torch.save({**content, "step": 3}, path)
    with pytest.raises(UserError, match="is damaged; delete it"):
        load_state(path, trainer, {"seed": 1})
    del content["digest"]
    torch.save({**content, "step": 3}, path)
    assert load_state(path, trainer, {"seed": 1}) == 3


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"step": 1},
        {"step": float("inf"), "recipe": {}},
        {"step": torch.zeros(3), "recipe": {}},
        {"step": 1, "recipe": 3},
        {"step": 11, "recipe": {}},
    ],
)
def test_what_is_no_state_is_refused(tmp_path, content):
    trainer, path = small_trainer(Recipe(steps=10, budget=0.65)), tmp_path / "x.unfinished.pt"
    torch.save(content, path)
    with pytest.raises(UserError, match="is damaged; delete it and start over"):
        load_state(path, trainer, {})
