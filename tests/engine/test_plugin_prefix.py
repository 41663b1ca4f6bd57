"""Prefixes of the op in TensorRT-RTX: its builder and our plugin's shapes, without a GPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from asvit_deploy.engine.job import Job
from asvit_deploy.engine.process import Outcome, run
from asvit_deploy.errors import UserError

ATTRIBUTES = 'plugin_version="1", plugin_namespace=""'


def two_stages(rows: int, prefix: int, kind: str, images: str) -> onnx.ModelProto:
    """A cut on given rows, and one on as many as it left: their scores are slices of the tokens."""
    text = f"""<ir_version: 10, opset_import: ["": 20, "asvit": 1]>
    g ({kind}[{images},{rows},8] tokens)
        => ({kind}[{images},K,8] compact_1, int64[{images}] length_1)
    <float threshold = {{0.5}}, int64[1] prefix = {{{prefix}}}, int64[1] end = {{{rows}}},
     int64[1] axis = {{1}}, int64[1] last = {{2}}> {{
        image_0 = Slice (tokens, prefix, end, axis)
        wide_0 = Cast <to = 1> (image_0)
        scores_0 = ReduceMax <keepdims = 0> (wide_0, last)
        compact_0, index_0, length_0, size_0 =
            asvit.ThresholdCompact <{ATTRIBUTES}> (tokens, scores_0, threshold)
        twice = Add (compact_0, compact_0)
        image_1 = Slice (twice, prefix, end, axis)
        wide_1 = Cast <to = 1> (image_1)
        scores_1 = ReduceMax <keepdims = 0> (wide_1, last)
        compact_1, index_1, length_1, size_1 =
            asvit.ThresholdCompact <{ATTRIBUTES}> (twice, scores_1, threshold)
    }}"""
    return onnx.parser.parse_model(text)


def built(model: onnx.ModelProto, rtx, plugin: Path, folder: Path, stages: int, **more) -> Outcome:
    onnx.save(model, folder / "x.onnx")
    job = Job(
        rtx.module, False, str(folder / "x.onnx"), str(folder / "x.plan"), str(plugin),
        ("ThresholdCompact", "1", ""), stages=stages, target_sms=("86",), **more,
    )  # fmt: skip
    return run(job, rtx, folder, "x.onnx", lambda *_: None)


@pytest.mark.parametrize("kind", ["float", "float16", "bfloat16"])
@pytest.mark.parametrize("images", ["1", "B"])
@pytest.mark.parametrize(("rows", "prefix"), [(197, 1), (198, 2), (261, 5), (6, 5)])
def test_two_cuts_behind_a_prefix_are_built(rtx, trt_plugin, tmp_path, rows, prefix, images, kind):
    profiles = []
    if images == "B":
        profiles = [{"tokens": ((1, rows, 8), (4, rows, 8), (8, rows, 8))}]
    model = two_stages(rows, prefix, kind, images)
    outcome = built(model, rtx, trt_plugin, tmp_path, 2, profiles=profiles)
    assert outcome.plugin_layers == 2
    assert (tmp_path / "x.plan").stat().st_size > 1000


@pytest.mark.parametrize("columns", [9, 10, 0])
def test_scores_that_leave_no_prefix_or_no_token_are_refused(rtx, trt_plugin, tmp_path, columns):
    """While the network is read: the shapes are known by then."""
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20, "asvit": 1]>'
        f"g (float[1,9,8] tokens, float[1,{columns}] scores) => (int64[1] length)"
        "<float threshold = {0.5}> { compact, index, length, size = "
        f"asvit.ThresholdCompact <{ATTRIBUTES}> (tokens, scores, threshold) }}"
    )
    with pytest.raises(UserError, match=r"^TensorRT-RTX.* cannot build x\.onnx: ") as error:
        built(model, rtx, trt_plugin, tmp_path, 1)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.plan").exists()
