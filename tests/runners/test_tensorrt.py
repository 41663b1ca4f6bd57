"""Engines on a GPU, in every mode: the tokens and logits of PyTorch. Skipped without one."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.engine.bucketed import build_bucketed
from asvit_deploy.engine.build import Options, build_engine
from asvit_deploy.engine.source import open_source
from asvit_deploy.errors import UserError
from asvit_deploy.parity import compare
from asvit_deploy.runners.pytorch import TorchRunner
from asvit_deploy.runners.trt_flavour import FLAVOURS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch sees"),
]


@pytest.fixture(params=list(FLAVOURS))
def flavour(request):
    found = FLAVOURS[request.param]
    if found.module is None or importlib.util.find_spec("polygraphy") is None:
        pytest.skip(f"{found.title} or Polygraphy is not installed")
    return found


@pytest.fixture(scope="module")
def plugin():
    from asvit_deploy.ops.trt_library import build_trt

    return build_trt()


def engine(flavour, plugin, onnx, folder, mode, precision, batch=None):
    options = Options(precision, mode, batch, plugin=plugin if mode == "dynamic" else None,
                      checked=False)  # fmt: skip
    bucketed = mode == "bucketed"
    path = folder / ("x.bucketed" if bucketed else "x.engine")
    (build_bucketed if bucketed else build_engine)(open_source(onnx), path, flavour, options)
    return open_artefact(path)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("mode", ["dynamic", "padded", "bucketed"])
def test_keeps_the_tokens_of_pytorch(
    flavour, plugin, mini_artifacts, mini, photos, tmp_path, mode, graph
):
    session = engine(flavour, plugin, mini_artifacts["1", "auto"], tmp_path, mode, None)
    if mode == "dynamic" and graph:
        with pytest.raises(UserError, match="no CUDA graph can hold"):
            session.runner(graph)
        return
    runner = session.runner(graph)
    for _ in range(2):  # the second time over buffers that have been used
        parity = compare(
            TorchRunner(mini), runner, list(photos), photos.names, mini.threshold_values()
        )
        assert parity.passed, parity.failures


def test_batches(flavour, plugin, mini_artifacts, mini, photos, tmp_path):
    onnx = mini_artifacts["dynamic", "auto"]
    session = engine(flavour, plugin, onnx, tmp_path, "dynamic", None, batch=(1, 4, 8))
    parity = compare(
        TorchRunner(mini), session.runner(), list(photos), photos.names, mini.threshold_values(),
        batch=8,
    )  # fmt: skip
    assert parity.passed, parity.failures
