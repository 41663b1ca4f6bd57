"""Threads are held against the cores that there are, once for every runtime."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import raises_one_line

from asvit_deploy import processor
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.processor import require_threads, usable_cores
from asvit_deploy.runners.onnx_runtime import OrtRunner, session_options
from asvit_deploy.runners.openvino import OpenVinoRunner
from asvit_deploy.runners.pytorch import TorchRunner


def test_as_many_as_cores():
    cores = usable_cores()
    assert [require_threads(n) for n in (0, 1, cores)] == [0, 1, cores]
    for bad in (cores + 1, 4096, -1):
        raises_one_line(lambda bad=bad: require_threads(bad), f"threads is {bad}",
                        f"{cores} core", f"give 1 to {cores}")  # fmt: skip


def test_a_process_that_may_not_use_them_all(monkeypatch):
    monkeypatch.setattr(processor, "usable_cores", lambda: 1)
    raises_one_line(lambda: require_threads(2), "threads is 2; this machine has 1 core for")


@pytest.mark.parametrize("threads", [usable_cores() + 1, -1])
def test_every_runtime_refuses_alike(mini, mini_artifacts, threads):
    proto = to_onnx(mini)
    artefact = open_artefact(mini_artifacts["1", "auto"])
    calls = [
        lambda: session_options(threads),
        lambda: OrtRunner(proto, threads=threads),
        lambda: TorchRunner(mini, threads=threads),
        lambda: artefact.ways(threads, runtimes=("onnxruntime",))["function"],
        lambda: artefact.ways(threads, runtimes=("torch",))["torch"],
    ]
    if importlib.util.find_spec("openvino") is not None:
        calls.append(lambda: OpenVinoRunner(proto, threads=threads))
    for call in calls:
        raises_one_line(call, f"threads is {threads}", f"give 1 to {usable_cores()}")


def test_torch_computes_in_the_threads_it_was_given(mini, photos):
    seen: list[int] = []
    hook = mini.register_forward_pre_hook(lambda *given: seen.append(torch.get_num_threads()))
    image = photos.batch([0])
    try:
        torch.set_num_threads(1)
        cores = usable_cores()
        for threads, wanted in ((None, 1), (0, cores), (cores, cores), (1, 1)):
            runner = TorchRunner(mini, threads=threads)
            first = runner(image)
            runner.replay(image, [stage[0] for stage in first.kept])
            assert seen == [wanted, wanted]
            assert torch.get_num_threads() == 1, "the process has its own back"
            seen.clear()
    finally:
        hook.remove()
