"""What TensorRT answers with None or False on a GPU becomes one line; its answers are made up."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch

from asvit_deploy.errors import UserError
from asvit_deploy.runners import trt_buffers
from asvit_deploy.runners.place import Place
from asvit_deploy.runners.trt_buffers import Bound, Scratch
from asvit_deploy.runners.trt_flavour import RTX
from asvit_deploy.runners.trt_plan import Engine


class Config:
    """A runtime configuration as RTX's bindings have it."""

    def __init__(self, made):
        self.made = made

    def create_runtime_cache(self):
        self.made.append(object())
        return self.made[-1]

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


@pytest.fixture
def engine():
    """An engine without a GPU: only what `context` looks at."""
    made: list = []
    configs: list = []
    found = Engine.__new__(Engine)
    found.trt = SimpleNamespace(
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"),
    )
    found.place = Place("cpu")
    found.flavour, found.name, found._cache = RTX, "x.engine", None
    found._logger = SimpleNamespace(errors=["Error Code 2:\nout of memory", "later"])

    def config():
        configs.append(Config(made))
        return configs[-1]

    found.engine = SimpleNamespace(
        create_runtime_config=config, create_execution_context=Context,
        num_optimization_profiles=1, device_memory_size_v2=1000,
    )  # fmt: skip
    found.made, found.configs = made, configs
    return found


class Context:
    """An execution context as TensorRT 10.1 and later have it."""

    def __init__(self, *given):
        self.given = given

    def set_device_memory(self, address, size):
        self.memory = address, size


class OldContext:
    """As TensorRT 10.0 has it."""

    def __init__(self, *given):
        self.given = given


def test_contexts_of_all_engines_run_in_one_scratch_of_the_largest(engine):
    other = copy.copy(engine)
    other.engine = SimpleNamespace(**{**vars(engine.engine), "device_memory_size_v2": 5000})
    scratch = Scratch([engine, other, engine])
    assert scratch.memory.shape == (5000,)
    contexts = [of.context(scratch) for of in (engine, other, engine)]
    assert {context.memory for context in contexts} == {(scratch.memory.data_ptr(), 5000)}
    assert [config.strategy for config in engine.configs] == ["ours"] * 3


def test_scratch_by_the_names_of_tensorrt_10_0_and_without_a_runtime_configuration(engine):
    del engine.engine.device_memory_size_v2
    engine.engine.device_memory_size = 300
    engine.engine.create_execution_context = OldContext
    del engine.trt.DynamicShapesKernelSpecializationStrategy
    scratch = Scratch([engine])
    context = engine.context(scratch)
    assert context.given == ("ours",)
    assert context.device_memory == scratch.memory.data_ptr()
    assert scratch.bytes == 300


def test_engine_that_needs_no_scratch(engine):
    engine.engine.device_memory_size_v2 = 0
    scratch = Scratch([engine])
    address, size = engine.context(scratch).memory
    assert (address != 0, size) == (True, 0)


class Watched(Place):
    """A GPU whose memory is the host's, and which says whether it is current."""

    def __init__(self):
        self.cuda, self.index, self.device, self.inside = True, 3, torch.device("cpu"), False

    @contextlib.contextmanager
    def current(self):
        self.inside = True
        yield
        self.inside = False


class Stream:
    def __init__(self, index, handle):
        self.index, self.cuda_stream, self.waited = index, handle, []

    def wait_stream(self, other):
        self.waited.append(other)


def test_contexts_are_made_and_run_on_the_engine_s_device(engine, monkeypatch):
    place = engine.place = Watched()
    ran = []

    class Running(Context):
        def __init__(self, *given):
            assert place.inside
            super().__init__(*given)

        def set_input_shape(self, name, shape):
            return True

        def set_tensor_address(self, name, address):
            return True

        def execute_async_v3(self, stream):
            assert place.inside
            ran.append(stream)
            return True

    engine.engine.create_execution_context = Running
    engine.outputs, engine.dtype = [], lambda name: torch.float32
    bound = Bound(engine, engine.context(Scratch([engine])), {"images": (1, 3, 8, 8)})
    assert bound.tensors["images"].device == place.device
    default, own, side = (Stream(3, handle) for handle in (0, 7, 9))
    of_index = {3: default}.__getitem__
    monkeypatch.setattr(torch.cuda, "default_stream", of_index)
    monkeypatch.setattr(torch.cuda, "current_stream", of_index)
    monkeypatch.setattr(trt_buffers, "_side_stream", {3: side}.__getitem__)
    bound.enqueue()
    assert (side.waited, default.waited) == ([default], [side]), "one execution after the other"
    monkeypatch.setattr(torch.cuda, "current_stream", {3: own}.__getitem__)
    bound.enqueue()
    assert ran == [9, 7]
    assert not place.inside


def test_no_context_is_one_line_with_what_tensorrt_logged(engine):
    engine.engine.create_execution_context = lambda *given: None
    with pytest.raises(UserError) as error:
        engine.context(Scratch([engine]))
    assert str(error.value) == (
        "TensorRT-RTX cannot make an execution context for x.engine (Error Code 2: out of memory); "
        "free GPU memory, or build it again on this machine"
    )
    assert engine.said() == "", "said once"


def test_contexts_of_one_engine_share_a_runtime_cache(engine):
    for _ in range(3):
        (config,) = engine.context(Scratch([engine])).given
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert len(engine.made) == 1
    assert [config.cache for config in engine.configs] == engine.made * 3


def test_bindings_without_a_runtime_cache_or_a_strategy(engine, monkeypatch):
    monkeypatch.delattr(Config, "create_runtime_cache")
    engine.context(Scratch([engine]))
    assert engine.made == []
    del engine.trt.DynamicShapesKernelSpecializationStrategy
    assert engine._context_arguments() == ("ours",)


def test_a_runtime_cache_that_is_not_taken(engine, monkeypatch):
    monkeypatch.setattr(Config, "set_runtime_cache", lambda self, cache: False)
    with pytest.raises(UserError, match=r"took no runtime cache for .*\(Error Code 2"):
        engine.context(Scratch([engine]))


def test_installed_bindings_have_what_is_called(rtx):
    """The names above, on the real classes; the calls themselves need a GPU."""
    import importlib

    trt = importlib.import_module(rtx.module)
    assert callable(trt.IRuntimeConfig.set_runtime_cache)
    assert callable(trt.IRuntimeConfig.create_runtime_cache)
    assert callable(trt.IExecutionContext.is_stream_capturable)
    assert callable(trt.IRuntimeConfig.set_execution_context_allocation_strategy)
    assert callable(trt.IExecutionContext.set_device_memory)
    assert isinstance(trt.ICudaEngine.device_memory_size_v2, property)
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")
