"""Values are named from what was traced, with and without the op."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import InferenceSession

from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build
from asvit_deploy.models.vit import Trace
from asvit_deploy.ops import onnx_op
from asvit_deploy.reduction.rows import Rows
from asvit_deploy.reduction.scoring import token_scores

KEPT = (100, 40, 7)


@dataclass
class Merging(Trace):
    """What a method to come may leave of each stage."""

    tokens: list[torch.Tensor] = field(default_factory=list)
    size: list[torch.Tensor] = field(default_factory=list)


class FixedRows(torch.nn.Module):
    """A network that keeps fixed rows in the middle of its blocks, without any op of ours."""

    def __init__(self, mini) -> None:
        super().__init__()
        self.inner, self.config, self.adaptive, self.reduction = mini, mini.config, True, None

    def forward(self, images, batch_rule="exact", padded=None):
        x, trace = self.inner.embed(images), Merging()
        for number, block in enumerate(self.inner.blocks):
            rows, look = block.attend(Rows(x))
            seen = look()
            x = rows.tokens
            scores = token_scores(seen.class_row(), seen.context)
            if number < len(KEPT):  # a cut inside the block
                best = scores.topk(KEPT[number]).indices.sort().values + 1
                index = torch.nn.functional.pad(best, (1, 0))
                trace.tokens.append(x)
                trace.scores.append(scores)
                trace.index.append(index)
                trace.length.append(torch.full_like(index[:, 0], index.shape[1]))
                trace.size.append(torch.ones_like(index, dtype=torch.float32))
                x = x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
            x = block.feed(Rows(x)).tokens
        return self.inner.classify(Rows(x)), trace


@pytest.fixture(scope="module")
def fixed(mini):
    model = FixedRows(mini).eval()
    return model, to_onnx(model)


@pytest.mark.slow
def test_names_without_op_nodes_are_what_was_traced(fixed, photos):
    model, proto = fixed
    assert not onnx_op.nodes_of(proto.graph)
    assert not proto.functions
    assert [o.name for o in proto.graph.output] == ["logits", "length_0", "length_1", "length_2"]
    names = [f"{kind}_{s}" for s in range(3) for kind in ("tokens", "scores", "index", "length")]
    there = {output.name for output in proto.graph.output}
    extra = onnx.ModelProto()
    extra.MergeFrom(proto)
    extra.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    session = InferenceSession(extra.SerializeToString(), providers=["CPUExecutionProvider"])
    image = photos[1][None]
    found = dict(zip(names, session.run(names, {"images": image})))
    with torch.no_grad():
        _, trace = model(torch.from_numpy(image))
    for s in range(3):
        np.testing.assert_array_equal(found[f"index_{s}"], trace.index[s])
        np.testing.assert_array_equal(found[f"length_{s}"], [1 + KEPT[s]])
        np.testing.assert_allclose(found[f"scores_{s}"], trace.scores[s], rtol=1e-4)
        np.testing.assert_allclose(found[f"tokens_{s}"], trace.tokens[s], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_stage_outputs_are_of_whatever_made_them(fixed, photos):
    proto = to_onnx(fixed[0], stage_outputs=True)
    outputs = [output.name for output in proto.graph.output]
    assert outputs[4:] == ["index_0", "index_1", "index_2"]
    session = InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    index = session.run(["index_1"], {"images": photos[0][None]})[0]
    assert index.shape == (1, 1 + KEPT[1])
    assert index[0, 0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["1", "dynamic"])
def test_what_goes_through_the_op_is_named_at_the_op(mini, batch):
    proto = to_onnx(mini, batch, "custom", stage_outputs=True)
    nodes = onnx_op.nodes_of(proto.graph)
    assert [node.name for node in nodes] == [f"stage_{s}/ThresholdCompact" for s in range(3)]
    for s, node in enumerate(nodes):
        assert list(node.input) == [f"{name}_{s}" for name in onnx_op.INPUTS]
        assert list(node.output) == [f"{name}_{s}" for name in onnx_op.OUTPUTS]
    assert [o.name for o in proto.graph.output[4:]] == ["index_0", "index_1", "index_2"]


@pytest.mark.slow
def test_a_dense_network_has_no_stage_to_name(mini):
    proto = to_onnx(build(mini.config, adaptive=False).eval(), stage_outputs=True)
    assert [output.name for output in proto.graph.output] == ["logits"]
    values = {name for node in proto.graph.node for name in node.output}
    assert not {name for name in values if name.startswith(("scores_", "index_", "tokens_"))}
