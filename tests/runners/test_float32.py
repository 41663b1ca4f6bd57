"""What compares scores with thresholds computes them in float32, not in cuDNN's TF32."""

from __future__ import annotations

import pytest
import torch

from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.runners.pytorch import TorchRunner


def _train() -> None:
    pytest.importorskip("accelerate", reason="comes with [train]")
    from asvit_deploy.training.processes import accelerator_for

    accelerator_for()


def _run() -> None:
    TorchRunner(build(arch("as_deit_mini")))


@pytest.mark.parametrize("use", [_run, _train])
def test_convolutions_are_not_rounded(use):
    torch.backends.cudnn.allow_tf32 = True
    use()
    assert not torch.backends.cudnn.allow_tf32
