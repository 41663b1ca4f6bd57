"""Networks that give embeddings, with one prefix row and with five, as engines and their graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from embedding_files import CONFIGS, network, written

from asvit_deploy import sidecar
from asvit_deploy.artefacts import bundle
from asvit_deploy.artefacts.engine_file import BundleArtefact, EngineArtefact
from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.engine.bucketed import build_bucketed, ort_runner
from asvit_deploy.engine.build import Options, build_engine
from asvit_deploy.engine.source import open_source
from asvit_deploy.exporting.export import export
from asvit_deploy.exporting.half import rounded, to_half
from asvit_deploy.exporting.padded import to_padded
from asvit_deploy.exporting.split import split_segments
from asvit_deploy.exporting.static_topk import to_static_topk
from asvit_deploy.graph import with_function
from asvit_deploy.parity import compare
from asvit_deploy.runners.bucketed import BucketedRunner
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner
from asvit_deploy.runners.torch_stages import StaticModel, TorchStages

SMS = ("86", "120")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[tuple[str, str], Path]:
    folder, paths = tmp_path_factory.mktemp("exported"), {}
    for kind, config in CONFIGS.items():
        checkpoint = load_checkpoint(written(folder, kind))
        for batch in ("1", "dynamic"):
            paths[kind, batch] = folder / f"{kind}_{batch}.onnx"
            export(checkpoint, paths[kind, batch], open_images(None, config, limit=2), batch)
    return paths


def judged(kind, runner, precision="float32", count=9):
    model = network(kind)
    loaded, names = open_images(None, CONFIGS[kind], limit=count).loaded()
    return compare(TorchRunner(model), runner, loaded, names, model.threshold_values(), precision,
                   output="embedding")  # fmt: skip


def assert_same(parity):
    assert parity.passed, parity.failures
    assert parity.judged == parity.images == parity.neighbours_equal
    assert len(parity.noise) == 3, "scores and tokens were compared too"


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_graphs_of_every_mode_agree(exported, kind):
    graph = onnx.load(exported[kind, "1"])
    assert_same(judged(kind, OrtRunner(to_padded(graph))))
    rows = CONFIGS[kind].rows
    assert_same(judged(kind, ort_runner(graph, (16, 32, rows), kind)))
    assert_same(judged(kind, ort_runner(graph, (rows,), kind)))
    half = OrtRunner(rounded(with_function(to_half(graph, "fp16"))), optimize=False)
    parity = judged(kind, half, "fp16")
    assert parity.passed, parity.failures
    assert 1e-12 < parity.cosine_error < 1e-4, "ten times what rounding makes"
    names = [info.name for info in split_segments(graph)[-1].graph.output]
    assert names == ["embedding"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_stages_in_pytorch_agree(kind):
    stages = TorchStages(network(kind), (16, 32, CONFIGS[kind].rows))
    assert_same(judged(kind, BucketedRunner(stages, 3, stages.buckets)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_static_rows_agree_in_both_forms(exported, kind):
    config, kept = CONFIGS[kind], [30, 20, 10]
    images = np.stack(open_images(None, config, limit=3).loaded()[0])
    model = StaticModel(network(kind), [config.prefix + k for k in kept])
    runner = OrtRunner(to_static_topk(onnx.load(exported[kind, "1"]), kept))
    for image in images:
        expected = model.infer(image[None])
        np.testing.assert_allclose(runner(image[None]).output, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("mode", "batch"), [("dynamic", "1"), ("padded", "dynamic")])
def test_builds(rtx, request, exported, tmp_path, kind, mode, batch):
    plugin = request.getfixturevalue("trt_plugin") if mode == "dynamic" else None
    options = Options("fp16", mode, target_sms=SMS, plugin=plugin, limit=6,
                      batch=(1, 2, 4) if batch == "dynamic" else None)  # fmt: skip
    said, path = [], tmp_path / "x.engine"
    result = build_engine(open_source(exported[kind, batch]), path, rtx, options, say=said.append)
    assert result.warnings == []
    fields = sidecar.read(path)
    assert (fields["output"], fields.get("prefix", 1)) == ("embedding", CONFIGS[kind].prefix)
    checked = fields["checked"]
    assert checked["passed"]
    assert (checked["output"], checked["images"], checked["neighbour_changes_in_all"]) == (
        "embedding", 6, len(checked["neighbour_changes"]),
    )  # fmt: skip
    assert "top1_changes" not in checked
    assert "agrees with PyTorch on 6 images" in said[-1]
    assert "; cosine 1 - " in said[-1]
    opened = EngineArtefact(path)
    assert opened.config.output == "embedding"
    assert fields["plugin_layers"] == (3 if mode == "dynamic" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_builds_buckets(rtx, exported, tmp_path, kind):
    rows = CONFIGS[kind].rows
    options = Options("fp16", "bucketed", target_sms=SMS, limit=6, buckets=(32, rows))
    path = tmp_path / "x.bucketed"
    result = build_bucketed(open_source(exported[kind, "1"]), path, rtx, options)
    assert result.warnings == []
    fields = bundle.read(path)
    assert (fields["output"], fields["buckets"]) == ("embedding", [32, rows])
    assert fields["checked"]["passed"]
    assert BundleArtefact(path).config.prefix == CONFIGS[kind].prefix
