"""TensorRT engines as runners: one plan, or the stage plans of bucketed mode."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asvit_deploy.errors import UserError
from asvit_deploy.runners.base import Prediction, RunnerBase, decode, require_images, stack
from asvit_deploy.runners.bucketed import KEPT, SIDE_ROWS, Cut
from asvit_deploy.runners.place import Place
from asvit_deploy.runners.torch_stages import Captured, DeviceStages, Outputs
from asvit_deploy.runners.trt_buffers import Bound, Scratch
from asvit_deploy.runners.trt_plan import NOTHING, Allowed, Engine


@dataclass(frozen=True)
class Times:
    """One call, in milliseconds.

    Attributes:
        gpu: between two CUDA events around the execution, transfers not included.
        enqueue: until the host was free again.
        wall: from the picture on the host to the output on the host.
    """

    gpu: float
    enqueue: float
    wall: float


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
        self.output = fields.get("output", "logits")
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
                execute, lambda: bound.tensors[self.output].cpu(),
            )  # fmt: skip

    def __call__(self, images: NDArray[np.float32]) -> Prediction:
        """images float32 [B, 3, H, W]; more than the engine takes run in turn.

        Kept tokens are there where the engine puts out `index_s` (`export --stage-outputs`).
        """
        require_images(images)
        parts = [self._predict(images[i : i + self.most]) for i in range(0, len(images), self.most)]
        return parts[0] if len(parts) == 1 else stack(parts)

    def _predict(self, images: NDArray[np.float32]) -> Prediction:
        out = {name: tensor.cpu().numpy() for name, tensor in self.infer(images).items()}
        lengths = [out[f"length_{s}"].astype(np.int64) for s in range(self.stages)]
        prefix, appended = self.fields.get("prefix", 1), self.fields.get("appended", 0)
        if not self.indexed:
            return Prediction(np.asarray(out[self.output], np.float32), lengths, prefix=prefix)
        batch = len(images)
        index = [_rows(out[f"index_{s}"], batch, lengths[s]) for s in range(self.stages)]
        tokens = self.fields["image_tokens"]
        before = [tokens, *(rows.shape[1] - prefix + appended for rows in index)]
        unknown = [np.full((batch, count), np.nan, np.float32) for count in before[: self.stages]]
        into = []
        if "into_0" in out:
            whole = [np.full(batch, count + prefix) for count in before[: self.stages]]
            into = [_rows(out[f"into_{s}"], batch, rows) for s, rows in enumerate(whole)]
        made = decode(out[self.output], lengths, index, unknown, prefix, appended, into)
        return replace(made, scores=None)

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


def require_side_rows(engines: Sequence[Engine], side: Sequence[str]) -> None:
    """Refuse stage engines that do not hand on what their manifest says.

    Args:
        side: which of `SIDE_ROWS` the manifest names; behind the last compaction nothing may need
            them.

    Raises:
        UserError: it names the engine.
    """
    for before, after in pairwise(engines):
        made = {name for name in SIDE_ROWS if name in before.outputs}
        taken = {name for name in SIDE_ROWS if KEPT + name in after.inputs}
        if made != taken or not (taken == set(side) or (after is engines[-1] and not taken)):
            raise UserError(
                f"{after.name} takes {_listed(taken)} of each row beside its token, {before.name} "
                f"makes {_listed(made)} and the manifest says {_listed(side)}; build it again"
            )


def _listed(names: Iterable[str]) -> str:
    return ",".join(sorted(names)) or "nothing"


class TensorRTStages(DeviceStages):
    """The stage engines of bucketed mode, a context for every (stage, bucket), one scratch for all.

    Args:
        folder: the bundle.
        fields: its manifest.
        graphs: capture a CUDA graph for every (stage, bucket).
        device: a CUDA device.
        allowed: as `Engine`.

    Raises:
        UserError: see `Engine`; or they do not hand on what the manifest says.
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
        side = tuple(fields.get("side_rows", ()))
        require_side_rows(self.engines, side)
        self.scratch = Scratch(self.engines)
        first = self.engines[0]
        shape = tuple(first.engine.get_tensor_shape("tokens"))
        super().__init__(
            fields["thresholds"], fields["buckets"], shape[2], fields["image_size"], 1,
            first.dtype("tokens"), first.dtype("images"), place, side,
        )  # fmt: skip
        self.fields, self.wanted = fields, graphs
        self.capture(self._function(0, 0), lambda s, bucket: self._function(s, bucket), graphs)

    def _function(self, stage: int, bucket: int) -> Any:
        """Stage `stage` on `bucket` rows (stage 0 has but one shape), on our own buffers."""
        engine = self.engines[stage]
        if stage == 0:
            given = {"images": self.images}
        else:
            side = {KEPT + name: values for name, values in self.side[bucket].items()}
            given = {"kept": self.inputs[bucket], "length": self.length, **side}
        given = {name: tensor for name, tensor in given.items() if name in engine.inputs}
        profile = self.buckets.index(bucket) if stage else 0
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        bound = Bound(engine, engine.context(self.scratch, profile), shapes)
        for name, tensor in given.items():
            bound.rebind(name, tensor)
        if self.wanted:
            bound.require_capturable()
        last = stage == len(self.engines) - 1
        output = self.fields.get("output", "logits")

        def execute(*_: Tensor) -> Outputs:
            bound.enqueue()
            return (bound.tensors[output],) if last else Cut.of(bound.tensors)

        return execute

    def describe(self) -> dict[str, str]:
        first = self.engines[0]
        return {
            **super().describe(),
            "backend": f"{first.flavour.title} {first.trt.__version__}",
            "provider": f"bucketed{', CUDA graphs' if self.graphs else ''}",
        }
