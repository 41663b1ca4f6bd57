"""Networks with DeiT's names that are none, known by their options, names and keys."""

from __future__ import annotations

import argparse

import pytest
import torch
from checkpoint_files import THIN, dense_state
from conftest import raises_one_line

from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.models.archs import ARCHS


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(ARCHS, THIN.name, THIN)


@pytest.mark.parametrize("kind", [lambda d: argparse.Namespace(**d), dict])
@pytest.mark.parametrize("key", ["args", "hyper_parameters"])
@pytest.mark.parametrize(
    ("args", "method"),
    [
        ({"accu": True}, "accumulated scores"),
        ({"gate_scale": 10.0}, "A-ViT"),
        ({"act_mode": 4}, "A-ViT"),
        ({"base_keep_rate": 0.7, "drop_loc": "(3, 6, 9)"}, "EViT"),
        ({"fuse_token": True}, "EViT"),
        ({"drop_loc": (3, 6, 9)}, "EViT"),
        ({"base_rate": 0.7}, "DynamicViT"),
        ({"keep_rate": [1, 0.7]}, "BAT"),
        ({"tome_r": 13}, "ToMe"),
        ({"ats_blocks": [3, 4]}, "ATS"),
        ({"mask_ratio": 0.75}, "MAE"),
        ({"model": "avit_small_patch16_224"}, "A-ViT"),
        ({"model": "deit_small_patch16_shrink_base"}, "EViT"),
        ({"model": "mae_vit_base_patch16"}, "MAE"),
    ],
)
def test_methods_known_by_their_options(args, method, key, kind, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": dense_state(), key: kind(args)}, path)
    raises_one_line(lambda: load_checkpoint(path), str(path), f"({method}", "another method")


@pytest.mark.parametrize(
    "args",
    [
        {"accu": False, "gate_scale": None, "base_rate": 1.0, "mask_ratio": 0, "tome_r": 0},
        {"base_keep_rate": 1.0, "fuse_token": True, "drop_loc": "(3, 6, 9)"},
        {"model": "small", "drop_path": 0.1, "batch_size": 64},
    ],
)
def test_options_that_are_off_say_nothing(args, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": dense_state(), "args": argparse.Namespace(**args)}, path)
    assert load_checkpoint(path).config == THIN


def scaled(state, name="ls1.gamma"):
    return {**state, f"blocks.0.{name}": torch.ones(384)}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (scaled({**dense_state(), "pos_embed": torch.zeros(1, 4, 384)}), "is a DeiT-III"),
        (scaled({**dense_state(), "pos_embed": torch.zeros(1, 4, 384)}, "gamma_1"), "DeiT-III"),
        (scaled({**dense_state(), "mask_token": torch.zeros(1, 384)}), "is a DINOv2"),
        ({**dense_state(), "pos_embed": torch.zeros(1, 4, 384)}, "no position for its class token"),
        ({**dense_state(), "reg_token": torch.zeros(1, 4, 384)}, "register tokens"),
        ({**dense_state(), "fc_norm.weight": torch.zeros(384)}, "averages its tokens"),
        ({**dense_state(), "norm_pre.weight": torch.zeros(384)}, "is a CLIP"),
        ({**dense_state(), "decoder_blocks.0.norm1.weight": torch.zeros(4)}, "MAE"),
        ({**dense_state(), "blocks.0.prune_masker.threshold": torch.ones(1)}, "LTMP"),
        ({**dense_state(), "blocks.0.prune_ddp.x": torch.ones(1)}, "DiffRate"),
        ({**dense_state(), "blocks.0.attn.q_norm.weight": torch.ones(64)}, "queries and keys"),
        ({"vit.embeddings.cls_token": torch.zeros(1, 1, 384)}, "a ViT that has transformers'"),
        ({"dinov2.embeddings.cls_token": torch.zeros(1, 1, 384)}, "is a DINOv2 and"),
        ({"encoder.layer.0.layer_scale1.lambda1": torch.zeros(384)}, "is a DINOv2 and"),
        ({"encoder.layer.0.attention.attention.query.weight": torch.zeros(4, 4)}, "transformers'"),
        ({"vision_model.embeddings.class_embedding": torch.zeros(384)}, "CLIP or SigLIP"),
        ({"visual.transformer.resblocks.0.ln_1.weight": torch.zeros(384)}, "is a CLIP"),
        ({"encoder.layers.encoder_layer_0.ln_1.weight": torch.zeros(384)}, "torchvision ViT"),
    ],
)
@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s}])
def test_families_known_by_their_keys(state, words, wrap, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(wrap(state), path)
    raises_one_line(lambda: load_checkpoint(path), str(path), words)
