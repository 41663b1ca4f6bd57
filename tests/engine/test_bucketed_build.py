"""Stage engines built by TensorRT-RTX on a machine without a GPU."""

from __future__ import annotations

import pytest

from asvit_deploy.artefacts import bundle
from asvit_deploy.engine import bucketed
from asvit_deploy.engine.bucketed import build_bucketed
from asvit_deploy.engine.build import Options
from asvit_deploy.engine.source import open_source
from asvit_deploy.errors import CheckFailed, UserError
from asvit_deploy.exporting.split import split_segments
from asvit_deploy.runners.onnx_runtime import precision_of

ALL_SMS = ("86", "89", "120")


# Random weights put tokens too close to the thresholds for the parity rule in half precision.
@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
@pytest.mark.parametrize("ops", ["auto", "custom"])
def test_builds_every_stage_for_every_gpu(rtx, mini_artifacts, tmp_path, ops, precision):
    options = Options(precision, "bucketed", target_sms=ALL_SMS, checked=False, buckets=(64, 197))
    path = tmp_path / "m.bucketed"
    result = build_bucketed(open_source(mini_artifacts["1", ops]), path, rtx, options)
    assert result.warnings == []
    fields = bundle.read(path)
    assert fields == {**fields, **result.fields}
    assert (fields["kind"], fields["mode"], fields["ops"]) == ("bucketed", "bucketed", "standard")
    assert (fields["buckets"], fields["plugin_layers"]) == ([64, 197], 0)
    assert (
        fields["precision"] == {None: "float32", "fp16": "float16", "bf16": "bfloat16"}[precision]
    )
    assert list(fields["files"]) == [f"stage_{stage}.engine" for stage in range(4)]
    for name in fields["files"]:
        assert (path / name).stat().st_size > 300_000


@pytest.mark.slow
def test_more_buckets_are_more_profiles(rtx, mini_artifacts, tmp_path):
    source = open_source(mini_artifacts["1", "auto"])
    sizes = []
    for number, buckets in enumerate([(197,), (64, 128, 197)]):
        options = Options(None, "bucketed", target_sms=("86",), checked=False, buckets=buckets)
        path = tmp_path / f"{number}.bucketed"
        build_bucketed(source, path, rtx, options)
        sizes.append([p.stat().st_size for p in sorted(path.glob("*.engine"))])
    assert sizes[0][0] == pytest.approx(sizes[1][0], rel=0.01), "stage 0 has one shape"
    for one, three in zip(sizes[0][1:], sizes[1][1:]):
        assert three > one + 100_000, "kernels for each profile"


@pytest.mark.slow
def test_stages_are_checked_before_the_build(rtx, mini_artifacts, tmp_path):
    said, seen = [], []
    options = Options(None, "bucketed", limit=12, buckets=(100, 197))
    path = tmp_path / "m.bucketed"
    build_bucketed(open_source(mini_artifacts["1", "auto"]), path, rtx, options,
                   lambda *step: seen.append(step), said.append)  # fmt: skip
    result = bundle.read(path)["checked"]
    assert (result["passed"], result["reference"], result["images"]) == (True, "PyTorch", 12)
    assert "agrees with PyTorch on 12 images" in said[-1]
    phases = [phase for phase, _, _ in seen]
    assert [phase.split(":")[0] for phase in dict.fromkeys(phases)] == [
        f"segment {number} of 4" for number in (1, 2, 3, 4)
    ]


def unmasked(precisions):
    """`split_segments` with a fault: in models of these precisions nothing hides the padding."""

    def split(model, name="model"):
        stages = split_segments(model, name)
        for stage in stages if precision_of(model) in precisions else ():
            for mask in [n for n in stage.graph.node if n.name.endswith("_hidden")]:
                user = next(n for n in stage.graph.node if mask.output[0] in n.input)
                user.input[0] = mask.input[1]
        return stages

    return split


@pytest.mark.slow
def test_stages_without_their_masks_are_not_built(rtx, mini_artifacts, tmp_path, monkeypatch):
    monkeypatch.setattr(bucketed, "split_segments", unmasked(["float32"]))
    source = open_source(mini_artifacts["1", "auto"])
    with pytest.raises(CheckFailed, match="does not match PyTorch"):
        build_bucketed(source, tmp_path / "m.bucketed", rtx, Options(None, "bucketed", limit=12))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_half_cut_runs_before_the_build(rtx, mini_artifacts, tmp_path, monkeypatch):
    """A fault that only the half stages have: the mask of float32 is right."""
    monkeypatch.setattr(bucketed, "split_segments", unmasked(["float16"]))
    source = open_source(mini_artifacts["1", "auto"])
    options = Options("fp16", "bucketed", limit=4, buckets=(197,))
    with pytest.raises(CheckFailed, match=r"the fp16 graph of .* does not match PyTorch"):
        build_bucketed(source, tmp_path / "m.bucketed", rtx, options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_refused_stage_leaves_nothing(rtx, mini_artifacts, tmp_path):
    source = open_source(mini_artifacts["1", "auto"])
    options = Options(None, "bucketed", target_sms=("90",), checked=False)
    with pytest.raises(UserError, match=r"cannot build segment 1 of 4 of .*SM90"):
        build_bucketed(source, tmp_path / "m.bucketed", rtx, options)
    assert list(tmp_path.iterdir()) == []
