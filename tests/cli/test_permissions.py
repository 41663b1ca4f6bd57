"""What may not be read, searched or written is one line that names it, and nothing is changed."""

from __future__ import annotations

import shutil

import pytest
from conftest import refused

CASES = {
    "checkpoint in a closed folder": ("export --ckpt closed/x.pt", "closed/x.pt"),
    "closed checkpoint": ("export --ckpt secret.pt", "secret.pt"),
    "output in a closed folder": ("export --ckpt x.pt -o closed/y.onnx", "closed/y.onnx"),
    "output within a closed folder": ("export --ckpt x.pt -o closed/in/y.onnx", "closed/in"),
    "output in a read-only folder": ("export --ckpt x.pt -o fixed/y.onnx", "fixed/y.onnx"),
    "checkpoint in a read-only folder": (
        "calibrate --ckpt x.pt -o fixed/y.safetensors", "fixed/y.safetensors",
    ),
    "report in a read-only folder": ("bench m.onnx -o fixed/r.json", "fixed/r.json"),
    "artefact in a closed folder": ("check closed/m.onnx", "closed/m.onnx"),
    "closed artefact": ("check secret.onnx", "secret.onnx"),
    "closed sidecar": ("bench hidden.onnx", "hidden.onnx.json"),
    "reference in a closed folder": ("check m.onnx --reference closed/m.onnx", "closed/m.onnx"),
    "library in a closed folder": ("check m.onnx --library closed/l.so", "closed/l.so"),
    "closed folder of pictures": ("check m.onnx --images closed", "closed"),
    "closed folder among the pictures": ("check m.onnx --images pictures", "pictures/closed"),
    "picture in a closed folder": ("predict m.onnx closed/p.png", "closed/p.png"),
    "closed picture": ("predict m.onnx secret.png", "secret.png"),
}  # fmt: skip


@pytest.fixture(scope="module")
def results(powerless_cli, mini_checkpoint, mini_artifacts, photos, tmp_path_factory):
    """Every case's result, from one process."""
    top = tmp_path_factory.mktemp("permissions")
    for folder in ("closed", "closed/in", "fixed", "pictures", "pictures/closed"):
        (top / folder).mkdir()
    model = mini_artifacts["1", "auto"]
    for name in ("m.onnx", "secret.onnx", "hidden.onnx", "closed/m.onnx"):
        shutil.copy(model, top / name)
        shutil.copy(f"{model}.json", top / f"{name}.json")
    for name in ("x.pt", "secret.pt", "closed/x.pt"):
        shutil.copy(mini_checkpoint, top / name)
    for name in ("secret.png", "closed/p.png", "pictures/p.png"):
        photos.views[0].picture().save(top / name)
    (top / "closed/l.so").touch()
    modes = {"fixed": 0o500} | dict.fromkeys(
        ("closed", "pictures/closed", "secret.pt", "secret.onnx", "secret.png", "hidden.onnx.json"),
        0,
    )
    before = sorted(top.rglob("*"))
    for name, mode in modes.items():
        (top / name).chmod(mode)
    try:
        found = powerless_cli(top, *(line.split() for line, _ in CASES.values()))
    finally:
        for name in modes:
            (top / name).chmod(0o700)
    assert sorted(top.rglob("*")) == before
    return dict(zip(CASES, found))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_permission_is_one_line(results, case):
    refused(results[case], CASES[case][1], "permission")
