"""What an engine runs in: device memory that its contexts share, and buffers bound once.

Nothing is allocated in a call. Token counts are ordinary outputs, and the buffers are tensors of
PyTorch, whose streams and CUDA graphs are used too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asvit_deploy.errors import UserError
from asvit_deploy.runners.trt_plan import Engine


class Scratch:
    """Device memory in which contexts run in turn: as large as the one that needs most.

    Such contexts must never run at once. Here they do not: one batch is on its way at a time, and
    each execution waits for the one before (`Bound.enqueue`). Keep it as long as the contexts.

    Args:
        engines: whose contexts it will hold, on one device.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.bytes = max(engine.scratch_bytes() for engine in engines)
        # PyTorch's allocations are aligned to 512 bytes, TensorRT wants 256.
        self.memory = torch.empty(
            max(self.bytes, 1), dtype=torch.uint8, device=engines[0].place.device
        )

    def lend(self, context: Any) -> None:
        """Let a context run here."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(self.memory.data_ptr(), self.bytes)
        else:  # TensorRT 10.0
            context.device_memory = self.memory.data_ptr()


class Bound:
    """A context with every tensor bound: inputs of one shape, outputs as large as they can get.

    Args:
        shapes: of every input.

    Raises:
        UserError: a shape does not fit the profile, or TensorRT takes no buffer or does not say
            how large one must be.
    """

    def __init__(self, engine: Engine, context: Any, shapes: dict[str, tuple[int, ...]]) -> None:
        self.engine, self.context = engine, context
        zeros = functools.partial(torch.zeros, device=engine.place.device)
        self.tensors: dict[str, Tensor] = {}
        self.ragged: dict[str, list[int]] = {}  # outputs whose shape depends on the data
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise UserError(
                    f"{engine.name} takes no {name} of shape {list(shape)}{engine.said()}; build "
                    "it again"
                )
            self._bind(name, zeros(shape, dtype=engine.dtype(name)))
        for name in engine.outputs:
            shape = tuple(context.get_tensor_shape(name))
            dtype = engine.dtype(name)
            if min(shape, default=0) < 0:
                self.ragged[name] = list(shape)
                size = context.get_max_output_size(name)
                if size < 0:
                    raise UserError(
                        f"{engine.name} gives no largest size of {name}{engine.said()}; build it "
                        "again on this machine"
                    )
                self._bind(name, zeros(size // dtype.itemsize, dtype=dtype))
            else:
                self._bind(name, zeros(shape, dtype=dtype))

    def _bind(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor
        if not self.context.set_tensor_address(name, tensor.data_ptr()):
            engine = self.engine
            raise UserError(
                f"{engine.name} takes no buffer for {name}{engine.said()}; build it again on this "
                "machine"
            )

    def rebind(self, name: str, tensor: Tensor) -> None:
        """Read or write `tensor`, of the same shape and type, in place of our own buffer."""
        self._bind(name, tensor)

    def enqueue(self) -> None:
        """Put one execution on PyTorch's current stream.

        On CUDA's default stream TensorRT would wait for the whole device: there the execution goes
        to a stream of its own, which the default one waits for.
        """
        engine, index = self.engine, self.engine.place.index
        current, default = torch.cuda.current_stream(index), torch.cuda.default_stream(index)
        stream = _side_stream(index) if current == default else current
        if stream is not current:
            stream.wait_stream(current)
        with engine.place.current():
            enqueued = self.context.execute_async_v3(stream.cuda_stream)
        if not enqueued:
            raise UserError(
                f"{engine.flavour.title} cannot run {engine.name}{engine.said()}; build it again "
                "on this machine"
            )
        if stream is not current:
            current.wait_stream(stream)

    def require_capturable(self) -> None:
        """Run once, which compiles what RTX has left to do, and ask whether a graph can hold it.

        Raises:
            UserError: it cannot.
        """
        ask = getattr(self.context, "is_stream_capturable", None)
        if ask is None:
            return
        self.enqueue()
        index = self.engine.place.index
        torch.cuda.synchronize(index)
        with self.engine.place.current():
            capturable = ask(_side_stream(index).cuda_stream)
        if not capturable:
            raise UserError(
                f"no CUDA graph can hold {self.engine.name}{self.engine.said()}; build it again "
                "on this machine"
            )


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)
