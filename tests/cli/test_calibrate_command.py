"""`asvit-deploy calibrate` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.files import sha256
from asvit_deploy.models.macs import model_macs, teacher_macs


@pytest.fixture
def dense_file(mini_checkpoint, tmp_path) -> Path:
    """DeiT-format weights in the current folder."""
    state = build_model(load_checkpoint(mini_checkpoint), dense=True).state_dict()
    torch.save({"model": state}, tmp_path / "deit.pth")
    return tmp_path / "deit.pth"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Eleven pictures: crops of one photograph."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i, view in enumerate(open_images(None, load_config(), limit=11).views):
        view.picture().resize((80, 70)).save(place / f"{i:02}.png")
    return place


def load_config():
    from asvit_deploy.models.archs import arch

    return arch("as_deit_mini")


@pytest.mark.slow
def test_dense_weights_become_an_adaptive_checkpoint(cli, dense_file, folder):
    result = cli("calibrate", "--ckpt", "deit.pth", "--images", "pictures", "--budget", "0.7",
                 "--method", "threshold")  # fmt: skip
    assert result.code == 0, result.err
    assert result.out.endswith("\n\ndeit.calibrated.safetensors\n")
    assert "11 pictures in pictures" in result.err
    for words in ("before block 2", "chance, same counts", "budget 0.7", "the best of 10"):
        assert words in result.out
    checkpoint = load_checkpoint(Path("deit.calibrated.safetensors"))
    assert checkpoint.adaptive
    assert checkpoint.metadata["budget"] == "0.7"
    assert checkpoint.metadata["source_sha256"] == sha256(dense_file)
    report = json.loads(checkpoint.metadata["calibration"])
    assert len(report["candidates"]) == 10
    # What was written meets the budget on these very pictures.
    model, config = build_model(checkpoint), checkpoint.config
    with torch.inference_mode():
        images = [torch.from_numpy(image)[None] for image in open_images(folder, config)]
        lengths = np.array([[n.item() for n in model(image)[1].length] for image in images])
    ratio = model_macs(config, list(lengths.T.astype(float))).mean() / teacher_macs(config)
    assert ratio == pytest.approx(0.7, rel=1e-2)
    assert ratio == pytest.approx(report["macs_ratio"])


def test_json_on_stdout_and_photographs_by_default(cli, dense_file):
    result = cli("calibrate", "--ckpt", dense_file, "-o", "own.safetensors", "--limit", 9,
                 "--method", "threshold", "--json")  # fmt: skip
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert (report["output"], report["arch"], report["images"]) == (
        "own.safetensors", "as_deit_mini", 9,
    )  # fmt: skip
    assert "photographs that scikit-image carries" in report["pictures"]
    assert abs(report["macs_ratio"] / 0.65 - 1) <= 0.01
    written = load_checkpoint(Path("own.safetensors"))
    assert [written.state[f"thresholds.{i}"].item() for i in range(3)] == report["thresholds"]
    assert (report["method"], report["budget_by"]) == ("threshold", "executed")
    assert written.reduction is None, "as AS-ViT's files always were"


@pytest.mark.slow
def test_an_adaptive_checkpoint_of_ours_is_calibrated_anew(cli, dense_file):
    arguments = ("calibrate", "--ckpt", dense_file, "-o", "a.safetensors", "--limit", 8)
    assert cli(*arguments, "--method", "threshold").code == 0
    first = Path("a.safetensors").read_bytes()
    again = cli("calibrate", "--ckpt", "a.safetensors", "--budget", "0.8", "--limit", 8)
    assert again.code == 0, again.err
    assert load_checkpoint(Path("a.calibrated.safetensors")).metadata["budget"] == "0.8"
    assert Path("a.safetensors").read_bytes() == first


def test_existing_output_needs_force(cli, dense_file):
    Path("own.safetensors").write_bytes(b"precious")
    arguments = ("calibrate", "--ckpt", dense_file, "-o", "own.safetensors", "--limit", 8)
    result = cli(*arguments)
    assert result.code == 2
    assert "own.safetensors exists already; pass --force" in result.err
    assert Path("own.safetensors").read_bytes() == b"precious"
    assert cli(*arguments, "--force").code == 0
    assert load_checkpoint(Path("own.safetensors")).adaptive


def test_a_file_with_the_sidecars_name_needs_force(cli, dense_file):
    mine = Path("own.safetensors.json")
    mine.write_text("my own notes")
    result = cli("calibrate", "--ckpt", dense_file, "-o", "own.safetensors", "--limit", 8)
    refused(result, "own.safetensors.json exists", "--force")
    assert mine.read_text() == "my own notes"


_THRESHOLD = ("--method", "threshold")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget", "0.05", *_THRESHOLD), "out of reach for as_deit_mini at 56 px; choose one"),
        (("--budget", "1.5", *_THRESHOLD), "choose one between"),
        (("--budget", "0.05"), "out of reach of size-passing with 5 cuts on as_deit_mini at 56 px: "
         "it reaches 0.433 to 0.902; choose another budget or other cuts"),
        (("--budget", "1.5"), "out of reach of size-passing"),
        (("--limit", "3"), "3 images are too few to calibrate on"),
        (("--images", "gone"), "gone does not exist"),
        (("--image-size", "57"), "not a multiple of the 4-pixel patch"),
        (("--image-size", "400000000"), "image size 400000000 is too large"),
        (("--image-size", "4"), "nothing to remove: of its 1 image token one always stays"),
        (("--image-size", "4", *_THRESHOLD), "nothing to remove: of its 1 image token one always"),
        (("--seed", "99999999999999999999"), "is not in the range"),
        (("--arch", "as_deit_small"), "holds as_deit_mini, not as_deit_small"),
        (("--ema",), "holds no moving average"),
        (("-o", "own.onnx"), "name in .safetensors"),
        (("-o", "gone/own.safetensors"), "does not exist"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(cli, dense_file, tmp_path, arguments, words):
    result = cli("calibrate", "--ckpt", dense_file, *arguments)
    assert result.code == 2
    assert result.out == ""
    errors = [line for line in result.err.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert words in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["deit.pth"]


def test_a_corrupt_picture_is_named(cli, dense_file, folder):
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:200])
    result = cli("calibrate", "--ckpt", dense_file, "--images", folder)
    assert result.code == 2
    assert "05.png" in result.err
    assert not Path("deit.calibrated.safetensors").exists()


def test_another_image_size(cli, dense_file):
    result = cli("calibrate", "--ckpt", dense_file, "--image-size", 40, "--limit", 8)
    assert result.code == 0, result.err
    config = load_checkpoint(Path("deit.calibrated.safetensors")).config
    assert (config.image_size, config.image_tokens) == (40, 100)


@pytest.mark.slow
def test_grey_and_tiny_pictures_are_fine(cli, dense_file, folder):
    Image.new("L", (1, 1), 128).save(folder / "tiny.png")
    result = cli("calibrate", "--ckpt", dense_file, "--images", folder)
    assert result.code == 0, result.err
