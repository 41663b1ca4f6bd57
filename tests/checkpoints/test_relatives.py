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


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({**dense_state(), "decoder_blocks.0.norm1.weight": torch.zeros(4)}, "MAE"),
        ({**dense_state(), "blocks.0.prune_masker.threshold": torch.ones(1)}, "LTMP"),
        ({**dense_state(), "blocks.0.prune_ddp.x": torch.ones(1)}, "DiffRate"),
        ({**dense_state(), "blocks.0.attn.q_norm.weight": torch.ones(64)}, "queries and keys"),
        ({"encoder.layers.encoder_layer_0.ln_1.weight": torch.zeros(384)}, "torchvision ViT"),
    ],
)
@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s}])
def test_families_known_by_their_keys(state, words, wrap, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(wrap(state), path)
    raises_one_line(lambda: load_checkpoint(path), str(path), words)
