"""Every model × mode × precision that we offer, built by TensorRT-RTX for three GPUs at once."""

from __future__ import annotations

import pytest
from conftest import sharpened

from asvit_deploy import artifact, bundle
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.engine.bucketed import build_bucketed
from asvit_deploy.engine.build import Options, build_engine
from asvit_deploy.engine.source import open_source
from asvit_deploy.export.pipeline import export
from asvit_deploy.images import open_images
from asvit_deploy.models.checkpoint import load_checkpoint, save_checkpoint
from asvit_deploy.models.registry import arch

pytestmark = pytest.mark.slow
SMS = ("86", "89", "120")
MODELS = ("default", "as_deit_small", "as_lvvit_s")


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The ONNX file of a model with one image or a dynamic batch, made once."""
    folder = tmp_path_factory.mktemp("matrix")
    paths = {}

    def get(name: str, batch: str):
        if (name, batch) not in paths:
            path = folder / f"{name}_{batch}.onnx"
            checkpoint = load_checkpoint(weights(name))
            export(checkpoint, path, open_images(None, checkpoint.config, limit=2), batch)
            paths[name, batch] = path
        return paths[name, batch]

    def weights(name: str):
        if name == "default":
            return default_checkpoint()
        path = folder / f"{name}.safetensors"
        if not path.exists():
            config = arch(name)
            save_checkpoint(path, sharpened(config, open_images(None, config, limit=2)), {})
        return path

    return get


@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("mode", "batch"), [("dynamic", "1"), ("dynamic", "dynamic"), ("padded", "dynamic")]
)
def test_builds(rtx, trt_plugin, exported, tmp_path, model, mode, batch, precision):
    # The graphs' agreement with PyTorch has its own tests; random weights are not judged in half.
    options = Options(
        precision, mode, target_sms=SMS, checked=False,
        plugin=trt_plugin if mode == "dynamic" else None,
        batch=(1, 4, 8) if batch == "dynamic" else None,
    )  # fmt: skip
    output = tmp_path / "x.engine"
    result = build_engine(open_source(exported(model, batch)), output, rtx, options)
    assert result.warnings == []
    fields = artifact.read(output)
    assert fields["plugin_layers"] == (3 if mode == "dynamic" else 0)
    assert fields["target_sms"] == list(SMS)
    weights = exported(model, batch).stat().st_size * (0.45 if precision else 0.9)
    assert output.stat().st_size > weights, "a plan holds at least its weights"


@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_builds_stages_for_automatic_buckets(rtx, exported, tmp_path, model, precision):
    options = Options(precision, "bucketed", target_sms=SMS, checked=False)
    output = tmp_path / "x.bucketed"
    result = build_bucketed(open_source(exported(model, "1")), output, rtx, options)
    assert result.warnings == []
    fields = bundle.read(output)
    assert list(fields["files"]) == [f"stage_{stage}.engine" for stage in range(4)]
    assert (len(fields["buckets"]), fields["buckets"][-1]) == (13, 197)
    assert fields["target_sms"] == list(SMS)
    weights = exported(model, "1").stat().st_size * (0.45 if precision else 0.9)
    assert sum(p.stat().st_size for p in output.iterdir()) > weights
