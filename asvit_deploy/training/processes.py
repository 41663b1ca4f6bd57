"""This process's place among those that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object, parse_flag_from_env

from asvit_deploy.errors import UserError
from asvit_deploy.models.stem import exact_convolutions
from asvit_deploy.processor import processes_here


def accelerator_for(amp: str = "no") -> Accelerator:
    """This process's place and its device, a CUDA GPU or the CPU, once all have met.

    Raises:
        UserError: the device cannot compute in that precision; the processes would each hold a
            part of the network, are more than the GPUs of their machine, were not started by a
            launcher, or cannot find one another.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1" and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE announces {world} processes, and nothing says which this one is; start "
            "them with torchrun or `accelerate launch`, or unset WORLD_SIZE"
        )
    on_cpu = not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    here = processes_here()
    if not on_cpu and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes on a machine with {torch.cuda.device_count()} GPUs; start one for "
            "each GPU, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    # The recipe sets the precision, which decides a result and belongs to a run's identity. Without
    # `cpu`, accelerate makes processes without a GPU runs of their own.
    accelerator = Accelerator(mixed_precision="no", cpu=on_cpu)
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"asvit-deploy keeps the whole network in every process, which {kind.value} does not; "
            "start it with torchrun, or with `accelerate launch --multi_gpu`"
        )
    if amp == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU; use --amp bf16 on a CPU")
    exact_convolutions()
    with lost_peers(accelerator):
        total(accelerator, 0)  # found out before the work, not after it
    return accelerator


def anywhere(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so in any process."""
    return total(accelerator, float(here))[0] > 0


_ELSEWHERE = "another process of this run ended; its own line says why"
# What gloo says of a peer that is gone.
_HUNG_UP = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


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
    """Turn what gloo or NCCL say when another process is gone, or out of reach, into one line.

    Raises:
        UserError: another process ended while this one waited for it, or they cannot talk.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo's has no class of its own.
        ours = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if accelerator.num_processes == 1 or not ours:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if any(sign in lines[0] for sign in _HUNG_UP):
            raise UserError(_ELSEWHERE) from error
        raise UserError(
            f"the processes of this run cannot work together, or one of them ended: {lines[0]}"
        ) from error


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


def summed(accelerator: Accelerator, own: torch.Tensor) -> torch.Tensor:
    """A tensor's sum over all processes, on the CPU and in its own precision."""
    if accelerator.num_processes == 1:
        return own
    return accelerator.reduce(own.to(accelerator.device), reduction="sum").cpu()  # type: ignore[union-attr]
