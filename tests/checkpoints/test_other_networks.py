"""Networks of timm's that only look like a ViT of ours: each is refused by name, with what to use
instead, from its weights alone and from its folder."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from conftest import raises_one_line

from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.checkpoints.model_types import named_other
from asvit_deploy.checkpoints.names import timm_name

INSTEAD = "pass a ViT, DeiT, DINOv2"
OTHERS = {
    "cait_xxs24_224": "is a CaiT (blocks_token_only.",
    "eva02_tiny_patch14_224": "is a BEiT, EVA or DINOv3 (blocks.0.attn.q_bias)",
    "eva02_base_patch14_224": "is an EVA-02 (blocks.0.attn.",
    "beit_base_patch16_224": "is a BEiT, EVA or DINOv3 (blocks.0.attn.",
    "beitv2_base_patch16_224": "is a BEiT, EVA or DINOv3 (blocks.0.attn.",
    "vit_small_patch16_dinov3": "lacks pos_embed",
    "vit_small_patch16_dinov3_qkvb": "is a BEiT, EVA or DINOv3 (blocks.0.attn.q_bias)",
    "vit_small_plus_patch16_dinov3": "has a gated MLP (blocks.0.mlp.fc1_g.",
    "vit_small_patch16_rope_224": "lacks pos_embed",
    "vit_small_patch16_rope_mixed_ape_224": "has rotary positions (rope.freqs)",
    "vit_base_patch16_siglip_224": "pools its tokens by attention, as SigLIP does",
    "vit_base_patch16_siglip_gap_224": "lacks cls_token",
    "vit_medium_patch16_gap_240": "lacks cls_token",
    "vit_medium_patch16_reg4_gap_256": "lacks cls_token",
    "vit_relpos_small_patch16_224": "lacks cls_token",
    "vit_small_patch16_18x2_224": "has parallel branches in its blocks (blocks.0.attns.0.",
    "vit_tiny_r_s16_p8_224": "has a convolutional network before its blocks (patch_embed.backbone.",
    "vit_giant_patch14_dinov2": "has a gated MLP (blocks.0.mlp.fc1 gives twice what fc2 takes)",
}


def other(name):
    """Its weights at two blocks, or as few as it can have."""
    options = {"depth": 1 if "giant" in name else 2}
    return families.timm().create_model(name, **options).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), OTHERS.items(), ids=OTHERS)
def test_a_network_that_is_no_vit_of_ours(name, words, tmp_path):
    model = other(name)
    path, folder = tmp_path / "weights.pth", tmp_path / "hub"
    torch.save(model.state_dict(), path)
    raises_one_line(lambda: load_checkpoint(path), str(path), words, INSTEAD)
    families.timm().models.save_for_hf(model, folder, safe_serialization=True)
    words = ("gated MLP",) if "giant" in name else (f"says the architecture '{name}', and", "pass")
    raises_one_line(lambda: load_checkpoint(folder), str(folder / "model.safetensors"), *words)


NAMES = {
    "vit_small_patch16_rope_ape_224": ("rotary position embeddings (RoPE)",),
    "vit_base_patch16_rpn_224": ("normalises what its layers give",),
    "vit_pe_core_x": ("a Perception Encoder", "(RoPE)"),
    "vit_base_patch16_siglip_224": ("a SigLIP", "pools its tokens by attention", "no class token"),
    "vit_base_patch16_siglip_256.webli": ("a SigLIP", "pass a CLIP"),
    "vit_base_patch16_siglip_gap_224": ("a SigLIP without its head", "no class token"),
    "eva02_base_patch14_448": ("an EVA-02", "(RoPE) and gated MLPs (SwiGLU)"),
    "eva_large_patch14_196": ("an EVA", "biases"),
    "vit_base_patch16_dinov3": ("a DINOv3", "(RoPE)"),
    "convnext_tiny": ("a ConvNeXt", "convolutions"),
    "swin_tiny_patch4_window7_224": ("a Swin", "attends in windows"),
    "cait_s24_224": ("a CaiT", "behind its blocks"),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_alone_tells_what_the_weights_hide(name, tmp_path):
    """The weights of a plain ViT under the name of another network: those of the first are a
    DeiT-III's, name by name."""
    model = families.timm().create_model("vit_small_patch16_224", depth=2)
    families.timm().models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = Path(tmp_path) / "config.json"
    config.write_text(config.read_text().replace("vit_small_patch16_224", name))
    path = tmp_path / "model.safetensors"
    raises_one_line(lambda: load_checkpoint(path), f"architecture '{name}'", *NAMES[name])


PLAIN = ("vit_base_patch16_224.augreg_in21k", "vit_base_patch14_reg4_dinov2.lvd142m", "lvvit_s",
         "deit3_small_patch16_224", "vit_base_patch16_clip_224", "deit_base_distilled_patch16_384",
         "vit_large_patch14_clip_quickgelu_336.openai", "vit_small_patch8_224.dino", "as_vit_tiny",
         "vit_base_patch16_224.mae", "vit_medium_patch32_clip_224", "flexivit_base")  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_no_vit_of_ours_is_another_network_by_its_name(name):
    assert named_other(name) is None


def plain_names():
    """Names of timm's with weights that ours reads something into."""
    return [full for full in families.timm().list_pretrained() if timm_name(full) is not None]


def test_names_say_how_timm_prepares_pictures():
    names = plain_names()
    assert len(names) > 80
    for full in names:
        says, told = timm_name(full), families.timm().get_pretrained_cfg(full)
        assert says["mean"] == pytest.approx(told.mean), full
        assert says["std"] == pytest.approx(told.std), full
        assert says["interpolation"] == told.interpolation, full
        if "_clip_" not in full:  # theirs differ from tag to tag
            assert says["crop_pct"] == pytest.approx(told.crop_pct), full


@pytest.mark.slow
def test_names_say_what_timm_builds():
    for name in {full.split(".")[0] for full in plain_names()}:
        with torch.device("meta"):
            model = families.timm().create_model(name)
        says, block = timm_name(name), model.blocks[0]
        assert says["width"] == model.embed_dim, name
        assert says["heads"] == block.attn.num_heads, name
        assert says["patch_size"] == model.patch_embed.patch_size[0], name
        assert says.get("registers", 0) == model.num_reg_tokens, name
        if "activation" in says:
            quick = "Quick" in type(block.mlp.act).__name__
            assert says["activation"] == ("quick_gelu" if quick else "gelu"), name
