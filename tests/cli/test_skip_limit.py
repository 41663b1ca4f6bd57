"""`--skip-limit` wherever pictures are read, and what a command says of the rest."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import conftest
import pytest
import torch
from conftest import refused
from shard_files import picture_folder

from asvit_deploy import sidecar as artifact
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.models.archs import arch
from asvit_deploy.models.vit import ViT
from asvit_deploy.runners.trt_flavour import RTX

READERS = ("bench", "build-engine", "calibrate", "check", "evaluate", "export", "finetune",
           "predict", "visualize")  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_every_command_that_reads_pictures_has_it(name):
    module = importlib.import_module(f"asvit_deploy.cli.{name.replace('-', '_')}")
    (option,) = [p for p in module.command.params if p.name == "skip_limit"]
    assert isinstance(option, click.Option)
    assert option.default == 0


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Eleven sound pictures and two that are none, beside a text."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i, view in enumerate(open_images(None, arch("as_deit_mini"), limit=11).views):
        view.picture().resize((80, 70)).save(place / f"{i:02}.png")
    (place / "03x.png").write_bytes(b"")
    (place / "99.jpg").write_bytes(b"no picture")
    (place / "notes.txt").write_text("later")
    return place


@pytest.fixture
def model(tmp_path, mini_artifacts) -> Path:
    return conftest.signed_copy(mini_artifacts["1", "auto"], tmp_path / "m.onnx")


def reported(result, place: Path) -> None:
    """Both are named, and so is what else lies there."""
    assert result.code == 0, result.err
    for name in ("03x.png is empty", "99.jpg is not a picture"):
        assert f"skipped: {place}/{name}" in result.err
    assert f"passed over in {place}: 1 file (.txt 1)" in result.err


@pytest.mark.slow
def test_check_skips_and_counts(cli, model, pictures):
    args = ("check", model, "--images", "pictures")
    refused(cli(*args), "03x.png is empty")
    refused(cli(*args, "--skip-limit", 1), "99.jpg", "makes 2 where --skip-limit allows 1")
    result = cli(*args, "--skip-limit", 2, "--json")
    reported(result, Path("pictures"))
    for row in json.loads(result.out):
        assert row["skipped"] == 2
        assert row["parity"]["images"] == 11
        assert row["skipped_by_reason"] == {"empty": 1, "no picture": 1}
        assert row["passed_over"] == {".txt": 1}
    assert "2 skipped (empty 1, no picture 1)" in cli(*args, "--skip-limit", 2).out


@pytest.mark.slow
def test_bench_skips_and_counts(cli, model, pictures):
    args = ("bench", model, "--images", "pictures", "--runs", 10, "--warmup", 0, "--threads", "1")
    refused(cli(*args), "03x.png is empty")
    result = cli(*args, "--skip-limit", 2, "--json")
    reported(result, Path("pictures"))
    (report,) = json.loads(result.out)
    assert (report["image_count"], report["skipped"]) == (11, 2)


@pytest.mark.slow
def test_export_skips_and_says_so(cli, mini_checkpoint, pictures):
    args = ("export", "--ckpt", mini_checkpoint, "--images", "pictures", "-o", "x.onnx")
    refused(cli(*args), "03x.png is empty")
    assert not Path("x.onnx").exists()
    result = cli(*args, "--skip-limit", 2)
    reported(result, Path("pictures"))
    assert "on 11 images (13 pictures in pictures, 1 other entry passed over, 2 skip" in result.err


@pytest.mark.slow
def test_calibrate_skips_and_keeps_it_in_the_file(cli, mini_checkpoint, pictures, tmp_path):
    state = build_model(load_checkpoint(mini_checkpoint), dense=True).state_dict()
    torch.save({"model": state}, tmp_path / "deit.pth")
    args = ("calibrate", "--ckpt", "deit.pth", "--images", "pictures", "--budget", "0.7")
    refused(cli(*args), "03x.png is empty")
    result = cli(*args, "--skip-limit", 5, "--json")
    reported(result, Path("pictures"))
    report = json.loads(result.out)
    assert (report["images"], report["skipped"]) == (11, 2)
    kept = load_checkpoint(Path("deit.calibrated.safetensors")).metadata["calibration"]
    assert json.loads(kept)["skipped"] == 2


@pytest.mark.slow
def test_predict_skips_and_keeps_the_order(cli, model, pictures):
    names = [pictures / name for name in ("00.png", "03x.png", "01.png")]
    refused(cli("predict", model, *names), "03x.png is empty")
    result = cli("predict", model, *names, "--skip-limit", 1, "--json")
    assert result.code == 0, result.err
    first, second, third = json.loads(result.out)
    assert second == {"image": str(names[1]), "skipped": "empty"}
    alone = json.loads(cli("predict", model, names[0], names[2], "--json").out)
    assert [first, third] == alone
    assert f"{names[1]}: skipped (empty)" in cli("predict", model, *names, "--skip-limit", 1).out
    refused(cli("predict", model, names[1], "--skip-limit", 3), "none of the 1 pictures")
    refused(cli("predict", model, "gone.png"), "there is no such file")


@pytest.mark.slow
@pytest.mark.skipif(RTX.module is None or importlib.util.find_spec("polygraphy") is None,
                    reason="TensorRT-RTX is not installed")  # fmt: skip
def test_build_engine_skips_and_the_sidecar_keeps_it(cli, model, pictures):
    args = ("build-engine", "--onnx", model, "--mode", "padded", "--target-sm", "86", "--level", 1,
            "--images", "pictures", "-o", "m.engine")  # fmt: skip
    refused(cli(*args), "03x.png is empty")
    assert not Path("m.engine").exists()
    result = cli(*args, "--skip-limit", 2)
    reported(result, Path("pictures"))
    checked = artifact.read(Path("m.engine"))["checked"]
    assert (checked["images"], checked["skipped"]) == (11, 2)
    assert "2 skipped" in checked["pictures"]


# --- evaluate -----------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path) -> tuple[Path, Path]:
    """A network of three classes, and pictures of them, all of the third unreadable."""
    torch.manual_seed(0)
    config = arch("as_deit_mini").at(num_classes=3)
    checkpoint = tmp_path / "three.safetensors"
    metadata = {"classes": json.dumps(["cat", "dog", "eel"])}
    save_checkpoint(checkpoint, ViT(config, None), metadata)
    data = picture_folder(tmp_path / "data", ("cat", "dog", "eel"), count=3)
    for path in (data / "eel").iterdir():
        path.write_bytes(b"")
    (data / "cat" / "notes.txt").write_text("later")
    return checkpoint, data


@pytest.mark.parametrize("size", [1, 2, 9])
def test_evaluate_accounts_for_every_picture(cli, labelled, size):
    checkpoint, data = labelled
    args = ("evaluate", checkpoint, "--data", data, "--batch-size", size)
    refused(cli(*args), "eel/000.png is empty")
    refused(cli(*args, "--skip-limit", 2), "makes 3 where --skip-limit allows 2")
    result = cli(*args, "--skip-limit", 3, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert report["rows"][0]["images"] == report["taken"] == 6
    assert (report["seen"], report["skipped"]) == (9, 3)
    assert report["skipped_by_reason"] == {"empty": 3}
    assert report["passed_over"] == {".txt": 1}
    assert report["classes_without_pictures"] == ["eel"]
    assert f"passed over in {data}: 1 file (.txt 1)" in result.err
    table = cli(*args, "--skip-limit", 3).out
    assert "pictures: 6 of 9 taken; 3 skipped (empty 3); 1 other entry passed over" in table
    assert "1 of 3 classes without a picture (eel)" in table


def test_evaluate_counts_a_picture_once_over_several_batch_sizes(cli, labelled):
    checkpoint, data = labelled
    result = cli("evaluate", checkpoint, "--data", data, "--batch-size", 1, "--batch-size", 4,
                 "--skip-limit", 3, "--json")  # fmt: skip
    assert json.loads(result.out)["skipped"] == 3


@pytest.mark.slow
def test_processes_count_skipped_pictures_together(labelled, tmp_path):
    pytest.importorskip("accelerate", reason="comes with [train]")
    checkpoint, data = labelled
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "asvit_deploy", "evaluate", checkpoint, "--data", data, "--json"]  # fmt: skip
    results = {}
    for limit in (2, 3):  # each process alone has one or two
        results[limit] = subprocess.run(
            [*map(str, line), "--skip-limit", str(limit)], capture_output=True, text=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, timeout=300,
        )  # fmt: skip
    assert results[2].returncode != 0
    assert "makes 3 where --skip-limit allows 2" in results[2].stderr
    assert results[3].returncode == 0, results[3].stderr
    report = json.loads(results[3].stdout)
    assert (report["processes"], report["taken"], report["skipped"]) == (2, 6, 3)
    assert report["classes_without_pictures"] == ["eel"]


# --- finetune -----------------------------------------------------------------------------------


def test_finetune_says_what_it_sees(cli, tmp_path):
    data = picture_folder(tmp_path / "data", count=4)
    (data / "dog" / "x.heic").write_bytes(b"")
    (data / "dog" / "001.png").write_bytes(b"")
    line = ("finetune", "--data", data, "--arch", "as_deit_mini", "--dense", "--epochs", 1,
            "--batch-size", 4, "-o", "a.safetensors")  # fmt: skip
    result = cli(*line, "--skip-limit", 1)
    assert result.code == 0, result.err
    assert (
        f"2 classes of {data} (8 training pictures, 0 for validation, 1 other entry passed over)"
        in result.err
    )
    assert f"no validation pictures: {data} has no val/" in result.err
    assert f"passed over in {data}: 1 file (.heic 1)" in result.err
    assert f"skipped 1 unreadable picture: {data}/dog/001.png" in result.err
