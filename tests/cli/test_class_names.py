"""Class names from a checkpoint to a prediction, as users run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import refused, released_format, sharpened
from shard_files import picture_folder, png, samples, write_tar

from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.models.archs import arch
from asvit_deploy.sidecar import read


@pytest.fixture(scope="module")
def released(tmp_path_factory, photos):
    """Networks as the release writes them, by their number of outputs."""
    made: dict[int, Path] = {}

    def of(count: int) -> Path:
        if count not in made:
            folder = tmp_path_factory.mktemp(f"outputs{count}")
            model = sharpened(arch("as_deit_mini").at(num_classes=count), photos)
            torch.save(released_format(model), folder / f"m{count}.pt")
            made[count] = folder / f"m{count}.pt"
        return made[count]

    return of


@pytest.fixture(scope="module")
def deit(tmp_path_factory) -> Path:
    """DeiT-T of the release with random weights: a network whose names are ImageNet's."""
    from asvit_deploy.models import build

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("deit") / "as_deit_t.pt"
    torch.save(released_format(build(arch("as_deit_tiny").at(64))), path)
    return path


def picture() -> Path:
    Path("x.png").write_bytes(png(1, (80, 70)))
    return Path("x.png")


def names_file(*names: str) -> Path:
    Path("names.txt").write_text("\n".join(names))
    return Path("names.txt")


def ok(result):
    assert result.code == 0, result.err
    return result


def predicted(cli, *args):
    result = ok(cli("predict", *args, "--json"))
    return json.loads(result.out)[0], result.err


# --- names into an artefact ---------------------------------------------------------------------


@pytest.mark.slow
def test_imagenets_names_from_export_to_evaluate(cli, deit):
    made = ok(cli("export", "--ckpt", deit, "-o", "m.onnx"))
    assert "ImageNet-1k's names, assumed" in made.err
    fields = read(Path("m.onnx"))
    assert fields["classes"][0] == "tench, Tinca tinca"
    assert fields["classes_from"] == "ImageNet-1k's names, assumed"
    result = ok(cli("predict", "m.onnx", picture()))
    assert "ImageNet-1k's names, assumed" in result.err
    first = json.loads(cli("predict", "m.onnx", "x.png", "--json").out)[0]["top"][0]
    assert first["label"] == fields["classes"][first["index"]]
    assert first["label"] in result.out
    folders = ("n01440764", "n02086240", "n03417042")
    picture_folder(Path("val"), folders, 2)
    for model in ("m.onnx", deit):
        report = ok(cli("evaluate", model, "--data", "val", "--json", "--batch-size", 1,
                        "--batch-size", 2))  # fmt: skip
        assert json.loads(report.out)["rows"][0]["images"] == 6
        assert json.loads(report.out)["classes_from"] == "ImageNet-1k's names, assumed"
        assert report.err.count("'n03417042' = 569 (garbage truck, dustcart)") == 1
    # The labels that evaluation counts with are those outputs: guess k is right in folder k.
    index = first["index"]
    (Path("one") / str(index)).mkdir(parents=True)
    (Path("one") / str((index + 1) % 1000)).mkdir()
    for place in Path("one").iterdir():
        (place / "x.png").write_bytes(Path("x.png").read_bytes())
    report = json.loads(ok(cli("evaluate", "m.onnx", "--data", "one", "--json")).out)
    assert report["rows"][0]["top1"]["value"] == 0.5


@pytest.mark.slow
def test_the_option_names_the_outputs(cli, released):
    names = names_file("cat", "dog", "cow")
    ok(cli("export", "--ckpt", released(3), "-o", "m.onnx", "--classes", names))
    fields = read(Path("m.onnx"))
    assert fields["classes"] == ["cat", "dog", "cow"]
    assert fields["classes_from"] == "--classes names.txt"
    guess, err = predicted(cli, "m.onnx", picture())
    assert {top["label"] for top in guess["top"]} == {"cat", "dog", "cow"}
    assert "--classes names.txt" in err
    Path("other.json").write_text(json.dumps({"id2label": {0: "Katze", 1: "Hund", 2: "Kuh"}}))
    guess, err = predicted(cli, "m.onnx", "x.png", "--classes", "other.json")
    assert {top["label"] for top in guess["top"]} == {"Katze", "Hund", "Kuh"}
    assert "output 0 is 'Katze', not 'cat'" in err
    # Text order would be cat, cow, dog.
    picture_folder(Path("data"), ("cat", "cow"), 2)
    cli_args = ("--data", "data", "--classes", names, "--json")
    for model in ("m.onnx", released(3)):
        report = ok(cli("evaluate", model, *cli_args))
        assert json.loads(report.out)["classes_from"] == "--classes names.txt"
    refused(cli("evaluate", released(3), "--data", "data"), "2 classes and the model 3")


@pytest.mark.slow
def test_config_json_beside_the_checkpoint_goes_along(cli, released):
    Path("m.pt").write_bytes(released(3).read_bytes())
    config = {"id2label": {0: "cat", 1: "dog", 2: "cow"}, "num_attention_heads": 2}
    Path("config.json").write_text(json.dumps({"model_type": "vit", **config}))
    made = ok(cli("export", "--ckpt", "m.pt", "-o", "m.onnx"))
    assert "class names from config.json" in made.err
    assert read(Path("m.onnx"))["classes"] == ["cat", "dog", "cow"]
    Path("out").mkdir()
    ok(cli("calibrate", "--ckpt", "m.pt", "-o", "out/c.safetensors", "--budget", "0.8"))
    assert json.loads(load_checkpoint(Path("out/c.safetensors")).metadata["classes"]) == [
        "cat", "dog", "cow",
    ]  # fmt: skip
    ok(cli("export", "--ckpt", "out/c.safetensors", "-o", "c.onnx"))
    assert read(Path("c.onnx"))["classes_from"] == "config.json beside the checkpoint"


@pytest.mark.slow
def test_without_names_it_says_so(cli, released):
    made = ok(cli("export", "--ckpt", released(3), "-o", "m.onnx"))
    assert "names" not in made.err
    assert read(Path("m.onnx"))["classes_from"] is None
    guess, err = predicted(cli, "m.onnx", picture())
    assert {top["label"] for top in guess["top"]} == {"class 0", "class 1", "class 2"}
    assert "--classes FILE" in err
    picture_folder(Path("data"), ("10", "2", "1"), 1)
    report = ok(cli("evaluate", "m.onnx", "--data", "data"))
    assert "in order ('1' = 0, '2' = 1, '10' = 2); --classes FILE settles it" in report.err


def test_labels_of_shards_are_numbers_of_outputs(cli, released):
    write_tar(Path("s/0.tar"), samples([("a", png(0), 2), ("b", png(1), 0)]))
    refused(cli("evaluate", released(3), "--data", "s"), "no classes.txt")
    names = names_file("cat", "dog", "cow")
    report = ok(cli("evaluate", released(3), "--data", "s", "--classes", names))
    assert "no classes.txt" in report.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("cat\ndog\n", ["names.txt names 2 classes", "3 outputs"]),
        ("cat\n\ndog\n", ["names.txt", "line 2 is empty"]),
        ("cat\ncat\ndog\n", ["names.txt", "'cat' twice"]),
        ('["cat", "dog", ', ["names.txt", "no whole JSON"]),
        ('{"0": "cat", "2": "dog"}', ["names.txt", "none for number 1"]),
    ],
)
def test_bad_names_leave_everything_as_it_was(cli, released, content, words):
    ok(cli("export", "--ckpt", released(3), "-o", "m.onnx"))
    before = Path("m.onnx").read_bytes(), Path("m.onnx.json").read_bytes()
    Path("names.txt").write_text(content)
    picture_folder(Path("data"), ("a", "b", "c"), 1)
    option = ("--classes", "names.txt")
    refused(cli("export", "--ckpt", released(3), "-o", "m.onnx", "--force", *option), *words)
    refused(cli("predict", "m.onnx", picture(), *option), *words)
    refused(cli("evaluate", "m.onnx", "--data", "data", *option), *words)
    refused(cli("evaluate", released(3), "--data", "data", *option), *words)
    assert before == (Path("m.onnx").read_bytes(), Path("m.onnx.json").read_bytes())


def test_names_are_never_replaced_by_an_output(cli, released):
    names = names_file("cat", "dog", "cow").rename("n.onnx")
    args = ("export", "--ckpt", released(3), "-o", names, "--force", "--classes", names)
    refused(cli(*args), "is the input itself")
    assert names.read_text() == "cat\ndog\ncow"


@pytest.mark.slow
def test_hostile_names_do_not_steer_the_terminal(cli, released):
    from conftest import signed_copy

    ok(cli("export", "--ckpt", released(3), "-o", "m.onnx"))
    signed_copy(Path("m.onnx"), Path("odd.onnx"), classes=["a\x1b[2J", "b\nc", "\ud800"])
    result = ok(cli("predict", "odd.onnx", picture()))
    assert "\x1b" not in result.out
    assert "\\x1b[2J" in result.out
    assert len(result.out.splitlines()) == 5


# --- few outputs --------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_output_is_a_score(cli, released):
    made = ok(cli("export", "--ckpt", released(1), "-o", "m.onnx"))
    assert "ImageNet" not in made.err
    result = ok(cli("predict", "m.onnx", picture()))
    assert "%" not in result.out
    assert "score" in result.out
    guess, err = predicted(cli, "m.onnx", "x.png")
    assert guess["top"] == []
    assert guess["label"] is None
    assert "one output, a score" in err
    assert f"score {guess['score']:.6g}" in result.out
    assert len(guess["kept"]) == 3
    guess, _ = predicted(cli, "m.onnx", "x.png", "--classes", names_file("quality"))
    assert guess["label"] == "quality"
    picture_folder(Path("data"), ("0", "1"), 1)
    for model in ("m.onnx", released(1)):
        refused(cli("evaluate", model, "--data", "data"), "one output, a score and no class")


@pytest.mark.slow
def test_calibrate_compares_scores(cli, released):
    args = ("calibrate", "--ckpt", released(1), "-o", "c.safetensors", "--budget", "0.8")
    result = ok(cli(*args))
    assert "top-1" not in result.out
    assert "KL" not in result.out
    assert "mean error of the score" in result.out
    report = json.loads(ok(cli(*args, "--json", "--force")).out)
    errors = [candidate["agreement"]["score_error"] for candidate in report["candidates"]]
    assert report["agreement"]["score_error"] == min(errors) > 0
    assert len(set(errors)) > 1, "they differ, so the best is a choice"


@pytest.mark.slow
def test_two_outputs_are_two_classes(cli, released):
    ok(cli("export", "--ckpt", released(2), "-o", "m.onnx", "--classes", names_file("cat", "dog")))
    guess, _ = predicted(cli, "m.onnx", picture())
    assert sum(top["probability"] for top in guess["top"]) == pytest.approx(1)
    picture_folder(Path("data"), ("cat", "dog"), 2)
    result = ok(cli("evaluate", "m.onnx", "--data", "data"))
    assert "- (2 classes)" in result.out
    assert "100.00%" not in result.out.splitlines()[3].split("|")[4]
    done = ok(cli("calibrate", "--ckpt", released(2), "-o", "c.safetensors", "--budget", "0.8"))
    assert "- (2 classes)" in done.out
