"""Graphs in a child: what crashes there ends its own rows, and the run goes on."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

import numpy as np
import onnx
import pytest

from asvit_deploy.evaluation.timing import run_once
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.tuning import running
from asvit_deploy.tuning.clock import OutOfTime
from asvit_deploy.tuning.running import Crashed, Runnable, Workshop


@pytest.fixture(scope="module")
def images(photos):
    return photos.batch(range(6))


@pytest.fixture
def workshop(tmp_path, images, mini_artifacts):
    onnx.save(onnx.load(mini_artifacts["1", "auto"]), tmp_path / "mini.onnx")
    made = Workshop(tmp_path, images, 1)
    yield made
    made.close()


def runnable(runtime: str = "onnxruntime", model: str = "mini.onnx") -> Runnable:
    return Runnable(runtime, runtime, "float32", "adaptive", model)


def crashing_openvino(folder):
    """A package of that name which ends the process as soon as it is asked for anything."""
    package = folder / "fake" / "openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import os, signal\n"
        "def Core():\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)\n"
    )  # fmt: skip
    return package.parent


def put_first(monkeypatch, folder):
    rest = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), rest]))


def test_outputs_are_those_of_the_runtime(workshop, images, mini_artifacts):
    ticks = []
    found = workshop.outputs(runnable(), [4, 1], lambda: ticks.append(1))
    output, lengths = run_once(OrtRunner(mini_artifacts["1", "auto"]), [images[4], images[1]])
    assert np.array_equal(found.arrays["output"], output)
    assert np.array_equal(found.arrays["lengths"], lengths)
    assert len(ticks) >= 2


@pytest.mark.slow
def test_the_ops_library_computes_what_the_function_does(workshop, op_library):
    function = workshop.outputs(runnable(), [0, 1], lambda: None)
    library = workshop.outputs(replace(runnable(), library=str(op_library)), [0, 1], lambda: None)
    assert (function.said["described"]["op"], library.said["described"]["op"]) == (
        "function", "library"
    )  # fmt: skip
    assert np.array_equal(function.arrays["lengths"], library.arrays["lengths"])
    assert np.allclose(function.arrays["output"], library.arrays["output"], atol=1e-5)


def test_every_variant_is_timed_on_the_same_batches(workshop):
    pair = [runnable(), Runnable("two", "onnxruntime", "float32", "dense", "mini.onnx")]
    found = workshop.timed(pair, [0, 1, 2], 1, 0.1, (10, 12), 0, lambda: None)
    assert 10 <= len(found.arrays["seconds_0"]) == len(found.arrays["seconds_1"]) <= 12
    assert found.arrays["lengths_0"].shape == (3, 1, 3)
    assert found.arrays["lengths_1"].shape == (3, 1, 0)


def test_a_runtime_that_crashes_is_named_and_the_next_job_is_done(
    workshop, tmp_path, monkeypatch
):  # fmt: skip
    first = crashing_openvino(tmp_path)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(first), os.environ.get("PYTHONPATH", "")])
    )
    with pytest.raises(Crashed, match="SIGSEGV") as caught:
        workshop.timed([runnable(), runnable("openvino")], [0, 1], 1, 0.1, (10, 12), 0,
                       lambda: None)  # fmt: skip
    assert caught.value.variant == 1
    assert workshop.outputs(runnable(), [0], lambda: None).arrays["output"].shape[0] == 1


def test_a_graph_that_cannot_be_run_is_one_line(workshop, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no graph")
    with pytest.raises(Crashed) as caught:
        workshop.outputs(runnable(model="broken.onnx"), [0], lambda: None)
    assert "\n" not in caught.value.why


def test_what_hangs_is_ended(workshop, tmp_path, monkeypatch):
    first = crashing_openvino(tmp_path)
    (first / "openvino" / "__init__.py").write_text("import time\ndef Core():\n time.sleep(600)\n")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(first), os.environ.get("PYTHONPATH", "")])
    )
    workshop.outputs(runnable(), [0], lambda: None)
    workshop.close()
    monkeypatch.setattr(running, "PATIENCE", 20)
    with pytest.raises(Crashed, match="no sign of life"):
        workshop.outputs(runnable("openvino"), [0], lambda: None)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_is_the_systems_own_error(workshop, tmp_path, monkeypatch):
    (tmp_path / running.RESULT).symlink_to("/dev/full")
    monkeypatch.setattr(type(tmp_path), "unlink", lambda self, missing_ok=False: None)
    with pytest.raises(OSError, match="No space left"):
        workshop.outputs(runnable(), [0], lambda: None)


def test_a_slow_round_is_no_hang(workshop, monkeypatch):
    """A round over all variants may take longer than one is waited for; a run may not."""
    many = [Runnable(f"{i}", "onnxruntime", "float32", "dense", "mini.onnx") for i in range(12)]
    fake = workshop.folder / "fake"
    fake.mkdir()
    (fake / "sitecustomize.py").write_text(
        "import time\n"
        "from asvit_deploy.tuning import worker\n"
        "real = worker.Marked.infer\n"
        "def infer(self, images):\n"
        "    time.sleep(0.5)\n"
        "    return real(self, images)\n"
        "worker.Marked.infer = infer\n"
    )  # fmt: skip
    put_first(monkeypatch, fake)
    workshop.outputs(many[0], [0], lambda: None)  # imports take seconds
    monkeypatch.setattr(running, "PATIENCE", 4)
    ticks = []
    found = workshop.timed(many, [0], 1, 0.1, (1, 1), 0, lambda: ticks.append(1))
    assert found.arrays["seconds_0"] > 0.5
    assert len(ticks) < 12 * 3, "signs of life are no progress"


def test_a_deadline_leaves_fewer_rounds_or_none(workshop):
    pair = [runnable(), Runnable("two", "onnxruntime", "float32", "dense", "mini.onnx")]
    workshop.timed(pair, [0, 1], 1, 0.1, (10, 12), 0, lambda: None)  # imports take seconds
    found = workshop.timed(
        pair, [0, 1], 1, 600, (100_000, 100_000), 0, lambda: None, time.monotonic() + 6
    )
    assert 20 <= found.said["runs"] == len(found.arrays["seconds_0"]) < found.said["planned"]
    assert len(found.arrays["seconds_1"]) == found.said["runs"]
    with pytest.raises(OutOfTime):
        workshop.timed(pair, [0, 1], 1, 1, (10, 12), 0, lambda: None, time.monotonic() - 1)


def test_jobs_leave_no_file_open(workshop):
    workshop.outputs(runnable(), [0], lambda: None)
    place = f"/proc/{workshop._child._process.pid}/fd"
    if not os.path.isdir(place):
        pytest.skip("no /proc")
    before = len(os.listdir(place))
    for _ in range(4):
        workshop.outputs(runnable(), [0], lambda: None)
    assert len(os.listdir(place)) <= before
