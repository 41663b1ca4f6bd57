"""Facts that weights cannot tell: who says them, who wins, and what is refused."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from checkpoint_files import (
    AUGREG,
    FLAT,
    HF,
    PREPROCESSOR,
    THIN,
    TIMM,
    dense_state,
    headless,
    hub_folder,
)  # fmt: skip
from conftest import raises_one_line
from written_out import written_out

from asvit_deploy.checkpoints.facts import Given
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import ARCHS
from asvit_deploy.models.config import IMAGENET_MEAN

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(ARCHS, THIN.name, THIN)


def saved(tmp_path, name="weights.pth", **content):
    torch.save({"model": dense_state(), **content}, tmp_path / name)
    return tmp_path / name


def line(path, **options):
    return load_checkpoint(path, **options).origins.line


# --- config files beside the file ---------------------------------------------------------------


@pytest.mark.parametrize("config", [TIMM, FLAT, {**FLAT, "architecture": "deit_small_patch16_224"}])
def test_timm_config_in_both_layouts(config, tmp_path):
    checkpoint = load_checkpoint(hub_folder(tmp_path, config=config))
    rules = checkpoint.config.preprocessing
    assert (rules.mean, rules.std, rules.crop_pct) == (HALF, HALF, 0.9)
    assert checkpoint.origins.line == (
        "mean 0.5, std 0.5, crop 0.9, bicubic, 6 heads from config.json"
    )


def test_transformers_config_and_preprocessor(tmp_path):
    config = {**HF, "num_attention_heads": 12, "layer_norm_eps": 1e-12}
    checkpoint = load_checkpoint(
        hub_folder(tmp_path, config=config, preprocessor_config=PREPROCESSOR)
    )
    rules = checkpoint.config.preprocessing
    assert rules.mean == (0.4, 0.4, 0.4)
    assert (rules.interpolation, rules.crop_mode, rules.crop_pct) == ("bilinear", "squash", 1.0)
    assert checkpoint.config.heads == 12
    network = build_model(checkpoint)
    assert {m.eps for m in network.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}
    assert network.blocks[0].attn.heads == 12
    assert "squashed from preprocessor_config.json; 12 heads, eps 1e-12" in checkpoint.origins.line


@pytest.mark.parametrize(
    ("stated", "crop_pct", "mode"),
    [
        ({"size": 32}, 1.0, "squash"),
        ({"size": [32, 32]}, 1.0, "squash"),
        ({"size": {"shortest_edge": 36}, "do_center_crop": True, "crop_size": 32}, 32 / 36,
         "center"),
        ({"size": {"shortest_edge": 37}, "do_center_crop": True,
          "crop_size": {"height": 32, "width": 32}}, 32 / 37, "center"),
        ({"size": 36, "do_center_crop": True, "crop_size": 32,
          "image_processor_type": "DeiTImageProcessor"}, 32 / 36, "squash"),
        ({"size": 36, "do_center_crop": True, "crop_size": 32,
          "feature_extractor_type": "CLIPFeatureExtractor"}, 32 / 36, "center"),
    ],
)  # fmt: skip
def test_every_form_of_size(stated, crop_pct, mode, tmp_path):
    stated = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **stated}
    path = hub_folder(tmp_path, preprocessor_config=stated)
    rules = load_checkpoint(path).config.preprocessing
    assert (rules.crop_pct, rules.crop_mode) == (pytest.approx(crop_pct), mode)
    edge = stated["size"]["shortest_edge"] if isinstance(stated["size"], dict) else stated["size"]
    edge = edge[0] if isinstance(edge, list) else edge
    assert int(32 / rules.crop_pct) == edge  # to the pixel, whatever a division rounds to


def test_every_edge_is_met_to_the_pixel():
    from asvit_deploy.checkpoints.configs import _share

    for window in (32, 224, 384, 518):
        for edge in range(window, 3 * window):
            assert int(window / _share(window, edge)) == edge


@pytest.mark.parametrize(
    ("stated", "mean", "std"),
    [
        ({"do_normalize": False}, (0, 0, 0), (1, 1, 1)),
        ({"rescale_factor": 1 / 127.5}, (0.2, 0.2, 0.2), (0.15, 0.15, 0.15)),
        ({"rescale_factor": 0.00392156862745098}, (0.4, 0.4, 0.4), (0.3, 0.3, 0.3)),
    ],
)
def test_normalisation_in_pixels_from_0_to_1(stated, mean, std, tmp_path):
    path = hub_folder(tmp_path, preprocessor_config={**PREPROCESSOR, **stated})
    rules = load_checkpoint(path).config.preprocessing
    assert (rules.mean, rules.std) == (pytest.approx(mean), pytest.approx(std))


def test_squashed_pictures_keep_no_proportions():
    import numpy as np
    from PIL import Image

    from asvit_deploy.data.images import preprocess

    pixels = np.zeros((20, 80, 3), np.uint8)
    pixels[:, :8] = 255  # a tenth of the width, which a centre crop would cut away
    rules = replace(THIN.preprocessing, crop_mode="squash", crop_pct=1.0, mean=(0,) * 3,
                    std=(1,) * 3, interpolation="box")  # fmt: skip
    result = preprocess(Image.fromarray(pixels), replace(THIN, preprocessing=rules))
    assert result.shape == (3, 32, 32)
    assert (result[0].mean(0) > 0.5).sum() == 3


# --- in the file --------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda d: argparse.Namespace(**d), dict])
def test_args(wrap, tmp_path):
    stated = {"model": "vit_small_patch16_224", "mean": HALF, "std": [0.25], "crop_pct": None,
            "interpolation": "", "input_size": 32, "num_heads": None}  # fmt: skip
    path = saved(tmp_path, args=wrap(stated))
    checkpoint = load_checkpoint(path)
    assert checkpoint.config.preprocessing.std == (0.25, 0.25, 0.25)
    assert checkpoint.origins.line == (
        "mean 0.5, std 0.25 from args; crop 0.9, bicubic, 6 heads from args.model "
        "vit_small_patch16_224"
    )


def test_hyper_parameters_of_lightning_wherever_they_lie(tmp_path):
    path = saved(tmp_path, hyper_parameters={"lr": 1e-3, "data": {"mean": [0.5] * 3, "std": 0.5}})
    assert line(path).startswith("mean 0.5, std 0.5 from hyper_parameters; crop 0.875, bicubic")


@pytest.mark.parametrize(
    ("arch", "mean", "heads"),
    [
        ("vit_small_patch16_224", HALF, 6),
        ("vit_small_patch16_224.augreg_in1k", HALF, 6),
        ("vit_small_patch16_224.dino", IMAGENET_MEAN, 6),
        ("deit_small_patch16_224", IMAGENET_MEAN, 6),
        ("vit_small", IMAGENET_MEAN, 12),  # MoCo v3
        ("visiontransformer", IMAGENET_MEAN, 6),
    ],
)
def test_arch_is_obeyed(arch, mean, heads, tmp_path):
    config = load_checkpoint(saved(tmp_path, arch=arch)).config
    assert (config.preprocessing.mean, config.heads) == (mean, heads)


def test_a_vit_small_of_dino_is_none_of_moco(tmp_path):
    stated = argparse.Namespace(arch="vit_small", momentum_teacher=0.996)
    path = tmp_path / "dino.pth"
    torch.save({"student": dense_state(), "args": stated}, path)
    assert load_checkpoint(path).config.heads == 6


def test_what_nobody_says_is_assumed_and_said(tmp_path):
    assert line(saved(tmp_path)) == (
        "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop 0.875, bicubic, 6 heads assumed "
        "(as_deit_thin's)"
    )


def test_options_win(tmp_path):
    path = hub_folder(tmp_path, config=TIMM)
    given = Given(mean=(0.1, 0.2, 0.3), heads=12)
    checkpoint = load_checkpoint(path, given=given)
    assert checkpoint.config.preprocessing.mean == (0.1, 0.2, 0.3)
    assert checkpoint.config.preprocessing.std == HALF
    assert checkpoint.origins.line == (
        "mean 0.1 0.2 0.3 by --mean; std 0.5, crop 0.9, bicubic from config.json; "
        "12 heads by --heads"
    )


def test_heads_change_what_is_computed(tmp_path):
    path = saved(tmp_path, arch="vit_small")
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        twelve = build_model(load_checkpoint(path))(image)[0]
        six = build_model(load_checkpoint(path, given=Given(heads=6)))(image)[0]
    assert not torch.allclose(twelve, six)


# --- our own files ------------------------------------------------------------------------------


def test_our_own_file_keeps_them_and_asks_nobody_else(tmp_path):
    path = hub_folder(tmp_path, config=TIMM)
    first = load_checkpoint(path, given=Given(heads=12))
    own = tmp_path / "own.safetensors"
    save_checkpoint(own, build_model(first), first.origins.metadata())
    (tmp_path / "config.json").write_text("{")
    second = load_checkpoint(own)
    assert second.config == first.config
    assert second.origins.by_fact == first.origins.by_fact
    assert "from config.json" in second.origins.line
    assert second.origins.line.endswith("as its metadata says")
    # What knows of no heads must not read it, nor what would resize positions in another way.
    assert second.metadata["schema"] == "5"
    sidecar = json.loads((tmp_path / "own.safetensors.json").read_text())
    assert sidecar["preprocessing"]["mean"] == [0.5] * 3
    assert (sidecar["heads"], sidecar["heads_from"]) == (12, "option --heads")


@pytest.mark.parametrize(
    ("field", "value"),
    [("heads", "5"), ("heads", "x"), ("eps", "0"), ("preprocessing", '{"mean": [0, 0, 0]}'),
     ("preprocessing", "[]"), ("preprocessing_from", "3"), ("heads_from", "[]")],
)  # fmt: skip
def test_our_own_metadata_that_cannot_be(field, value, tmp_path):
    import safetensors.torch
    from safetensors import safe_open

    from asvit_deploy.checkpoints.damage import unsealed

    own = tmp_path / "own.safetensors"
    save_checkpoint(own, build_model(load_checkpoint(saved(tmp_path))), {})
    with safe_open(own, "pt") as file:
        metadata = {**unsealed(file.metadata()), field: value}
    safetensors.torch.save_file(safetensors.torch.load_file(own), own, metadata)
    (tmp_path / "own.safetensors.json").unlink()
    raises_one_line(lambda: load_checkpoint(own), str(own), "write it again with this tool")


# --- whose config it is -------------------------------------------------------------------------


def test_a_config_of_several_checkpoints_is_the_hubs_file_s(tmp_path):
    path = hub_folder(tmp_path, config=TIMM)
    other = saved(tmp_path, "other.pt")
    assert load_checkpoint(path).config.preprocessing.mean == HALF
    checkpoint = load_checkpoint(other)
    assert checkpoint.config.preprocessing.mean == IMAGENET_MEAN
    (note,) = checkpoint.notes
    assert "config.json beside it not taken: model.safetensors lies there too" in note


def test_a_sole_checkpoint_owns_the_config_and_our_outputs_do_not_count(tmp_path):
    path = hub_folder(tmp_path, "ft.safetensors", config=TIMM)
    torch.save({}, tmp_path / "optimizer.pt")
    first = load_checkpoint(path)
    assert first.config.preprocessing.mean == HALF
    save_checkpoint(tmp_path / "ft.calibrated.safetensors", build_model(first), {})
    assert load_checkpoint(path).config.preprocessing.mean == HALF


def test_a_link_s_config_lies_beside_what_it_leads_to(tmp_path):
    path = hub_folder(tmp_path / "hub", config=TIMM)
    link = tmp_path / "vit.safetensors"
    link.symlink_to(path)
    assert load_checkpoint(link).config.preprocessing.mean == HALF


@pytest.mark.parametrize("config", [{"epochs": 3}, {"model_type": "bert", "hidden_size": 768}, {}])
def test_a_config_of_no_vision_model_is_passed_over_with_a_line(config, tmp_path):
    checkpoint = load_checkpoint(hub_folder(tmp_path, config=config))
    assert checkpoint.notes == ("config.json beside it describes no vision model; it is not taken",)


# --- bad input ----------------------------------------------------------------------------------


def cfg(**changes):
    return {"config": {**TIMM, "pretrained_cfg": {**AUGREG, **changes}}}


def timm_args(**args):
    return {"config": {**TIMM, "model_args": args}}


BAD = [
    ({"config": '{"architecture": "vit'}, "config.json is cut or no JSON"),
    ({"config": "[1]"}, "holds a JSON list, not an object"),
    ({"config": "[" * 100_000}, "is cut or no JSON"),
    ({"preprocessor_config": "null"}, "holds a JSON NoneType"),
    (cfg(std=[0, 0.5, 0.5]), "config.json says std [0, 0.5, 0.5], which is not three numbers"),
    (cfg(mean=[0.5, 0.5]), "mean [0.5, 0.5], which is not three numbers, for"),
    (cfg(mean=[math.nan] * 3), "mean [nan, nan, nan]"),
    (cfg(std=[math.inf] * 3), "std [inf, inf, inf]"),
    (cfg(mean=[123.7, 116.3, 103.5]), "for pixels from 0 to 1"),
    (cfg(crop_pct=0), "crop_pct 0, which is not a number from 0.1 to 1; pass --crop-pct"),
    (cfg(crop_pct=2), "crop_pct 2"),
    (cfg(crop_pct="0.9"), "crop_pct '0.9'"),
    (cfg(interpolation="magic"), "interpolation 'magic', which is not one of bicubic"),
    (cfg(crop_mode="border"), "crop_mode 'border'"),
    (cfg(input_size=[3, 64, 64]), "holds image size 32 where config.json says input_size 64"),
    ({"config": {**TIMM, "num_features": 768}}, "says num_features 768"),
    ({"config": {**TIMM, "num_classes": 1000}}, "holds num classes 7"),
    ({"config": {**TIMM, "architecture": "vit_base_patch16_224"}}, "vit_base_patch16_224: width"),
    ({"config": {**TIMM, "architecture": "vit_small_patch32_224"}}, "patch_size 32"),
    ({"config": {**TIMM, "architecture": "resnet50"}}, "the architecture 'resnet50'"),
    ({"config": {**TIMM, "global_pool": "map"}}, "global_pool 'map', which is not computed"),
    (timm_args(act_layer="relu"), "the activation 'relu', which is not computed; pass --activ"),
    (timm_args(class_token=False), "a network without a class token"),
    (timm_args(reg_tokens=4), "holds registers 0 where config.json says reg_tokens 4"),
    (timm_args(num_heads=5), "which the 5 heads of config.json do not divide; pass --heads"),
    (timm_args(num_heads=0), "num_heads 0, which is not a whole number of at least 1"),
    (timm_args(norm_layer="rmsnorm"), "norm_layer 'rmsnorm'"),
    ({"config": {**HF, "hidden_act": "silu"}}, "the activation 'silu'"),
    ({"config": {**HF, "hidden_size": 768}}, "holds width 384 where config.json says hidden_size"),
    ({"config": {**HF, "num_hidden_layers": 12}}, "holds depth 3"),
    ({"config": {**HF, "intermediate_size": 1536}}, "holds hidden 384"),
    ({"config": {**HF, "patch_size": 14}}, "says patch_size 14"),
    ({"config": {**HF, "id2label": {"0": "a"}}}, "says id2label 1"),
    ({"config": {**HF, "layer_norm_eps": 1}}, "layer_norm_eps 1, which is not a number above 0"),
    ({"config": {**HF, "num_channels": 1}}, "1 channels"),
    ({"config": {**HF, "model_type": "beit"}}, "model_type 'beit', and a BEiT"),
    *[({"config": {**HF, "model_type": kind}}, f"says model_type '{kind}', not vit, deit, timm_w")
      for kind in ("clip", "dinov2", "blip_2", "internvl_vision")],
    ({"config": {k: v for k, v in HF.items() if k != "num_attention_heads"} | {"hidden_size": 7}},
     "holds width 384 where config.json says hidden_size 7"),
    ({"config": {**TIMM, "global_pool": ""}}, "global_pool '', so an output for each patch; pass"),
    ({"preprocessor_config": {**PREPROCESSOR, "rescale_factor": 10**400}}, "rescale_factor"),
    ({"preprocessor_config": {**PREPROCESSOR, "size": 10**400}}, "no square"),
    ({"preprocessor_config": {**PREPROCESSOR, "size": {"shortest_edge": 10**320},
                              "crop_size": 32, "do_center_crop": True}}, "no square"),
    ({"preprocessor_config": {**PREPROCESSOR, "resample": 9}}, "resample 9"),
    ({"preprocessor_config": {**PREPROCESSOR, "do_resize": False}}, "do_resize false"),
    ({"preprocessor_config": {**PREPROCESSOR, "do_rescale": False}}, "do_rescale False"),
    ({"preprocessor_config": {**PREPROCESSOR, "rescale_factor": 0}}, "rescale_factor 0"),
    ({"preprocessor_config": {**PREPROCESSOR, "size": {"height": 32, "width": 64}}}, "no square"),
    ({"preprocessor_config": {**PREPROCESSOR, "size": {"longest_edge": 32}}}, "no square"),
    ({"preprocessor_config": {**PREPROCESSOR, "size": {"shortest_edge": 32}}}, "no square"),
    ({"preprocessor_config": {**PREPROCESSOR, "image_std": [0.3, 0.3]}}, "image_std [0.3, 0.3]"),
    ({"config": TIMM, "preprocessor_config": PREPROCESSOR},
     "two accounts of its mean: config.json says 0.5, preprocessor_config.json says 0.4; pass"),
]  # fmt: skip


def test_a_config_without_heads_has_those_that_transformers_assumes(tmp_path):
    config = {key: value for key, value in HF.items() if key != "num_attention_heads"}
    checkpoint = load_checkpoint(hub_folder(tmp_path, config=config))
    assert checkpoint.config.heads == 12
    assert "12 heads" in checkpoint.origins.line
    assert "from config.json" in checkpoint.origins.line


def test_a_model_type_of_another_kind_is_no_traceback(tmp_path):
    for kind in (["vit"], {"vit": 1}, 7):
        load_checkpoint(hub_folder(tmp_path, config={**HF, "model_type": kind}))


def test_a_classifier_that_the_config_has_and_the_weights_have_not(tmp_path):
    path = hub_folder(tmp_path, config={**HF, "architectures": ["ViTForImageClassification"]})
    load_checkpoint(path)
    safetensors.torch.save_file(headless(dense_state()), path)
    raises_one_line(lambda: load_checkpoint(path), "lacks its classifier", "save_pretrained")


def test_an_average_without_a_head_is_refused(tmp_path):
    state = headless(dense_state())
    state = {key.replace("norm.", "fc_norm.") if key.startswith("norm.") else key: value
             for key, value in state.items()}  # fmt: skip
    torch.save(state, tmp_path / "mae.pt")
    raises_one_line(lambda: load_checkpoint(tmp_path / "mae.pt"), "averages its tokens (fc_norm)")


@pytest.mark.parametrize(("files", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_configs_that_lie_are_cut_or_cannot_be_obeyed(files, words, tmp_path):
    path = hub_folder(tmp_path, **files)
    raises_one_line(lambda: load_checkpoint(path), str(tmp_path), words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"std": [0.5, 0, 0.5]}, "args says std"),
        ({"mean": torch.zeros(3, device="meta")}, "args says mean a Tensor"),
        ({"crop_pct": 0}, "args says crop_pct 0"),
        ({"eval_crop_ratio": 1.5}, "args says eval_crop_ratio 1.5"),
        ({"num_heads": 7}, "the 7 heads of args"),
        ({"input_size": 224}, "args says input_size 224"),
        ({"gp": "max"}, "global_pool 'max'"),
        ({"gp": torch.ones(2)}, "global_pool a Tensor"),
        ({"act_layer": torch.zeros(2)}, "the activation a Tensor"),
        ({"input_size": torch.zeros(2)}, "input_size a Tensor"),
        ({"act_layer": "torch.nn.SiLU"}, "the activation 'torch.nn.SiLU'"),
        ({"model": "vit_base_patch16_224"}, "vit_base_patch16_224: width 768"),
    ],
)
def test_args_that_cannot_be_obeyed(args, words, tmp_path):
    path = saved(tmp_path, args=argparse.Namespace(**args))
    raises_one_line(lambda: load_checkpoint(path), str(path), words)


@pytest.mark.parametrize(
    ("args", "traits", "words"),
    [
        ({"gp": "avg"}, {"head": "mean"}, "mean of the tokens from args"),
        ({"global_pool": True}, {"head": "mean"}, "mean of the tokens from args"),
        ({"global_pool": "token"}, {}, "6 heads assumed"),
        ({"act_layer": "torch.nn.GELU"}, {}, "6 heads assumed"),
        ({"act_layer": "quick_gelu"}, {"activation": "quick_gelu"}, "quick_gelu from args"),
        ({"act_layer": "gelu_tanh"}, {"activation": "gelu_tanh"}, "gelu_tanh from args"),
        ({"model": "vit_small_patch16_clip_quickgelu_224"}, {"activation": "quick_gelu"},
         "quick_gelu from args.model vit_small_patch16_clip_quickgelu_224"),
    ],
)  # fmt: skip
def test_what_changes_the_computation_is_obeyed_and_said(args, traits, words, tmp_path):
    checkpoint = load_checkpoint(saved(tmp_path, args=argparse.Namespace(**args)))
    assert words in checkpoint.origins.line
    config, image = replace(THIN, **traits), torch.randn(3, 32, 32)
    state = {key: value.double() for key, value in dense_state().items()}
    with torch.inference_mode():
        logits = build_model(checkpoint)(image[None])[0][0].double()
    torch.testing.assert_close(logits, written_out(state, config, image), rtol=1e-4, atol=1e-5)


def test_two_accounts_of_one_fact_and_the_option_that_settles_it(tmp_path):
    path = saved(tmp_path, args=argparse.Namespace(mean=[0.4] * 3))
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    raises_one_line(lambda: load_checkpoint(path), "config.json says 0.5, args says 0.4", "--mean")
    given = Given(mean=(0.4, 0.4, 0.4))
    assert load_checkpoint(path, given=given).config.preprocessing.mean == (0.4, 0.4, 0.4)
    # The same fact in other digits is no other fact.
    path = saved(tmp_path, args=argparse.Namespace(mean=[0.5001] * 3, crop_pct=0.9))
    assert load_checkpoint(path).config.preprocessing.mean == HALF


def test_an_option_settles_what_a_config_says_badly(tmp_path):
    path = hub_folder(tmp_path, **cfg(std=[0, 0, 0], crop_mode="border"))
    given = Given(std=(0.2, 0.2, 0.2), crop_pct=1.0)
    rules = load_checkpoint(path, given=given).config.preprocessing
    assert (rules.std, rules.crop_pct, rules.crop_mode) == ((0.2,) * 3, 1.0, "center")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mean": (math.nan, 0, 0)}, "--mean"),
        ({"std": (0, 1, 1)}, "--std"),
        ({"crop_pct": 1.5}, "--crop-pct 1.5 cannot be used; pass a number from 0.1 to 1"),
        ({"interpolation": "magic"}, "--interpolation"),
        ({"heads": 0}, "--heads 0"),
        ({"activation": "relu"}, "--activation 'relu' cannot be used; pass one of gelu, gelu_tanh"),
        ({"activation": 7}, "--activation 7"),
    ],
)
def test_options_that_cannot_be(given, words):
    with pytest.raises(UserError, match=words):
        Given(**given)


def test_heads_that_do_not_divide(tmp_path):
    path = saved(tmp_path)
    raises_one_line(
        lambda: load_checkpoint(path, given=Given(heads=5)),
        "--heads 5 does not divide the width 384 of as_deit_thin; pass a divisor, such as 4",
    )


def test_one_head_is_one_head(tmp_path):
    path = hub_folder(tmp_path, **timm_args(num_heads=1))
    assert ", 1 head from config.json" in load_checkpoint(path).origins.line


@pytest.mark.parametrize(
    ("config", "said"),
    [(TIMM, "num_classes 7"), ({**HF, "architectures": ["ViTModel"]}, "id2label 7")],
)
def test_classes_that_only_the_config_has(config, said, tmp_path):
    path = hub_folder(tmp_path, config=config)
    safetensors.torch.save_file(headless(dense_state()), path)
    line = f"config.json says {said}, for which the weights have no head: the output is the emb"
    assert any(note.startswith(line) for note in load_checkpoint(path).notes)
    config = {**config, "num_classes": 0, "id2label": None}
    path = hub_folder(tmp_path, config=config)
    assert not any("no head: the output" in note for note in load_checkpoint(path).notes)
    safetensors.torch.save_file(headless(dense_state()), path)
    assert not any("no head: the output" in note for note in load_checkpoint(path).notes)


@pytest.mark.parametrize("size", [[32, 64], (3, 32, 64), {"height": 32, "width": 64}])
def test_a_run_on_oblong_pictures(size, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": dense_state(), "args": {"input_size": size}}, path)
    raises_one_line(lambda: load_checkpoint(path), str(path), "args says", "32 px high and 64")


def test_an_image_size_that_is_asked_for_settles_the_size(tmp_path):
    path = hub_folder(tmp_path, **cfg(input_size=[3, 64, 64]))
    assert load_checkpoint(path, image_size=64).config.image_size == 64
