"""The C++ samples' preprocessing is Pillow's; the one for ONNX Runtime says what `predict` says."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL
import pytest
from embedding_files import written
from PIL import Image
from skimage import data

import asvit_deploy
from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.data.images import open_images, preprocess
from asvit_deploy.exporting.export import export
from asvit_deploy.models.archs import arch
from asvit_deploy.models.config import ArchConfig, Preprocessing

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "plugins" / "sample"
FLOAT, FLOAT16, INT64 = (getattr(onnx.TensorProto, t) for t in ("FLOAT", "FLOAT16", "INT64"))
STRICT = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror")


def compiled(command: list[object]) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def preprocessing(compiler, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("preprocess") / "preprocess"
    compiled([compiler, *STRICT, ROOT / "tests" / "cpp" / "preprocess.cc", "-o", output])
    return output


@pytest.fixture(scope="module")
def runtime(tmp_path_factory) -> Path:
    """A folder with the wheel's library under the names that linker and loader ask for."""
    folder = tmp_path_factory.mktemp("onnxruntime")
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("this wheel of onnxruntime has no library of its own")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(found[0])
    return folder


@pytest.fixture(scope="module")
def run_model(compiler, ort_headers, runtime, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("sample") / "run_model"
    compiled([compiler, *STRICT, "-isystem", ort_headers.folder, SAMPLE / "run_model.cc",
              f"-L{runtime}", "-lonnxruntime", f"-Wl,-rpath,{runtime}", "-o", output])  # fmt: skip
    return output


def picture(path: Path, size: tuple[int, int], seed: int) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def rows_first(path: Path, config: ArchConfig) -> Image.Image:
    """A picture resized by Pillow, its rows first and then its columns. Pillow 13 takes the columns
    of tall pictures first, those before it never do: some bytes then differ."""
    found, rules = Image.open(path), config.preprocessing
    short, (width, height) = int(config.image_size / rules.crop_pct), found.size
    if rules.crop_mode == "squash":
        width, height = short, short
    elif width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    kind = Image.Resampling[rules.interpolation.upper()]
    return found.resize((width, found.height), kind).resize((width, height), kind)


def output_of(program: Path, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_input_is_pillows_to_the_bit(preprocessing, tmp_path, interpolation):
    sizes = [(300, 200), (200, 301), (97, 640), (31, 57), (256, 256), (37, 20), (28, 28)]
    crops = ((0.875, "center"), (0.9, "squash"), (1, "center"))
    means, stds = (0.485, 0.456, 0.406), (0.229, 0.2, 0.225)
    for number, (size, crop) in enumerate(itertools.product(sizes, crops)):
        rules = Preprocessing(crop[0], interpolation, means, stds, crop[1])
        sized = arch("as_deit_mini").at(image_size=32 + number % 3 * 4)
        config = replace(sized, preprocessing=rules)
        path = picture(tmp_path / "x.ppm", size, number)
        (tmp_path / "rules.json").write_text(json.dumps({"preprocessing": rules.fields()}))
        done = output_of(preprocessing, tmp_path / "rules.json", path, config.image_size)
        assert done.returncode == 0, done.stderr
        expected = preprocess(rows_first(path, config), config)
        found = np.frombuffer(done.stdout, np.float32).reshape(expected.shape)
        np.testing.assert_array_equal(found, expected, err_msg=f"{size} {rules}")


def test_a_portrait_is_preprocessed_as_here(preprocessing, tmp_path):
    """To the bit where Pillow resizes rows first; columns first, as Pillow 13 takes some tall
    pictures, move bytes by two steps at most, of noise fewer than one in five."""
    config = replace(arch("as_deit_mini").at(image_size=32), preprocessing=Preprocessing())
    (tmp_path / "rules.json").write_text(json.dumps(Preprocessing().fields()))
    for number, size in enumerate([(97, 640), (200, 301), (301, 200), (64, 64)]):
        path = picture(tmp_path / "x.ppm", size, number)
        done = output_of(preprocessing, tmp_path / "rules.json", path, 32)
        assert done.returncode == 0, done.stderr
        expected = preprocess(Image.open(path), config)
        found = np.frombuffer(done.stdout, np.float32).reshape(expected.shape)
        if size[0] >= size[1] or int(PIL.__version__.partition(".")[0]) < 13:
            np.testing.assert_array_equal(found, expected)
            continue
        step = 1 / 255 / np.array(Preprocessing().std, np.float32).reshape(3, 1, 1)
        steps = np.abs(found - expected) / step
        assert steps.max() < 2.01
        assert np.mean(steps > 0.5) < 0.2


@pytest.mark.parametrize(("content", "word"), [
    (b"", "no binary PPM"), (b"P5 2 2 255 ....", "no binary PPM"), (b"P6 2 2 65535 ", "no binary"),
    (b"P6 2 -2 255 ", "no binary"), (b"P6 999999999 999999999 255 ", "no binary"),
    (b"P6 2 2 255 abc", "ends early"), (b"P6 # 9\n# 8", "no binary"), (b"P6 2", "no binary"),
])  # fmt: skip
def test_a_bad_picture_is_one_line(preprocessing, tmp_path, content, word):
    (tmp_path / "x.ppm").write_bytes(content)
    (tmp_path / "rules.json").write_text(json.dumps(Preprocessing().fields()))
    done = output_of(preprocessing, tmp_path / "rules.json", tmp_path / "x.ppm", 32)
    assert done.returncode == 1
    assert done.stderr.decode().startswith("Error: ")
    assert word in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_rules_that_the_samples_lack_are_named(preprocessing, tmp_path):
    picture(tmp_path / "x.ppm", (40, 40), 0)
    for fields, word in (({"interpolation": "lanczos"}, "another interpolation"),
                         ({"crop_pct": 2}, "crop_pct is not"),
                         ({"mean": []}, "mean is not")):  # fmt: skip
        text = json.dumps({**Preprocessing().fields(), **fields})
        (tmp_path / "rules.json").write_text(text)
        done = output_of(preprocessing, tmp_path / "rules.json", tmp_path / "x.ppm", 32)
        assert (done.returncode, word in done.stderr.decode()) == (1, True), done.stderr
    rest = {key: value for key, value in Preprocessing().fields().items() if key != "mean"}
    cut = json.dumps(rest)[:-1]
    (tmp_path / "rules.json").write_text(cut + ', "mean": [0.5')  # the file's last byte
    done = output_of(preprocessing, tmp_path / "rules.json", tmp_path / "x.ppm", 32)
    assert (done.returncode, b"mean is not" in done.stderr) == (1, True), done.stderr
    (tmp_path / "rules.json").write_text("{}")
    done = output_of(preprocessing, tmp_path / "rules.json", tmp_path / "x.ppm", 32)
    assert b"does not say its crop_pct" in done.stderr


@pytest.mark.slow
def test_the_sample_says_what_predict_says(run_model, mini_artifacts, op_library, tmp_path):
    paths = []
    for name in ("chelsea", "coffee", "astronaut", "rocket"):
        paths.append(tmp_path / f"{name}.ppm")
        Image.fromarray(getattr(data, name)()).save(paths[-1])
    ways = [(mini_artifacts["1", "auto"], None), (mini_artifacts["1", "auto"], op_library),
            (mini_artifacts["dynamic", "auto"], None)]  # fmt: skip
    counts = set()
    for model, library in ways:
        said = asvit_deploy.predict(model, paths, library=library)
        for path, expected in zip(paths, said):
            done = output_of(run_model, model, path, *([library] if library else []))
            assert done.returncode == 0, done.stderr
            *best, kept = done.stdout.decode().splitlines()
            assert [tuple(line.split()) for line in best] == [
                ("class", str(guess.index), f"{guess.probability:.4f}") for guess in expected.top
            ]
            assert kept == "kept tokens per stage: " + ", ".join(str(len(s)) for s in expected.kept)
            counts.add(kept)
    assert len(counts) > 1, "other pictures keep others"


@pytest.mark.slow
def test_embeddings_and_what_is_no_model(run_model, tmp_path):
    checkpoint = load_checkpoint(written(tmp_path, "dinov2"))
    export(checkpoint, tmp_path / "d.onnx", open_images(None, checkpoint.config, limit=4))
    path = picture(tmp_path / "x.ppm", (90, 70), 1)
    (expected,) = asvit_deploy.predict(tmp_path / "d.onnx", path)
    done = output_of(run_model, tmp_path / "d.onnx", path)
    line, kept = done.stdout.decode().splitlines()
    numbers = re.fullmatch(r"embedding of 128 numbers, norm ([\d.]+): (.*) \.\.\.", line)
    assert numbers is not None
    assert float(numbers[1]) == pytest.approx(expected.norm, rel=1e-4)
    first = list(map(float, numbers[2].split()))
    assert first == pytest.approx(expected.embedding[:5], rel=1e-3, abs=1e-5)
    assert kept == "kept tokens per stage: " + ", ".join(str(len(s)) for s in expected.kept)
    assert output_of(run_model).returncode == 2
    for arguments in ((tmp_path / "gone.onnx", path), (tmp_path / "d.onnx", tmp_path / "gone.ppm"),
                      (path, path), (tmp_path / "d.onnx", path, path)):  # fmt: skip
        done = output_of(run_model, *arguments)
        assert (done.returncode, done.stderr.count(b"Error: ")) == (1, 1), done.stderr


def model_of(path: Path, given: dict[str, tuple[int, list[int]]], takes: int = FLOAT) -> Path:
    """An ONNX file that takes a picture and gives constants of these types and shapes."""
    values = {
        name: np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(kind))
        for name, (kind, shape) in given.items()
    }
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))
         for name, value in values.items()],
        "g", [onnx.helper.make_tensor_value_info("images", takes, [1, 3, 32, 32])],
        [onnx.helper.make_tensor_value_info(name, *given[name]) for name in given],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)],
                                   ir_version=9)  # fmt: skip
    said = {"asvit_preprocessing": json.dumps(Preprocessing().fields())}
    onnx.helper.set_model_props(model, said)
    onnx.save(model, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("given", "word"), [
    ({"logits": (INT64, [1, 9])}, "logits is not"), ({"logits": (FLOAT, [9])}, "logits is not"),
    ({"logits": (FLOAT, [1, 0])}, "logits is not"), ({"logits": (FLOAT, [2, 3])}, "logits is not"),
    ({"logits": (FLOAT, [1, 3]), "length_0": (FLOAT, [1])}, "length_0 is not"),
    ({"logits": (FLOAT, [1, 3]), "length_0": (INT64, [0])}, "length_0 is not"),
    ({"logits": (FLOAT, [1, 3]), "length_0": (INT64, [1])}, None),
])  # fmt: skip
def test_outputs_of_other_types_and_shapes_are_refused(run_model, tmp_path, given, word):
    path = picture(tmp_path / "x.ppm", (40, 40), 0)
    done = output_of(run_model, model_of(tmp_path / "m.onnx", given), path)
    if word is None:
        assert done.stdout.startswith(b"class 0  0.3333"), done.stderr
        half = output_of(run_model, model_of(tmp_path / "m.onnx", given, FLOAT16), path)
        assert b"takes no square pictures" in half.stderr
        return
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1), done.stderr
    assert word in done.stderr.decode()


@pytest.mark.slow
def test_the_sample_builds_with_cmake(ort_headers, runtime, tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    compiled(["cmake", "-S", SAMPLE, "-B", tmp_path, f"-DORT_HEADERS={ort_headers.folder}",
              f"-DORT_LIBRARY={runtime / 'libonnxruntime.so'}"])  # fmt: skip
    done = subprocess.run(["cmake", "--build", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
