"""Networks of timm's that only look like a ViT of ours: each is refused by name, with what to use
instead, from its weights alone and from its folder."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from conftest import raises_one_line

from asvit_deploy.checkpoints.load import load_checkpoint
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
    for path in (tmp_path / "weights.pth", tmp_path / "hub" / "model.safetensors"):
        if path.suffix == ".pth":
            torch.save(model.state_dict(), path)
        else:
            families.timm().models.save_for_hf(model, path.parent, safe_serialization=True)
        raises_one_line(lambda path=path: load_checkpoint(path), str(path), words, INSTEAD)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_rope_ape_224", "vit_base_patch16_rpn_224", "vit_pe_core_x"]
)
def test_a_config_alone_tells_what_the_weights_hide(name, tmp_path):
    """The weights of a plain ViT under the name of another network: those of the first are a
    DeiT-III's, name by name."""
    model = families.timm().create_model("vit_small_patch16_224", depth=2)
    families.timm().models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = Path(tmp_path) / "config.json"
    config.write_text(config.read_text().replace("vit_small_patch16_224", name))
    path = tmp_path / "model.safetensors"
    raises_one_line(lambda: load_checkpoint(path), f"architecture '{name}', no ViT or DeiT")


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
