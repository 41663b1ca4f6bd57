"""TensorRT engines: one plan, or the stage plans of bucketed mode, on buffers made once.

Nothing is allocated in a call, token counts are ordinary outputs, and the buffers are tensors of
PyTorch, whose streams and CUDA graphs are used too. Written for TensorRT 10, 11 and RTX: what only
some of them have is asked for by name.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asvit_deploy import precision
from asvit_deploy.errors import UserError
from asvit_deploy.runners.base import Prediction, RunnerBase, decode, stack
from asvit_deploy.runners.place import Place
from asvit_deploy.runners.torch_stages import Captured, DeviceStages, Outputs
from asvit_deploy.runners.trt_plan import (
    NOTHING,
    Allowed,
    import_flavour,
    load_plan,
    logger_of,
    require_allowed,
    require_gpu,
    said,
)

_DTYPES = {row.tensorrt_name: row.torch_type for row in precision.TABLE}
_DTYPES |= {"INT32": torch.int32, "INT64": torch.int64}


@dataclass(frozen=True)
class Times:
    """One call, in milliseconds.

    Attributes:
        gpu: between two CUDA events around the execution, transfers not included.
        enqueue: until the host was free again.
        wall: from the picture on the host to the logits on the host.
    """

    gpu: float
    enqueue: float
    wall: float


class Engine:
    """A plan on a GPU, where TensorRT then has it and its contexts for good.

    Args:
        plan: its bytes.
        fields: the sidecar or manifest.
        name: how messages call it.
        device: a CUDA device.
        allowed: the code that it may run beside its own kernels.

    Raises:
        UserError: it carries code that is not allowed, no such GPU, the flavour is not installed,
            the plugin is missing, or TensorRT does not take the plan.
    """

    def __init__(
        self, plan: bytes, fields: dict[str, Any], name: str, device: str | Place = "cuda",
        allowed: Allowed = NOTHING,
    ) -> None:  # fmt: skip
        require_allowed(fields, name, allowed)
        require_gpu(name)
        self.place = device if isinstance(device, Place) else Place(device)
        self.flavour, self.trt = import_flavour(fields["flavour"])
        self.name, self._logger = name, logger_of(self.trt)
        with self.place.current():
            self._runtime, self.engine = load_plan(
                self.trt, self.flavour, plan, fields, name, allowed
            )
        self._cache: Any = None
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        mode = self.trt.TensorIOMode.INPUT
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == mode]
        self.outputs = [n for n in names if n not in self.inputs]

    def dtype(self, tensor: str) -> torch.dtype:
        """The type of an input or output."""
        return _DTYPES[self.engine.get_tensor_dtype(tensor).name]

    def largest(self, tensor: str, profile: int = 0) -> tuple[int, ...]:
        """An input's largest shape."""
        shape = tuple(self.engine.get_tensor_shape(tensor))
        if min(shape) >= 0:
            return shape
        return tuple(self.engine.get_tensor_profile_shape(tensor, profile)[2])

    def scratch_bytes(self) -> int:
        """Device memory that a context of it needs while it runs, on whichever profile."""
        # TensorRT 10.0 has but the older name, 11 and RTX but the newer.
        newer = getattr(self.engine, "device_memory_size_v2", None)
        return self.engine.device_memory_size if newer is None else newer

    def _context_arguments(self) -> tuple[Any, ...]:
        """What makes a context that gets its scratch from us, and on RTX runs final kernels.

        RTX compiles kernels for a shape in the background and swaps them in when they are ready: a
        CUDA graph would hold the preliminary ones for good, and a bench would time both kinds.
        """
        ours = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        strategies = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return (ours,)
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(ours)
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        # Contexts of one engine share what was compiled: bucketed mode has one for each bucket.
        if hasattr(config, "create_runtime_cache"):
            if self._cache is None:
                self._cache = config.create_runtime_cache()
            if not config.set_runtime_cache(self._cache):
                raise UserError(
                    f"{self.flavour.title} took no runtime cache for {self.name}{self.said()}; "
                    "build it again on this machine"
                )
        return (config,)

    def context(self, scratch: Scratch, profile: int = 0) -> Any:
        """An execution context on that optimisation profile, which runs in `scratch`.

        Raises:
            UserError: there is no memory for it, or no such profile.
        """
        with self.place.current():
            return self._context(scratch, profile)

    def _context(self, scratch: Scratch, profile: int) -> Any:
        context = self.engine.create_execution_context(*self._context_arguments())
        if context is None:
            raise UserError(
                f"{self.flavour.title} cannot make an execution context for {self.name}"
                f"{self.said()}; free GPU memory, or build it again on this machine"
            )
        if self.engine.num_optimization_profiles > 1:
            stream = torch.cuda.current_stream(self.place.index)
            if not context.set_optimization_profile_async(profile, stream.cuda_stream):
                raise UserError(
                    f"{self.name} has no optimisation profile {profile}{self.said()}; build it "
                    "again"
                )
            stream.synchronize()
        scratch.lend(context)
        return context

    def said(self) -> str:
        """What TensorRT logged since it was last asked, in brackets, or nothing."""
        return said(self._logger)


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
        UserError: a shape does not fit the profile, or TensorRT takes no buffer or does not tell
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
                        f"{engine.name} tells no largest size of {name}{engine.said()}; build it "
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


class TensorRTRunner(RunnerBase):
    """A plan as a runner.

    Args:
        plan: the engine file.
        fields: its sidecar.
        graph: replay a CUDA graph; only where no shape depends on the data.
        device: a CUDA device.
        allowed: as `Engine`.

    Raises:
        UserError: see `Engine`; or `graph` for a dynamic engine.
    """

    def __init__(
        self, plan: Path, fields: dict[str, Any], graph: bool = False, device: str = "cuda",
        allowed: Allowed = NOTHING,
    ) -> None:  # fmt: skip
        if graph and fields["mode"] == "dynamic":
            raise UserError(
                f"{plan} decides its shapes while it runs, which no CUDA graph can hold; "
                "build it with --mode bucketed or padded"
            )
        self.engine = Engine(plan.read_bytes(), fields, str(plan), device, allowed)
        self.place, self.scratch = self.engine.place, Scratch([self.engine])
        self.fields, self.graph = fields, graph
        self.stages = sum(name.startswith("length_") for name in self.engine.outputs)
        self.indexed = "index_0" in self.engine.outputs
        self.most = self.engine.largest("images")[0]
        self._bound: dict[int, tuple[Bound, Captured]] = {}

    def _of(self, batch: int) -> tuple[Bound, Captured]:
        """The buffers for a batch size, made at its first call."""
        if batch not in self._bound:
            shape = (batch, *self.engine.largest("images")[1:])
            context = self.engine.context(self.scratch)
            bound = Bound(self.engine, context, {"images": shape})

            if self.graph:
                bound.require_capturable()

            def execute(*_: Tensor) -> Outputs:
                bound.enqueue()
                return tuple(bound.tensors[name] for name in self.engine.outputs)

            images = (bound.tensors["images"],)
            captured = Captured(execute, images, None, self.graph, self.place)
            self._bound[batch] = bound, captured
        return self._bound[batch]

    def infer(self, images: NDArray[np.float32]) -> dict[str, Tensor]:
        """images float32 [B, 3, H, W] -> the outputs on the GPU, overwritten by the next call."""
        bound, execute = self._of(len(images))
        with self.place.current():
            bound.tensors["images"].copy_(torch.from_numpy(images), non_blocking=True)
            execute()
            torch.cuda.current_stream(self.place.index).synchronize()
        return bound.tensors

    def timed(self, images: NDArray[np.float32]) -> Times:
        """One call with a clock."""
        bound, execute = self._of(len(images))
        with self.place.current():
            return timed(
                lambda: bound.tensors["images"].copy_(torch.from_numpy(images), non_blocking=True),
                execute, lambda: bound.tensors["logits"].cpu(),
            )  # fmt: skip

    def __call__(self, images: NDArray[np.float32]) -> Prediction:
        """images float32 [B, 3, H, W]; more than the engine takes run in turn.

        Kept tokens are there where the engine puts out `index_s` (`export --stage-outputs`).
        """
        parts = [self._predict(images[i : i + self.most]) for i in range(0, len(images), self.most)]
        return parts[0] if len(parts) == 1 else stack(parts)

    def _predict(self, images: NDArray[np.float32]) -> Prediction:
        out = {name: tensor.cpu().numpy() for name, tensor in self.infer(images).items()}
        lengths = [out[f"length_{s}"].astype(np.int64) for s in range(self.stages)]
        if not self.indexed:
            return Prediction(np.asarray(out["logits"], np.float32), lengths)
        batch = len(images)
        index = [_rows(out[f"index_{s}"], batch, lengths[s]) for s in range(self.stages)]
        tokens = self.fields["image_tokens"]
        before = [tokens, *(rows.shape[1] - 1 for rows in index)]
        unknown = [np.full((batch, count), np.nan, np.float32) for count in before[: self.stages]]
        padded = self.fields["mode"] == "padded"
        return replace(decode(out["logits"], lengths, index, unknown, padded), scores=None)

    def describe(self) -> dict[str, str]:
        return {
            "backend": f"{self.engine.flavour.title} {self.engine.trt.__version__}",
            "provider": f"{self.fields['mode']}{', CUDA graph' if self.graph else ''}",
            "precision": self.fields["precision"],
            "device": self.place.name(),
        }


def _rows(flat: NDArray, batch: int, length: NDArray[np.int64]) -> NDArray[np.int64]:
    """A data-dependent `index_s` [B, max(length)] out of the buffer that could hold the largest."""
    if flat.ndim == 2:
        return flat
    size = int(length.max())
    return flat[: batch * size].reshape(batch, size)


def timed(copy_in: Any, execute: Any, copy_out: Any) -> Times:
    """Run three steps with a clock, on the current device; the middle one between two events."""
    import time

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    copy_in()
    first.record()
    before = time.perf_counter()
    execute()
    enqueued = time.perf_counter()
    last.record()
    copy_out()
    torch.cuda.synchronize()
    end = time.perf_counter()
    return Times(first.elapsed_time(last), (enqueued - before) * 1e3, (end - start) * 1e3)


class TensorRTStages(DeviceStages):
    """The stage engines of bucketed mode, a context for every (stage, bucket), one scratch for all.

    Args:
        folder: the bundle.
        fields: its manifest.
        graphs: capture a CUDA graph for every (stage, bucket).
        device: a CUDA device.
        allowed: as `Engine`.

    Raises:
        UserError: see `Engine`.
    """

    def __init__(
        self, folder: Path, fields: dict[str, Any], graphs: bool = True, device: str = "cuda",
        allowed: Allowed = NOTHING,
    ) -> None:  # fmt: skip
        stages = len(fields["thresholds"]) + 1
        files = [folder / f"stage_{s}.engine" for s in range(stages)]
        place = Place(device)
        self.engines = [
            Engine(path.read_bytes(), fields, str(path), place, allowed) for path in files
        ]
        self.scratch = Scratch(self.engines)
        first = self.engines[0]
        shape = tuple(first.engine.get_tensor_shape("tokens"))
        super().__init__(
            fields["thresholds"], fields["buckets"], shape[2], fields["image_size"], 1,
            first.dtype("tokens"), first.dtype("images"), place,
        )  # fmt: skip
        self.fields, self.wanted = fields, graphs
        self.capture(self._function(0, 0), lambda s, bucket: self._function(s, bucket), graphs)

    def _function(self, stage: int, bucket: int) -> Any:
        """Stage `stage` on `bucket` rows (stage 0 has but one shape), on our own buffers."""
        engine = self.engines[stage]
        if stage == 0:
            given = {"images": self.images}
        else:
            given = {"kept": self.inputs[bucket], "length": self.length}
        profile = self.buckets.index(bucket) if stage else 0
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        bound = Bound(engine, engine.context(self.scratch, profile), shapes)
        for name, tensor in given.items():
            bound.rebind(name, tensor)
        if self.wanted:
            bound.require_capturable()
        last = stage == len(self.engines) - 1
        names = ("logits",) if last else ("tokens", "scores")

        def execute(*_: Tensor) -> Outputs:
            bound.enqueue()
            return tuple(bound.tensors[name] for name in names)

        return execute

    def describe(self) -> dict[str, str]:
        first = self.engines[0]
        return {
            **super().describe(),
            "backend": f"{first.flavour.title} {first.trt.__version__}",
            "provider": f"bucketed{', CUDA graphs' if self.graphs else ''}",
        }
