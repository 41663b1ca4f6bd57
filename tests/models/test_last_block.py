"""The last block worked out for the prefix alone: the same output, fewer MACs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import (
    attend_macs,
    block_macs,
    dense_macs,
    feed_macs,
    last_block_macs,
    model_macs,
    teacher_macs,
)
from asvit_deploy.reduction.size_passing import SizePassing
from asvit_deploy.runners.onnx_runtime import OrtRunner

SMALL = replace(arch("as_deit_tiny"), depth=4, stages=(1, 2, 3), num_classes=9, image_size=112,
                patch_size=16)  # fmt: skip


def pair(method=None, **traits):
    """A network and the same weights that save nothing."""
    torch.manual_seed(0)
    config = replace(SMALL, **traits)
    all_rows = build(config, True, method).eval()
    saving = build(config.saving(), True, method).eval()
    with torch.no_grad():
        for block in all_rows.blocks:
            block.attn.qkv.weight.mul_(4)
            if config.layer_scale:
                block.ls1.gamma.uniform_(0.5, 2)
    saving.load_state_dict(all_rows.state_dict())
    return all_rows, saving


@pytest.mark.parametrize("method", [None, SizePassing((0, 1, 2), (30, 20, 12))])
@pytest.mark.parametrize(
    "traits",
    [{}, {"qkv_bias": False}, {"layer_scale": True}, {"head": "none"}, {"head": "projection"},
     {"prefix": 2, "head": "two_classes"}, {"residual": 0.5}],
    ids=str,
)  # fmt: skip
@torch.inference_mode()
def test_same_output_alone_and_in_a_batch(method, traits):
    if method is not None:
        method = SizePassing(method.blocks, method.kept, traits.get("prefix", 1))
    all_rows, saving = pair(method, **traits)
    assert saving.config.last_block == "prefix"
    pictures = torch.randn(3, 3, 112, 112)
    for images in (pictures[:1], pictures):
        wanted, found = all_rows(images), saving(images)
        torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-5)
        assert [n.tolist() for n in found[1].length] == [n.tolist() for n in wanted[1].length]
    masked, _, _ = saving.forward_masked(pictures)
    torch.testing.assert_close(masked, found[0], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_it_is_carried_out_on_fewer_rows():
    all_rows, saving = pair()
    seen = []
    for model in (all_rows, saving):
        model.blocks[-1].mlp.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
        model(torch.randn(1, 3, 112, 112))
    assert seen[0] > 1
    assert seen[1] == 1


@pytest.mark.parametrize("head", ["mean", "mean_norm", "class_and_mean", "class_and_tokens"])
def test_not_where_the_head_reads_other_rows(head):
    assert replace(SMALL, head=head, last_block="all").saving().last_block == "all"


@torch.inference_mode()
def test_not_where_a_cut_lies_inside_the_last_block():
    kept = (30, 20, 12, 5)
    all_rows, saving = pair(SizePassing((0, 1, 2, 3), kept))
    pictures = torch.randn(2, 3, 112, 112)
    wanted, found = all_rows(pictures)[0], saving(pictures)[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    cuts = all_rows.cuts
    assert model_macs(saving.config, [1 + k for k in kept], cuts) == model_macs(
        all_rows.config, [1 + k for k in kept], cuts
    )


def test_macs_by_hand():
    config, n = SMALL.saving(), 20
    d, p = 192, 1
    wanted = n * 2 * d * d + 2 * p * d * d + 2 * p * n * d + p * 2 * d * 4 * d
    assert last_block_macs(config, n) == wanted
    assert last_block_macs(config, p) == block_macs(SMALL, p)
    assert attend_macs(config, p) + feed_macs(config, p) == block_macs(config, p)
    lengths = [40, 30, n]
    saved = model_macs(SMALL, lengths) - model_macs(config, lengths)
    assert saved == block_macs(SMALL, n) - wanted
    assert model_macs(config, [np.array([40.0]), np.array([30.0]), np.array([20.0])])[
        0
    ] == model_macs(config, lengths)


def test_a_dense_vit_b_saves_its_known_share():
    # 12 blocks at 196 tokens: published for ViT-B/16 with OpenAI's stem, 0.930 without the class
    # token's own row counted.
    config = arch("as_deit_base").saving()
    share = dense_macs(config) / teacher_macs(config)
    dense = dense_macs(config) / dense_macs(replace(config, last_block="all"))
    assert 0.92 < dense < 0.94
    assert share < 0.94


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["1", "dynamic"])
def test_the_graph_has_it_and_parts_no_weights(batch):
    _, saving = pair()
    proto = to_onnx(saving, batch)
    weights = {tensor.name: list(tensor.dims) for tensor in proto.graph.initializer}
    shapes = [dims for dims in weights.values() if len(dims) == 2]
    assert [384, 192] in shapes or [192, 384] in shapes  # keys and values of the last block
    parted = [n for n in proto.graph.node if n.op_type in ("Slice", "Split", "Gather")
              and weights.get(n.input[0], []) and len(weights[n.input[0]]) == 2]  # fmt: skip
    assert not parted
    pictures = np.random.default_rng(0).standard_normal((1, 3, 112, 112)).astype(np.float32)
    with torch.inference_mode():
        wanted = saving(torch.from_numpy(pictures))[0].numpy()
    np.testing.assert_allclose(OrtRunner(proto)(pictures).output, wanted, atol=1e-5)
