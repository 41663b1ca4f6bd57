"""`asvit-deploy finetune` as a user runs it: what it refuses, what it leaves, what it reports."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Result, refused
from PIL import Image

from asvit_deploy import sidecar as artifact
from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.training import run as training_run
from asvit_deploy.training import state
from asvit_deploy.training.log import log_path
from asvit_deploy.training.state import state_path

SIZE = 20  # pixels: 25 tokens, so that a step takes milliseconds
OUTPUT = Path("out.safetensors")
SCRATCH = ["--arch", "as_deit_mini", "--image-size", SIZE, "--dense", "--lr", "1e-3"]
SHORT = ["--batch-size", 4, "--steps", 2, "-o", OUTPUT]


def add_pictures(folder: Path, count: int = 8) -> None:
    """Noise, the same for the same folder name; no test asks what is learnt from it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(folder.name.encode()))
    for i in range(count):
        pixels = rng.integers(0, 255, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes of eight pictures."""
    for name in ("cat", "dog"):
        add_pictures(tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.fixture
def dense(tmp_path) -> Path:
    """Dense weights of two classes, whose tokens differ enough for thresholds to tell apart."""
    torch.manual_seed(0)
    model = build(arch("as_deit_mini").at(SIZE, 2), adaptive=False)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(6)  # type: ignore[operator, union-attr]
    save_checkpoint(tmp_path / "dense.safetensors", model, {})
    return tmp_path / "dense.safetensors"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def events(name: str) -> list[dict]:
    lines = [json.loads(line) for line in log_path(OUTPUT).read_text().splitlines()]
    return [line for line in lines if line.get("event") == name]


# --- numbers that make no sense -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--lr", value) for value in ("nan", "inf", "-1", "0")),
        *(("--min-lr", value) for value in ("nan", "inf", "-1e-6", "1")),
        *(("--clip", value) for value in ("nan", "inf", "-1")),
        *(("--smoothing", value) for value in ("nan", "2", "1", "-0.1")),
        *(("--weight-decay", value) for value in ("nan", "inf", "-1")),
        ("--seed", str(2**64)),
        ("--steps", str(10**20)),
        ("--batch-size", str(10**20)),
    ],
)
def test_a_number_out_of_range_is_one_line_and_leaves_nothing(cli, data, option, value):
    result = cli("finetune", "--data", data, *SCRATCH, *SHORT, option, value)
    refused(result, f"{option} {value if '.' in value else value.split('e')[0]}")
    assert files(Path()) == {"data"}


@pytest.mark.parametrize("option", ["--flops-weight", "--distill-weight"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_weights_of_the_losses_are_checked_too(cli, data, dense, option, value):
    result = cli("finetune", "--data", data, "--pretrained", dense, *SHORT, option, value)
    refused(result, f"{option} {value}")


@pytest.mark.parametrize("budget", ["0", "-1", "1", "1.5", "nan", "inf", "0.02"])
def test_an_impossible_budget_is_refused_before_anything_is_trained(cli, data, dense, budget):
    before = files(Path())
    result = cli("finetune", "--data", data, "--pretrained", dense, *SHORT, "--budget", budget)
    refused(result, "budget " + budget)
    assert files(Path()) == before


def test_a_dense_run_has_no_weights_of_adaptive_losses(cli, data):
    for option in ("--flops-weight", "--distill-weight", "--budget"):
        result = cli("finetune", "--data", data, *SCRATCH, *SHORT, option, "0.5")
        refused(result, "--dense has no " + option[2:])


# --- batches that do not fit into memory --------------------------------------------------------


@pytest.mark.parametrize("size", [10**7, 10**15])
def test_a_batch_larger_than_memory_is_refused_at_once(cli, data, size):
    result = cli("finetune", "--data", data, *SCRATCH, "-o", OUTPUT, "--batch-size", size)
    refused(result, f"--batch-size {size} needs more than", "lower --batch-size")
    assert files(Path()) == {"data"}


# The limit counts address space, of which the imports alone take gigabytes; hence only after them.
_LITTLE_MEMORY = """
import resource, sys
import asvit_deploy.training.run, torch
from asvit_deploy.cli.main import main
torch.zeros(8).sum()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (600 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_that_runs_out_is_one_line_and_keeps_what_was_there(data, tmp_path):
    state, log = (tmp_path / place(OUTPUT) for place in (state_path, log_path))
    options = ["finetune", "--data", data, *SCRATCH, "-o", OUTPUT, "--steps", 1, "--force"]
    for kept in (False, True):
        if kept:
            state.write_text("an older state")
            log.write_text("an older log")
        before = files(tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", _LITTLE_MEMORY, *map(str, options), "--batch-size", "4000"],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert "--batch-size 4000 does not fit into memory; lower" in done.stderr
        assert files(tmp_path) == before
    assert (state.read_text(), log.read_text()) == ("an older state", "an older log")


def test_no_file_of_the_run_replaces_what_is_another_s(cli, data, dense):
    notes = OUTPUT.with_suffix(".ema.safetensors.json")
    notes.write_text("my notes")
    options = ["finetune", "--data", data, "--pretrained", dense, *SHORT, "--ema", 0.5]
    refused(cli(*options), "out.ema.safetensors.json exists already")
    assert notes.read_text() == "my notes"
    mine, lock = Path("mine.txt"), OUTPUT.with_name(f".{OUTPUT.name}.lock")
    mine.write_text("precious")
    lock.symlink_to(mine)
    refused(cli(*options, "--force"), f"cannot access {lock}")
    assert mine.read_text() == "precious"


def test_the_runs_own_files_never_replace_an_input(cli, data, dense):
    weights, recipe = state_path(OUTPUT), log_path(OUTPUT)
    torch.save(load_checkpoint(dense).state, weights)
    recipe.write_text("steps = 1")
    before = weights.read_bytes()
    options = ["finetune", "--data", data, *SHORT, "--force"]
    for given, mine in (
        (["--pretrained", weights, "--arch", "as_deit_mini", "--image-size", SIZE], weights),
        (["--pretrained", dense, "--recipe", recipe], recipe),
    ):
        refused(cli(*options, *given), f"would write {mine}, its own input")
    assert (weights.read_bytes(), recipe.read_text()) == (before, "steps = 1")


@pytest.mark.slow
def test_a_stop_for_the_whole_group_lets_worker_processes_end_in_peace(data, tmp_path):
    options = ["--data", data, *SCRATCH, "-o", OUTPUT, "--batch-size", 2, "--steps", 4000]
    options += ["--workers", 2, "--log-every", 1]
    line = [sys.executable, "-m", "asvit_deploy", "finetune", *map(str, options)]
    run = subprocess.Popen(
        line, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / log_path(OUTPUT)
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert run.poll() is None, run.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)  # as systemd stops a job
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 130, said
    assert "Traceback" not in said
    assert "stopped after step" in said
    assert torch.load(tmp_path / state_path(OUTPUT), weights_only=True)["step"] >= 3


@pytest.mark.slow
def test_a_worker_process_that_is_killed_costs_one_line(data, tmp_path):
    options = ["--data", data, *SCRATCH, "-o", OUTPUT, "--batch-size", 2, "--steps", 4000]
    options += ["--workers", 1, "--log-every", 1]
    line = [sys.executable, "-m", "asvit_deploy", "finetune", *map(str, options)]
    run = subprocess.Popen(line, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / log_path(OUTPUT)
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert run.poll() is None, run.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)  # as a system short of memory does
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 2, said
    assert "Traceback" not in said
    assert "Error: a process of --workers was killed" in said
    assert torch.load(tmp_path / state_path(OUTPUT), weights_only=True)["step"] >= 3


# --- a disk that is full ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "left"),
    [(1 << 20, log_path(OUTPUT)), (10, None)],
    ids=["no room for the state", "no room for the log"],
)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(data, tmp_path, size, left):
    """A limit on the file size fails in mid-write, as a full disk does."""
    options = ["--data", data, *SCRATCH, "-o", OUTPUT, "--batch-size", 2, "--steps", 3,
               "--save-every", 1, "--log-every", 1]  # fmt: skip
    line = [sys.executable, "-m", "asvit_deploy", "finetune", *map(str, options)]
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    where = state_path(OUTPUT) if left else log_path(OUTPUT)
    refused(Result(done.returncode, done.stdout, done.stderr),
            f"cannot write {where}: File too large; a limit on file sizes")  # fmt: skip
    assert files(tmp_path) == {"data", *([left.name] if left else [])}


@pytest.mark.slow
def test_a_full_disk_under_tensorboard_is_one_line(data, tmp_path):
    """Its writer is a thread of its own, with a traceback of its own."""
    pytest.importorskip("tensorboard", reason="comes with [train]")
    options = ["--data", data, *SCRATCH, "-o", OUTPUT, "--batch-size", 2, "--steps", 3,
               "--log-every", 1, "--tensorboard", "events"]  # fmt: skip
    line = [sys.executable, "-m", "asvit_deploy", "finetune", *map(str, options)]
    size = 600  # bytes: three lines of the log, and two steps' events
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )  # fmt: skip
    refused(Result(done.returncode, done.stdout, done.stderr),
            "cannot write events: File too large; a limit on file sizes")  # fmt: skip


@contextlib.contextmanager
def room_for(states: int, monkeypatch) -> Iterator[None]:
    """A disk that is full once so many states have been written."""
    whole, saved = state.write_bytes, []

    def filling(path, content):
        if len(saved) == states:
            raise UserError(f"cannot write {path}: No space left on device; free space")
        saved.append(path)
        whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(state, "write_bytes", filling)
        yield


def test_a_disk_that_fills_up_costs_the_steps_since_the_last_state(cli, data, monkeypatch):
    options = ["finetune", "--data", data, *SCRATCH, "-o", OUTPUT, "--batch-size", 2]
    options += ["--steps", 4, "--save-every", 1, "--log-every", 1]
    with room_for(2, monkeypatch):
        refused(cli(*options), "No space left on device")
    assert torch.load(state_path(OUTPUT), weights_only=True)["step"] == 2
    result = cli(*options, "--resume")
    assert result.code == 0, result.err
    events = [json.loads(line) for line in log_path(OUTPUT).read_text().splitlines()]
    assert [event["step"] for event in events if "loss" in event] == [1, 2, 3, 4]


# --- resumed with other data --------------------------------------------------------------------


@pytest.fixture
def stopped(cli, data) -> list[object]:
    """A run that a broken picture ended after its first states; the picture is whole again."""
    picture = data / "dog" / "7.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:60])
    options = ["finetune", "--data", data, *SCRATCH, "--batch-size", 2, "--epochs", 2, "-o", OUTPUT]
    options += ["--save-every", 1, "--log-every", 1]
    refused(cli(*options), "7.png")
    assert torch.load(state_path(OUTPUT), weights_only=True)["step"] >= 1
    picture.write_bytes(whole)
    return options


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_the_data_are_the_same(cli, stopped):
    result = cli(*stopped, "--resume")
    assert result.code == 0, result.err
    events = [json.loads(line) for line in log_path(OUTPUT).read_text().splitlines()]
    steps = [event.get("step") for event in events if event.get("event") != "epoch"]
    assert steps == [None, *range(1, 17), None]  # start, steps, validation: nothing lost or twice
    assert [event["step"] for event in events if event.get("event") == "epoch"] == [8, 16]


@pytest.mark.slow
def test_a_mended_picture_is_trained_on_as_if_it_had_always_been_whole(cli, stopped):
    """What stood in for it while it could not be read has left no trace in the weights."""
    refused(cli(*stopped), "holds an unfinished run; pass --resume")
    assert cli(*stopped, "--resume").code == 0
    resumed = load_checkpoint(OUTPUT).state
    assert cli(*stopped, "--force").code == 0
    whole = load_checkpoint(OUTPUT).state
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_resume_does_not_pass_a_picture_that_is_still_broken(cli, data, stopped):
    (data / "dog" / "7.png").write_bytes(b"no picture")
    before = state_path(OUTPUT).read_bytes()
    refused(cli(*stopped, "--resume"), "7.png, which makes 1 where --skip-limit allows 0")
    assert state_path(OUTPUT).read_bytes() == before
    assert not OUTPUT.exists()


@pytest.fixture
def fitted(data, dense) -> list[object]:
    """A run whose thresholds start on the budget."""
    return ["finetune", "--data", data, "--pretrained", dense, "-o", OUTPUT, "--thresholds", "fit",
            "--batch-size", 4, "--steps", 3, "--save-every", 1, "--log-every", 1]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1])
def test_a_start_on_the_budget_is_made_once(cli, fitted, monkeypatch, steps):
    """A stop keeps it, and its line in the log, be it before the first step or after."""
    assert cli(*fitted).code == 0
    whole = load_checkpoint(OUTPUT).state
    log = log_path(OUTPUT).read_text()
    if steps:
        with room_for(steps, monkeypatch):
            refused(cli(*fitted, "--force"), "No space left")
    else:
        with monkeypatch.context() as patch:
            signals = contextlib.nullcontext([signal.SIGTERM])
            patch.setattr(training_run, "stop_signals", lambda: signals)
            assert cli(*fitted, "--force").code == 130
    assert torch.load(state_path(OUTPUT), weights_only=True)["step"] == steps
    result = cli(*fitted, "--resume")
    assert result.code == 0, result.err
    resumed = load_checkpoint(OUTPUT).state
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    said = [[(event.get("event"), event.get("loss")) for event in map(json.loads, lines)]
            for lines in (log.splitlines(), log_path(OUTPUT).read_text().splitlines())]  # fmt: skip
    assert said[0] == said[1]
    assert said[0][1] == ("starting thresholds scaled to the budget", None)


def test_a_start_on_the_budget_that_meets_a_broken_picture_leaves_nothing(cli, data, fitted):
    (data / "dog" / "7.png").write_bytes(b"no picture")
    before = files(Path())
    refused(cli(*fitted), "7.png, which makes 1 where --skip-limit allows 0")
    assert files(Path()) == before


@pytest.mark.slow
@pytest.mark.parametrize("where", ["val", "the fit of the thresholds"])
def test_unreadable_pictures_count_after_the_last_step_too(cli, data, dense, where):
    """No epoch ends in one step; of sixteen training pictures it sees four, the fit all."""
    broken = data / "cat" / "0.png"
    if where == "val":
        data.rename("train")
        data.mkdir()
        Path("train").rename(data / "train")
        add_pictures(data / "val" / "cat")
        add_pictures(data / "val" / "dog")
        broken = data / "val" / "cat" / "3.png"
    options = ["finetune", "--data", data, "--pretrained", dense, "-o", OUTPUT, "--batch-size", 4]
    options += ["--steps", 1]
    broken.write_bytes(b"no picture")
    for more in ([], ["--resume"]):
        refused(cli(*options, *more), f"cannot read {broken}, which makes 1 where --skip-limit")
        assert not OUTPUT.exists()
    result = cli(*options, "--skip-limit", 1, "--resume")
    assert result.code == 0, result.err


def test_resume_notices_an_added_class(cli, data, stopped):
    add_pictures(data / "eel")
    refused(cli(*stopped, "--resume"), "belongs to a run with classes 2 (", "not 3 (")


def test_resume_notices_a_renamed_class(cli, data, stopped):
    (data / "cat").rename(data / "bat")
    refused(cli(*stopped, "--resume"), "belongs to a run with classes 2 (", "not 2 (")


def test_resume_notices_other_pictures(cli, data, stopped):
    (data / "cat" / "0.png").rename(data / "cat" / "zero.png")
    refused(cli(*stopped, "--resume"), "belongs to a run with pictures 16 (", "not 16 (")


# --- files that are not the run's own -----------------------------------------------------------


def test_a_log_that_is_there_needs_force(cli, data):
    log_path(OUTPUT).write_text("my own notes")
    result = cli("finetune", "--data", data, *SCRATCH, *SHORT)
    refused(result, "out.log.jsonl exists already", "--force")
    assert log_path(OUTPUT).read_text() == "my own notes"
    assert cli("finetune", "--data", data, *SCRATCH, *SHORT, "--force").code == 0
    assert len(events("start")) == 1


@pytest.mark.slow
def test_a_resumed_run_replaces_its_own_log_only(cli, stopped):
    log_path(OUTPUT).write_text('{"step": 1}\nmy own notes\n')
    refused(cli(*stopped, "--resume"), "out.log.jsonl exists already", "--force")
    assert "my own notes" in log_path(OUTPUT).read_text()
    assert cli(*stopped, "--resume", "--force").code == 0


@pytest.mark.parametrize("name", ["finetune", "calibrate"])
def test_the_input_is_never_the_output(cli, data, dense, name):
    before = dense.read_bytes()
    given = ["--data", data, "--pretrained"] if name == "finetune" else ["--ckpt"]
    refused(cli(name, *given, dense, "-o", dense.name, "--force"), "is the input itself")
    assert dense.read_bytes() == before, "the checkpoint changed"


# --- what it reports ----------------------------------------------------------------------------


def test_the_budget_it_landed_on_is_reported(cli, data, dense):
    result = cli(
        "finetune", "--data", data, "--pretrained", dense, *SHORT,
        "--flops-weight", 3, "--distill-weight", 0.25,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "of the dense MACs on 16 training pictures, budget 0.65" in result.err
    assert "missed the budget" not in result.err
    fields = artifact.read(OUTPUT)
    fit = fields["budget_fit"]
    assert not fit["missed"]
    assert fit["after"] == pytest.approx(0.65, rel=0.01)
    assert events("thresholds scaled to the budget")[0]["pictures"] == fit["pictures"] == 16
    recipe = fields["provenance"]["recipe"]
    assert (recipe["flops_weight"], recipe["distill_weight"]) == (3.0, 0.25)


@pytest.mark.slow
def test_thresholds_can_start_on_the_budget(cli, data, dense):
    options = ["finetune", "--data", data, "--pretrained", dense, *SHORT, "--log-every", 1]
    Path("r.toml").write_text('thresholds = "fit"')
    starts = []
    for more in (["--thresholds", "fit"], ["--recipe", "r.toml"], []):
        result = cli(*options, *more, "--force")
        assert result.code == 0, result.err
        events = [json.loads(line) for line in log_path(OUTPUT).read_text().splitlines()]
        fits = [event for event in events if "scaled to the budget" in event.get("event", "")]
        starts += [event for event in fits if event["event"].startswith("starting")]
        assert len(fits) == (2 if more else 1)
    assert starts[0] == starts[1]
    assert abs(starts[0]["before"] - 0.65) > 0.02
    assert starts[0]["after"] == pytest.approx(0.65, rel=0.01)
    refused(cli(*options, "--thresholds", "fitted", "--force"), "'fitted' is no list such as 1,2,3")


@pytest.mark.slow
def test_a_missed_budget_is_reported(cli, data, dense):
    checkpoint = load_checkpoint(dense)
    model = build(checkpoint.config, adaptive=False)
    for block in model.blocks:  # nobody attends to anything: all tokens score alike
        block.attn.qkv.weight.data.zero_()  # type: ignore[operator, union-attr]
    save_checkpoint(Path("even.safetensors"), model, {})
    result = cli(
        "finetune", "--data", data, "--pretrained", "even.safetensors", *SHORT, "--lr", "1e-20",
        "--min-lr", 0, "--ema", 0.5,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "\nmissed the budget by" in result.err
    assert "\nits moving average: missed the budget by" in result.err
    fit = artifact.read(OUTPUT)["budget_fit"]
    assert fit["missed"]
    assert abs(fit["after"] / 0.65 - 1) > 0.01


# --- classes ------------------------------------------------------------------------------------


def test_classes_in_the_users_order(cli, data):
    Path("names.txt").write_text("dog\r\ncat\r\n")
    result = cli("finetune", "--data", data, *SCRATCH, *SHORT, "--classes", "names.txt")
    assert result.code == 0, result.err
    fields = artifact.read(OUTPUT)
    assert (fields["classes"], fields["classes_from"]) == (["dog", "cat"], "--classes names.txt")
    again = cli("finetune", "--data", data, *SCRATCH, *SHORT, "--force")
    assert again.code == 0, again.err
    fields = artifact.read(OUTPUT)
    assert (fields["classes"], fields["classes_from"]) == (
        ["cat", "dog"], "names of the class folders",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "words"),
    [("dog\n", "at least 2"), ("dog\ncow\n", "lacks the class 'cat'"),
     ("cat\ndog\ncow\n", "names 'cow'"), ("cat\ncat\n", "'cat' twice")],
)  # fmt: skip
def test_classes_that_the_data_does_not_have(cli, data, names, words):
    Path("names.txt").write_text(names)
    result = cli("finetune", "--data", data, *SCRATCH, *SHORT, "--classes", "names.txt")
    refused(result, "names.txt", words)
    assert not OUTPUT.exists()


@pytest.mark.slow
def test_weights_keep_the_order_of_their_outputs(cli, tmp_path):
    """Those of before stand in the order of text, and the folders now go by number."""
    numbers = [str(i) for i in range(11)]
    for name in numbers:
        add_pictures(tmp_path / "data" / name, 1)
    torch.manual_seed(0)
    model = build(arch("as_deit_mini").at(SIZE, 11), adaptive=False)
    said = {"classes": json.dumps(sorted(numbers))}
    save_checkpoint(tmp_path / "text.safetensors", model, said)
    args = ["finetune", "--data", "data", "--dense", "--pretrained", "text.safetensors", *SHORT]
    result = cli(*args)
    assert result.code == 0, result.err
    assert "keeps its head" in result.err
    assert artifact.read(OUTPUT)["classes"] == sorted(numbers)
    assert cli("finetune", "--data", "data", *SCRATCH, *SHORT, "--force").code == 0
    assert artifact.read(OUTPUT)["classes"] == numbers


# --- stopped, and streams that are closed -------------------------------------------------------


@pytest.mark.parametrize("saved", [False, True])
def test_a_state_that_this_run_never_saved_is_not_said_to_be_its_own(
    cli, data, dense, monkeypatch, saved
):
    """A second Ctrl-C does not wait for a step's end; here it comes before or after a save."""
    mine = state_path(OUTPUT)
    mine.write_text("of another run")

    def interrupted(*arguments: object) -> None:
        if saved:
            mine.with_suffix(".new").write_text("of this run")
            mine.with_suffix(".new").replace(mine)
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "finetune", interrupted)
    result = cli("finetune", "--data", data, "--pretrained", dense, *SHORT, "--force")
    assert result.code == 130
    told = result.err.splitlines()[-1]
    if saved:
        assert told.endswith(f"{mine} holds the last state that was saved, go on with --resume")
    else:
        assert told == "Interrupted; nothing was changed."


@pytest.mark.slow
def test_a_run_whose_stderr_is_closed_goes_on_without_bars(data, dense, tmp_path):
    words = ["finetune", "--data", data, "--pretrained", dense, *SHORT]
    command = [sys.executable, "-m", "asvit_deploy", *map(str, words)]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *command], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0
    assert load_checkpoint(tmp_path / OUTPUT).adaptive
