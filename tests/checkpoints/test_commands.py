"""The facts on the command line: said on every load, kept by what is written, used downstream."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import AUGREG, THIN, TIMM, dense_state, headless, hub_folder, prefixed
from conftest import refused, signed_copy
from PIL import Image

from asvit_deploy import sidecar as artifact
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.facts import Given
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.data.images import load_picture, preprocess
from asvit_deploy.models import build
from asvit_deploy.models.archs import ARCHS, arch
from asvit_deploy.training import run as training

SIZE = 20  # pixels: 25 tokens, so that a step takes milliseconds
LINE = "mean 0.5, std 0.5, crop 0.9, bicubic, 6 heads from config.json"


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(ARCHS, THIN.name, THIN)


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes of four pictures."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (24, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def top(cli, model, picture) -> list[dict]:
    result = cli("predict", model, picture, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)[0]["top"]


def probabilities(checkpoint, picture) -> np.ndarray:
    image = preprocess(load_picture(picture), checkpoint.config)
    with torch.inference_mode():
        return build_model(checkpoint)(torch.from_numpy(image)[None])[0].softmax(1)[0].numpy()


# --- export, and what follows it ----------------------------------------------------------------


@pytest.mark.slow
def test_export_says_keeps_and_hands_on(cli, tmp_path, picture):
    path = hub_folder(tmp_path / "vit", config=TIMM)
    result = cli("export", "--ckpt", path, "--dense", "-o", "vit.onnx")
    assert result.code == 0, result.err
    assert result.err.count(LINE) == 1
    fields = artifact.read(Path("vit.onnx"))
    assert fields["preprocessing"] == {"crop_pct": 0.9, "interpolation": "bicubic",
                                       "mean": [0.5] * 3, "std": [0.5] * 3}  # fmt: skip
    assert set(fields["preprocessing_from"].values()) == {"config.json"}
    assert (fields["heads"], fields["heads_from"]) == (6, "config.json")
    # The config is not asked again: what was recorded holds.
    (tmp_path / "vit" / "config.json").write_text("{")
    assert cli("check", "vit.onnx", "--limit", "2").code == 0
    checkpoint = load_checkpoint(path, recorded=load_checkpoint(path, recorded=THIN).config)
    assert checkpoint.config.preprocessing.mean != (0.5,) * 3
    given = Given(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9)
    (tmp_path / "vit" / "config.json").unlink()
    expected = probabilities(load_checkpoint(path, given=given), picture)
    assumed = probabilities(load_checkpoint(path), picture)
    for guess in top(cli, "vit.onnx", picture):
        assert guess["probability"] == pytest.approx(expected[guess["index"]], abs=1e-5)
    assert np.abs(expected - assumed).max() > 1e-3  # so that the comparison can fail


@pytest.mark.slow
def test_heads_of_an_option_reach_the_check(cli, tmp_path):
    path = hub_folder(tmp_path / "vit")
    result = cli("export", "--ckpt", path, "--dense", "-o", "a.onnx", "--heads", 12)
    assert "12 heads by --heads" in result.err
    assert cli("check", "a.onnx", "--limit", "2").code == 0
    assert cli("export", "--ckpt", path, "--dense", "-o", "b.onnx").code == 0
    refused(cli("check", "b.onnx", "--reference", "a.onnx"), "heads is 12 there, 6 here")


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
def test_an_activation_of_an_option_reaches_the_check(cli, tmp_path, activation):
    path = hub_folder(tmp_path / "vit")
    result = cli("export", "--ckpt", path, "--dense", "-o", "a.onnx", "--activation", activation)
    assert result.code == 0, result.err
    assert f"{activation} by --activation" in result.err
    assert artifact.read(Path("a.onnx"))["activation_from"] == "option --activation"
    assert cli("check", "a.onnx", "--limit", "2").code == 0
    assert cli("export", "--ckpt", path, "--dense", "-o", "b.onnx").code == 0
    # Another network: so the first check could have failed.
    refused(
        cli("check", "b.onnx", "--reference", "a.onnx"),
        f"activation is {activation} there, gelu here",
    )


@pytest.mark.slow
def test_options_of_export(cli, tmp_path):
    path = hub_folder(tmp_path / "vit", config=TIMM)
    options = ["--mean", "0.1,0.2,0.3", "--std", "0.4", "--crop-pct", "1", "--interpolation",
               "lanczos"]  # fmt: skip
    result = cli("export", "--ckpt", path, "--dense", "-o", "vit.onnx", *options)
    assert "mean 0.1 0.2 0.3 by --mean; std 0.4 by --std; crop 1 by --crop-pct;" in result.err
    fields = artifact.read(Path("vit.onnx"))
    assert fields["preprocessing"]["mean"] == [0.1, 0.2, 0.3]
    assert fields["preprocessing_from"]["interpolation"] == "option --interpolation"
    assert cli("check", "vit.onnx", "--limit", "2").code == 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--mean", "0.5,0.5", "neither one number nor three"),
        ("--mean", "nan", "--mean"),
        ("--std", "0", "--std"),
        ("--std", "a,b,c", "neither one number nor three"),
        ("--crop-pct", "2", "--crop-pct 2.0 cannot be used"),
        ("--interpolation", "magic", "--interpolation"),
        ("--heads", "0", "--heads"),
        ("--heads", "-3", "--heads"),
        ("--activation", "relu", "--activation"),
        ("--heads", "7", "--heads 7 does not divide the width 384"),
    ],
)
@pytest.mark.parametrize("command", ["export", "evaluate"])
def test_options_that_cannot_be(cli, tmp_path, data, command, option, value, words):
    path = hub_folder(tmp_path / "vit")
    arguments = {"export": ["--ckpt", path, "--dense", "-o", "vit.onnx"],
                 "evaluate": [path, "--data", data]}[command]  # fmt: skip
    refused(cli(command, *arguments, option, value), words)
    assert not Path("vit.onnx").exists()


def test_a_bad_config_is_one_line_and_nothing_is_replaced(cli, tmp_path):
    path = hub_folder(tmp_path / "vit", config={**TIMM, "pretrained_cfg": {**AUGREG, "std": 0}})
    Path("vit.onnx").write_text("mine")
    result = cli("export", "--ckpt", path, "--dense", "-o", "vit.onnx", "--force")
    refused(result, "config.json says std 0", "pass --std")
    assert Path("vit.onnx").read_text() == "mine"


def test_artefacts_of_before_load_as_they_did(cli, mini_artifacts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    old = tmp_path / "old.onnx"
    signed_copy(mini_artifacts["1", "auto"], old)
    fields = artifact.read(old)
    for key in ("schema", "sha256", "digest", "heads", "eps", "preprocessing_from", "heads_from",
                "eps_from"):  # fmt: skip
        del fields[key]
    artifact.write(old, old.read_bytes(), fields)
    assert cli("check", old, "--limit", "2").code == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("heads", 5), ("heads", "6"), ("heads", 0), ("eps", 0.0), ("eps", "x"),
     ("preprocessing", {"mean": [0, 0, 0]}), ("preprocessing", {"crop_pct": 2.0})],
)  # fmt: skip
def test_a_sidecar_s_facts_that_cannot_be(cli, mini_artifacts, tmp_path, field, value):
    copy = signed_copy(mini_artifacts["1", "auto"], tmp_path / "copy.onnx", **{field: value})
    refused(cli("check", copy, "--limit", "2"), str(copy), field, "again")


@pytest.mark.slow
def test_default_names_know_ckpt(cli, tmp_path):
    torch.save({"state_dict": prefixed("model.", dense_state())}, tmp_path / "last.v1.ckpt")
    assert cli("export", "--ckpt", "last.v1.ckpt", "--dense").out.strip() == "last.v1.dense.onnx"


# --- evaluate -----------------------------------------------------------------------------------


def mini(tmp_path, name="dense.pt", classes=2, **content) -> Path:
    """Dense weights of two classes, whose tokens differ enough for thresholds to tell apart."""
    torch.manual_seed(0)
    model = build(arch("as_deit_mini").at(SIZE, classes), adaptive=False)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(6)  # type: ignore[operator, union-attr]
    torch.save({"model": model.state_dict(), **content}, tmp_path / name)
    return tmp_path / name


@pytest.mark.slow
def test_evaluate_tells_and_takes_options_for_a_checkpoint_alone(cli, tmp_path, data):
    path = mini(tmp_path, model_ema=torch.load(mini(tmp_path, "other.pt"))["model"])
    result = cli("evaluate", path, "--data", data, "--ema", "--mean", "0.3", "--json")
    assert result.code == 0, result.err
    assert "mean 0.3 by --mean" in result.err
    assert "the moving average is taken (model_ema)" in result.err
    assert cli("export", "--ckpt", path, "--dense", "-o", "m.onnx").code == 0
    for option in (["--ema"], ["--mean", "0.5"], ["--heads", "2"], ["--activation", "gelu"]):
        result = cli("evaluate", "m.onnx", "--data", data, *option)
        refused(result, "m.onnx is an ONNX file", option[0])


# --- calibrate ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_calibrate_carries_the_facts(cli, tmp_path):
    options = ["--mean", "0.4", "--limit", "8", "-o", "a.safetensors"]
    result = cli("calibrate", "--ckpt", default_checkpoint(), *options)
    assert result.code == 0, result.err
    assert "mean 0.4 by --mean" in result.err
    written = load_checkpoint(Path("a.safetensors"))
    assert written.config.preprocessing.mean == (0.4,) * 3
    assert written.origins.by_fact["mean"] == "option --mean"
    assert written.origins.by_fact["heads"] == "its arch as_deit_mini"
    assert cli("export", "--ckpt", "a.safetensors").code == 0
    assert artifact.read(Path("a.onnx"))["preprocessing"]["mean"] == [0.4] * 3


# --- finetune -----------------------------------------------------------------------------------


def run(cli, data, *options):
    return cli("finetune", "--data", data, "--batch-size", 4, "--steps", 2, "-o",
               "out.safetensors", "--validation-limit", 2, "--force", *options)  # fmt: skip


def test_finetune_carries_the_facts(cli, tmp_path, data):
    args = argparse.Namespace(mean=[0.3] * 3, std=[0.2] * 3)
    path = mini(tmp_path, args=args)
    result = run(cli, data, "--pretrained", path, "--dense", "--heads", 4)
    assert result.code == 0, result.err
    assert "mean 0.3, std 0.2 from args" in result.err
    written = load_checkpoint(Path("out.safetensors"))
    assert (written.config.preprocessing.mean, written.config.heads) == ((0.3,) * 3, 4)
    assert (written.origins.by_fact["mean"], written.origins.by_fact["heads"]) == (
        "args", "option --heads",
    )  # fmt: skip


@pytest.mark.parametrize(
    "option",
    [
        ["--mean", "0.5"],
        ["--heads", "2"],
        ["--activation", "gelu_tanh"],
        ["--ema"],
    ],
)
def test_options_for_pretrained_need_it(cli, data, option):
    result = run(cli, data, "--arch", "as_deit_mini", "--dense", *option)
    refused(result, f"{option[0]} say something of --pretrained's weights")


@pytest.mark.slow
def test_a_teacher_sees_alike_or_is_refused(cli, tmp_path, data):
    student = mini(tmp_path, args={"mean": [0.3] * 3})
    teacher = mini(tmp_path, "teacher.pt")
    options = ["--pretrained", student, "--budget", 0.8]
    result = run(cli, data, *options, "--teacher", teacher)
    assert result.code == 0, result.err
    assert f"what is assumed of its pictures is as {student} sees them instead" in result.err
    other = mini(tmp_path, "other.pt", args={"mean": [0.6] * 3})
    refused(run(cli, data, *options, "--teacher", other), str(other), "another preprocessing")


def test_headless_weights_start_a_dense_run(cli, tmp_path, data):
    path = mini(tmp_path)
    torch.save({"model": headless(torch.load(path)["model"])}, path)
    result = run(cli, data, "--pretrained", path, "--dense")
    assert result.code == 0, result.err
    assert f"{path}: has no head; a fresh head is trained" in result.err
    assert load_checkpoint(Path("out.safetensors")).config.num_classes == 2
    first = Path("out.safetensors").read_bytes()
    run(cli, data, "--pretrained", path, "--dense")
    assert (
        load_checkpoint(Path("out.safetensors"))
        .state["head.weight"]
        .equal(_weights(first)["head.weight"])
    )  # the fresh head follows from the seed


def _weights(content: bytes):
    import safetensors.torch

    return safetensors.torch.load(content)


@pytest.mark.slow
def test_headless_weights_start_an_adaptive_run(cli, tmp_path, data):
    path = mini(tmp_path, "bare.pt")
    torch.save(headless(torch.load(path)["model"]), path)
    result = run(cli, data, "--pretrained", path, "--budget", 0.8)
    assert result.code == 0, result.err
    assert "has no head; a fresh head is trained, and without a --teacher nothing is" in result.err
    assert load_checkpoint(Path("out.safetensors")).adaptive
    recipe = artifact.read(Path("out.safetensors"))["provenance"]["recipe"]
    assert recipe["distill_weight"] == 0
    asked = run(cli, data, "--pretrained", path, "--budget", 0.8, "--distill-weight", 0.5)
    refused(asked, "pass --teacher")
    Path("r.toml").write_text("distill-weight = 0.5\n")
    refused(run(cli, data, "--pretrained", path, "--recipe", "r.toml"), "pass --teacher")
    taught = run(cli, data, "--pretrained", path, "--budget", 0.8, "--teacher", mini(tmp_path))
    assert taught.code == 0, taught.err
    assert "nothing is distilled" not in taught.err


def test_the_projection_of_a_clip_gives_way_to_a_fresh_head(cli, tmp_path, data):
    config = replace(arch("as_deit_mini").at(SIZE, 5), stem="patch", depth=3, norm_pre=True)
    state = build(config, adaptive=False).state_dict()
    torch.save({**state, "head.bias": torch.zeros(5)}, tmp_path / "clip.pt")
    result = run(cli, data, "--pretrained", "clip.pt", "--dense")
    assert result.code == 0, result.err
    assert "clip.pt: gives embeddings, no classes; a fresh head is trained" in result.err
    trained = load_checkpoint(Path("out.safetensors"))
    assert (trained.config.head, trained.config.num_classes) == ("class", 2)
    close = trained.state["blocks.1.mlp.fc1.weight"]
    torch.testing.assert_close(close, state["blocks.1.mlp.fc1.weight"], atol=1e-3, rtol=0)


@pytest.mark.slow
def test_headless_weights_export_dense(cli, tmp_path):
    torch.save(headless(dense_state()), tmp_path / "bare.pt")
    refused(cli("export", "--ckpt", "bare.pt"), "bare.pt is a dense", "--dense")
    result = cli("export", "--ckpt", "bare.pt", "--dense", "-o", "bare.onnx")
    assert result.code == 0, result.err
    assert "has no head: its output is the class token, 384 numbers" in result.err


@pytest.mark.slow
def test_bare_ema_takes_averaged_weights(cli, tmp_path, data):
    other = torch.load(mini(tmp_path, "other.pt"))["model"]
    average = {k: v + 0.01 if v.is_floating_point() else v for k, v in other.items()}
    path = mini(tmp_path, model_ema=average)
    still = ["--dense", "--lr", 1e-30, "--min-lr", 0]
    result = run(cli, data, "--pretrained", path, *still, "--ema")
    assert result.code == 0, result.err
    assert "the moving average is taken (model_ema)" in result.err
    close = load_checkpoint(Path("out.safetensors")).state["norm.weight"]
    assert torch.allclose(close, average["norm.weight"])
    result = run(cli, data, "--pretrained", tmp_path / "other.pt", *still, "--ema")
    refused(result, "other.pt holds no moving average")


@pytest.mark.slow
def test_the_older_spelling_of_the_decay(cli, tmp_path, data):
    options = ["--pretrained", mini(tmp_path), "--budget", 0.8]
    result = run(cli, data, *options, "--ema", "0.5")
    assert result.code == 0, result.err
    assert "--ema 0.5 is the older spelling of --ema-decay 0.5" in result.err
    assert Path("out.ema.safetensors").exists()
    result = run(cli, data, *options, "--ema-decay", "0.5")
    assert result.code == 0, result.err
    assert "older spelling" not in result.err
    refused(run(cli, data, *options, "--ema", "0.5", "--ema-decay", "0.5"), "drop one")
    refused(run(cli, data, *options, "--ema", "soon"), "--ema", "no decay")
    refused(run(cli, data, *options, "--ema-decay", "2"), "--ema-decay 2")
    Path("r.toml").write_text("ema = 0.5\nema-decay = 0.5\n")
    refused(run(cli, data, *options, "--recipe", "r.toml"), "twice")
    Path("r.toml").write_text("ema = 0.25\n")
    result = run(cli, data, *options, "--recipe", "r.toml")
    assert result.code == 0, result.err
    assert artifact.read(Path("out.ema.safetensors"))["provenance"]["recipe"]["ema"] == 0.25


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_eyes(cli, tmp_path, data, monkeypatch):
    path = mini(tmp_path)
    state = Path("out.safetensors.unfinished.pt")
    save = training.save_checkpoint

    def stopped(*rest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", stopped)
    assert run(cli, data, "--pretrained", path, "--dense", "--mean", "0.4").code == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert state.exists()
    assert save is training.save_checkpoint
    again = ["--pretrained", path, "--dense", "--resume"]
    refused(run(cli, data, *again), f"{state} belongs to a run with facts")
    refused(run(cli, data, *again, "--mean", "0.3"), "belongs to a run with facts")
    same_eyes = [*again, "--mean", "0.4", "--activation", "quick_gelu"]
    refused(run(cli, data, *same_eyes), "belongs to a run with")


def test_save_checkpoint_keeps_what_is_not_the_arch_s_own(tmp_path, mini_config):
    config = replace(mini_config, heads=4)
    path = tmp_path / "four.safetensors"
    save_checkpoint(path, build(config), {})
    assert load_checkpoint(path).config == config.saving()
