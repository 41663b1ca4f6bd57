"""Every model × mode × precision that we offer, checked against PyTorch on a few pictures and built
by TensorRT-RTX for three GPUs at once."""

from __future__ import annotations

import pytest
from conftest import sharpened

from asvit_deploy import sidecar as artifact
from asvit_deploy.artefacts import bundle
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.engine.bucketed import build_bucketed
from asvit_deploy.engine.build import Options, build_engine
from asvit_deploy.engine.source import open_source
from asvit_deploy.exporting.export import export
from asvit_deploy.models.archs import arch

pytestmark = pytest.mark.slow
SMS = ("86", "89", "120")
PICTURES = 4
MODELS = ("default", "as_deit_small", "as_lvvit_s")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model with one image or a dynamic batch, opened once: it keeps its reference."""
    folder = tmp_path_factory.mktemp("matrix")
    sources = {}

    def get(name: str, batch: str):
        if (name, batch) not in sources:
            path = folder / f"{name}_{batch}.onnx"
            checkpoint = load_checkpoint(weights(name))
            export(checkpoint, path, open_images(None, checkpoint.config, limit=2), batch)
            sources[name, batch] = open_source(path)
        return sources[name, batch]

    def weights(name: str):
        if name == "default":
            return default_checkpoint()
        path = folder / f"{name}.safetensors"
        if not path.exists():
            config = arch(name)
            save_checkpoint(path, sharpened(config, open_images(None, config, limit=2)), {})
        return path

    return get


def assert_checked(fields, changed):
    """A graph that is not the exported one was compared; random weights pass, whatever flips."""
    if not changed:
        assert fields["checked"] is None
        return
    assert fields["checked"]["passed"]
    assert fields["checked"]["images"] == fields["checked"]["judged"] == PICTURES
    assert len(fields["checked"]["noise"]) == 3


@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("mode", "batch"), [("dynamic", "1"), ("dynamic", "dynamic"), ("padded", "dynamic")]
)
def test_builds(rtx, trt_plugin, exported, tmp_path, model, mode, batch, precision):
    options = Options(
        precision, mode, target_sms=SMS, limit=PICTURES,
        plugin=trt_plugin if mode == "dynamic" else None,
        batch=(1, 4, 8) if batch == "dynamic" else None,
    )  # fmt: skip
    output = tmp_path / "x.engine"
    result = build_engine(exported(model, batch), output, rtx, options)
    assert result.warnings == []
    fields = artifact.read(output)
    assert_checked(fields, precision or mode == "padded")
    assert fields["plugin_layers"] == (3 if mode == "dynamic" else 0)
    assert fields["target_sms"] == list(SMS)
    weights = exported(model, batch).path.stat().st_size * (0.45 if precision else 0.9)
    assert output.stat().st_size > weights, "a plan holds at least its weights"


# Each precision and each model once: the cut is the same for all of them.
@pytest.mark.parametrize(
    ("model", "precision"), list(zip((*MODELS, *MODELS), (None, "fp16", "bf16")))
)
def test_builds_stages_for_automatic_buckets(rtx, exported, tmp_path, model, precision):
    options = Options(precision, "bucketed", target_sms=SMS, limit=PICTURES)
    output = tmp_path / "x.bucketed"
    result = build_bucketed(exported(model, "1"), output, rtx, options)
    assert result.warnings == []
    fields = bundle.read(output)
    assert_checked(fields, True)
    assert list(fields["files"]) == [f"stage_{stage}.engine" for stage in range(4)]
    assert (len(fields["buckets"]), fields["buckets"][-1]) == (13, 197)
    assert fields["target_sms"] == list(SMS)
    weights = exported(model, "1").path.stat().st_size * (0.45 if precision else 0.9)
    assert sum(p.stat().st_size for p in output.iterdir()) > weights
