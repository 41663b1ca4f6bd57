"""The checks of `scripts/kill` and `scripts/soak` fail where something is half, left or grows."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def script(name):
    loader = SourceFileLoader(f"script_{name}", str(SCRIPTS / name))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


kill, soak = script("kill"), script("soak")


@pytest.fixture
def bench(tmp_path):
    """After an undisturbed run that made every kind of output, and what that made."""
    from asvit_deploy import sidecar

    bench = kill.Bench(tmp_path)
    (bench.inputs / "given.txt").write_text("an input")
    work = bench.fresh()
    for name in ("out.safetensors", "out.bin"):
        data = safetensors.torch.save({"weight": torch.arange(64.0)})
        sidecar.write(work / name, data, {"kind": "test"})
    (work / "out").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(work / "out" / "1.png")
    (work / "out" / "kept.json").write_text('{"kept": [1, 2]}')
    (work / "out.log.jsonl").write_text('{"loss": 1}\n{"loss": 2}\n')
    wanted = bench.made()
    assert kill.half_of(bench, wanted) == ([], [])
    return bench, work, wanted


@pytest.mark.parametrize(
    "name", ["out.safetensors", "out.safetensors.json", "out.bin", "out/1.png", "out/kept.json"]
)
def test_a_half_output_is_found(bench, name):
    bench, work, wanted = bench
    data = (work / name).read_bytes()
    (work / name).write_bytes(data[: len(data) // 2])
    half, _ = kill.half_of(bench, wanted)
    assert any(name in line for line in half)


def test_parts_that_lack_the_rest_are_found(bench):
    bench, work, wanted = bench
    (work / "out" / "1.png").unlink()
    (work / "out.safetensors").unlink()
    (work / "out.bin.json").unlink()
    (work / ".out.bin.0123.tmp").mkdir()  # hidden: the next run's to remove
    (work / "out.log.jsonl").write_text('{"loss": 1}\n{"lo')  # goes on
    half, between = kill.half_of(bench, wanted)
    assert half == ["out lacks out/1.png", "out.safetensors.json without its artefact"]
    assert [line.partition(" has ")[0] for line in between] == [str(work / "out.bin")]


def test_what_is_left_over_is_counted(bench):
    bench, work, wanted = bench
    (work / ".out.bin.0123.tmp").mkdir()
    (bench.tmp / "asvit-left").mkdir()
    left = set(bench.made()) - set(wanted)
    assert left == {".out.bin.0123.tmp", "TMPDIR/asvit-left"}


def test_what_lives_on_is_counted_in_a_session_of_its_own(bench):
    bench, *_ = bench
    process = subprocess.Popen(["sleep", "60"], start_new_session=True,
                               env={**os.environ, "TMPDIR": str(bench.tmp)})  # fmt: skip
    try:
        assert bench.living() == 1
    finally:
        process.kill()
        process.wait()
    assert bench.living() == 0


def test_a_run_that_fails_is_a_bad_row(tmp_path, monkeypatch):
    bench = kill.Bench(tmp_path)
    monkeypatch.setattr(kill, "commands", lambda: {"check": ["check", "absent.onnx"]})
    row = kill.row_of(bench, "check", 2, random.Random(0))
    assert len(row["bad"]) == 1
    assert "absent.onnx does not exist" in row["bad"][0]["failed"]
    one = kill.killed(bench, ["check", "absent.onnx"], {}, 60.0)
    assert "--force" in one["failed"]  # a rerun


# --- soak ----------------------------------------------------------------------------------------


def test_what_grows_fails():
    held = []

    def leak():
        held.append(open(os.devnull))  # noqa: SIM115

    try:
        found = soak.soaked(leak, 0.5)
    finally:
        for file in held:
            file.close()
    said = soak.failures({**found, "mib": {"an_hour": 0.0}})
    assert len(said) == 1
    assert said[0].startswith("descriptors grew from ")
    steady = soak.soaked(lambda: None, 0.5)
    assert soak.failures({**steady, "mib": {"an_hour": 0.0}}) == []
    assert soak.failures({**steady, "mib": {"an_hour": 1.5}}) == ["memory grew by 1.5 MiB an hour"]
    more = {**steady["threads"], "most": steady["threads"]["most_before"] + 1}
    assert "threads grew" in soak.failures({**steady, "mib": {"an_hour": 0}, "threads": more})[0]


def test_a_part_that_crashes_is_a_failed_part(tmp_path, monkeypatch, capsys):
    """The others' results stay."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # as it will be, and gone again afterwards
    monkeypatch.setattr(soak, "made", lambda folder: (Path("m.onnx"), []))
    monkeypatch.setattr(soak, "measured", _ends)
    output = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["soak", "--part", "a", "--part", "b", "-o", str(output)])
    assert soak.main() == 1
    parts = json.loads(output.read_text())["soak"]
    assert parts["a"]["failed"] == "it ended with exit code 3"
    assert parts["b"]["rounds"] == 1
    assert "a: it ended with exit code 3\n1 of 2 parts" in capsys.readouterr().out


def _ends(name, onnx, pictures, seconds, to):
    if name == "a":
        os._exit(3)
    to.send({"rounds": 1})
