"""One CUDA graph that picks its buckets on the device, beside buckets that the host reads.

All buckets of a stage share one input and one output buffer of M rows; a bucket is their first
rows, and scores behind it are -inf, so that counting may always go over M rows.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asvit_deploy.ops.kernel import Counted, Kernel, build_kernel
from asvit_deploy.reduction.rows import Rows
from gpu_parts import networks
from gpu_parts.kit import FailPart, Kit, Report, torch_for
from gpu_parts.timing import on_device, on_wall, spin

LOGITS = 1e-3  # of the largest, between two ways to run the same kernels


class Shared:
    """A network's stages in buckets over shared buffers, B = 1, for the device to choose from."""

    def __init__(self, kit: Kit, network: networks.Network, buckets: tuple[int, ...]) -> None:
        place, dtype = torch.device(kit.device), getattr(torch, kit.half)
        config, most = network.config, network.rows
        self.model = copy.deepcopy(network.model).to(place, dtype)
        self.buckets, self.stages = buckets, len(config.stages)
        self.thresholds = [torch.tensor(value, dtype=torch.float32, device=place)
                           for value in network.model.threshold_values()]  # fmt: skip
        self.kernel = Kernel(build_kernel(cuda=place.type == "cuda"))

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=of, device=place)

        self.images = zeros(1, 3, config.image_size, config.image_size)
        self.before, self.after = zeros(1, most, config.dim), zeros(1, most, config.dim)
        self.scores = zeros(1, most - 1, of=torch.float32)
        self.logits = zeros(1, config.num_classes, of=torch.float32)
        self.length, self.index = zeros(1, of=torch.int64), zeros(1, most, of=torch.int64)
        self.size, self.stride = zeros(1, of=torch.int64), zeros(1, of=torch.int64)
        self.workspace = zeros(most, of=torch.int16)
        self.list = torch.tensor(buckets, dtype=torch.int32, device=place)

    def first(self) -> None:
        tokens, scores = networks.run_stage(self.model, 0, self.model.embed(self.images), None)
        assert scores is not None
        self.after.copy_(tokens)
        self.scores.copy_(scores)

    def _counted(self, stage: int) -> Counted:
        return Counted(
            1, self.after.shape[1], self.scores.data_ptr(), self.thresholds[stage].data_ptr(),
            self.length.data_ptr(), self.size.data_ptr(), self.workspace.data_ptr(),
            prefix=self.after.shape[1] - self.scores.shape[1],
        )  # fmt: skip

    def _stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.images.is_cuda else 0

    def count(self, stage: int) -> None:
        self.kernel.count(self._counted(stage), self._stream())

    def gather(self, stage: int) -> None:
        self.kernel.gather(
            self._counted(stage), self.after.data_ptr(), self.after.shape[2],
            self.after.element_size(), self.before.data_ptr(), self.index.data_ptr(),
            self.stride.data_ptr(), self._stream(),
        )  # fmt: skip

    def body(self, stage: int, bucket: int) -> None:
        """Stage `stage` (1-based) on the first `bucket` rows."""
        mask = torch.arange(bucket, device=self.images.device) < self.length[:, None]
        x, scores = networks.run_stage(self.model, stage, self.before[:, :bucket], mask)
        if scores is None:
            self.logits.copy_(self.model.classify(Rows(x, alive=mask)))
            return
        self.after[:, :bucket].copy_(x)
        self.scores[:, : bucket - 1].copy_(scores)
        self.scores[:, bucket - 1 :].fill_(-torch.inf)

    def walk(self) -> None:
        """The whole as the host would do it, part by part."""
        self.first()
        for stage in range(self.stages):
            self.count(stage)
            kept = int(self.size.item())
            bucket = next(b for b in self.buckets if b >= kept)
            self.stride.fill_(bucket)
            self.gather(stage)
            self.body(stage + 1, bucket)


class SwitchGraph:
    """The parts of `Shared`, captured and joined by the library.

    Raises:
        RuntimeError: CUDA refuses.
    """

    def __init__(self, shared: Shared, library: Any) -> None:
        self.shared, self.library = shared, ctypes.CDLL(str(library))
        self.library.asvitSwitchError.restype = ctypes.c_char_p
        self.pool = torch.cuda.graph_pool_handle()
        self.kept: list[Any] = []
        stages, buckets = range(shared.stages), shared.buckets
        first = self._capture(shared.first)
        counts = [self._capture(partial(shared.count, stage)) for stage in stages]
        gathers = [self._capture(partial(shared.gather, stage)) for stage in stages]
        bodies = [self._capture(partial(shared.body, stage + 1, bucket))
                  for stage in stages for bucket in buckets]  # fmt: skip

        def several(graphs: list[int]) -> Any:
            return (ctypes.c_void_p * len(graphs))(*graphs)

        self.graph = ctypes.c_void_p()
        self._try(self.library.asvitSwitchBuild(
            ctypes.c_void_p(first), several(counts), several(gathers), several(bodies),
            ctypes.c_int32(shared.stages), ctypes.c_int32(len(buckets)),
            ctypes.c_void_p(shared.size.data_ptr()), ctypes.c_void_p(shared.list.data_ptr()),
            ctypes.c_void_p(shared.stride.data_ptr()), ctypes.byref(self.graph),
        ))  # fmt: skip

    def _capture(self, function: Callable[[], None]) -> int:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, pool=self.pool):
            function()
        self.kept.append(graph)
        return graph.raw_cuda_graph()

    def _try(self, status: int) -> None:
        if status:
            words = self.library.asvitSwitchError().decode()
            raise RuntimeError(f"the graph cannot be built or launched ({status}): {words}")

    def __call__(self) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._try(self.library.asvitSwitchLaunch(self.graph, stream))


@torch.no_grad()
def switch(kit: Kit) -> Report:
    """B = 1, half: the same logits, and both ways timed."""
    torch_for(kit)
    library = None if kit.rehearse else kit.file("switch")
    result: Report = {"unit": "ms", "runs": []}
    for name in networks.names(kit):
        network = networks.load(kit, name)
        step = 16 if network.rows < 200 else 64
        buckets = (*range(step, network.rows, step), network.rows)
        result["runs"].append(_measure(kit, network, buckets, library))
        kit.save(result)
    wrong = [run["network"] for run in result["runs"] if run["logit_error"] > LOGITS]
    if wrong:
        raise FailPart(f"logits differ from host-read buckets: {', '.join(wrong)}", result)
    return result


def _measure(kit: Kit, network: networks.Network, buckets: tuple[int, ...], library: Any) -> Report:
    from asvit_deploy.runners.bucketed import BucketedRunner
    from asvit_deploy.runners.torch_stages import StaticModel, TorchStages

    given: dict[str, Any] = {"dtype": getattr(torch, kit.half), "device": kit.device}
    stages = TorchStages(network.model, buckets, **given)
    runner = BucketedRunner(stages, len(network.config.stages), buckets)
    dense = StaticModel(network.model, None, **given)
    top_k = StaticModel(network.model, network.mean_kept, **given)
    shared = Shared(kit, network, buckets)
    launch: Callable[[], Any] = shared.walk if library is None else SwitchGraph(shared, library)

    def on_its_own(images: Tensor) -> Any:
        shared.images.copy_(images)
        launch()
        return shared.logits.cpu().numpy()

    feeds: list[Any] = [network.batch(1, i).to(kit.device) for i in range(len(network.pictures))]
    error = 0.0
    for feed in feeds:
        theirs = runner.infer(feed)
        mine = on_its_own(feed)
        error = max(error, float(abs(mine - theirs).max() / abs(theirs).max()))
    spin(kit.device)
    wall = on_wall(
        {"device_picks": on_its_own, "host_reads": runner.infer, "dense": dense.infer,
         "top_k": top_k.infer}, feeds, 3 if kit.rehearse else 100, 1 if kit.rehearse else 10,
    )  # fmt: skip
    alone = on_device(
        {"device_picks": launch, "dense": dense.whole, "top_k": top_k.whole}, kit.device,
        2 if kit.rehearse else 60,
    )  # fmt: skip
    p50 = {key: value["p50"] for key, value in wall.items()}
    return {
        "network": network.name, "buckets": list(buckets), "logit_error": error,
        "wall": wall, "replay": alone,
        "speedup_over_host_reads": p50["host_reads"] / p50["device_picks"],
        "speedup_over_dense": p50["dense"] / p50["device_picks"],
    }  # fmt: skip
