"""Engines of DynamicViT, LTMP and a schedule, built by TensorRT-RTX on a machine without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from asvit_deploy import per_picture
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.engine.bucketed import build_bucketed
from asvit_deploy.engine.build import Options, build_engine
from asvit_deploy.engine.source import open_source
from asvit_deploy.exporting.export import export
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.dynamicvit import DynamicViT
from asvit_deploy.reduction.schedule import Schedule


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Small networks by method and batch, made where they are asked for."""
    folder, made = tmp_path_factory.mktemp("learned"), {}
    config = replace(arch("as_deit_mini"), depth=4, stages=(1, 2, 3), image_size=28).saving()
    torch.manual_seed(0)
    dense = build(config, adaptive=False).eval()
    with torch.no_grad():
        for block in dense.blocks:
            block.attn.qkv.weight.mul_(4)
    pictures = open_images(None, config, limit=8)

    def reduction(name):
        if name == "ltmp":
            return per_picture.fit_pairs(dense, [*pictures], 0.75)
        if name == "schedule":
            return Schedule((0, 1, 2), (40, 24, 11), 1, None, (5, 0, 9))
        torch.manual_seed(1)
        own = DynamicViT.planned(config.dim, config.prefix, (1, 2, 3), (34, 24, 16))
        with torch.no_grad():
            for predictor in own.predictors:
                predictor.out_conv[4].weight.mul_(30)
        if name == "dynamicvit":
            return own
        taught = dense.with_reduction(own)
        return per_picture.fit(taught, DynamicViT, [*pictures], 0.75, (1, 2, 3))

    def of(name, batch="1"):
        if (name, batch) not in made:
            checkpoint = folder / f"{name}.safetensors"
            if not checkpoint.exists():
                fields = {"budget": "0.75", "budget_by": "executed"}
                save_checkpoint(checkpoint, dense.with_reduction(reduction(name)), fields)
            made[name, batch] = folder / f"{name}.{batch}.onnx"
            export(load_checkpoint(checkpoint), made[name, batch], pictures, batch)
        return made[name, batch]

    return of


# Random weights lie too close to the thresholds for the rule in half precision.
@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
@pytest.mark.parametrize(
    ("name", "batch", "mode", "layers"),
    [("dynamicvit", "1", "dynamic", 0), ("schedule", "1", "dynamic", 0),
     ("adaptive", "1", "dynamic", 3), ("adaptive", "dynamic", "padded", 0),
     ("ltmp", "dynamic", "dynamic", 1), ("ltmp", "dynamic", "padded", 0)],
)  # fmt: skip
def test_builds_for_rtx(rtx, trt_plugin, exported, tmp_path, name, batch, mode, layers, precision):
    sized = (1, 2, 4) if batch == "dynamic" else None
    options = Options(
        precision, mode, target_sms=("86", "120"), checked=precision is None, limit=8, batch=sized,
        plugin=trt_plugin if layers else None, compact_at=(1,) if layers == 1 else None,
    )  # fmt: skip
    path = tmp_path / "m.engine"
    built = build_engine(open_source(exported(name, batch)), path, rtx, options)
    assert built.warnings == []
    fields = open_artefact(path).fields
    assert (fields["reduction"]["name"], fields["plugin_layers"]) == (
        "dynamicvit" if name == "adaptive" else name, layers
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "fp16"])
@pytest.mark.parametrize("name", ["adaptive", "ltmp"])
def test_builds_stage_engines(rtx, exported, tmp_path, name, precision):
    options = Options(precision, "bucketed", target_sms=("86",), checked=precision is None,
                      limit=8, buckets=(16, 32, 50))  # fmt: skip
    path = tmp_path / "m.bucketed"
    built = build_bucketed(open_source(exported(name, "dynamic")), path, rtx, options)
    assert built.warnings == []
    fields = open_artefact(path).fields
    assert fields.get("side_rows", []) == (["sizes"] if name == "ltmp" else [])
