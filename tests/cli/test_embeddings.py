"""Networks that give embeddings through every command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import refused, signed_copy
from embedding_files import CONFIGS, network, written
from onnx import numpy_helper
from PIL import Image

from asvit_deploy import sidecar
from asvit_deploy.checkpoints.load import build_model, load_checkpoint
from asvit_deploy.data.images import load_picture, open_images, preprocess
from asvit_deploy.exporting.export import export
from asvit_deploy.models.macs import model_macs, teacher_macs
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner
from asvit_deploy.similarity import agreement, nearest, units, voted

WIDTH = {kind: config.num_classes for kind, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints and ONNX files of both kinds: `clip`, `clip.onnx`, `clip dense` and so on."""
    folder, found = tmp_path_factory.mktemp("embeddings"), {}
    for kind, config in CONFIGS.items():
        found[kind], found[f"{kind} dense"] = written(folder, kind), written(folder, kind, True)
        found[f"{kind}.onnx"] = folder / f"{kind}.onnx"
        pictures = open_images(None, config, limit=4)
        export(load_checkpoint(found[kind]), found[f"{kind}.onnx"], pictures)
    return found


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Twelve pictures in a folder per kind of noise, so that neighbours tell them apart."""
    folder, rng = tmp_path_factory.mktemp("by_class"), np.random.default_rng(0)
    for place, (name, low, high) in enumerate([("dark", 0, 90), ("light", 150, 255)]):
        (folder / name).mkdir()
        for i in range(6):
            coarse = rng.integers(low, high, (2 + place, 3, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((40, 36)).save(folder / name / f"{i}.png")
    return folder


def inputs(folder: Path, kind: str) -> tuple[np.ndarray, list[Path]]:
    paths = sorted(folder.rglob("*.png"))
    return np.stack([preprocess(load_picture(path), CONFIGS[kind]) for path in paths]), paths


def outputs(path: Path, images: np.ndarray, dense: bool = False) -> np.ndarray:
    """One image at a time, by PyTorch."""
    runner = TorchRunner(build_model(load_checkpoint(path), dense=dense))
    return np.concatenate([runner(image[None]).output for image in images])


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("batch", ["1", "dynamic"])
def test_export_and_check(cli, made, kind, batch):
    result = cli("export", "--ckpt", made[kind], "-o", "x.onnx", "--batch", batch)
    assert result.code == 0, result.err
    names = [output.name for output in onnx.load("x.onnx").graph.output]
    assert names == ["embedding", "length_0", "length_1", "length_2"]
    fields = sidecar.read(Path("x.onnx"))
    assert (fields["output"], fields["num_classes"], fields["classes"]) == (
        "embedding", WIDTH[kind], None,
    )  # fmt: skip
    result = cli("check", "x.onnx", "--limit", 9, "--json")
    assert result.code == 0, result.err
    reports = [row["parity"] for row in json.loads(result.out)]
    assert len(reports) == (2 if batch == "dynamic" else 1) * len(
        {r["run"].split(",")[0] for r in json.loads(result.out)}
    )
    for parity in reports:
        assert parity["output"] == "embedding"
        assert parity["neighbours_equal"] == parity["images"] == 9
        assert parity["cosine_error"] < 1e-9
        assert "logit_error" not in parity
    table = cli("check", "x.onnx", "--limit", 3)
    assert "same neighbour" in table.out
    assert "1 - cosine" in table.out
    assert "logit" not in table.out
    assert cli("check", "x.onnx", "--limit", 2).err.count("take 3 images to be judged") == 1


@pytest.mark.slow
def test_check_fails_for_another_network(cli, made, tmp_path):
    def wrong(proto):
        tensor = next(t for t in proto.graph.initializer if "blocks.5.mlp.fc2.weight" in t.name)
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(values[::-1].copy(), tensor.name))

    path = signed_copy(made["clip.onnx"], tmp_path / "wrong.onnx", wrong)
    result = cli("check", path, "--limit", 6)
    assert result.code == 1
    assert "the cosine with the reference falls to 1 - " in result.err


@pytest.mark.slow
def test_check_takes_a_table_for_each_kind_of_output(cli, made, mini_artifacts):
    result = cli("check", made["clip.onnx"], mini_artifacts["1", "auto"], "--limit", 3)
    assert result.code == 0, result.err
    assert result.out.index("same top-1") < result.out.index("same neighbour")


@pytest.mark.slow
def test_quantised_by_another_tool(cli, made, tmp_path):
    from onnxruntime.quantization import quantize_dynamic

    plain = onnx.load(made["dinov2.onnx"])
    del plain.metadata_props[:], plain.graph.value_info[:]
    onnx.save(plain, tmp_path / "plain.onnx")
    quantize_dynamic(tmp_path / "plain.onnx", tmp_path / "int8.onnx", per_channel=True,
                     op_types_to_quantize=["MatMul", "Gemm"])  # fmt: skip
    result = cli("check", "--reference", made["dinov2.onnx"], tmp_path / "int8.onnx", "--limit",
                 12, "--json")  # fmt: skip
    parity = json.loads(result.out)[0]["parity"]
    assert parity["precision"] == "int8"
    assert 1e-9 < parity["cosine_error"] <= 1e-2, "what int8 may turn an embedding by"


@pytest.mark.parametrize("kind", CONFIGS)
def test_predict(cli, made, photographs, kind):
    images, paths = inputs(photographs, kind)
    images, paths = images[:5], paths[:5]
    expected = outputs(made[kind], images)
    result = cli("predict", made[f"{kind}.onnx"], *paths, "--json")
    assert result.code == 0, result.err
    said = json.loads(result.out)
    np.testing.assert_allclose([one["embedding"] for one in said], expected, rtol=0, atol=1e-4)
    directions = units(expected)
    for i, (one, other) in enumerate(zip(said, nearest(directions))):
        assert one["nearest"]["image"] == str(paths[other])
        assert one["nearest"]["cosine"] == pytest.approx(
            directions[i] @ directions[other], abs=1e-5
        )
        assert one["norm"] == pytest.approx(np.linalg.norm(expected[i]), rel=1e-5)
        assert len(one["kept"]) == 3
        assert "top" not in one
    text = cli("predict", made[f"{kind}.onnx"], *paths)
    assert f"embedding of {WIDTH[kind]} numbers, norm " in text.out
    assert text.out.count("nearest: ") == 5
    assert "labels" not in text.err


def test_predict_of_one_picture_and_of_a_broken_one(cli, made, photographs, tmp_path):
    picture = photographs / "dark" / "0.png"
    alone = cli("predict", made["clip.onnx"], picture)
    assert "nearest" not in alone.out
    (tmp_path / "broken.png").write_bytes(b"no picture")
    args = ("predict", made["clip.onnx"], picture, "broken.png", "--skip-limit", 1, "--json")
    first, second = json.loads(cli(*args).out)
    assert first["nearest"] is None
    assert set(second) == {"image", "skipped"}


def test_predict_with_class_names(cli, made, photographs, tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    result = cli("predict", made["clip.onnx"], photographs / "dark" / "0.png", "--classes",
                 "names.txt")  # fmt: skip
    assert result.code == 0, result.err
    assert "gives embeddings and has no classes: --classes names.txt is not looked at" in result.err


def changed_head(made, target: Path, change) -> Path:
    def apply(proto):
        tensor = next(t for t in proto.graph.initializer if list(t.dims) in ([48, 128], [128, 48]))
        values = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return signed_copy(made["clip.onnx"], target, apply)


@pytest.mark.slow
def test_predict_of_zero_and_of_nan(cli, made, photographs, tmp_path):
    pictures = sorted((photographs / "dark").iterdir())[:2]
    zero = changed_head(made, tmp_path / "zero.onnx", lambda w: 0 * w)
    result = cli("predict", zero, *pictures)
    assert result.code == 0, result.err
    assert result.out.count("a norm of 0 has no direction") == 2
    assert json.loads(cli("predict", zero, *pictures, "--json").out)[0]["nearest"] is None
    lost = changed_head(made, tmp_path / "nan.onnx", lambda w: w * np.nan)
    refused(cli("predict", lost, *pictures), "nan.onnx gives numbers that are not finite for")


@pytest.mark.slow
@pytest.mark.parametrize("values", [0.0, np.nan])
def test_directionless_embeddings_are_judged_by_nothing(cli, made, photographs, tmp_path, values):
    path = changed_head(made, tmp_path / "odd.onnx", lambda w: w * np.float32(values))
    result = cli("check", path, "--limit", 3)
    assert result.code == 1
    assert "embeddings of 3/3 images are zero or not finite" in result.err
    refused(cli("evaluate", path, "--data", photographs), "odd.onnx gives embeddings that are zero "
            "or not finite on 12 of 12 pictures")  # fmt: skip
    bench = cli("bench", path, "--runs", 10, "--warmup", 0, "--limit", 2, "--threads", 1)
    assert bench.code == 0, bench.err
    assert "note: no agreement with the dense network: " in bench.out


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("form", ["", ".onnx"])
def test_evaluate_on_class_folders(cli, made, photographs, kind, form):
    images, paths = inputs(photographs, kind)
    labels = np.array([path.parent.name == "light" for path in paths]).astype(np.int64)
    ours, dense = outputs(made[kind], images), outputs(made[kind], images, dense=True)
    result = cli("evaluate", made[kind + form], "--data", photographs, "--neighbours", 3, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    (row,) = report["rows"]
    assert (report["output"], report["taken"], row["images"]) == ("embedding", 12, 12)
    expected = agreement(dense, ours, "x")
    assert row["agreement"]["neighbour"]["value"] == expected.pop("neighbour")
    del row["agreement"]["neighbour"]
    assert row["agreement"] == pytest.approx(expected, abs=1e-6)
    for whose, vectors in (("model", ours), ("dense", dense)):
        right = (voted(units(vectors), labels, 3) == labels).mean()
        assert row["knn"][whose]["value"] == pytest.approx(right)
        assert row["knn"][whose]["low"] <= right <= row["knn"][whose]["high"]
    assert row["knn"]["model"]["value"] > 0.7, "dark and light are told apart"
    assert (row["knn"]["neighbours"], row["knn"]["alone"]) == (3, 0)
    config = CONFIGS[kind].saving()  # the last block works out the prefix alone
    prediction = TorchRunner(build_model(load_checkpoint(made[kind])))(images)
    lengths = [np.asarray(n, np.float64) for n in prediction.lengths]
    share = float(np.mean(model_macs(config, lengths))) / teacher_macs(config)
    assert row["macs_share"] == pytest.approx(share)
    assert row["mean_kept"] == pytest.approx([n.mean() - config.prefix for n in lengths])


def test_evaluate_without_labels(cli, made, photographs, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(photographs.rglob("*.png"))):
        (flat / f"{i:02}.png").write_bytes(path.read_bytes())
    args = ("evaluate", made["clip"], "--data", flat, "--batch-size", 1, "--batch-size", 5)
    result = cli(*args)
    assert result.code == 0, result.err
    assert "no classes, for 12 pictures lie in it directly" in result.err
    assert "cosine with dense (95 %)" in result.out
    assert "NN accuracy" not in result.out
    assert "pictures: 12 of 12 taken" in result.out
    one, five = json.loads(cli(*args, "--json").out)["rows"]
    assert one["knn"] is None
    assert one["agreement"]["cosine"] == pytest.approx(five["agreement"]["cosine"], abs=1e-6)
    few = cli(*args, "--limit", 2, "--json")
    assert json.loads(few.out)["rows"][0]["agreement"]["neighbour"] is None
    assert few.err.count("2 pictures: nearest neighbours take three or more") == 1
    (flat / "99.png").write_bytes(b"broken")
    refused(cli(*args), "99.png")
    skipped = json.loads(cli(*args, "--skip-limit", 1, "--json").out)
    assert (skipped["taken"], skipped["skipped"], skipped["seen"]) == (12, 1, 13)


def test_evaluate_of_a_dense_network(cli, made, photographs):
    result = cli("evaluate", made["dinov2 dense"], "--data", photographs, "--json")
    assert result.code == 0, result.err
    (row,) = json.loads(result.out)["rows"]
    assert (row["agreement"], row["knn"]["dense"], row["mean_kept"]) == (None, None, [])
    assert "no dense twin to agree with: it is dense itself" in result.err
    same = cli("evaluate", made["dinov2"], "--data", photographs, "--dense", "--json")
    assert json.loads(same.out)["rows"][0]["knn"]["model"] == row["knn"]["model"]
    flat = photographs / "dark"
    refused(cli("evaluate", made["dinov2 dense"], "--data", flat), "there is nothing to evaluate")


def test_evaluate_where_the_checkpoint_is_gone(cli, made, photographs, tmp_path):
    gone = {"path": "/gone/x.safetensors", "sha256": "0"}
    path = signed_copy(made["clip.onnx"], tmp_path / "x.onnx", source=gone)
    result = cli("evaluate", path, "--data", photographs, "--json")
    assert result.code == 0, result.err
    assert "x.onnx has no dense twin to agree with: the checkpoint of" in result.err
    assert json.loads(result.out)["rows"][0]["knn"]["dense"] is None
    refused(cli("evaluate", path, "--data", photographs / "dark"), "there is nothing to evaluate")


def test_evaluate_where_neighbours_say_little(cli, made, photographs, tmp_path):
    one = tmp_path / "one"
    (one / "only").mkdir(parents=True)
    (one / "only" / "x.png").write_bytes((photographs / "dark" / "0.png").read_bytes())
    result = cli("evaluate", made["clip"], "--data", one)
    assert result.code == 0, result.err
    assert "it holds 1 class folder" in result.err
    for name in ("b", "c"):
        (one / name).mkdir()
        (one / name / "y.png").write_bytes((photographs / "light" / "1.png").read_bytes())
    result = cli("evaluate", made["clip"], "--data", one, "--json")
    assert "each picture has but 2 others: so many neighbours vote, not 5" in result.err
    assert "3 pictures are alone in a class" in result.err
    assert json.loads(result.out)["rows"][0]["knn"]["alone"] == 3
    names = cli("evaluate", made["clip"], "--data", one, "--classes", "names.txt")
    assert "--classes names.txt is not looked at" in names.err
    refused(cli("evaluate", made["clip"], "--data", "nowhere"), "nowhere does not exist")
    refused(cli("evaluate", made["clip"], "--data", one, "--neighbours", 0), "neighbours")


def test_neighbours_are_for_embeddings(cli):
    result = cli("evaluate", "default", "--data", "digits", "--limit", 4, "--neighbours", 3)
    assert "--neighbours, which is for embeddings, is not looked at" in result.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_calibrate(cli, made, kind):
    """The budget is met with all rows of the prefix, and agreement is that of the written file."""
    args = ("calibrate", "--ckpt", made[f"{kind} dense"], "--budget", 0.7, "--limit", 16,
            "--method", "threshold")  # fmt: skip
    result = cli(*args, "-o", "x.safetensors", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    config, pictures = CONFIGS[kind].saving(), open_images(None, CONFIGS[kind], limit=16)
    images = np.stack(pictures.loaded()[0])
    runner = TorchRunner(build_model(load_checkpoint(Path("x.safetensors"))))
    made_now = [runner(image[None]) for image in images]
    lengths = np.array([[int(n[0]) for n in one.lengths] for one in made_now], np.float64)
    share = np.mean(model_macs(config, list(lengths.T))) / teacher_macs(config)
    assert share == pytest.approx(0.7, rel=0.01)
    assert report["macs_ratio"] == pytest.approx(share)
    kept = [k["mean"] for k in report["kept_tokens"]]
    assert kept == pytest.approx((lengths - config.prefix).mean(0).tolist())
    ours = np.concatenate([one.output for one in made_now])
    expected = agreement(outputs(made[f"{kind} dense"], images), ours, "x")
    assert report["agreement"] == pytest.approx(expected, abs=1e-6)
    best = max(candidate["agreement"]["cosine"] for candidate in report["candidates"])
    assert report["agreement"]["cosine"] == pytest.approx(best)
    assert set(report["random"]) == set(expected)
    table = cli(*args, "-o", "y.safetensors").out
    assert "cosine (95 %)" in table
    assert "same neighbour" in table
    assert "KL" not in table


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_bench(cli, made, kind):
    args = ("bench", made[f"{kind}.onnx"], "--runs", 10, "--warmup", 0, "--limit", 6, "--threads",
            1)  # fmt: skip
    result = cli(*args, "--json")
    assert result.code == 0, result.err
    (report,) = json.loads(result.out)
    images = np.stack(open_images(None, CONFIGS[kind], limit=6).loaded()[0])
    expected = agreement(outputs(made[kind], images, True), outputs(made[kind], images), "x")
    assert report["agreement"] == pytest.approx(expected, abs=1e-5)
    assert "agreement with dense on 6 images: cosine " in cli(*args).out


@pytest.mark.slow
def test_finetune_from_embeddings(cli, made, photographs):
    common = ("finetune", "--data", photographs, "--batch-size", 4, "--steps", 2, "--force", "-o",
              "out.safetensors")  # fmt: skip
    dense = cli(*common, "--pretrained", made["clip"], "--dense")
    assert dense.code == 0, dense.err
    assert "no classes; a fresh head is trained in place of its projection" in dense.err
    config = load_checkpoint(Path("out.safetensors")).config
    assert (config.head, config.output, config.num_classes) == ("class", "logits", 2)
    adaptive = cli(*common, "--pretrained", made["dinov2"], "--budget", 0.8)
    assert adaptive.code == 0, adaptive.err
    assert "has no head; a fresh head is trained, and without a --teacher nothing" in adaptive.err
    loaded = load_checkpoint(Path("out.safetensors"))
    assert (loaded.adaptive, loaded.config.prefix) == (True, 5)
    model, images = build_model(loaded), inputs(photographs, "dinov2")[0]
    with torch.inference_mode():
        logits, trace = model(torch.from_numpy(images))
    assert logits.shape == (12, 2)
    lengths = [n.double() for n in trace.length]
    share = float(model_macs(loaded.config, lengths).mean()) / teacher_macs(loaded.config)
    assert share == pytest.approx(0.8, rel=0.02), "on the pictures it was trained on"


def test_a_teacher_of_embeddings_is_refused(cli, made, photographs):
    result = cli("finetune", "--data", photographs, "--pretrained", made["dinov2"], "--budget",
                 0.8, "--teacher", made["clip dense"], "--steps", 2)  # fmt: skip
    refused(result, "clip_dense.safetensors gives embeddings and no classes, so it teaches none")


def test_weights_that_are_no_longer_embeddings_are_no_reference(cli, made, mini_artifacts):
    refused(cli("check", "--reference", mini_artifacts["1", "auto"], made["clip.onnx"]),
            "no reference for")  # fmt: skip


def test_an_output_under_another_name_is_missed(cli, made, tmp_path):
    def renamed(proto):
        for node in proto.graph.node:
            node.output[:] = ["other" if o == "embedding" else o for o in node.output]
        proto.graph.output[0].name = "other"

    path = signed_copy(made["clip.onnx"], tmp_path / "x.onnx", renamed)
    refused(cli("check", path), "has no output logits or embedding")


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_runner_gives_the_network_s_own_numbers(made, kind):
    images = np.stack(open_images(None, CONFIGS[kind], limit=3).loaded()[0])
    ours = OrtRunner(made[f"{kind}.onnx"])(images)
    with torch.inference_mode():
        expected = network(kind)(torch.from_numpy(images))[0].numpy()
    np.testing.assert_allclose(ours.output, expected, rtol=0, atol=1e-5)
