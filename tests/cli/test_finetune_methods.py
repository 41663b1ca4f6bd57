"""`finetune` of methods, of thresholds alone and without labels, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from embedding_files import CONFIGS, written
from PIL import Image
from shard_files import write_tar

from asvit_deploy import sidecar as artifact
from asvit_deploy.checkpoints.load import load_checkpoint, save_checkpoint
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.training.log import log_path
from asvit_deploy.training.state import state_path

SIZE = 28  # pixels: 49 tokens
OUTPUT = Path("out.safetensors")
SHORT = ["--batch-size", 4, "--steps", 2, "--log-every", 1, "-o", OUTPUT]


def add_pictures(folder: Path, count: int = 8, pixels: tuple[int, int] = (30, 34)) -> Path:
    """Coarse noise, so that tokens differ."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(folder.name.encode()))
    for i in range(count):
        coarse = rng.integers(0, 255, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def plain(tmp_path) -> Path:
    """Pictures in folders of no class, twelve to train on and four held out."""
    for name in ("train/2024/may", "train"):
        add_pictures(tmp_path / "plain" / name, 6)
    return add_pictures(tmp_path / "plain" / "val", 4).parent


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes of eight pictures."""
    for name in ("cat", "dog"):
        add_pictures(tmp_path / "data" / name)
    return tmp_path / "data"


@pytest.fixture
def dense(tmp_path) -> Path:
    torch.manual_seed(0)
    model = build(arch("as_deit_mini").at(SIZE, 2), adaptive=False)
    for block in model.blocks:
        block.attn.qkv.weight.data.mul_(6)  # type: ignore[operator, union-attr]
    names = {"classes": json.dumps(["ham", "spam"]), "classes_from": "--classes names.txt"}
    save_checkpoint(tmp_path / "dense.safetensors", model, names)
    return tmp_path / "dense.safetensors"


def events(name: str) -> list[dict]:
    lines = [json.loads(line) for line in log_path(OUTPUT).read_text().splitlines()]
    return [line for line in lines if line.get("event") == name]


# --- methods ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["tome"], ["bat"], ["evit"], ["size-passing", "--per-picture"]]
)
def test_what_is_trained_goes_through_every_other_command(cli, data, dense, options):
    name, *more = options
    result = cli("finetune", "--data", data, "--pretrained", dense, *SHORT, "--budget", 0.75,
                 "--method", name, *more)  # fmt: skip
    assert result.code == 0, result.err
    assert f", {name}" in result.err
    trained, fields = load_checkpoint(OUTPUT), artifact.read(OUTPUT)
    assert trained.reduction is not None
    assert trained.reduction["name"] == fields["provenance"]["recipe"]["method"] == name
    assert (fields["budget"], fields["budget_by"]) == (0.75, "release")
    assert (trained.reduction["kept"] is None) == bool(more)
    exported = cli("export", "--ckpt", OUTPUT, "-o", "out.onnx")
    assert exported.code == 0, exported.err
    assert cli("check", "out.onnx", "--limit", 4).code == 0
    assert cli("evaluate", OUTPUT, "--data", data).code == 0
    # It goes on as what it is, with another budget where counts are fixed.
    again = cli("finetune", "--data", data, "--pretrained", OUTPUT, "--batch-size", 4, "--steps", 1,
                "--budget", 0.8, "-o", "again.safetensors")  # fmt: skip
    assert again.code == 0, again.err
    found = load_checkpoint(Path("again.safetensors")).reduction
    assert found is not None
    assert (found["name"], found["kept"] is None) == (name, bool(more))
    other = cli("finetune", "--data", data, "--pretrained", OUTPUT, *SHORT, "--method", "topk")
    refused(other, f"is a checkpoint of the method {name}")


def test_a_method_by_the_recipe_file(cli, data, dense):
    Path("r.toml").write_text('method = "topk"\ncuts = [0, 2]\nbudget = 0.8\nper-picture = false\n')
    result = cli("finetune", "--data", data, "--pretrained", dense, *SHORT, "--recipe", "r.toml")
    assert result.code == 0, result.err
    found = load_checkpoint(OUTPUT).reduction
    assert found is not None
    assert (found["name"], found["blocks"]) == ("topk", [0, 2])
    for text, words in (
        ('cuts = "0,2"', "says cuts = '0,2'"),
        ('method = "min-k"', "no training"),
        ("per-picture = 1", "says per_picture = 1"),
        ('labels = "nobody"', "labels = 'nobody'; make it one of data, none"),
    ):
        Path("r.toml").write_text(text)
        refused(cli("finetune", "--data", data, "--pretrained", dense, *SHORT, "--recipe",
                    "r.toml", "--force"), words)  # fmt: skip


def test_stages_of_the_command_line_win_over_the_cuts_of_a_file(cli, data, dense):
    Path("r.toml").write_text("cuts = [1, 2, 4]\n")
    result = cli("finetune", "--data", data, "--pretrained", dense, *SHORT, "--recipe", "r.toml",
                 "--stages", "1,3,4")  # fmt: skip
    assert result.code == 0, result.err
    assert load_checkpoint(OUTPUT).config.stages == (1, 3, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "random"], "--method random has no training form"),
        (["--method", "min-k"], "--method min-k has no training form"),
        (["--method", "sift"], "--method sift is not known; pass one of threshold, size-passing"),
        (["--method", "auto"], "--method auto is not known"),
        (["--method", "bat", "--per-picture"], "bat keeps as many tokens of every picture"),
        (["--method", "topk", "--train", "thresholds"], "topk with fixed counts has nothing of"),
        (["--method", "topk", "--stages", "1,2"], "--stages are those of --method threshold; pass"),
        (["--stages", "1,2", "--cuts", "1,2"], "--stages and --cuts say the same thing; drop one"),
        (["--method", "topk", "--budget", "0.1"], "budget 0.1 is out of reach of topk"),
        (["--method", "topk", "--masking", "activation"], "drop --masking"),
        (["--train", "thresholds", "--ema-decay", "0.9"], "--train thresholds leaves them as they"),
        (["--dense", "--method", "topk"], "--dense has no method; drop one"),
        (["--dense", "--train", "all"], "--dense has no train; drop one"),
        (["--dense", "--labels", "none"], "--dense learns from labels; drop one"),
        (["--labels", "none", "--smoothing", "0.1"], "--smoothing is of a loss on labels"),
        (["--labels", "none", "--distill-weight", "0"], "leaves nothing of it; drop one"),
        (["--labels", "none", "--classes", "names.txt"], "--classes says what labels mean"),
    ],
)  # fmt: skip
def test_contradictions_are_one_line_and_leave_nothing(cli, data, dense, options, words):
    before = {path.name for path in Path().iterdir()}
    refused(cli("finetune", "--data", data, "--pretrained", dense, *SHORT, *options), words)
    assert {path.name for path in Path().iterdir()} == before


def test_cuts_of_thresholds_are_their_stages(cli, data, dense):
    result = cli("finetune", "--data", data, "--pretrained", dense, *SHORT, "--cuts", "1,3",
                 "--budget", 0.8)  # fmt: skip
    assert result.code == 0, result.err
    assert load_checkpoint(OUTPUT).config.stages == (1, 3)


# --- thresholds alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["threshold", "size-passing"])
def test_thresholds_alone_leave_the_weights(cli, data, dense, method):
    per_picture = ["--per-picture"] if method != "threshold" else []
    result = cli("finetune", "--data", data, "--pretrained", dense, *SHORT, "--budget", 0.8,
                 "--method", method, *per_picture, "--train", "thresholds")  # fmt: skip
    assert result.code == 0, result.err
    assert "thresholds alone" in result.err
    before, after = load_checkpoint(dense).state, load_checkpoint(OUTPUT).state
    assert all(torch.equal(after[key], value) for key, value in before.items())
    fit = artifact.read(OUTPUT)["budget_fit"]
    assert fit["after"] == pytest.approx(0.8, rel=0.01)
    # The start met it too, cut by cut.
    assert len(events("starting thresholds fitted to the budget")) == 1
    assert events("thresholds scaled to the budget")[0]["before"] == pytest.approx(0.8, rel=0.05)
    assert not OUTPUT.with_suffix(".ema.safetensors").exists()


def test_what_ltmp_learns_is_a_file_beside_the_network(cli, data, dense):
    result = cli("finetune", "--data", data, "--pretrained", dense, *SHORT, "--budget", 0.8,
                 "--method", "ltmp", "--train", "thresholds")  # fmt: skip
    assert result.code == 0, result.err
    assert "thresholds alone; it stays beside its network, dense.safetensors" in result.err
    assert OUTPUT.stat().st_size < 20_000
    before, after = load_checkpoint(dense).state, load_checkpoint(OUTPUT).state
    assert all(torch.equal(after[key], value) for key, value in before.items())
    dense.rename(dense.with_name("moved.safetensors"))
    refused(cli("evaluate", OUTPUT, "--data", data), "dense.safetensors")


def test_calibrated_thresholds_are_where_training_starts(cli, data, dense):
    calibrated = cli(
        "calibrate",
        "--ckpt",
        dense,
        "--images",
        data,
        "--budget",
        0.8,
        "--method",
        "topk",
        "--per-picture",
        "-o",
        "c.safetensors",
        "--budget-by",
        "release",
    )
    assert calibrated.code == 0, calibrated.err
    result = cli("finetune", "--data", data, "--pretrained", "c.safetensors", *SHORT, "--budget",
                 0.8, "--train", "thresholds", "--labels", "none")  # fmt: skip
    assert result.code == 0, result.err
    assert events("starting thresholds fitted to the budget") == []
    start = artifact.read(Path("c.safetensors"))["thresholds"]
    log = [json.loads(line) for line in log_path(OUTPUT).read_text().splitlines()]
    first = next(line for line in log if "loss" in line)["thresholds"]
    assert first == pytest.approx(start, rel=0.011)


# --- without labels -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_embeddings_learn_from_any_pictures(cli, tmp_path, plain, kind):
    weights = written(tmp_path, kind, dense=True)
    result = cli("finetune", "--data", plain, "--pretrained", weights, *SHORT, "--budget", 0.8,
                 "--method", "size-passing", "--labels", "none")  # fmt: skip
    assert result.code == 0, result.err
    assert f"{plain} without labels (12 training pictures, 4 for validation" in result.err
    assert "has labels" not in result.err
    trained = load_checkpoint(OUTPUT)
    assert trained.config.output == "embedding"
    assert trained.config.num_classes == CONFIGS[kind].num_classes
    assert trained.reduction is not None
    assert trained.reduction["name"] == "size-passing"
    held_out = events("validation")[0]
    assert held_out["images"] == 4
    assert 0.5 < held_out["cosine"] <= 1
    assert "top1" not in held_out
    log = [json.loads(line) for line in log_path(OUTPUT).read_text().splitlines()]
    steps = [line for line in log if "loss" in line and "event" not in line]
    assert all("ce" not in line and "distill" in line for line in steps)
    fields = artifact.read(OUTPUT)
    assert "classes" not in fields
    assert fields["provenance"]["recipe"]["labels"] == "none"


def test_a_classifier_keeps_its_classes_and_says_whose_labels_are_idle(cli, data, dense):
    result = cli("finetune", "--data", data, "--pretrained", dense, *SHORT, "--budget", 0.8,
                 "--labels", "none", "--mixup", 0.8, "--thresholds", "fit")  # fmt: skip
    assert result.code == 0, result.err
    assert f"{data} has labels, which are not used" in result.err
    fields = artifact.read(OUTPUT)
    assert (fields["classes"], fields["classes_from"]) == (["ham", "spam"], "--classes names.txt")
    assert "top1" not in fields["provenance"]


@pytest.mark.parametrize("labels", [True, False])
def test_shards_need_no_labels_either(cli, tmp_path, plain, dense, labels):
    for part in ("train", "val"):
        pictures = sorted((plain / part).rglob("*.png"))
        members = [(f"{number}.png", path.read_bytes()) for number, path in enumerate(pictures)]
        if labels:
            members += [(f"{number}.cls", b"7") for number in range(len(pictures))]
        write_tar(tmp_path / "shards" / part / "0.tar", sorted(members))
    options = ["--pretrained", dense, *SHORT, "--budget", 0.8]
    result = cli("finetune", "--data", "shards", *options, "--labels", "none")
    assert result.code == 0, result.err
    assert "shards without labels (12 training pictures, 4 for validation" in result.err
    assert ("shards has labels, which are not used" in result.err) == labels
    assert events("validation")[0]["images"] == 4
    refused(cli("finetune", "--data", "shards", *options, "--force"), "no classes.txt")


@pytest.mark.slow
def test_held_out_pictures_are_compared_with_the_dense_network(cli, plain, dense):
    result = cli("finetune", "--data", plain, "--pretrained", dense, *SHORT, "--budget", 0.8,
                 "--labels", "none", "--method", "topk")  # fmt: skip
    assert result.code == 0, result.err
    figures = events("validation")[0]
    assert figures.keys() == {"event", "images", "kl", "top1_as_dense", "macs", "kept"}
    assert 0 <= figures["kl"] < 1
    assert "images 4, kl" in result.err


def test_labels_that_are_needed_are_missed_in_one_line(cli, tmp_path, plain, dense):
    options = ["--pretrained", dense, *SHORT, "--budget", 0.8]
    result = cli("finetune", "--data", plain, *options)
    refused(result, "at least two; or pass --labels none, which needs no classes")
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = cli("finetune", "--data", empty, *options)
    refused(nothing, "holds 0 class folders")
    assert "--labels none" not in nothing.err
    refused(cli("finetune", "--data", empty, *options, "--labels", "none"), "holds no picture")
    scratch = cli("finetune", "--data", plain, "--arch", "as_deit_mini", "--dense", *SHORT)
    assert "--labels none" not in scratch.err  # which a dense run would refuse


def test_a_loss_on_classes_needs_a_head(cli, tmp_path, data):
    weights = written(tmp_path, "clip", dense=True)
    options = ["--data", data, "--pretrained", weights, *SHORT, "--budget", 0.8]
    frozen = cli("finetune", *options, "--train", "thresholds")
    refused(frozen, "gives embeddings, and a loss on classes needs a head", "pass --labels none")
    result = cli("finetune", *options)
    assert result.code == 0, result.err
    assert "--labels none would keep the embedding" in result.err


# --- stopped and resumed ------------------------------------------------------------------------


@pytest.fixture
def stopped(cli, plain, dense) -> list[object]:
    """A run without labels that a broken picture ended after its first states."""
    picture = plain / "train" / "5.png"
    whole = picture.read_bytes()
    options = ["finetune", "--data", plain, "--pretrained", dense, "--batch-size", 2, "--epochs", 1,
               "-o", OUTPUT, "--save-every", 1, "--log-every", 1, "--budget", 0.8, "--labels",
               "none", "--thresholds", "0.02,0.02,0.02", "--seed", 2]  # fmt: skip
    picture.write_bytes(whole[:60])
    refused(cli(*options), "5.png")
    assert torch.load(state_path(OUTPUT), weights_only=True)["step"] >= 1
    picture.write_bytes(whole)
    return options


@pytest.mark.slow
def test_a_run_goes_on_to_the_same_weights(cli, stopped):
    assert cli(*stopped, "--resume").code == 0
    resumed = load_checkpoint(OUTPUT).state
    assert cli(*stopped, "--force").code == 0
    whole = load_checkpoint(OUTPUT).state
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_another_method_or_other_labels_do_not_go_on(cli, data, stopped):
    before = state_path(OUTPUT).read_bytes()
    data_at, where = stopped.index("--data"), stopped.index("--labels")
    other = [*stopped, "--method", "topk", "--per-picture", "--resume"]
    refused(cli(*other), "belongs to a run with", "method threshold, not topk")
    refused(cli(*stopped, "--train", "thresholds", "--resume"), "train all, not thresholds")
    labelled = [*stopped[:data_at], "--data", data, *stopped[data_at + 2 : where],
                *stopped[where + 2 :], "--resume"]  # fmt: skip
    refused(cli(*labelled), "labels none, not data")
    assert state_path(OUTPUT).read_bytes() == before


def test_a_state_of_before_there_was_a_choice_goes_on(cli, data, dense):
    picture = data / "dog" / "7.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:60])
    options = ["finetune", "--data", data, "--pretrained", dense, "--batch-size", 2, "--epochs", 1,
               "-o", OUTPUT, "--save-every", 1, "--thresholds", "0.02,0.02,0.02"]  # fmt: skip
    refused(cli(*options), "7.png")
    state = torch.load(state_path(OUTPUT), weights_only=True)
    for name in ("method", "per_picture", "cuts", "train", "labels"):
        del state["recipe"][name]
    del state["digest"]
    torch.save(state, state_path(OUTPUT))
    picture.write_bytes(whole)
    log_path(OUTPUT).unlink(missing_ok=True)
    refused(cli(*options, "--method", "topk", "--per-picture", "--resume"), "not topk")
    result = cli(*options, "--resume")
    assert result.code == 0, result.err
