"""What names and shapes tell of a family, without its own code; and files that contradict it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from conftest import raises_one_line
from written_out import written_out

from asvit_deploy.checkpoints.facts import Given
from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch

TINY = replace(arch("as_deit_tiny"), dim=64, heads=1, depth=3, stages=(1, 2), image_size=64,
               num_classes=7)  # fmt: skip
# Traits, and how the file's names differ from timm's.
FAMILIES = {
    "DeiT-III": ({"layer_scale": True, "positions": "image"}, ()),
    "DeiT-III's release": ({"layer_scale": True, "positions": "image"},
                           (r"ls([12])\.gamma", r"gamma_\1")),
    "DINOv2": ({"layer_scale": True, "head": "none"}, ()),
    "DINOv2's release": ({"layer_scale": True, "head": "none"}, (r"^cls_token", "cls_token")),
    "registers": ({"prefix": 5}, (r"^reg_token", "register_tokens")),
    "registers without positions": ({"prefix": 5, "positions": "image"}, ()),
    "blocks in chunks": ({"layer_scale": True}, (r"^blocks\.", "blocks.0.")),
    "distilled": ({"prefix": 2, "head": "two_classes"}, (r"^reg_token", "dist_token")),
    "mean, then norm": ({"head": "mean_norm"}, (r"^norm\.", "fc_norm.")),
    "CLIP with classes": ({"norm_pre": True, "patch_bias": False, "eps": 1e-5}, ()),
    "CLIP": ({"norm_pre": True, "patch_bias": False, "eps": 1e-5, "head": "projection"}, ()),
}  # fmt: skip


def network(traits):
    torch.manual_seed(0)
    model = build(replace(TINY, **traits), adaptive=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def named(state, rule):
    return {re.sub(*rule, key) if rule else key: value for key, value in state.items()}


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize(("traits", "rule"), FAMILIES.values(), ids=FAMILIES)
def test_a_family_is_told_by_names_and_shapes(traits, rule, tmp_path):
    model = network(traits)
    state = named(model.state_dict(), rule)
    if traits.get("head") == "projection":
        state["head.bias"] = torch.zeros(7)  # as timm fills it in
    torch.save({"model": state}, tmp_path / "weights.pth")
    checkpoint = load_checkpoint(tmp_path / "weights.pth")
    found = checkpoint.config
    assert {name: getattr(found, name) for name in traits} == traits
    image = torch.randn(3, 64, 64)
    wanted = written_out({k: v.double() for k, v in model.state_dict().items()}, found, image)
    ours = build_model(checkpoint)(image[None])[0][0].double()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_a_class_token_s_position_joins_it_where_registers_have_none(tmp_path):
    """DINOv2's release with registers."""
    model = network({"prefix": 5, "positions": "image"})
    state, place = model.state_dict(), torch.randn(1, 1, 64)
    state["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
    torch.save(state, tmp_path / "weights.pth")
    checkpoint = load_checkpoint(tmp_path / "weights.pth")
    assert checkpoint.config.positions == "image"
    assert checkpoint.state["cls_token"].equal(model.cls_token + place)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("traits", "changes", "words"),
    [
        ({}, {"pos_embed": torch.zeros(1, 15, 64)}, "14 image tokens; only square grids"),
        ({"prefix": 5}, {"pos_embed": torch.zeros(1, 24, 64)}, "19 image tokens; only square"),
        ({"prefix": 5}, {"pos_embed": torch.zeros(1, 26, 32)}, "a class token and positions of"),
        ({"prefix": 5}, {"reg_token": torch.zeros(1, 4, 32)}, "reg_token of shape [1, 4, 32]"),
        ({"prefix": 5}, {"reg_token": torch.zeros(4, 64)}, "reg_token of shape [4, 64]"),
        ({"prefix": 5}, {"reg_token": torch.zeros(1, 0, 64)}, "reg_token of shape [1, 0, 64]"),
        ({}, {"blocks.1.ls1.gamma": torch.ones(64)}, "does not know: blocks.1.ls1.gamma"),
        ({}, {"blocks.0.ls1.gamma": torch.ones(64)}, "lacks blocks.0.ls2.gamma"),
        ({"layer_scale": True}, {"blocks.2.gamma_1": torch.ones(64)},
         "has both blocks.2.gamma_1 and blocks.2.ls1.gamma"),
        ({"layer_scale": True}, {"blocks.2.ls2.gamma": torch.ones(63)}, "gamma of shape [63]"),
        ({}, {"fc_norm.weight": torch.ones(64)}, "has both fc_norm.weight and norm.weight"),
        ({"norm_pre": True}, {"head.bias": torch.zeros(9)}, "head.bias of shape [9] where [7] is"),
        ({}, {"blocks.0.0.norm1.weight": torch.ones(64)}, "which are one; leave one of them"),
        ({"prefix": 2}, {"dist_token": torch.zeros(1, 1, 64)}, "a distillation token and reg"),
        ({"head": "two_classes", "prefix": 2}, {"head_dist.weight": torch.zeros(8, 64)},
         "has head_dist.weight of shape [8, 64]"),
    ],
)  # fmt: skip
def test_weights_that_contradict_themselves(traits, changes, words, tmp_path):
    torch.save({**network(traits).state_dict(), **changes}, tmp_path / "weights.pth")
    path = tmp_path / "weights.pth"
    raises_one_line(lambda: load_checkpoint(path), str(path), words)


def timm_config(**changes):
    return {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "num_features": 64,
            "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 64, 64]},
            **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("traits", "config", "words"),
    [
        ({}, timm_config(model_args={"reg_tokens": 4}), "registers 0 where config.json says reg_t"),
        ({"prefix": 5}, timm_config(model_args={"reg_tokens": 1}), "holds registers 4"),
        ({"dim": 192, "heads": 3},
         timm_config(architecture="vit_tiny_patch16_reg4_256", num_features=192),
         "holds registers 0 where config.json says vit_tiny_patch16_reg4_256: registers 4"),
        ({}, timm_config(pretrained_cfg={"input_size": [3, 224, 224]}),
         "holds image size 64 where config.json says input_size 224"),
        ({}, timm_config(model_args={"img_size": 32}), "says img_size 32"),
        ({}, timm_config(model_args={"img_size": [64, 96]}),
         "says img_size [64, 96], so pictures 64 px high and 96 px wide; only square ones are"),
        ({}, timm_config(pretrained_cfg={"input_size": [3, 32, 128]}),
         "says input_size [3, 32, 128], so pictures 32 px high and 128 px wide; only square"),
        ({}, timm_config(model_args={"num_heads": 3}), "which the 3 heads of config.json do not"),
        ({"head": "none"}, timm_config(global_pool="avg", num_classes=0),
         "averages its tokens, as config.json says, and has no head"),
        ({"head": "projection", "norm_pre": True}, timm_config(global_pool="avg"),
         "averages its tokens"),
    ],
)  # fmt: skip
def test_a_config_that_disagrees_with_the_weights(traits, config, words, tmp_path):
    config = {key: value for key, value in config.items() if key != "architecture" or "reg4" in
              value}  # fmt: skip
    path = tmp_path / "model.safetensors"
    state = network(traits).state_dict()
    if traits.get("head") == "projection":
        state["head.bias"] = torch.zeros(7)
    safetensors.torch.save_file(state, path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    raises_one_line(lambda: load_checkpoint(path), str(path), words)


# --- OpenCLIP's config ---------------------------------------------------------------------------

TOWER = {"width": 64, "layers": 3, "patch_size": 16, "image_size": 64, "head_width": 32}


def openclip(state):
    """A tower of ours under OpenCLIP's names."""
    names = [(r"^norm_pre", "ln_pre"), (r"^norm\.", "ln_post."), ("^cls_token", "class_embedding"),
             ("^pos_embed", "positional_embedding"), (r"^patch_embed\.proj", "conv1"),
             (r"^blocks\.", "transformer.resblocks."), (r"\.norm([12])", r".ln_\1"),
             (r"attn\.qkv\.", "attn.in_proj_"), (r"attn\.proj\.", "attn.out_proj."),
             (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
             (r"^head\.weight", "proj")]  # fmt: skip
    for rule in names:
        state = named(state, rule)
    state["class_embedding"] = state["class_embedding"].reshape(-1)
    state["positional_embedding"] = state["positional_embedding"][0]
    state["proj"] = state["proj"].T.contiguous()
    return {f"visual.{key}": value for key, value in state.items()}


@pytest.fixture
def clip(tmp_path):
    """A folder of OpenCLIP's; what its config says can be changed."""
    traits = FAMILIES["CLIP"][0]
    state = openclip(network(traits).state_dict())
    safetensors.torch.save_file(state, tmp_path / "open_clip_model.safetensors")

    def write(tower=(), model=(), rules=()):
        content = {"model_cfg": {"embed_dim": 7, "vision_cfg": {**TOWER, **dict(tower)},
                                 **dict(model)}, "preprocess_cfg": dict(rules)}  # fmt: skip
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        return tmp_path / "open_clip_model.safetensors"

    return write


@torch.inference_mode()
def test_openclip_s_config_is_obeyed(clip):
    checkpoint = load_checkpoint(clip(model={"quick_gelu": True}))
    config = checkpoint.config
    assert (config.heads, config.activation, config.num_classes) == (2, "quick_gelu", 7)
    assert config.preprocessing.crop_pct == 1
    assert checkpoint.origins.line == (
        "mean 0.4815 0.4578 0.4082, std 0.2686 0.2613 0.2758, crop 1, bicubic, 2 heads, "
        "quick_gelu from open_clip_config.json"
    )
    model, image = network(FAMILIES["CLIP"][0]), torch.randn(3, 64, 64)
    state = {key: value.double() for key, value in model.state_dict().items()}
    ours = build_model(checkpoint)(image[None])[0][0].double()
    torch.testing.assert_close(ours, written_out(state, config, image), rtol=1e-4, atol=1e-5)
    tanh = load_checkpoint(clip(tower={"act_kwargs": {"approximate": "tanh"},
                                       "norm_kwargs": {"eps": 1e-6}}))  # fmt: skip
    assert (tanh.config.activation, tanh.config.eps) == ("gelu_tanh", 1e-6)
    assert load_checkpoint(clip()).config.activation == "gelu"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tower": {"width": 128}}, "says width 128"),
        ({"tower": {"layers": 12}}, "says layers 12"),
        ({"tower": {"layers": [3, 4, 6, 3]}}, "layers [3, 4, 6, 3], a ResNet"),
        ({"tower": {"patch_size": 32}}, "says patch_size 32"),
        ({"tower": {"image_size": 224}}, "holds image size 64 where open_clip_config.json says"),
        ({"tower": {"image_size": [64, 96]}}, "image_size [64, 96], so pictures 64 px high"),
        ({"tower": {"head_width": 0}}, "head_width 0, which makes no whole heads; pass --heads"),
        ({"tower": {"pool_type": "avg"}}, "averages its tokens, as open_clip_config.json says"),
        ({"tower": {"attentional_pool": True}}, "says attentional_pool True"),
        (
            {"tower": {"timm_model_name": "vit_base_patch16_siglip_224"}},
            "says timm_model_name 'vit_base_patch16_siglip_224', and a SigLIP pools its tokens by",
        ),
        ({"tower": {"timm_model_name": "vit_base_patch16_224"}}, "says timm_model_name"),
        ({"model": {"embed_dim": 512}}, "says embed_dim 512"),
        ({"rules": {"std": [0, 1, 1]}}, "says std [0, 1, 1]"),
        ({"rules": {"resize_mode": "longest"}}, "says resize_mode 'longest'"),
    ],
)
def test_an_openclip_config_that_cannot_be_obeyed(clip, changes, words):
    path = clip(**changes)
    raises_one_line(lambda: load_checkpoint(path), str(path), words)


def test_an_openclip_config_of_something_else_is_passed_over_with_a_line(clip):
    path = clip()
    path.with_name("open_clip_config.json").write_text('{"text_cfg": {}}')
    checkpoint = load_checkpoint(path, given=Given(heads=2))
    assert any("describes no vision model; it is not taken" in note for note in checkpoint.notes)
