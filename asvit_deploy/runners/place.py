"""Where tensors lie and work is put: one CUDA device, or the host."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from asvit_deploy.errors import UserError


class Place:
    """A device, and what has to be said to work on it.

    PyTorch makes streams and graphs on its *current* device, and TensorRT and the op's library
    launch there as well, wherever their buffers lie: so all of that happens inside `current()`.

    Args:
        device: "cpu", "cuda:1", or "cuda" for the device that is current now.

    Attributes:
        device: of the tensors, with its number.
        cuda: whether work is put on streams.
        index: number of the CUDA device.

    Raises:
        UserError: there is no such GPU.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        given = torch.device(device)
        self.cuda = given.type == "cuda"
        self.index = 0
        if self.cuda:
            count = torch.cuda.device_count()
            if (given.index or 0) >= count:
                raise UserError(f"there is no {given} here: PyTorch sees {count} GPUs")
            self.index = torch.cuda.current_device() if given.index is None else given.index
            given = torch.device("cuda", self.index)
        self.device = given

    @classmethod
    def of(cls, tensor: Tensor) -> Place:
        """Where a tensor lies."""
        return cls(tensor.device)

    def current(self) -> contextlib.AbstractContextManager:
        """Inside, what is made and launched is made and launched here."""
        return torch.cuda.device(self.index) if self.cuda else contextlib.nullcontext()

    def stream(self) -> int:
        """PyTorch's current stream here, as CUDA takes it."""
        return torch.cuda.current_stream(self.index).cuda_stream if self.cuda else 0

    def name(self) -> str:
        """What people call it."""
        return torch.cuda.get_device_name(self.index) if self.cuda else "cpu"
