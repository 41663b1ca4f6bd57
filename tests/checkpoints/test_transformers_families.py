"""transformers' families: our network against their own code, random weights at real shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import asvit_deploy

# Small networks of each width: what depth adds is more of the same.
S = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 3}
B = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 2}
VIT_S = {**S, "intermediate_size": 1536, "image_size": 224, "patch_size": 16}
CLIP_B = {**B, "intermediate_size": 3072, "image_size": 224, "patch_size": 16}
DINO_S = {**S, "image_size": 224, "patch_size": 14}
TEXT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 64, "vocab_size": 100}  # fmt: skip

# (class, config, its arguments, another size, what of its output is compared)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int, str]] = {
    "ViT-S/16": ("ViTForImageClassification", "ViTConfig", {**VIT_S, "num_labels": 11}, 288,
                 "logits"),
    "ViT-S/16 without head": ("ViTModel", "ViTConfig", VIT_S, 192, "class token"),
    "DeiT-S": ("DeiTForImageClassification", "DeiTConfig", {**VIT_S, "num_labels": 11}, 288,
               "logits"),
    "DeiT-S distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig",
                         {**VIT_S, "num_labels": 11}, 288, "logits"),
    "DINOv2-S/14": ("Dinov2Model", "Dinov2Config", DINO_S, 280, "class token"),
    "DINOv2-S/14 classifier": ("Dinov2ForImageClassification", "Dinov2Config",
                               {**DINO_S, "num_labels": 11}, 280, "logits"),
    "DINOv2-S/14 registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO_S,
                              280, "class token"),
    "DINOv2-S/14 registers classifier": (
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
        {**DINO_S, "num_labels": 11}, 280, "logits"),
    "CLIP-B/16 tower": ("CLIPVisionModel", "CLIPVisionConfig", CLIP_B, 288, "pooler_output"),
    "CLIP-B/16": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", CLIP_B, 288,
                  "image_embeds"),
    "CLIP-B/16 beside its texts": (
        "CLIPModel", "CLIPConfig", {"vision_config": CLIP_B, "text_config": TEXT}, 288,
        "image features"),
    "OpenCLIP's activation": ("CLIPVisionModelWithProjection", "CLIPVisionConfig",
                              {**CLIP_B, "hidden_act": "gelu"}, 288, "image_embeds"),
}  # fmt: skip


def network(name: str) -> nn.Module:
    """Random weights, perturbed so that no norm, bias or scale is what it was initialised to."""
    library = families.transformers()
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()
    cls, config, arguments, _, _ = FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(library, cls)(getattr(library, config)(**arguments)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    return made


def theirs(made: nn.Module, name: str, images: Tensor) -> Tensor:
    """What transformers gives at whatever size the pictures have."""
    what = FAMILIES[name][4]
    resized = {} if "DINO" in name else {"interpolate_pos_encoding": True}  # they always do
    with torch.no_grad():
        if what == "image features":
            found = made.get_image_features(pixel_values=images, **resized)  # type: ignore[operator]
            return found if isinstance(found, Tensor) else found.pooler_output
        found = made(pixel_values=images, **resized)
    return found.last_hidden_state[:, 0] if what == "class token" else getattr(found, what)


def apart(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).abs().max() / wanted.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_gives_what_transformers_gives(name: str, tmp_path: Path) -> None:
    made = network(name)
    made.save_pretrained(tmp_path)  # type: ignore[operator]
    sizes = (None, FAMILIES[name][3])
    for size in sizes:
        ours = asvit_deploy.load(tmp_path, image_size=size)
        images = torch.randn(2, 3, ours.config.image_size, ours.config.image_size)
        with torch.no_grad():
            assert apart(ours(images)[0], theirs(made, name, images)) <= 1e-5
    assert ours.config.image_size == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_and_its_state_dict_give_the_same(name: str, tmp_path: Path) -> None:
    """transformers 5 calls the modules otherwise than the files that it writes."""
    made = network(name)
    torch.save(made.state_dict(), tmp_path / "weights.pt")
    config = made.config.to_dict()  # type: ignore[union-attr, operator]
    images = torch.randn(1, 3, 224, 224)
    wanted = theirs(made, name, images)
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    for given in (
        lambda: asvit_deploy.load(made),
        lambda: asvit_deploy.load(made.state_dict(), config=config),
        lambda: asvit_deploy.load(tmp_path / "weights.pt"),
    ):
        with torch.no_grad():
            assert apart(given()(images)[0], wanted) <= 1e-5


IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT-S/16": ("ViTImageProcessor", {"image_mean": [0.4, 0.5, 0.6]}),
    # These classes' own defaults are of other networks than those that were released with them.
    "DeiT-S distilled": ("DeiTImageProcessor", IMAGENET),
    "DINOv2-S/14 registers": ("BitImageProcessor", {"size": {"shortest_edge": 256}, **IMAGENET}),
    "CLIP-B/16": ("CLIPImageProcessor", {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_export_of_a_folder(name: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    """The ONNX file gives what transformers gives; its sidecar has the folder's mean and std."""
    import onnxruntime

    library = families.transformers()
    made, folder = network(name), tmp_path / "my-network"
    made.save_pretrained(folder)  # type: ignore[operator]
    kind, arguments = PROCESSORS[name]
    processor = getattr(library, kind)(**arguments)
    processor.save_pretrained(folder)
    done = cli("export", "--ckpt", folder, "--dense")
    assert done.code == 0, done.err
    assert done.out.strip() == "my-network.dense.onnx"
    fields = json.loads(Path("my-network.dense.onnx.json").read_text())
    assert fields["preprocessing"]["mean"] == pytest.approx(processor.image_mean)
    assert fields["preprocessing"]["std"] == pytest.approx(processor.image_std)
    session = onnxruntime.InferenceSession("my-network.dense.onnx")
    images = np.random.default_rng(0).standard_normal((1, 3, 224, 224), np.float32)
    (ours,) = session.run([session.get_outputs()[0].name], {"images": images})
    assert apart(torch.from_numpy(ours), theirs(made, name, torch.from_numpy(images))) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_assumed_is_what_the_released_processors_do(name: str, tmp_path: Path) -> None:
    library = families.transformers()
    kind, arguments = PROCESSORS[name]
    if name == "ViT-S/16":
        arguments = {}
    made, said = network(name), list[str]()
    made.save_pretrained(tmp_path)  # type: ignore[operator]
    assumed = asvit_deploy.load(tmp_path, say=said.append).config.preprocessing
    assert any("assumed (transformers" in line for line in said)
    getattr(library, kind)(**arguments).save_pretrained(tmp_path)
    stated = asvit_deploy.load(tmp_path).config.preprocessing
    assert stated.crop_mode == assumed.crop_mode
    assert stated.interpolation == assumed.interpolation
    assert stated.mean == pytest.approx(assumed.mean)
    assert stated.std == pytest.approx(assumed.std)
    assert stated.crop_pct == pytest.approx(assumed.crop_pct)


def test_pictures_of_a_dinov2_are_as_large_as_its_processor_makes_them(tmp_path: Path) -> None:
    """The released ones keep positions for 518 px and take pictures of 224."""
    library = families.transformers()
    families.transformers().utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    made = library.Dinov2Model(library.Dinov2Config(**{**DINO_S, "image_size": 518})).eval()
    made.save_pretrained(tmp_path)
    library.BitImageProcessor(size={"shortest_edge": 256}).save_pretrained(tmp_path)
    said = list[str]()
    ours = asvit_deploy.load(tmp_path, say=said.append)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert apart(ours(images)[0], made(pixel_values=images).pooler_output) <= 1e-5
    assert any("224 px, as preprocessor_config.json says" in line for line in said)
    assert asvit_deploy.load(tmp_path, image_size=518).config.image_size == 518


@pytest.mark.slow
def test_a_saved_module_keeps_its_names_and_its_facts(tmp_path: Path, cli: Callable) -> None:
    made = network("ViT-S/16")
    made.config.id2label = {i: f"bird {i}" for i in range(11)}  # type: ignore[union-attr]
    path = asvit_deploy.save(made, tmp_path / "birds.safetensors")
    again = asvit_deploy.load(path)
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert apart(again(images)[0], theirs(made, "ViT-S/16", images)) <= 1e-5
    assert cli("export", "--ckpt", path, "--dense").code == 0
    fields = json.loads(Path("birds.dense.onnx.json").read_text())
    assert fields["classes"] == [f"bird {i}" for i in range(11)]
    assert fields["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert fields["eps_from"] == "its config"
