"""Families of ViTs against their own code: timm and OpenCLIP, at real shapes with random weights.

Every parameter is perturbed, so that none is left at a value that hides what it does.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import families
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch

from asvit_deploy.checkpoints.facts import Given
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.models import build

# timm's name, its options, and another image size. Blocks are alike: of most networks two say all.
TIMM = {
    "augreg Ti/16": ("vit_tiny_patch16_224", {}, 160),
    "augreg S/32": ("vit_small_patch32_224", {}, 288),
    "augreg B/16 at 384": ("vit_base_patch16_384", {}, 224),
    "augreg L/16": ("vit_large_patch16_224", {}, 128),
    "H/14": ("vit_huge_patch14_224", {}, 140),
    "DINO S/8": ("vit_small_patch8_224", {}, 112),
    "mean, then norm": ("vit_small_patch16_224", {"global_pool": "avg"}, 160),
    "norm, then mean": ("vit_small_patch16_224", {"global_pool": "avg", "fc_norm": False}, 160),
    "norm of the class token": ("vit_tiny_patch16_224", {"fc_norm": True}, 160),
    "DeiT": ("deit_small_patch16_224", {"depth": 12}, 256),
    "DeiT, distilled": ("deit_small_distilled_patch16_224", {}, 160),
    "DeiT-III": ("deit3_small_patch16_224", {}, 160),
    "DeiT-III H": ("deit3_huge_patch14_224", {}, 140),
    "DINOv2 S/14 at 518": ("vit_small_patch14_dinov2", {}, 224),
    "DINOv2 S/14 with registers": ("vit_small_patch14_reg4_dinov2", {"depth": 12}, 224),
    "registers with positions": ("vit_tiny_patch16_224", {"reg_tokens": 4}, 160),
    "registers without": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}, 160),
    "no bias of q, k, v": ("vit_tiny_patch16_224", {"qkv_bias": False}, 160),
    "CLIP B/16": ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 512}, 256),
    "CLIP B/32 with GELU": ("vit_base_patch32_clip_224", {"num_classes": 512}, 256),
    "CLIP L/14": ("vit_large_patch14_clip_quickgelu_336", {"num_classes": 768}, 224),
    "CLIP bigG/14": ("vit_gigantic_patch14_clip_224", {"num_classes": 1280, "depth": 1}, 112),
    "CLIP with classes": ("vit_base_patch16_clip_224", {}, 112),
}


def perturbed(model, keep=()):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in keep:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def timm_model(name, options):
    """A CLIP's head keeps the bias of zeros that timm gives it where it stands for a projection."""
    clip = "_clip_" in name and "num_classes" in options
    return perturbed(families.timm().create_model(name, **options), ["head.bias"] if clip else [])


def timm_folder(model, folder):
    """As timm itself writes it."""
    families.timm().models.save_for_hf(model, folder, safe_serialization=True)
    return Path(folder) / "model.safetensors"


@torch.inference_mode()
def agrees(checkpoint, theirs):
    """Within 1e-5 of the largest number."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, *2 * [checkpoint.config.image_size])
    wanted, ours = theirs(images), build_model(checkpoint)(images)[0]
    assert ours.shape == wanted.shape
    assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    return ours


# --- timm ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "other"), TIMM.values(), ids=TIMM)
def test_a_folder_of_timm(name, options, other, tmp_path):
    model = timm_model(name, {"depth": 2, **options})
    path = timm_folder(model, tmp_path)
    checkpoint = load_checkpoint(path)
    told = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    rules = checkpoint.config.preprocessing
    assert checkpoint.config.image_size == told["input_size"][1]
    assert (list(rules.mean), list(rules.std)) == (list(told["mean"]), list(told["std"]))
    assert (rules.crop_pct, rules.interpolation) == (told["crop_pct"], told["interpolation"])
    agrees(checkpoint, model)
    assert not any("position embeddings resized" in line for line in checkpoint.lines)
    resized = load_checkpoint(path, image_size=other)
    (line,) = [line for line in resized.lines if "position embeddings resized" in line]
    assert line.endswith("patches, bicubic with antialias")
    model.set_input_size(img_size=other)
    agrees(resized, model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("deit3_small_patch16_224", ".pth"),
        ("vit_tiny_patch16_224", ".bin"),
        ("vit_xsmall_patch16_clip_224", ".safetensors"),
        ("deit_tiny_distilled_patch16_224", ".pth"),
    ],
)
def test_weights_alone(name, ending, tmp_path):
    model, path = timm_model(name, {"depth": 3}), tmp_path / f"weights{ending}"
    if ending == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    checkpoint = load_checkpoint(path)
    agrees(checkpoint, model)
    assert checkpoint.origins.by_fact["heads"] == "assumed"
    own = tmp_path / "ours.safetensors"
    save_checkpoint(own, build_model(checkpoint), checkpoint.origins.metadata())
    agrees(load_checkpoint(own), model)


@pytest.mark.slow
def test_a_projection_of_a_clip_is_an_embedding_and_a_head_is_none(tmp_path):
    name, options = "vit_base_patch16_clip_quickgelu_224", {"num_classes": 512, "depth": 2}
    model = timm_model(name, options)
    checkpoint = load_checkpoint(timm_folder(model, tmp_path))
    assert (checkpoint.config.head, checkpoint.config.output) == ("projection", "embedding")
    (line,) = [note for note in checkpoint.notes if "bias" in note]
    assert line.endswith("the projection of a CLIP: its output is an embedding")
    assert "quick_gelu from config.json" in checkpoint.origins.line
    model.head.bias.data[7] = 1e-3
    checkpoint = load_checkpoint(timm_folder(model, tmp_path))
    assert (checkpoint.config.head, checkpoint.config.output) == ("class", "logits")
    agrees(checkpoint, model)


@pytest.mark.slow
def test_the_activation_of_a_bare_clip_is_assumed_and_said(tmp_path):
    model = timm_model("vit_base_patch16_clip_quickgelu_224", {"num_classes": 512, "depth": 2})
    torch.save(model.state_dict(), tmp_path / "clip.pth")
    checkpoint = load_checkpoint(tmp_path / "clip.pth")
    assert "gelu assumed (vit_768x2_patch16_clip's)" in checkpoint.origins.line
    with pytest.raises(AssertionError):
        agrees(checkpoint, model)
    given = Given(activation="quick_gelu")
    agrees(load_checkpoint(tmp_path / "clip.pth", given=given), model)


@pytest.mark.slow
def test_openai_s_weights_under_timm_s_name_without_quickgelu(tmp_path):
    """timm computes them with GELU; the line says what they were trained with."""
    model = timm_model("vit_base_patch32_clip_224", {"num_classes": 512, "depth": 2})
    path = timm_folder(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["tag"] = "openai"
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = load_checkpoint(path)
    assert "gelu from config.json" in checkpoint.origins.line
    assert any("which --activation quick_gelu computes" in line for line in checkpoint.lines)
    agrees(checkpoint, model)


# --- releases whose names differ from timm's -----------------------------------------------------


def test_deit_iii_s_own_release(tmp_path):
    model = timm_model("deit3_small_patch16_224", {"depth": 3})
    state = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for key, value in model.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "deit_3_small_224_1k.pth")
    agrees(load_checkpoint(tmp_path / "deit_3_small_224_1k.pth"), model)


def released(model, registers=True, chunks=False):
    """DINOv2's own names: positions for class and image, a mask token, perhaps chunks of blocks."""
    state, names = model.state_dict(), {"reg_token": "register_tokens"}
    if registers:  # where timm's class token has swallowed its position
        place = torch.randn(1, 1, state["cls_token"].shape[2])
        state["pos_embed"] = torch.cat([place, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - place
    state = {names.get(key, key): value for key, value in state.items()}
    state["mask_token"] = torch.randn(1, state["cls_token"].shape[2])
    if chunks:
        state = {
            key.replace("blocks.", f"blocks.{int(key.split('.')[1]) // 2}.", 1)
            if key.startswith("blocks.") else key: value
            for key, value in state.items()
        }  # fmt: skip
    return state


@pytest.mark.parametrize("wrap", [dict, lambda s: {"teacher": {f"backbone.{k}": v for k, v in
                                                                s.items()}}])  # fmt: skip
@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("registers", [True, False])
def test_dinov2_s_own_release(registers, chunks, wrap, tmp_path):
    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    model = timm_model(name, {"depth": 4, "img_size": 112})
    torch.save(wrap(released(model, registers, chunks)), tmp_path / "dinov2_vits14.pth")
    checkpoint = load_checkpoint(tmp_path / "dinov2_vits14.pth")
    agrees(checkpoint, model)
    assert any("left out, not needed for its output: mask_token" in n for n in checkpoint.notes)


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def test_dinov2_s_release_resizes_in_its_own_two_ways(tmp_path):
    """Without registers by the quotient of (new + 0.1), as its `interpolate_pos_encoding` does;
    with registers by the sizes, with antialias."""
    plain = timm_model("vit_small_patch14_dinov2", {"depth": 2, "img_size": 112})
    torch.save(released(plain, registers=False), tmp_path / "plain.pth")
    checkpoint = load_checkpoint(tmp_path / "plain.pth", image_size=70)
    assert "8x8 to 5x5 patches, bicubic with an offset of 0.1, as DINOv2's release does" in (
        "\n".join(checkpoint.lines)
    )
    old = plain.state_dict()["pos_embed"][0, 1:].reshape(8, 8, -1)
    new = checkpoint.state["pos_embed"][0, 1:].reshape(5, 5, -1)
    for y, x in ((0, 0), (2, 3), (4, 4)):
        at_y, at_x = ((place + 0.5) * 8 / 5.1 - 0.5 for place in (y, x))
        wanted = sum(
            cubic(at_y - i) * cubic(at_x - j) * old[min(max(i, 0), 7), min(max(j, 0), 7)]
            for i in range(-3, 11) for j in range(-3, 11)
        )  # fmt: skip
        torch.testing.assert_close(new[y, x], wanted, rtol=1e-4, atol=1e-6)
    registers = timm_model("vit_small_patch14_reg4_dinov2", {"depth": 2, "img_size": 112})
    torch.save(released(registers), tmp_path / "registers.pth")
    checkpoint = load_checkpoint(tmp_path / "registers.pth", image_size=70)
    assert "patches, bicubic with antialias" in "\n".join(checkpoint.lines)
    registers.set_input_size(img_size=70)
    agrees(checkpoint, registers)


# --- OpenCLIP and OpenAI -------------------------------------------------------------------------

OPENCLIP = {  # whether torch.save wrote it, and what is not OpenCLIP's own
    "ViT-B-32-quickgelu": (True, {}),
    "ViT-B-16": (False, {"layers": 4}),
    "ViT-L-14-336": (False, {"layers": 2}),
    "ViT-H-14": (False, {"layers": 2}),  # heads of 80
    "ViT-B-32": (True, {"layers": 4, "ls_init_value": 0.1}),
}


def openclip_model(name, changes):
    """The image tower as it is but for the changes, the text's as small as it can be."""
    library = families.open_clip()
    config = copy.deepcopy(library.get_model_config(name))
    config["vision_cfg"] |= changes
    config["text_cfg"] = {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1,
                          "layers": 1}  # fmt: skip
    return perturbed(library.model.CLIP(**config)), config


@pytest.mark.slow
@pytest.mark.parametrize("name", OPENCLIP)
def test_a_folder_of_openclip(name, tmp_path):
    pickled, changes = OPENCLIP[name]
    model, config = openclip_model(name, changes)
    file = "open_clip_pytorch_model.bin" if pickled else "open_clip_model.safetensors"
    state, path = model.state_dict(), tmp_path / file
    if path.suffix == ".bin":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    rules = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear",
             "resize_mode": "squash"}  # fmt: skip
    described = {"model_cfg": config, "preprocess_cfg": rules}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    # The same network under transformers' names often lies beside it, with its own config.
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    checkpoint = load_checkpoint(path)
    found = checkpoint.config
    assert (found.head, found.output, found.num_classes) == (
        "projection", "embedding", config["embed_dim"],
    )  # fmt: skip
    assert (found.preprocessing.mean, found.preprocessing.crop_mode) == ((0.4, 0.5, 0.6), "squash")
    assert checkpoint.origins.by_fact["heads"] == "open_clip_config.json"
    agrees(checkpoint, model.encode_image)
    config["vision_cfg"]["image_size"] = 7 * config["vision_cfg"]["patch_size"] + (
        config["vision_cfg"]["patch_size"] if found.grid == 7 else 0
    )
    other = families.open_clip().model.CLIP(**config).eval()
    families.open_clip().model.resize_pos_embed(state, other)
    other.load_state_dict(state)
    resized = load_checkpoint(path, image_size=config["vision_cfg"]["image_size"])
    assert "patches, bicubic with antialias" in "\n".join(resized.lines)
    agrees(resized, other.encode_image)


@pytest.mark.slow
def test_openai_s_own_state_dict(tmp_path):
    """As `torch.jit.load(...).state_dict()` of its files: half precision, its sizes as numbers."""
    model, _ = openclip_model("ViT-B-32-quickgelu", {"layers": 3})
    state = {key: value.half() for key, value in model.state_dict().items()}
    model.load_state_dict({key: value.float() for key, value in state.items()})
    sizes = {"input_resolution": 224, "context_length": 8, "vocab_size": 16}
    state |= {key: torch.tensor(value) for key, value in sizes.items()}
    torch.save(state, tmp_path / "ViT-B-32.pt")
    checkpoint = load_checkpoint(tmp_path / "ViT-B-32.pt")
    agrees(checkpoint, model.encode_image)
    assert checkpoint.config.preprocessing.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert "mean 0.4815 0.4578 0.4082" in checkpoint.origins.line
    assert "quick_gelu assumed" in checkpoint.origins.line


# --- ONNX: our PyTorch against ONNX Runtime ------------------------------------------------------

SMALL = {
    "augreg": ("vit_tiny_patch16_224", {}),
    "mean": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "DeiT-III": ("deit3_small_patch16_224", {}),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {}),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 512}),
}


def adaptive_twin(checkpoint, images):
    """The same weights with thresholds in the middle of gaps between scores."""
    model = build(checkpoint.config).eval()
    model.load_state_dict(checkpoint.state, strict=False)
    with torch.inference_mode():
        for stage, threshold in enumerate(model.thresholds):
            scores = [model(image[None])[1].scores[stage][0] for image in images]
            ordered = torch.cat(scores).sort().values
            third = len(ordered) // 3
            gaps = ordered[third : 2 * third].diff()
            at = third + int(gaps.argmax())
            threshold.data = (ordered[at] + ordered[at + 1]) / 2
    return model


@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [True, False], ids=["adaptive", "dense"])
@pytest.mark.parametrize("family", SMALL)
def test_onnx_agrees_with_pytorch(family, adaptive, tmp_path):
    name, options = SMALL[family]
    size = 6 * int(name.split("_patch")[1].split("_")[0])
    model = timm_model(name, {"depth": 3, "img_size": size, **options})
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    checkpoint = load_checkpoint(tmp_path / "weights.pth")
    assert checkpoint.config.prefix == {"distilled": 2, "DINOv2 with registers": 5}.get(family, 1)
    images = torch.randn(3, 3, size, size)
    ours = adaptive_twin(checkpoint, images) if adaptive else build_model(checkpoint)
    batch, images = ("dynamic", images) if adaptive else ("1", images[:1])
    session = onnxruntime.InferenceSession(to_onnx(ours, batch, "standard").SerializeToString())
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"images": images.numpy()})))
    with torch.inference_mode():
        wanted, trace = ours(images)
    first = torch.from_numpy(outputs[names[0]])
    assert (first - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert len(trace.length) == (len(checkpoint.config.stages) if adaptive else 0)
    for stage, length in enumerate(trace.length):
        assert np.array_equal(outputs[f"length_{stage}"], length.numpy())
        assert (length < checkpoint.config.rows).all()
