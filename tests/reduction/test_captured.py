"""Networks of fixed counts leave the host alone, so that a CUDA graph can hold them whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from asvit_deploy.budget import fixed_counts
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.methods import RANKED

# Copies a number to the device; reads one from there; has a shape that only the device knows.
HOST = {"aten.lift_fresh", "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select"}


class Watched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.met: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.met |= HOST & {str(function).rpartition(".")[0]}
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", RANKED)
def test_nothing_waits_for_the_host(name, batch):
    config = arch("as_deit_mini")
    model = build(config).eval()
    network = model.with_reduction(fixed_counts(config, RANKED[name], 0.65))
    images = torch.randn(batch, 3, config.image_size, config.image_size)
    with Watched() as watched, torch.no_grad():
        network(images)
    assert not watched.met


@pytest.mark.parametrize(
    "waits",
    [lambda: torch.tensor(1.0), lambda: torch.ones(1).item(), lambda: torch.ones(2).nonzero()],
)
def test_what_waits_is_seen(waits):
    with Watched() as watched:
        waits()
    assert watched.met
