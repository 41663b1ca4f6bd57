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


ROPE = "has rotary position embeddings (RoPE)"


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"arch": "vit_small_patch16_rope_ape_224"}, ("arch is 'vit_small_", ROPE)),
        ({"arch": "timm/vit_small_patch16_rope_mixed_ape_224.naver_in1k"}, ("arch is", ROPE)),
        ({"args": {"model": "rope_axial_ape_deit_small_patch16_LS"}}, ("args.model is", ROPE)),
        ({"args": argparse.Namespace(arch="vit_small_patch16_rope_ape_224")}, ("args.arch", ROPE)),
        ({"hyper_parameters": {"model_name": "eva02_base_patch14_448"}}, ("EVA-02", "SwiGLU")),
        ({"args": {"model": "vit_base_patch16_siglip_224"}}, ("a SigLIP", "no class token")),
        ({"args": {"model": "beit_base_patch16_224"}}, ("a BEiT", "relative position biases")),
    ],
)
def test_other_networks_with_a_vits_weights(held, words, tmp_path):
    """Their keys and shapes are those of DeiT-III, so only a name tells."""
    path, state = tmp_path / "weights.pth", dense_state()
    state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save({"model": state, **held}, path)
    raises_one_line(lambda: load_checkpoint(path), str(path), *words)


@pytest.mark.parametrize(
    "args",
    [
        {"arch": "resnet50"},
        {"model": "vit_small_patch16_dinov2"},
        {"model": "evaluation"},
        {"accu": False, "gate_scale": None, "base_rate": 1.0, "mask_ratio": 0, "tome_r": 0},
        {"base_keep_rate": 1.0, "fuse_token": True, "drop_loc": "(3, 6, 9)"},
        {"model": "small", "drop_path": 0.1, "batch_size": 64},
    ],
)
def test_options_that_are_off_say_nothing(args, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": dense_state(), "args": argparse.Namespace(**args)}, path)
    assert load_checkpoint(path).config == THIN.saving()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({**dense_state(), "decoder_blocks.0.norm1.weight": torch.zeros(4)}, "MAE"),
        ({**dense_state(), "blocks.0.prune_masker.threshold": torch.ones(1)}, "LTMP"),
        ({**dense_state(), "blocks.0.prune_ddp.x": torch.ones(1)}, "DiffRate"),
        ({**dense_state(), "blocks.0.attn.q_norm.weight": torch.ones(64)}, "queries and keys"),
        (
            {"stages.0.blocks.0.conv_dw.weight": torch.zeros(9)},
            "is a ConvNeXt, or has its blocks (stages.0.blocks",
        ),
        (
            {"stages.0.0.dwconv.weight": torch.zeros(9)},
            "is a ConvNeXt, or has its blocks (stages.0.0.dwconv.",
        ),
        ({"convnext.encoder.stages.0.layers.0.dwconv.weight": torch.zeros(9)}, "is a ConvNeXt"),
        ({"stages.0.layers.0.depthwise_conv.weight": torch.zeros(9)}, "is a ConvNeXt"),
        (
            {"features.1.0.layer_scale": torch.zeros(9)},
            "is a ConvNeXt, or has its blocks (features.1.0.layer",
        ),
        ({"stages.0.blocks.0.mlp.dwconv.weight": torch.zeros(9)}, "as PVT v2 and SegFormer do"),
        ({"encoder.block.0.0.mlp.dwconv.dwconv.weight": torch.zeros(9)}, "as PVT v2 and SegF"),
        ({"layers.0.dwconv.weight": torch.zeros(9)}, "is no ViT that is known here"),
        ({"encoder.layers.encoder_layer_0.ln_1.weight": torch.zeros(384)}, "torchvision ViT"),
    ],
)
@pytest.mark.parametrize("wrap", [dict, lambda s: {"model": s}])
def test_families_known_by_their_keys(state, words, wrap, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(wrap(state), path)
    raises_one_line(lambda: load_checkpoint(path), str(path), words)
