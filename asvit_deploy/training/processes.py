"""This process's place among those that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType

from asvit_deploy.errors import UserError


def accelerator_for(amp: str = "no") -> Accelerator:
    """This process's place and its device.

    Raises:
        UserError: the device cannot compute in that precision, or the processes would each hold a
            part of the network.
    """
    # Precision is the recipe's affair: part of what decides a result, and of a run's identity.
    accelerator = Accelerator(mixed_precision="no")
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"asvit-deploy keeps the whole network in every process, which {kind.value} does not; "
            "start it with torchrun, or with `accelerate launch --multi_gpu`"
        )
    if amp == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 on a CPU")
    return accelerator


def anywhere(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so in any process."""
    if accelerator.num_processes == 1:
        return here
    flag = torch.tensor(float(here), device=accelerator.device)
    return accelerator.reduce(flag, reduction="sum").item() > 0  # type: ignore[union-attr]


@contextlib.contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Where one process refuses, all end, each with one line."""
    refusal = None
    try:
        yield
    except UserError as error:
        refusal = error
    elsewhere = anywhere(accelerator, refusal is not None)
    if refusal is not None:
        raise refusal
    if elsewhere:
        raise UserError("another process of this run refused to start; its own line says why")
