"""Work goes to the device that was named, whichever is current: on emulated GPUs, number 1 of four.

The op's kernel is CUDA's own source on the emulator, which knows a current device, refuses a launch
on another device's stream and counts what each device does. What only a GPU has, PyTorch's device
guard, streams and graphs, stands here as what it does to the current device, and no more.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import sharpened

from asvit_deploy.data.images import open_images
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import ArchConfig
from asvit_deploy.ops import trt_library
from asvit_deploy.ops.library import find_compiler
from asvit_deploy.runners import torch_stages
from asvit_deploy.runners.bucketed import BucketedRunner
from asvit_deploy.runners.place import Place
from asvit_deploy.runners.torch_stages import Captured, StaticModel, TorchStages

EMULATED = Path(__file__).resolve().parents[1] / "cpp" / "trt" / "emulated"
BUCKETS = [32, 64, 128, 197]
DEVICE = 1


class OnGpu(Place):
    """An emulated GPU: its memory is the host's."""

    def __init__(self) -> None:
        self.cuda, self.index, self.device = True, DEVICE, torch.device("cpu")


@pytest.fixture(scope="module")
def kernel(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernel on emulated devices, as the library that `Kernel` loads."""
    sources = trt_library.sources_dir() / "kernels"
    path = tmp_path_factory.mktemp("kernel") / "libemulated.so"
    subprocess.run(
        [*find_compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-I",
         sources, "-I", EMULATED, "-x", "c++", sources / "threshold_compact.cu", "-o", path],
        check=True,
    )  # fmt: skip
    return path


class Gpus:
    """PyTorch's side of the emulated devices: which one is current, and where things are made."""

    def __init__(self, kernel: Path, stream: int) -> None:
        self.library = ctypes.CDLL(str(kernel))
        self.library.emulatorLaunches.restype = ctypes.c_uint64
        self.current, self.handle, self.made = 0, stream, []

    @contextlib.contextmanager
    def device(self, index: int):
        before = self.current
        self.switch(index)
        yield
        self.switch(before)

    def switch(self, index: int) -> None:
        assert self.library.cudaSetDevice(index) == 0
        self.current = index

    def launches(self) -> list[int]:
        return [self.library.emulatorLaunches(device) for device in range(4)]

    def stream(self, index: int | None = None):
        """A stream of that device, made on it; a default stream's handle is 0 on every device."""
        device = self.current if index is None else index
        self.made.append(device)
        handle = 4096 * device + self.handle if self.handle else 0
        return Stream(device, handle)


class Stream:
    def __init__(self, device: int, handle: int) -> None:
        self.device, self.cuda_stream = device, handle

    def wait_stream(self, other) -> None:
        assert self.device == other.device


@pytest.fixture(params=[0, 8], ids=["default stream", "own stream"])
def gpus(request, kernel, monkeypatch):
    found = Gpus(kernel, request.param)
    found.switch(0)
    monkeypatch.setattr(torch.cuda, "device", found.device)
    monkeypatch.setattr(torch.cuda, "current_stream", found.stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: ("pool", found.current))
    twin = torch_stages.build_kernel(cuda=False)
    monkeypatch.setattr(torch_stages, "build_kernel", lambda cuda: kernel if cuda else twin)
    return found


@pytest.fixture(scope="module")
def small() -> ArchConfig:
    return ArchConfig("as_small", 64, 2, 6, 2, (2, 3, 5), image_size=56, patch_size=4,
                      num_classes=10)  # fmt: skip


@pytest.fixture(scope="module")
def model(small):
    return sharpened(small, open_images(None, small, limit=8))


@pytest.fixture(scope="module")
def pictures(small) -> np.ndarray:
    return open_images(None, small, limit=8).batch(range(4))


class Eager(TorchStages):
    """Stages that are called each time: what a graph holds cannot be replayed without a GPU."""

    def capture(self, first, later, graphs=True):
        super().capture(first, later, graphs=False)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 4])
def test_the_kernel_runs_on_the_device_of_its_tensors(gpus, model, pictures, batch):
    wanted = BucketedRunner(TorchStages(model, BUCKETS, batch), 3, BUCKETS)
    right = [wanted.infer(pictures[i : i + batch]) for i in range(0, 4, batch)]
    before = gpus.launches()
    runner = BucketedRunner(Eager(model, BUCKETS, batch, device=OnGpu()), 3, BUCKETS)
    mine = [runner.infer(pictures[i : i + batch]) for i in range(0, 4, batch)]
    np.testing.assert_array_equal(np.concatenate(mine), np.concatenate(right))
    done = np.subtract(gpus.launches(), before)
    # Three stages a batch: count and gather, and the memset of `size` where there are more images.
    assert done.tolist() == [0, (4 // batch) * 3 * (2 if batch == 1 else 3), 0, 0]
    assert gpus.current == 0, "the caller's device is current again"


@pytest.mark.slow
def test_a_launch_on_another_device_would_be_seen(gpus, model, pictures, monkeypatch):
    monkeypatch.setattr(OnGpu, "current", lambda self: contextlib.nullcontext())
    runner = BucketedRunner(Eager(model, BUCKETS, device=OnGpu()), 3, BUCKETS)
    before = gpus.launches()
    if gpus.handle:  # CUDA itself refuses it
        with pytest.raises(RuntimeError, match="ended with 400"):
            runner.infer(pictures[:1])
    else:
        runner.infer(pictures[:1])
        assert gpus.launches()[0] > before[0], "on the first GPU, as it used to be"


def test_graphs_and_their_streams_are_made_on_the_device(gpus, monkeypatch):
    captured, collected = [], []

    @contextlib.contextmanager
    def graph(holder, pool=None, stream=None):
        captured.append((gpus.current, stream.device))
        collected.append(gc.isenabled())
        yield

    class Graph:
        def __init__(self) -> None:
            self.device = gpus.current

        def replay(self) -> None:
            captured.append(("replay", gpus.current))

    monkeypatch.setattr(torch.cuda, "Stream", gpus.stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    seen = []

    def function(tensor):
        seen.append(gpus.current)
        return (tensor + 1,)

    graphed = Captured(function, (torch.zeros(2),), None, place=OnGpu())
    assert graphed()[0].tolist() == [1, 1]
    assert graphed.graph.device == DEVICE
    assert captured == [(DEVICE, DEVICE), ("replay", DEVICE)]
    assert set(seen) == set(gpus.made) == {DEVICE}
    assert gpus.current == 0
    # What a collection frees within a capture may end it, as graphs of an earlier runner did.
    assert collected == [False]
    assert gc.isenabled()


def test_whole_models_run_on_their_device(gpus, model, pictures, monkeypatch):
    monkeypatch.setattr(torch_stages, "Captured", Ungraphed)
    right = StaticModel(model, None).infer(pictures[:1])
    static = StaticModel(model, None, device=OnGpu())
    seen = []
    static.whole.function = lambda images: seen.append(gpus.current) or static._forward(images)
    np.testing.assert_array_equal(static.infer(pictures[:1]), right)
    assert seen == [DEVICE]


class Ungraphed(Captured):
    def __init__(self, function, inputs, pool, graph=True, place=None):
        assert pool in (None, ("pool", DEVICE))
        super().__init__(function, inputs, pool, False, place)


def test_a_gpu_that_is_not_there_is_one_line(model):
    with pytest.raises(UserError, match=r"there is no cuda:9 here: PyTorch sees \d+ GPUs"):
        TorchStages(model, BUCKETS, device="cuda:9")


def test_places():
    here = Place()
    assert (here.device, here.cuda, here.stream(), here.name()) == (
        torch.device("cpu"), False, 0, "cpu",
    )  # fmt: skip
    assert Place.of(torch.zeros(1)).device == here.device
