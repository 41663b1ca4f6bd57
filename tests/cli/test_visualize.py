"""`visualize`, and `predict --save`: what they draw is what the runner keeps."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import raises_one_line, refused, signed_copy
from drawn_cells import agree, panels_of
from embedding_files import written
from PIL import Image

import asvit_deploy
from asvit_deploy import sidecar
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.budget import fixed_counts
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.data.images import load_picture, open_images, preprocess
from asvit_deploy.drawing.album import album as drawings
from asvit_deploy.drawing.album import shown
from asvit_deploy.models.archs import arch
from asvit_deploy.reduction.tome import ToMe
from asvit_deploy.reduction.topk import EViT


@pytest.fixture(scope="module")
def models(mini_artifacts, tmp_path_factory) -> dict[str, Path]:
    """ONNX files of several methods, each made where it is first asked for."""
    folder = tmp_path_factory.mktemp("methods")

    class Models(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = made(name)
            return self[name]

    def made(name: str) -> Path:
        if name in ("1", "dynamic"):
            return mini_artifacts[name, "auto"]
        if name == "registers":
            checkpoint = written(folder, "dinov2")
        else:
            network = build_model(load_checkpoint(default_checkpoint()), dense=True)
            method = {"tome": ToMe, "evit": EViT}.get(name.removesuffix("-batch"))
            checkpoint = folder / f"{name}.safetensors"
            made = method and fixed_counts(network.config, method, 0.65)
            save_checkpoint(checkpoint, network.with_reduction(made), {})
        batch = "dynamic" if name.endswith("-batch") else "1"
        output = folder / f"{name}.onnx"
        return asvit_deploy.export(
            checkpoint, output=output, batch=batch, dense=name == "dense"
        ).output

    return Models()


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Pictures of odd shapes, kinds and names, in subfolders."""
    folder = tmp_path_factory.mktemp("odd") / "photos"
    (folder / "sub").mkdir(parents=True)
    views = open_images(None, arch("as_deit_mini"), limit=6).views
    whole = [view.picture() for view in views]
    whole[0].resize((2000, 20)).save(folder / "wide.png")
    whole[1].resize((21, 2000)).save(folder / "tall.png")
    whole[2].convert("L").save(folder / "grey.jpg")
    clear = whole[3].resize((90, 70)).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    whole[4].resize((120, 60)).save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), (250, 250, 250)).save(folder / "sub" / "grey.jpg.png")
    whole[5].convert("P").save(folder / "sub" / "wide.png")
    return folder


def crop(path: Path, config) -> np.ndarray:
    """The crop that the network sees, at the size of a panel."""
    return enlarged(preprocess(load_picture(path), config), config)


def enlarged(image: np.ndarray, config) -> np.ndarray:
    """A network's input as pixels again, each several times as large, by other means."""
    rules, times = config.preprocessing, -(-192 // config.image_size)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (rules.mean, rules.std))
    pixels = np.rint((image.astype(np.float64) * std + mean) * 255).astype(np.uint8)
    return np.kron(pixels.transpose(1, 2, 0), np.ones((times, times, 1), np.uint8))


def ok(result):
    assert result.code == 0, result.err
    return result


METHODS = [("1", False), ("tome", True), ("evit", False), ("registers", False)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "groups"), METHODS, ids=[name for name, _ in METHODS])
def test_drawings_are_what_the_runner_keeps(cli, models, album, tmp_path, name, groups):
    result = ok(cli("visualize", models[name], "--images", album, "-o", "out", "--panels", 4))
    assert result.out == "out\n"
    artefact = open_artefact(models[name])
    runner, config = artefact.in_runtime(), artefact.config
    fields = sidecar.read_signed(tmp_path / "out" / "kept.json", "list", "", "pictures")
    names = sorted(str(path.relative_to(album)) for path in album.rglob("*.*") if path.is_file())
    assert sorted(one["image"] for one in fields["pictures"]) == names
    files = {one["file"] for one in fields["pictures"]}
    assert {path.name for path in Path("out").iterdir()} == {*files, "gallery.png", "kept.json"}
    seen, tokens = 0, config.image_tokens
    for one in fields["pictures"]:
        found = runner(preprocess(load_picture(album / one["image"]), config)[None])
        kept = [stage[0][stage[0] < tokens] for stage in found.kept]
        into = found.into and [stage[0] for stage in found.into]
        assert one["kept"] == [stage.tolist() for stage in kept]
        lengths = [int(length[0]) - config.prefix for length in found.lengths]
        assert one["added"] == [n - len(stage) for n, stage in zip(lengths, kept)]
        cuts = [0, 1, 3, 4] if len(kept) == 5 else None  # ToMe's
        picture = crop(album / one["image"], config)
        seen += agree(tmp_path / "out" / one["file"], picture, tokens, kept, into, cuts)
        assert (one["into"] is None) == (into is None)
        for cut, pairs in enumerate(one["into"] or []):
            assert all(into[cut][token] == by for token, by in pairs)
            assert len(pairs) == len({token for token, _ in pairs})
        assert (one["answer"] is None) == (name == "registers")
    assert (seen > 0) == groups
    if name == "evit":
        assert all(one["added"][0] == 1 for one in fields["pictures"])
    assert fields["prefix"] == (5 if name == "registers" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynamic", "tome-batch"])
def test_batches_are_drawn_picture_by_picture(models, photos, tmp_path, name):
    """Each picture of a batch is drawn with its own tokens: those that it keeps alone."""
    artefact = open_artefact(models[name])
    assert artefact.dynamic_batch
    runner, config = artefact.in_runtime(), artefact.config
    together = runner(photos.batch(range(5)))
    with drawings(tmp_path / "out", artefact, False) as made:
        for place in range(5):
            made.add(f"{place}.png", photos[place], together, None, place)
        made.finish(runner.describe(), "five", {})
    for place, one in enumerate(made.drawn):
        alone = runner(photos[place][None])
        kept, into = [stage[0] for stage in alone.kept], alone.into
        into = into and [stage[0] for stage in into]
        cuts = None if len(kept) <= 6 else shown(len(kept), 6)
        picture = enlarged(photos[place], config)
        agree(tmp_path / "out" / one.file, picture, config.image_tokens, kept, into, cuts)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "openvino", "auto"])
def test_any_runtime(cli, models, album, tmp_path, runtime):
    if runtime == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed (scripts/setup cpu,openvino,train,dev)")
    model = signed_copy(models["1"], tmp_path / "m.onnx")
    if runtime == "auto":
        refused(cli("visualize", model, "--images", album, "--runtime", "auto"), "choice.json")
        ok(cli("bench", model, "--runs", 10, "--warmup", 0, "--limit", 1, "--save-choice",
               f"{model}.choice.json", "--runtime", "onnxruntime"))  # fmt: skip
    result = ok(cli("visualize", model, "--images", album, "--runtime", runtime, "--limit", 2))
    assert result.out == "m.visualized\n"
    fields = json.loads(Path("m.visualized/kept.json").read_text())
    backend = {"auto": "onnxruntime"}.get(runtime, runtime)
    assert fields["runner"]["backend"].startswith(backend)
    runner = open_artefact(model).in_runtime(backend)
    for one in fields["pictures"]:
        config = open_artefact(model).config
        found = runner(preprocess(load_picture(album / one["image"]), config)[None])
        assert one["kept"] == [stage[0].tolist() for stage in found.kept]


@pytest.mark.slow
def test_the_function_gives_what_lies_in_the_folder(models, album, tmp_path, capsys):
    done = asvit_deploy.visualize(models["tome"], images=album, output=tmp_path / "o", limit=3)
    assert capsys.readouterr().out == ""
    assert done.gallery.is_file()
    assert done.output == tmp_path / "o"
    fields = json.loads((tmp_path / "o" / "kept.json").read_text())
    assert [one.file for one in done.pictures] == [one["file"] for one in fields["pictures"]]
    assert [one.kept for one in done.pictures] == [
        tuple(map(tuple, one["kept"])) for one in fields["pictures"]
    ]
    assert len({one.mean_kept for one in done.pictures}) == 1, "counts are fixed"
    assert done.images == fields["images"]


@pytest.mark.slow
def test_the_same_pictures_give_the_same_bytes(cli, models, album):
    for folder in ("a", "b"):
        ok(cli("visualize", models["tome"], "--images", album, "-o", folder))
    names = sorted(path.name for path in Path("a").iterdir() if path.suffix == ".png")
    assert len(names) == 8
    for name in names:
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()


@pytest.mark.slow
def test_photographs_are_at_hand_and_few_panels_do(cli, models):
    ok(cli("visualize", models["1"], "--limit", 3, "--panels", 1, "-o", "out"))
    fields = json.loads(Path("out/kept.json").read_text())
    assert "photographs that scikit-image carries" in fields["images"]
    for one in fields["pictures"]:
        assert len(panels_of(Path("out") / one["file"], 224)) == 2


@pytest.mark.slow
def test_what_cannot_be_drawn_is_one_line(cli, models, album, tmp_path):
    refused(cli("visualize", models["dense"], "--images", album), "is dense", "nothing to draw")
    picture = album / "grey.jpg"
    refused(cli("predict", models["dense"], picture, "--save", "out"), "is dense")
    refused(cli("visualize", models["1"], "--images", "gone"), "gone does not exist")
    refused(cli("visualize", "gone.onnx", "--images", album), "gone.onnx does not exist")
    refused(cli("visualize", models["1"], "--runtime", "tensorrt"), "tensorrt")
    refused(cli("visualize", models["1"], "--runtime", "torch", "--library", "x.so"), "--library")
    refused(cli("visualize", "x.engine", "--library", "x.so"), "--library x.so", "leave it out")
    refused(cli("visualize", "x.engine", "--images", album), "x.engine does not exist")
    refused(cli("visualize", models["1"], "--plugin", "gone.so"), "gone.so")
    refused(cli("visualize", models["1"], "--panels", 0), "--panels")
    refused(cli("visualize", models["1"], "-o", ""), "an empty path")
    raises_one_line(lambda: asvit_deploy.visualize(models["1"], panels=0), "panels=0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_folders_of_others_stay_as_they_are(cli, models, album):
    model = models["1"]
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("mine")
    for more in ((), ("--force",)):
        args = ("visualize", model, "--images", album, "-o", "mine", *more)
        refused(cli(*args), "mine holds 'thesis.tex'", "name another folder")
        args = ("predict", model, album / "grey.jpg", "--save", "mine", *more)
        refused(cli(*args), "mine holds 'thesis.tex'")
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]
    args = ("visualize", model, "--images", album, "-o", "out", "--limit", 1)
    ok(cli(*args))
    refused(cli(*args), "out exists already; pass --force")
    ok(cli("visualize", model, "--images", album, "-o", "out", "--limit", 2, "--force"))
    assert len(list(Path("out").glob("0*.png"))) == 2
    Path("out/notes.txt").write_text("mine")
    refused(cli(*args, "--force"), "out holds 'notes.txt'")
    assert len(list(Path("out").glob("0*.png"))) == 2


@pytest.mark.slow
def test_drawings_among_the_pictures_are_not_drawn_again(cli, models, album):
    shutil.copytree(album, "photos")
    args = ("visualize", models["1"], "--images", "photos", "-o", "photos/out")
    refused(cli(*args), "photos/out lies in photos", "name another folder")
    assert not Path("photos/out").exists()


@pytest.mark.slow
def test_pictures_are_never_replaced_by_their_drawings(cli, models, album):
    args = ("visualize", models["1"], "--images", album, "-o", "out", "--limit", 1)
    ok(cli(*args))
    before = sorted(Path("out").iterdir())
    again = ("visualize", models["1"], "--images", "out", "-o", "out", "--force")
    refused(cli(*again), "out holds the pictures themselves")
    drawn = next(Path("out").glob("0*.png"))
    refused(cli("predict", models["1"], drawn, "--save", "out", "--force"), "--save out holds")
    refused(cli("predict", models["1"], drawn, "--force"), "add --save")
    assert sorted(Path("out").iterdir()) == before


@pytest.mark.slow
def test_unreadable_pictures_and_hostile_names(cli, models, album):
    shutil.copytree(album, "photos")
    Image.new("RGB", (2000, 1)).save("photos/line.png")
    Path("photos/broken.png").write_bytes(b"no picture")
    odd = ["\x1b[31mred\x1b[0m.png", "<script>alert(1)</script>.png".replace("/", "_"),
           "x" * 240 + ".png", "a\nb.png", "猫.png"]  # fmt: skip
    for name in odd:
        shutil.copy(album / "clear.png", Path("photos") / name)
    args = ("visualize", models["1"], "--images", "photos", "-o", "out")
    refused(cli(*args), "broken.png is not a picture")
    assert not Path("out").exists()
    result = ok(cli(*args, "--skip-limit", 2))
    assert result.out == "out\n"
    fields = json.loads(Path("out/kept.json").read_text())
    assert fields["skipped"] == 2
    assert fields["skipped_by_reason"] == {"no picture": 1, "too elongated": 1}
    assert {one["image"] for one in fields["pictures"]} >= set(odd)
    assert all(one["file"].isascii() and "\x1b" not in one["file"] for one in fields["pictures"])
    for one in fields["pictures"]:
        assert len(panels_of(Path("out") / one["file"], 224)) == 4
    shutil.rmtree("photos")
    Path("photos").mkdir()
    Path("photos/broken.png").write_bytes(b"no picture")
    refused(cli(*args, "--skip-limit", 2, "--force"), "none of the pictures can be read")
    assert Path("out/gallery.png").is_file()


@pytest.mark.slow
def test_class_names_are_written_as_they_are_and_steer_nothing(cli, models, album, tmp_path):
    """Those of a sidecar may be anything; `--classes` refuses control characters by itself."""
    names = [f"<b>{i}</b>\x1b[31m\u202e" + i * "long name " for i in range(10)]
    model = signed_copy(models["1"], tmp_path / "m.onnx", classes=names, classes_from="a tool")
    result = ok(cli("visualize", model, "--images", album, "-o", "out"))
    assert "\x1b" not in result.out + result.err
    fields = json.loads(Path("out/kept.json").read_text())
    for one in fields["pictures"]:
        assert one["answer"]["label"] == names[one["answer"]["index"]]
        assert 0 < one["answer"]["probability"] <= 1
        assert len(panels_of(Path("out") / one["file"], 224)) == 4
    assert "\x1b" not in Path("out/kept.json").read_text()


@pytest.mark.slow
def test_predict_saves_what_it_says(cli, models, album):
    pictures = [album / "grey.jpg", album / "wide.png", album / "sub" / "wide.png"]
    Path("broken.png").write_bytes(b"no picture")
    args = ("predict", models["tome"], *pictures, "broken.png", "--skip-limit", 1)
    plain = json.loads(ok(cli(*args, "--json")).out)
    said = json.loads(ok(cli(*args, "--save", "out", "--json")).out)
    assert [{k: v for k, v in one.items() if k != "drawn"} for one in said] == plain
    assert "drawn" not in said[3]
    artefact = open_artefact(models["tome"])
    runner, config = artefact.in_runtime(), artefact.config
    for one, path in zip(said, pictures):
        found = runner(preprocess(load_picture(path), config)[None])
        kept, into = [stage[0] for stage in found.kept], [stage[0] for stage in found.into]
        assert one["kept"] == [stage.tolist() for stage in kept]
        drawing, cuts = Path(one["drawn"]), range(len(kept))
        assert agree(drawing, crop(path, config), config.image_tokens, kept, into, cuts) > 0
    refused(cli(*args, "--save", "out"), "out exists already; pass --force")
    printed = ok(cli(*args, "--save", "out", "--force")).out
    assert printed.count("  drawn: out/") == 3
    fields = json.loads(Path("out/kept.json").read_text())
    assert fields["skipped"] == 1
