"""This process's place among those that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object

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
    return total(accelerator, float(here))[0] > 0


_ELSEWHERE = "another process of this run ended; its own line says why"


@contextlib.contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Where one process cannot go on, all end after the block, each with one line."""
    refusal = None
    try:
        yield
    except (UserError, OSError) as error:
        refusal = error
    elsewhere = anywhere(accelerator, refusal is not None)
    if refusal is not None:
        raise refusal
    if elsewhere:
        raise UserError(_ELSEWHERE)


@contextlib.contextmanager
def lost_peers(accelerator: Accelerator) -> Iterator[None]:
    """Turn what gloo or NCCL say when another process is gone into one line.

    Raises:
        UserError: another process ended while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo's has no class of its own.
        ours = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if accelerator.num_processes == 1 or not ours:
            raise
        raise UserError(_ELSEWHERE) from error


def in_all(accelerator: Accelerator, values: set[str]) -> set[str]:
    """The values of all processes."""
    if accelerator.num_processes == 1:
        return values
    return set().union(*gather_object([sorted(values)]))


def total(accelerator: Accelerator, *numbers: float) -> list[float]:
    """Each number's sum over all processes."""
    if accelerator.num_processes == 1:
        return list(numbers)
    summed = accelerator.reduce(torch.tensor(numbers, device=accelerator.device), reduction="sum")
    return summed.tolist()  # type: ignore[union-attr]
