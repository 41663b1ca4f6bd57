"""What other tools do with our files: ONNX Runtime's quantiser, and other opsets."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from conftest import refused
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process

from asvit_deploy.exporting.half import rounded, to_half
from asvit_deploy.exporting.padded import to_padded
from asvit_deploy.exporting.split import split_segments
from asvit_deploy.exporting.to_onnx import ir_version, to_onnx
from asvit_deploy.models import build
from asvit_deploy.parity import compare
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

pytest.importorskip("sympy")


@pytest.mark.slow
@pytest.mark.parametrize("ops", ["auto", "standard", "dense"])
@pytest.mark.parametrize("batch", ["1", "dynamic"])
def test_onnx_runtime_prepares_and_quantises_the_file(mini, photos, tmp_path, batch, ops):
    model = mini
    if ops == "dense":
        model = build(mini.config, adaptive=False).eval()
    source, prepared, small = (tmp_path / f"{name}.onnx" for name in ("a", "prepared", "int8"))
    onnx.save(to_onnx(model, batch, "auto" if ops == "dense" else ops), source)
    quant_pre_process(source, prepared)  # with every step of it
    runs = {1: photos.batch([0])} | ({3: photos.batch([0, 1, 2])} if batch == "dynamic" else {})
    for images in runs.values():
        before, after = (OrtRunner(path, record=False)(images) for path in (source, prepared))
        np.testing.assert_allclose(before.output, after.output, rtol=0, atol=1e-5)
        for ours, theirs in zip(before.lengths, after.lengths):
            assert np.array_equal(ours, theirs)
    quantize_dynamic(prepared, small)
    assert any(n.op_type == "MatMulInteger" for n in onnx.load(small).graph.node)
    for images in runs.values():
        quantised = OrtRunner(small, record=False)(images)
        exact = OrtRunner(source, record=False)(images)
        assert np.isfinite(quantised.output).all()
        if ops == "dense":
            error = np.abs(quantised.output - exact.output).max()
            assert error < 0.2 * np.abs(exact.output).max()


# 18 is the lowest that the op's body can use, 20 the default, 21 and 23 bring IR 10 and 11.
@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 19, 21, 23, 25])
@pytest.mark.parametrize("batch", ["1", "dynamic"])
def test_every_form_at_another_opset(mini, photos, opset, batch):
    proto = to_onnx(mini, batch, opset=opset)
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    assert versions == {"": opset, "asvit": 1}
    assert [f.opset_import[0].version for f in proto.functions] == [opset]
    assert proto.ir_version == ir_version(opset)
    pictures = [photos[i] for i in range(4)]
    size = 3 if batch == "dynamic" else 1
    half = to_half(proto, "fp16")
    reference = TorchRunner(mini)
    for model in (proto, to_padded(proto)):
        result = compare(
            reference, OrtRunner(model), pictures, photos.names, mini.threshold_values(),
            batch=size,
        )  # fmt: skip
        assert result.failures == []
    for model in (rounded(half), rounded(to_half(to_padded(proto), "fp16"))):
        runner, alike = OrtRunner(model), 0
        for picture in pictures:
            exact, other = reference(picture[None]), runner(picture[None])
            if all(np.array_equal(a, b) for a, b in zip(exact.lengths, other.lengths)):
                alike += 1
                error = np.abs(exact.output - other.output).max() / np.abs(exact.output).max()
                assert error < 2e-2
        assert alike >= 2, "rounding moved the tokens of most pictures"
    to_half(proto, "bf16")
    if batch == "1":
        for stage in [*split_segments(proto), *split_segments(half)]:
            assert [(e.domain, e.version) for e in stage.opset_import] == [("", opset)]


def test_the_lowest_ir_version_of_each_opset():
    assert [ir_version(opset) for opset in (18, 19, 20, 21, 22, 23)] == [8, 9, 9, 10, 10, 11]


@pytest.mark.slow
def test_export_writes_the_opset_asked_for(cli, tmp_path):
    result = cli("export", "--ckpt", "default", "-o", "a.onnx", "--opset", 18)
    assert result.code == 0, result.err
    fields = json.loads((tmp_path / "a.onnx.json").read_text())
    assert (fields["opset"], fields["ir_version"]) == (18, 8)
    assert cli("check", "a.onnx", "--limit", 2).code == 0


@pytest.mark.parametrize("opset", [0, 17, 26, 999])
def test_no_other_opset_is_written(cli, tmp_path, opset):
    refused(
        cli("export", "--ckpt", "default", "-o", "a.onnx", "--opset", opset),
        f"opset {opset}", "18 to 25",
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
