"""Stages on PyTorch's tensors for the bucketed runner, one CUDA graph for every (stage, bucket).

On a CPU the same stages run without graphs, which is how they are tested. Also here, for
comparison: the whole model as one graph, dense or with a fixed number of tokens per stage.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asvit_deploy.errors import UserError
from asvit_deploy.models.vit import ViT
from asvit_deploy.ops.kernel import Counted, Kernel, build_kernel
from asvit_deploy.reduction.removal import before_op
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.runners.bucketed import SIZES, Cut, Kept, side_rows_of, smallest
from asvit_deploy.runners.place import Place

Outputs = tuple[Any, ...]  # tensors, or a `Cut`


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector still: graphs of a discarded runner that it frees within a capture
    call CUDA functions that end the capture.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Captured:
    """A function of fixed tensors: replayed as a CUDA graph, or called where there is no CUDA.

    Args:
        function: tensors -> tensors, nothing of it on the host.
        inputs: the tensors that every run reads; fill them before.
        pool: memory shared with other captures, none of which ever runs at the same time.
        graph: False calls the function on CUDA too.
        place: where the inputs lie.
    """

    def __init__(
        self, function: Callable[..., Outputs], inputs: Outputs, pool: Any, graph: bool = True,
        place: Place | None = None,
    ) -> None:  # fmt: skip
        self.function, self.inputs = function, inputs
        self.place = place or Place.of(inputs[0])
        self.graph: torch.cuda.CUDAGraph | None = None
        if graph and self.place.cuda:
            with self.place.current():
                self._capture(pool)

    def _capture(self, pool: Any) -> None:
        index = self.place.index
        current, side = torch.cuda.current_stream(index), torch.cuda.Stream(index)
        # What allocates or tunes itself at the first call must have done so before the capture.
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.function(*self.inputs)
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # PyTorch's own capture stream is one for the process, on the device of its first capture.
        capture = torch.cuda.graph(self.graph, pool=pool, stream=torch.cuda.Stream(index))
        with _no_collection(), capture:
            self.outputs = self.function(*self.inputs)

    def __call__(self) -> Outputs:
        """The outputs; the next run overwrites them."""
        with self.place.current():
            if self.graph is None:
                return self.function(*self.inputs)
            self.graph.replay()
            return self.outputs


def _pool(place: Place) -> Any:
    return torch.cuda.graph_pool_handle() if place.cuda else None


class DeviceStages:
    """A `StageBackend` over tensors of PyTorch, for batches of one fixed size.

    Every buffer is made here, once; stages read and write the same addresses each time, so that
    they can be captured. The captures share one memory pool: one batch is on its way at a time, and
    all its work is on one stream. Subclasses give the stages and call `capture`.

    Args:
        thresholds: one per compaction.
        buckets: rising; the last is M.
        width: D.
        image_size: pixels.
        batch: B; above 1 a bucket holds the image that keeps most, as in dynamic mode.
        dtype: T.
        image_dtype: of the images that stage 0 takes.
        device: "cpu", or a CUDA device, on which all of it happens whichever is current.
        side: which of `SIDE_ROWS` stages hand on.

    Raises:
        UserError: there is no such device.
    """

    def __init__(
        self, thresholds: Sequence[float], buckets: Sequence[int], width: int, image_size: int,
        batch: int, dtype: torch.dtype, image_dtype: torch.dtype, device: str | Place,
        side: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.place = device if isinstance(device, Place) else Place(device)
        place = self.place.device
        self.thresholds = [torch.tensor(t, dtype=torch.float32, device=place) for t in thresholds]
        self.kernel = Kernel(build_kernel(cuda=self.place.cuda))
        self.buckets = tuple(buckets)
        most = self.buckets[-1]
        empty = functools.partial(torch.zeros, dtype=dtype, device=place)
        integers = functools.partial(torch.full, dtype=torch.int64, device=place)
        self.images = torch.zeros(batch, 3, image_size, image_size, dtype=image_dtype, device=place)
        self.length = integers((batch,), most)
        self.size = integers((), 0)
        self.workspace = torch.zeros(batch * most, dtype=torch.int16, device=place)
        self.inputs = {b: empty(batch, b, width) for b in self.buckets}
        self.index = {b: integers((batch, b), -1) for b in self.buckets}
        self.stride = {b: integers((), b) for b in self.buckets}
        # Side rows are all of one float32 number so far, which the kernel moves as tokens 1 wide.
        numbers = functools.partial(torch.zeros, dtype=torch.float32, device=place)
        self.side = {b: {name: numbers(batch, b) for name in side} for b in self.buckets}

    @torch.no_grad()
    def capture(
        self, first: Callable[..., Outputs], later: Callable[[int, int], Callable[..., Outputs]],
        graphs: bool = True,
    ) -> None:  # fmt: skip
        """Capture every stage in every bucket.

        Args:
            first: images -> `Cut`.
            later: (stage, bucket) -> function of (tokens, length, side rows) -> `Cut` or the
                output.
            graphs: False calls the functions each time.
        """
        self.graphs = graphs and self.place.cuda
        with self.place.current():
            captured = functools.partial(
                Captured, pool=_pool(self.place), graph=self.graphs, place=self.place
            )
            self.first = captured(first, (self.images,))
            self.later = {
                (stage, bucket): captured(
                    later(stage, bucket), (tokens, self.length, *self.side[bucket].values())
                )
                for stage in range(1, len(self.thresholds) + 1)
                for bucket, tokens in self.inputs.items()
            }

    @torch.no_grad()
    def start(self, images: NDArray[np.float32] | Tensor) -> Cut:
        with self.place.current():
            self.images.copy_(torch.as_tensor(images), non_blocking=True)
        return Cut(*self.first())

    def compact(self, stage: int, cut: Cut, rows: int) -> Kept:
        with self.place.current():
            return self._compact(stage, cut)

    def _compact(self, stage: int, cut: Cut) -> Kept:
        # All rows of the bucket: those that only pad have scores of -inf and never come back.
        batch, rows, _ = cut.tokens.shape
        stream = self.place.stream()
        tokens, scores = cut.tokens.contiguous(), cut.scores.contiguous()
        counted = Counted(
            batch, rows, scores.data_ptr(), self.thresholds[stage].data_ptr(),
            self.length.data_ptr(), self.size.data_ptr(), self.workspace.data_ptr(),
            rows - scores.shape[1],
        )  # fmt: skip
        self.kernel.count(counted, stream)
        kept = int(self.size.item())  # waits for the device
        bucket = smallest(self.buckets, kept)
        compacted, index = self.inputs[bucket], self.index[bucket]
        side = {name: self.side[bucket][name] for name in cut.side}
        moves = [(tokens, compacted), *((cut.side[name].contiguous(), side[name]) for name in side)]
        # A stage's input is another buffer than its output, so nothing is overwritten in reading.
        for source, target in moves:
            self.kernel.gather(
                counted, source.data_ptr(), math.prod(source.shape[2:]), source.element_size(),
                target.data_ptr(), index.data_ptr(), self.stride[bucket].data_ptr(), stream,
            )  # fmt: skip
        return Kept(compacted, index, self.length, kept, side)

    @torch.no_grad()
    def run(self, stage: int, bucket: int, kept: Kept) -> Outputs:
        return self.later[stage, bucket]()

    def host(self, array: Tensor) -> NDArray:
        with self.place.current():
            return array.cpu().numpy().copy()

    def describe(self) -> dict[str, str]:
        return {
            "backend": f"torch {torch.__version__}, bucketed, "
            + ("CUDA graphs" if self.graphs else "eager"),
            "provider": self.images.device.type,
            "precision": str(self.inputs[self.buckets[0]].dtype).removeprefix("torch."),
            "device": self.place.name(),
        }


class TorchStages(DeviceStages):
    """The stages of an adaptive model in PyTorch.

    Args:
        model: float32; its thresholds stay so.
        buckets, batch, dtype, device: as `DeviceStages`; weights and activations are `dtype`.
    """

    def __init__(
        self, model: ViT, buckets: Sequence[int], batch: int = 1,
        dtype: torch.dtype = torch.float32, device: str | Place = "cpu",
    ) -> None:  # fmt: skip
        config, method = model.config, model.reduction
        assert method is not None
        thresholds = model.threshold_values()
        if method.appends or not thresholds:
            what = "adds rows at each cut" if method.appends else "keeps as many of each picture"
            raise UserError(f"stages in buckets are of methods that thresholds decide and that add "
                            f"no rows; {method.name} {what}, so run it whole")  # fmt: skip
        super().__init__(thresholds, buckets, config.dim, config.image_size, batch, dtype, dtype,
                         device, side_rows_of(type(method)))  # fmt: skip
        self.model = copy.deepcopy(model).to(self.place.device, dtype).eval()
        self.capture(
            lambda images: self._stage(0, self.model.embed(images), None),
            lambda stage, _: functools.partial(self._padded_stage, stage),
        )

    def _padded_stage(
        self, stage: int, tokens: Tensor, length: Tensor, sizes: Tensor | None = None
    ) -> Outputs:
        rows = torch.arange(tokens.shape[1], device=tokens.device)
        return self._stage(stage, tokens, rows < length[:, None], sizes)

    def _stage(
        self, stage: int, x: Tensor, mask: Tensor | None, sizes: Tensor | None = None
    ) -> Outputs:
        if mask is not None and sizes is not None:
            sizes = torch.where(mask, sizes, 1.0)  # nothing divides by it, or takes its log
        rows = Rows(x, alive=mask, size=sizes)
        if stage == len(self.thresholds):
            rows, _ = self.model.segment(stage, rows)
            return (self.model.classify(rows).float(),)
        method = self.model.reduction
        assert method is not None
        rows, decision = self.model.scored(stage, rows)
        # Not the model's own thresholds, which are of T.
        threshold = self.thresholds[stage]
        rows, decision, scores = before_op(
            method, stage, rows, decision, decision.score, threshold
        )  # fmt: skip
        side = {} if rows.size is None else {SIZES: rows.size}
        return Cut(rows.tokens, scores, side, decision.into)


class StaticModel:
    """The whole model captured once: dense, or with a fixed number of rows after each stage.

    Args:
        model, batch, dtype, device: as `TorchStages`.
        lengths: rows that stay after each stage, prefix included; the highest scores stay,
            in order. None: dense.
    """

    def __init__(
        self, model: ViT, lengths: Sequence[int] | None, batch: int = 1,
        dtype: torch.dtype = torch.float32, device: str | Place = "cpu",
    ) -> None:  # fmt: skip
        self.place = device if isinstance(device, Place) else Place(device)
        place = self.place.device
        model = model if lengths is not None else model.with_reduction(None)
        self.model = copy.deepcopy(model).to(place, dtype).eval()
        self.lengths = lengths or ()
        size = model.config.image_size
        self.images = torch.zeros(batch, 3, size, size, dtype=dtype, device=place)
        with torch.no_grad(), self.place.current():
            pool = _pool(self.place)
            self.whole = Captured(self._forward, (self.images,), pool, place=self.place)

    def _forward(self, images: Tensor) -> Outputs:
        rows = Rows(self.model.embed(images))
        for stage, length in enumerate(self.lengths):
            rows, decision = self.model.scored(stage, rows)
            x, prefix = rows.tokens, self.model.config.prefix
            best = decision.score.topk(length - prefix).indices.sort().values + prefix
            first = torch.arange(prefix, device=best.device).expand(len(best), -1)
            index = torch.cat([first, best], 1)
            rows = Rows(x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2])))
        rows, _ = self.model.segment(len(self.lengths), rows)
        return (self.model.classify(rows).float(),)

    @torch.no_grad()
    def infer(self, images: NDArray[np.float32] | Tensor) -> NDArray:
        """images float32 [B, 3, H, W] -> logits or embeddings, float32 [B, C]."""
        with self.place.current():
            self.images.copy_(torch.as_tensor(images), non_blocking=True)
            return self.whole()[0].cpu().numpy()
