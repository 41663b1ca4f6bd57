"""What TensorRT answers with None or False on a GPU becomes one line; its answers are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from asvit_deploy.engine.flavour import RTX
from asvit_deploy.errors import UserError
from asvit_deploy.runners.tensorrt import Engine


class Config:
    """A runtime configuration as RTX's bindings have it."""

    def __init__(self, made):
        self.made = made

    def create_runtime_cache(self):
        self.made.append(object())
        return self.made[-1]

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


@pytest.fixture
def engine():
    """An engine without a GPU: only what `context` looks at."""
    made: list = []
    configs: list = []
    found = Engine.__new__(Engine)
    strategies = SimpleNamespace(EAGER="eager")
    found.trt = SimpleNamespace(DynamicShapesKernelSpecializationStrategy=strategies)
    found.flavour, found.name, found._cache = RTX, "x.engine", None
    found._logger = SimpleNamespace(errors=["Error Code 2:\nout of memory", "later"])

    def config():
        configs.append(Config(made))
        return configs[-1]

    found.engine = SimpleNamespace(
        create_runtime_config=config, create_execution_context=lambda *given: given or None,
        num_optimization_profiles=1,
    )  # fmt: skip
    found.made, found.configs = made, configs
    return found


def test_no_context_is_one_line_with_what_tensorrt_logged(engine):
    engine.engine.create_execution_context = lambda *given: None
    with pytest.raises(UserError) as error:
        engine.context()
    assert str(error.value) == (
        "TensorRT-RTX cannot make an execution context for x.engine (Error Code 2: out of memory); "
        "free GPU memory, or build it again on this machine"
    )
    assert engine.said() == "", "told once"


def test_contexts_of_one_engine_share_a_runtime_cache(engine):
    for _ in range(3):
        (config,) = engine.context()
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert len(engine.made) == 1
    assert [config.cache for config in engine.configs] == engine.made * 3


def test_bindings_without_a_runtime_cache_or_a_strategy(engine, monkeypatch):
    monkeypatch.delattr(Config, "create_runtime_cache")
    engine.context()
    assert engine.made == []
    engine.trt = SimpleNamespace()
    assert engine._runtime_config() == ()


def test_a_runtime_cache_that_is_not_taken(engine, monkeypatch):
    monkeypatch.setattr(Config, "set_runtime_cache", lambda self, cache: False)
    with pytest.raises(UserError, match=r"took no runtime cache for .*\(Error Code 2"):
        engine.context()


def test_installed_bindings_have_what_is_called(rtx):
    """The names above, on the real classes; the calls themselves need a GPU."""
    import importlib

    trt = importlib.import_module(rtx.module)
    assert callable(trt.IRuntimeConfig.set_runtime_cache)
    assert callable(trt.IRuntimeConfig.create_runtime_cache)
    assert callable(trt.IExecutionContext.is_stream_capturable)
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")
