"""Methods from `calibrate` to `predict`, as a user runs them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image

from asvit_deploy.checkpoints.load import build_model, load_checkpoint, save_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.errors import UserError
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch
from asvit_deploy.models.macs import model_macs, teacher_macs
from asvit_deploy.ops import onnx_op
from asvit_deploy.reduction.ltmp import LTMP
from asvit_deploy.sidecar import read

MINI = replace(arch("as_deit_mini"), num_classes=2)


def ok(result):
    assert result.code == 0, result.err
    return result


@pytest.fixture
def dense(cli, tmp_path) -> Path:
    """Weights in the current folder, with peaked attention, and pictures in a folder a class."""
    torch.manual_seed(0)
    model = build(MINI, adaptive=False).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(4)
    save_checkpoint(tmp_path / "dense.safetensors", model, {})
    for i, view in enumerate(open_images(None, MINI, limit=12).views):
        place = tmp_path / "data" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        view.picture().resize((80, 70)).save(place / f"{i:02}.png")
        (tmp_path / "pictures").mkdir(exist_ok=True)
        view.picture().resize((80, 70)).save(tmp_path / "pictures" / f"{i:02}.png")
    return Path("dense.safetensors")


CALIBRATE = ("calibrate", "--ckpt", "dense.safetensors", "--images", "pictures", "-o",
             "c.safetensors")  # fmt: skip


def share(path: Path) -> float:
    """Mean MACs over the teacher's, of the network that a checkpoint holds."""
    model = build_model(load_checkpoint(path))
    with torch.inference_mode():
        traces = [model(torch.from_numpy(image)[None])[1]
                  for image in open_images(Path("pictures"), model.config)]  # fmt: skip
    lengths = np.array([[float(n) for n in trace.length] for trace in traces])
    macs = model_macs(model.config, list(lengths.T), model.cuts)
    return float(np.mean(macs)) / teacher_macs(model.config)


@pytest.mark.parametrize("name", ["dense.safetensors", "folder/../dense.safetensors"])
def test_a_network_is_not_replaced_by_what_lies_beside_it(cli, dense, name):
    Path("folder").mkdir()
    model = build_model(load_checkpoint(dense)).with_reduction(LTMP((0, 1, 2)))
    save_checkpoint(Path("ltmp.safetensors"), model, {}, dense)
    before = dense.read_bytes()
    for line in (("calibrate", "--ckpt", "ltmp.safetensors", "--images", "pictures"),
                 ("finetune", "--data", "data", "--pretrained", "ltmp.safetensors")):  # fmt: skip
        refused(cli(*line, "--method", "ltmp", "-o", name, "--force"), "is the input itself")
    with pytest.raises(UserError, match="is the network that this is of"):
        save_checkpoint(dense, model, {}, dense)
    assert dense.read_bytes() == before


@pytest.mark.parametrize("method", ["ltmp", "threshold"])
def test_what_is_per_picture_anyway_is_not_asked_to_be(cli, dense, method):
    words = f"{method} keeps its own number of every picture anyway; drop --per-picture"
    options = "--method", method, "--per-picture"
    refused(cli(*CALIBRATE, *options), words)
    refused(cli("finetune", "--data", "data", "--pretrained", dense, *options), words)


def test_ltmp_is_refused_by_its_own_name(cli, dense):
    options = "--method", "ltmp"
    out = "budget 0.02 is out of reach of ltmp with 5 cuts"
    refused(cli(*CALIBRATE, *options, "--budget", "0.02"), out)
    for more in ((), ("--per-picture",)):
        refused(cli(*CALIBRATE, *options, "--max-kept", "50", *more), "no use with ltmp")
    found = ok(cli(*CALIBRATE, *options, "--budget", "0.75"))
    assert "as_deit_mini: ltmp, a threshold at each cut; asked for" in found.out


ROUTES = [
    (("--method", "size-passing"), "size-passing", "static"),
    (("--method", "size-passing", "--per-picture", "--max-kept", "150", "--cuts", "1,3,4",
      "--budget", "0.7"), "size-passing", "dynamic"),
    (("--method", "tome", "--cuts", "0,2,4", "--budget", "0.7"), "tome", "static"),
    (("--method", "bat", "--budget", "0.7"), "bat", "static"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("options", "name", "mode"), ROUTES)
def test_from_calibrate_to_predict(cli, dense, options, name, mode):
    report = json.loads(ok(cli(*CALIBRATE, *options, "--json")).out)
    budget = 0.7 if "0.7" in options else 0.65
    assert (report["method"], report["why"], report["budget_by"]) == (name, "asked for", "executed")
    assert (report["choosing_images"], report["judging_images"]) == (6, 6)
    checkpoint = load_checkpoint(Path("c.safetensors"))
    method = build_model(checkpoint).reduction
    assert checkpoint.reduction == method.fields()
    assert list(method.blocks) == report["blocks"]
    assert (method.kept is None) == (mode == "dynamic")
    if mode == "static":
        assert share(Path("c.safetensors")) == pytest.approx(budget, rel=0.01)
    else:
        assert method.most[-1] == 149
        assert report["thresholds"]["values"] == [b.item() for b in method.boundaries()]

    ok(cli("export", "--ckpt", "c.safetensors", "-o", "m.onnx"))
    fields = read(Path("m.onnx"))
    assert (fields["mode"], fields["budget"], fields["budget_by"]) == (mode, budget, "executed")
    assert (fields["reduction"], fields["last_block"]) == (method.fields(), "prefix")
    assert fields["thresholds"] == [b.item() for b in method.boundaries()]
    assert fields["stages"] == []

    (checked,) = json.loads(ok(cli("check", "m.onnx", "--images", "pictures", "--json")).out)[:1]
    assert checked["parity"]["passed"]
    args = ("--data", "data", "--classes", "names.txt", "--json")
    Path("names.txt").write_text("a\nb\n")
    rows = [json.loads(ok(cli("evaluate", model, *args)).out)["rows"][0]
            for model in ("m.onnx", "c.safetensors")]  # fmt: skip
    assert rows[0]["macs_share"] == pytest.approx(rows[1]["macs_share"], rel=1e-3)
    assert rows[0]["macs_share"] == pytest.approx(share(Path("c.safetensors")), rel=1e-3)

    args = ("--images", "pictures", "--runs", 10, "--warmup", 0, "--limit", 4, "--threads", 1)
    bench = ok(cli("bench", "m.onnx", "--methods", "topk,evit", *args, "--json"))
    (bench_report,) = json.loads(bench.out)
    own = bench_report["macs"]["adaptive_gmacs"] * 1e9 / teacher_macs(MINI)
    assert set(bench_report["methods"]) == {"topk", "evit"}
    for beside in bench_report["methods"].values():
        assert beside["macs_share"] == pytest.approx(own, rel=0.01), "at equal MACs"
        assert beside["agreement"].keys() == bench_report["agreement"].keys()
    names = {row["name"] for row in bench_report["rows"]}
    assert {"onnxruntime, topk", "onnxruntime, evit", "onnxruntime, dense"} <= names

    picture = sorted(Path("pictures").iterdir())[0]
    (guess,) = json.loads(ok(cli("predict", "m.onnx", picture, "--json")).out)
    assert len(guess["kept"]) == len(method.cuts)
    assert all(set(b) <= set(a) for a, b in zip(guess["kept"], guess["kept"][1:]))


@pytest.mark.slow
def test_auto_says_what_it_compared(cli, dense):
    result = ok(cli(*CALIBRATE))
    report = json.loads(load_checkpoint(Path("c.safetensors")).metadata["calibration"])
    assert set(report["methods"]) == {"size-passing", "tome", "topk-nearest", "random"}
    for words in (f"as_deit_mini: {report['method']}, as many of every picture; ",
                  "6 choose, 6 others judge", "KL (95 %)", "top-1 as dense", "random",
                  f"| {report['method']} * ", f"{report['method']}, per picture",
                  "a count of its own for each picture ", "(budget 0.65)"):  # fmt: skip
        assert words in result.out, words
    assert result.out.endswith("\n\nc.safetensors\n")
    assert share(Path("c.safetensors")) == pytest.approx(0.65, rel=0.01)


@pytest.mark.slow
def test_a_budget_counted_as_the_release_does_is_another(cli, dense):
    """With the work that the last block saves counted, fewer tokens fit into a budget."""
    kept = {}
    for by in ("executed", "release"):
        args = (*CALIBRATE, "--method", "size-passing", "--budget-by", by, "--force", "--json")
        report = json.loads(ok(cli(*args)).out)
        assert report["budget_by"] == by
        checkpoint = load_checkpoint(Path("c.safetensors"))
        assert checkpoint.metadata["budget_by"] == by
        model = build_model(checkpoint)
        kept[by] = model.reduction.kept
        lengths = [1.0 + k for k in model.reduction.kept]
        counted = model.config.released() if by == "release" else model.config
        macs = model_macs(counted, lengths, model.cuts)
        assert macs / teacher_macs(MINI) == pytest.approx(0.65, rel=0.01)
        assert model.config.last_block == "prefix", "what is saved is saved all the same"
    assert sum(kept["release"]) < sum(kept["executed"])
    ok(cli("export", "--ckpt", "c.safetensors", "-o", "m.onnx"))
    assert read(Path("m.onnx"))["budget_by"] == "release"


@pytest.mark.slow
def test_dense_weights_exported_by_a_method_are_checked_through_the_sidecar(cli, dense):
    """The checkpoint says nothing of the method; the file's sidecar does."""
    ok(cli("export", "--ckpt", "dense.safetensors", "--method", "tome", "--budget", "0.7", "--cuts",
           "0,1,3", "-o", "m.onnx"))  # fmt: skip
    fields = read(Path("m.onnx"))
    assert fields["reduction"]["name"] == "tome"
    assert fields["reduction"]["blocks"] == [0, 1, 3]
    assert (fields["mode"], fields["budget"], fields["budget_by"]) == ("static", 0.7, "executed")
    import onnx

    graph = onnx.load("m.onnx")
    assert not onnx_op.nodes_of(graph.graph)
    (checked,) = json.loads(ok(cli("check", "m.onnx", "--limit", 6, "--json")).out)[:1]
    assert (checked["parity"]["passed"], checked["parity"]["equal_sets"]) == (True, 6)
    # Other weights are seen.
    other = build_model(load_checkpoint(Path("dense.safetensors")), dense=True)
    with torch.no_grad():
        other.head.bias.add_(1)
    save_checkpoint(Path("dense.safetensors"), other, {})
    assert "changed" in cli("check", "m.onnx", "--limit", 2).err


@pytest.mark.slow
def test_evaluate_by_a_method(cli, dense):
    Path("names.txt").write_text("a\nb\n")
    args = ("evaluate", "dense.safetensors", "--data", "data", "--classes", "names.txt", "--json")
    whole = json.loads(ok(cli(*args)).out)["rows"][0]
    options = ("--method", "topk-nearest", "--budget", "0.6", "--cuts", "1,2,3")
    less = json.loads(ok(cli(*args, *options)).out)["rows"][0]
    assert whole["mean_kept"] == []
    assert less["macs_share"] == pytest.approx(0.6, rel=0.01)
    assert len(less["mean_kept"]) == 3


_DRIFT = "these pictures keep other counts than those that calibrated"


@pytest.mark.slow
def test_evaluate_says_where_counts_leave_the_calibrated_range(cli, dense):
    Path("names.txt").write_text("a\nb\n")
    ok(cli(*CALIBRATE, "--method", "tome", "--per-picture"))
    ok(cli("export", "--ckpt", "c.safetensors", "-o", "m.onnx"))
    rng = np.random.default_rng(0)
    for place in ("noise/a", "noise/b"):
        Path(place).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (80, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{place}/{i}.png")
    for model in ("c.safetensors", "m.onnx"):
        args = ("evaluate", model, "--classes", "names.txt", "--json", "--data")
        done = ok(cli(*args, "noise"))
        row = json.loads(done.out)["rows"][0]
        assert abs(row["macs_share"] / 0.65 - 1) > 0.02, "other pictures indeed"
        said = f"{model} takes {row['macs_share']:.3f} of the dense MACs here and was calibrated to"
        assert f"{said} 0.65: {_DRIFT}" in done.err
        calm = ok(cli(*args, "data"))
        close = abs(json.loads(calm.out)["rows"][0]["macs_share"] / 0.65 - 1) <= 0.02
        assert (_DRIFT in calm.err) is not close
    # Fixed counts do not drift.
    ok(cli(*CALIBRATE, "--method", "tome", "--force"))
    assert _DRIFT not in ok(cli("evaluate", "c.safetensors", "--data", "noise", "--classes",
                                "names.txt")).err  # fmt: skip


@pytest.mark.slow
def test_a_calibrated_checkpoint_keeps_its_method(cli, dense):
    ok(cli(*CALIBRATE, "--method", "topk-nearest"))
    again = ok(cli("calibrate", "--ckpt", "c.safetensors", "--images", "pictures",
                   "--budget", "0.8", "-o", "d.safetensors", "--json"))  # fmt: skip
    assert json.loads(again.out)["method"] == "topk-nearest"
    assert share(Path("d.safetensors")) == pytest.approx(0.8, rel=0.01)
