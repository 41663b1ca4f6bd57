"""Stage engines of methods whose rows carry sizes, and manifests that say otherwise."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import raises_one_line

from asvit_deploy import per_picture
from asvit_deploy.artefacts import bundle
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.engine.bucketed import build_bucketed
from asvit_deploy.engine.buckets import profiles_of
from asvit_deploy.engine.build import Options
from asvit_deploy.engine.source import open_source
from asvit_deploy.exporting.export import export
from asvit_deploy.exporting.split import split_segments
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.runners.tensorrt import require_side_rows

SIZED = ["size-passing", "tome", "topk-scalar"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Small networks by method and batch, made where they are asked for."""
    folder, made = tmp_path_factory.mktemp("methods"), {}
    config = replace(arch("as_deit_mini"), depth=4, stages=(1, 2, 3), image_size=28).saving()
    torch.manual_seed(0)
    dense = build(config, adaptive=False).eval()
    with torch.no_grad():
        for block in dense.blocks:
            block.attn.qkv.weight.mul_(4)
    pictures = open_images(None, config, limit=8)

    def of(name, batch="dynamic"):
        if (name, batch) not in made:
            reduction = per_picture.fit(dense, RANKED[name], [*pictures], 0.75, (0, 1, 2))
            checkpoint = folder / f"{name}.safetensors"
            fields = {"budget": "0.75", "budget_by": "executed"}
            save_checkpoint(checkpoint, dense.with_reduction(reduction), fields)
            made[name, batch] = folder / f"{name}.{batch}.onnx"
            export(load_checkpoint(checkpoint), made[name, batch], pictures, batch)
        return made[name, batch]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
@pytest.mark.parametrize("name", SIZED)
def test_builds_for_rtx(rtx, exported, tmp_path, name, precision):
    # Random weights lie too close to the thresholds for the rule in half precision.
    options = Options(precision, "bucketed", target_sms=("86", "120"), checked=precision is None,
                      limit=8, buckets=(16, 32, 50))  # fmt: skip
    path, said = tmp_path / "m.bucketed", []
    built = build_bucketed(open_source(exported(name)), path, rtx, options, say=said.append)
    assert built.warnings == []
    if precision is None:
        assert "agrees with PyTorch on 8 images" in said[-1]
    fields = open_artefact(path).fields
    assert fields == bundle.read(path) == {**fields, **built.fields}
    assert (fields["side_rows"], fields["buckets"]) == (["sizes"], [16, 32, 50])
    assert (fields["reduction"]["name"], fields["plugin_layers"]) == (name, 0)
    assert list(fields["files"]) == [f"stage_{stage}.engine" for stage in range(4)]


@pytest.mark.slow
def test_every_input_of_a_segment_has_the_bucket_s_rows(exported):
    first, *between, last = split_segments(open_source(exported("tome")).model)
    assert profiles_of(first, (16, 50)) == []
    for segment in (*between, last):
        assert profiles_of(segment, (16, 50)) == [
            {"kept": ((1, rows, 128),) * 3, "kept_sizes": ((1, rows),) * 3} for rows in (16, 50)
        ]


@pytest.mark.slow
def test_files_that_do_not_fit_leave_nothing(rtx, exported, tmp_path):
    options = Options(None, "bucketed", target_sms=("86",), checked=False)
    for name, batch, words in (
        ("size-passing", "1", ("takes one picture", "method size-passing", "--batch dynamic")),
        ("evit", "dynamic", ("method evit adds rows at each cut", "--mode padded")),
    ):
        source = open_source(exported(name, batch))
        raises_one_line(
            lambda source=source: build_bucketed(source, tmp_path / "m.bucketed", rtx, options),
            source.path.name, *words,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def manifest(exported, tmp_path_factory):
    """Writes a bundle of no engines whose manifest is as a build makes it, but for some fields."""
    fields = open_source(exported("tome")).fields
    kept = {key: value for key, value in fields.items() if key not in ("schema", "sha256")}
    own = {"kind": "bucketed", "flavour": "tensorrt-rtx", "flavour_version": "1", "plugin": None,
           "mode": "bucketed", "target_sms": [], "buckets": [16, 50], "side_rows": ["sizes"],
           "source": {**fields["source"], "checkpoint": fields["source"]}}  # fmt: skip

    def write(**changes):
        said = {**kept, **own, **changes}
        said = {key: value for key, value in said.items() if value is not ...}
        path = tmp_path_factory.mktemp("bundle") / "m.bucketed"
        bundle.write(path, {"stage_0.engine": b"no plan"}, said)
        return path

    return write


@pytest.mark.slow
def test_a_manifest_that_says_otherwise_is_refused(manifest, mini_artifacts):
    assert open_artefact(manifest()).fields["side_rows"] == ["sizes"]
    for side in (..., [], ["place"], ["sizes", "sizes"], "sizes", None):
        path = manifest(side_rows=side)
        raises_one_line(lambda path=path: open_artefact(path), f"{path} says side_rows",
                        "make")  # fmt: skip
    for buckets in (..., [], [16], [50, 16], [16, 16, 50], [1, 50], [16, "50"], [16, 51], 50):
        path = manifest(buckets=buckets)
        raises_one_line(lambda path=path: open_artefact(path), f"{path} says buckets")
    for name in ("evit", "topk"):  # what adds rows has no bundles, and what has no sizes none
        own = {"name": name, "blocks": [0, 1, 2], "kept": None}
        path = manifest(reduction=own, appended=int(name == "evit"))
        raises_one_line(lambda path=path: open_artefact(path), f"{path} says")


def engines(*ends):
    return [SimpleNamespace(name=f"stage_{i}.engine", inputs=given, outputs=made)
            for i, (given, made) in enumerate(ends)]  # fmt: skip


def test_engines_that_do_not_hand_on_what_the_manifest_says():
    kept, cut = ["kept", "length"], ["tokens", "scores"]
    sized, sized_cut = [*kept, "kept_sizes"], [*cut, "sizes", "into"]
    first, last = (["images"], sized_cut), (sized, ["logits"])
    require_side_rows(engines((["images"], cut), (kept, cut), (kept, ["logits"])), [])
    require_side_rows(engines(first, (sized, sized_cut), last), ["sizes"])
    require_side_rows(engines(first, (sized, cut), (kept, ["logits"])), ["sizes"])
    for wrong, side, *words in (
        ((first, (sized, sized_cut), last), [], "stage_1.engine", "manifest says nothing"),
        (((["images"], cut), (kept, cut), last), ["sizes"], "stage_1.engine", "takes nothing"),
        ((first, (sized, cut), last), ["sizes"], "stage_2.engine", "stage_1.engine makes nothing"),
        ((first, (sized, sized_cut), (kept, ["logits"])), ["sizes"], "stage_2.engine", "makes siz"),
    ):
        raises_one_line(lambda w=wrong, s=side: require_side_rows(engines(*w), s), *words)
