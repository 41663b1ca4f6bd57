"""`scripts/real_weights`: how it compares embeddings."""

from __future__ import annotations

import copy
import importlib.machinery
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from asvit_deploy.data.images import ImageSet
from asvit_deploy.errors import UserError
from asvit_deploy.models.vit import ViT

SCRIPT = Path(__file__).parent.parent / "scripts/real_weights"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("real_weights", str(SCRIPT))
    spec = importlib.util.spec_from_loader("real_weights", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_neighbours_are_sought_among_the_dense_embeddings(script: ModuleType) -> None:
    dense, noise = np.random.default_rng(0).normal(size=(2, 30, 8))
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    other = dense + 0.3 * noise
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    same = []
    for i in range(30):
        others = [j for j in range(30) if j != i]
        own, theirs = (max(others, key=lambda j, v=v: v[i] @ dense[j]) for v in (dense, other))
        same.append(own == theirs)
    found = script.agreement(dense, other)
    assert 0 < sum(same) < 30
    assert found["neighbour"].tolist() == same
    np.testing.assert_allclose(found["cosine"], (dense * other).sum(1))


def test_embeddings_without_a_direction_are_refused(
    script: ModuleType, mini: ViT, photos: ImageSet
) -> None:
    model = copy.deepcopy(mini)
    torch.nn.init.zeros_(model.head.weight)  # type: ignore[arg-type, union-attr]
    torch.nn.init.zeros_(model.head.bias)  # type: ignore[arg-type, union-attr]
    with pytest.raises(UserError, match="chance gives embeddings that are zero"):
        script.embedded(model, photos, "chance")
