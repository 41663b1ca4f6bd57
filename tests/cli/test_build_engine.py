"""`asvit-deploy build-engine`: the happy line, and one clear line for everything else."""

from __future__ import annotations

import importlib.util
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from asvit_deploy import sidecar as artifact
from asvit_deploy.artefacts import bundle
from asvit_deploy.exporting.half import to_half
from asvit_deploy.runners.trt_flavour import ENTERPRISE, RTX

rtx = pytest.mark.skipif(
    RTX.module is None or importlib.util.find_spec("polygraphy") is None,
    reason="TensorRT-RTX is not installed (scripts/setup cpu,train,dev,rtx)",
)


@pytest.fixture
def model(tmp_path, mini_artifacts):
    """The small model's artefact in the current folder."""
    return conftest.signed_copy(mini_artifacts["1", "auto"], tmp_path / "as_deit_s.onnx")


def refused(result, *words):
    """One line, and no engine."""
    conftest.refused(result, *words)
    assert list(Path().glob("*.engine*")) == []
    assert list(Path().glob("*.bucketed")) == []
    assert list(Path().glob(".*.tmp")) == []


@pytest.mark.slow
@rtx
def test_builds_the_artefact_of_the_folder(cli, model):
    result = cli("build-engine", "--mode", "padded", "--target-sm", "86", "89", "120",
                 "--level", 1, "--limit", 16)  # fmt: skip
    assert result.code == 0, result.err
    assert result.out == "as_deit_s.padded.engine\n"
    assert "agrees with PyTorch on 16 images" in result.err
    assert "TensorRT warns" not in result.err
    fields = artifact.read(Path("as_deit_s.padded.engine"))
    assert fields["target_sms"] == ["86", "89", "120"]
    again = cli("build-engine", "--mode", "padded")
    assert again.code == 2
    assert "--force" in again.err


@pytest.mark.slow
@rtx
def test_bucketed_folder(cli, model):
    args = ("build-engine", "--mode", "bucketed", "--buckets", "64,128,197", "--target-sm", "86")
    result = cli(*args, "--limit", 16)
    assert result.code == 0, result.err
    assert result.out == "as_deit_s.bucketed\n"
    assert "agrees with PyTorch on 16 images" in result.err
    assert "buckets 64, 128, 197" in result.err
    assert "TensorRT warns" not in result.err
    fields = bundle.read(Path("as_deit_s.bucketed"))
    assert fields["buckets"] == [64, 128, 197]
    assert fields["thresholds"] == artifact.read(model)["thresholds"]
    again = cli(*args, "--no-check")
    assert again.code == 2
    assert "--force" in again.err
    assert cli(*args, "--no-check", "--force").code == 0
    assert bundle.read(Path("as_deit_s.bucketed"))["checked"] is None
    Path("as_deit_s.bucketed/notes.txt").touch()
    conftest.refused(cli(*args, "--force"), "as_deit_s.bucketed holds notes.txt")


@pytest.mark.slow
@rtx
def test_bucketed_needs_one_image_at_a_time_and_op_nodes(cli, tmp_path, mini_artifacts):
    conftest.signed_copy(mini_artifacts["dynamic", "auto"], tmp_path / "d.onnx")
    refused(cli("build-engine", "--mode", "bucketed"), "d.onnx", "--batch 1")
    conftest.signed_copy(mini_artifacts["1", "standard"], tmp_path / "d.onnx")
    refused(cli("build-engine", "--mode", "bucketed"), "d.onnx", "--ops auto")


@pytest.mark.slow
@rtx
def test_half_names_and_forms(cli, model):
    result = cli("build-engine", "--bf16", "--mode", "padded", "--no-check", "-o", "b.engine")
    assert result.code == 0, result.err
    fields = artifact.read(Path("b.engine"))
    assert (fields["precision"], fields["checked"]) == ("bfloat16", None)
    result = cli("build-engine", "--fp16", "--mode", "padded", "--no-check")
    assert result.out == "as_deit_s.fp16.padded.engine\n"


@pytest.mark.slow
@rtx
def test_default_checkpoint_in_fp16(cli):
    from asvit_deploy.checkpoints import default_checkpoint
    from asvit_deploy.errors import UserError

    try:
        default_checkpoint()
        from asvit_deploy.ops.trt_library import build_trt

        build_trt(twin=True)
    except (UserError, ImportError) as error:
        pytest.skip(str(error))
    assert cli("export", "--ckpt", "default").code == 0
    result = cli("build-engine", "--fp16")
    assert result.code == 0, result.err
    fields = artifact.read(Path(result.out.strip()))
    assert fields["checked"]["passed"]
    assert fields["plugin_layers"] == 3


def test_no_tensorrt(cli, model, monkeypatch):
    real = importlib.util.find_spec
    gone = {*RTX.modules, *ENTERPRISE.modules}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in gone else real(name, *a)
    )
    result = cli("build-engine", "--fp16")
    refused(result, "TensorRT is not installed", "pip install ", '"tensorrt-rtx-cu13-bindings>=')


@rtx
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--fp16", "--bf16"], ["exclude each other"]),
        (["--buckets", "16,197"], ["--buckets needs --mode bucketed"]),
        (["--buckets", "auto"], ["--buckets needs --mode bucketed"]),
        (["--buckets", ""], ["--buckets needs --mode bucketed"]),
        (["--mode", "bucketed", "--buckets", ""], ["--buckets ''", "--buckets 64,128,197"]),
        (["--mode", "bucketed", "--buckets", "16,32"], ["16,32", "as_deit_s.onnx", "add 197"]),
        (["--mode", "bucketed", "--buckets", "16,198"], ["198", "2 to 197 rows"]),
        (["--mode", "bucketed", "--buckets", "few"], ["few", "--buckets 64,128,197"]),
        (["--mode", "bucketed", "--batch", 1, 4, 8], ["--batch", "--mode bucketed"]),
        (["--mode", "bucketed", "--embed-plugin"], ["--embed-plugin", "--mode bucketed"]),
        (["--mode", "bucketed", "-o", "x.engine"], ["x.engine", "a name in .bucketed"]),
        (["--mode", "bucketed", "--target-sm", "90", "--no-check"], ["segment 1 of 4", "SM90"]),
        (["--batch", "1", "4", "8"], ["as_deit_s.onnx", "fixed batch", "--batch dynamic"]),
        (["--layers", "l.json"], ["--layers", "--flavour tensorrt"]),
        (["--version-compatible"], ["--version-compatible"]),
        (["--plugin", "nowhere.so"], ["nowhere.so does not exist", "build-plugins trt"]),
        (["-o", "no/such/x.engine"], ["no/such", "does not exist"]),
        (["-o", "x.plan"], ["x.plan", "a name in .engine"]),
        (["--mode", "padded", "--target-sm", "90", "--no-check"], ["SM90", "86"]),
        (["--onnx", "gone.onnx"], ["gone.onnx does not exist"]),
    ],
)
def test_refused(cli, model, args, words):
    refused(cli("build-engine", *args), *words)


@pytest.mark.slow
@rtx
@pytest.mark.parametrize("name", ["libasvit_trt_host.so", "renamed.so"])
def test_the_host_twin_is_not_put_into_an_engine(cli, model, trt_plugin, name):
    shutil.copy(trt_plugin, name)
    refused(cli("build-engine", "--plugin", name, "--embed-plugin"), name, "holds no CUDA code",
            "--embed-plugin needs it", "build-plugins trt")  # fmt: skip
    assert cli("build-engine", "--plugin", name).code == 0, "to build with it is its purpose"


@rtx
def test_bad_capability(cli, model):
    result = cli("build-engine", "--target-sm", "ampere")
    assert result.code == 2
    assert "'ampere' is not a compute capability" in result.err


@pytest.mark.slow
@rtx
def test_unwritable_folder(powerless_cli, model):
    (model.parent / "closed").mkdir(mode=0o500)
    results = powerless_cli(
        model.parent,
        ["build-engine", "-o", "closed/x.engine"],
        ["build-engine", "--mode", "bucketed", "-o", "closed/x.bucketed"],
    )
    for result, name in zip(results, ("x.engine", "x.bucketed")):
        refused(result, f"closed/{name}", "permission")


@rtx
def test_keeps_a_file_with_the_sidecars_name(cli, model):
    mine = Path("as_deit_s.engine.json")
    mine.write_text("my own notes")
    conftest.refused(cli("build-engine", "--mode", "padded", "-o", "as_deit_s.engine"),
                     "as_deit_s.engine.json exists", "--force")  # fmt: skip
    assert mine.read_text() == "my own notes"


@rtx
def test_batch_that_does_not_rise(cli, tmp_path, mini_artifacts):
    conftest.signed_copy(mini_artifacts["dynamic", "auto"], tmp_path / "d.onnx")
    refused(cli("build-engine", "--mode", "padded", "--batch", 4, 2, 8), "--batch 4 2 8")


@rtx
def test_half_of_a_half_graph(cli, tmp_path, mini_artifacts):
    conftest.signed_copy(mini_artifacts["1", "auto"], tmp_path / "half.onnx",
          lambda proto: proto.CopyFrom(to_half(proto, "fp16")), precision="float16")  # fmt: skip
    refused(cli("build-engine", "--fp16", "--plugin", "half.onnx"), "half.onnx",
            "half precision already")  # fmt: skip


def _other_version(proto):
    next(entry for entry in proto.opset_import if entry.domain == "asvit").version = 2
    next(f for f in proto.functions if f.domain == "asvit").opset_import[0].version = 20


def _other_plugin_version(proto):
    node = next(node for node in proto.graph.node if node.domain == "asvit")
    next(a for a in node.attribute if a.name == "plugin_version").s = b"2"


def _no_attributes(proto):
    del next(node for node in proto.graph.node if node.domain == "asvit").attribute[:]


def _threshold_of(proto, stage=0):
    """The op node of a stage and its threshold."""
    node = [node for node in proto.graph.node if node.domain == "asvit"][stage]
    return node, next(t for t in proto.graph.initializer if t.name == node.input[2])


def _other_threshold(proto):
    _, tensor = _threshold_of(proto, 1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(0.25, np.float32), tensor.name))


def _threshold_in_a_list(proto):
    _, tensor = _threshold_of(proto)
    value = onnx.numpy_helper.to_array(tensor).astype(np.float32).reshape(1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))


def _computed_threshold(proto):
    node, tensor = _threshold_of(proto)
    proto.graph.node.insert(0, onnx.helper.make_node("Identity", [tensor.name], ["computed"]))
    node.input[2] = "computed"


def _no_scores(proto):
    _threshold_of(proto)[0].input[1] = ""


def _fewer_stages(proto):
    del proto.functions[:]
    del proto.graph.node[:]
    proto.graph.node.append(onnx.helper.make_node("Relu", ["images"], ["logits"]))
    del proto.graph.output[1:]
    del proto.graph.initializer[:]
    del proto.graph.value_info[:]


@rtx
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_version, ["version 2 of the asvit ops", "export it again"]),
        (_other_plugin_version, ["'plugin_version': '2'", "export it again"]),
        (_no_attributes, ["no attributes", "export it again"]),
        (_fewer_stages, ["--ops auto"]),
    ],
)
def test_tampered_graph(cli, tmp_path, mini_artifacts, change, words):
    conftest.signed_copy(mini_artifacts["1", "auto"], tmp_path / "t.onnx", change)
    refused(cli("build-engine", "--plugin", "t.onnx"), "t.onnx", *words)


@rtx
@pytest.mark.parametrize("mode", ["dynamic", "padded", "bucketed"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_threshold, ["is 0.25, its sidecar says", "export it again"]),
        (_threshold_in_a_list, ["no float32 number in the file", "export it again"]),
        (_computed_threshold, ["no float32 number in the file", "export it again"]),
        (_no_scores, ["t.onnx"]),  # by ONNX's checker, or by us
    ],
)
def test_threshold_that_is_not_the_sidecars(cli, tmp_path, mini_artifacts, mode, change, words):
    conftest.signed_copy(mini_artifacts["1", "auto"], tmp_path / "t.onnx", change)
    refused(cli("build-engine", "--mode", mode, "--no-check"), "t.onnx", *words)


@rtx
def test_tampered_file_and_lost_sidecar(cli, model):
    shutil.copy(model, "lost.onnx")
    refused(cli("build-engine", "--onnx", "lost.onnx"), "lost.onnx", "no sidecar")
    model.write_bytes(model.read_bytes() + b"\0")
    refused(cli("build-engine"), "sha256")


def _foreign(text):
    onnx.save(onnx.parser.parse_model(text), "foreign.onnx")


@rtx
def test_foreign_model(cli):
    _foreign('<ir_version: 10, opset_import: ["": 20]> g (float[1,8] x) => (float[1,8] y)'
             "{ y = Relu (x) }")  # fmt: skip
    refused(cli("build-engine", "--onnx", "foreign.onnx", "--fp16"), "foreign.onnx", "--fp16")
    result = cli("build-engine", "--onnx", "foreign.onnx")
    assert result.code == 0, result.err
    assert "foreign.onnx is not an artefact of ours" in result.err
    fields = artifact.read(Path("foreign.engine"))
    assert (fields["mode"], fields["precision"]) == ("foreign", None)


@rtx
def test_foreign_model_with_foreign_ops(cli):
    _foreign('<ir_version: 10, opset_import: ["": 20, "other": 1]> g (float[1,8] x) =>'
             " (float[1,8] y) { y = other.Magic (x) }")  # fmt: skip
    refused(cli("build-engine", "--onnx", "foreign.onnx"), "foreign.onnx", "other")


@rtx
def test_op_that_tensorrt_lacks(cli):
    _foreign('<ir_version: 10, opset_import: ["": 20]> g (float[1,8] x) => (int64[2,K] y)'
             "{ y = NonZero (x) }")  # fmt: skip
    refused(cli("build-engine", "--onnx", "foreign.onnx", "--flavour", "tensorrt-rtx"),
            "TensorRT-RTX cannot build foreign.onnx", "NonZero")  # fmt: skip


def test_not_an_onnx_file(cli, model):
    Path("broken.onnx").write_bytes(model.read_bytes()[:5000])
    if RTX.module:
        refused(cli("build-engine", "--onnx", "broken.onnx"), "broken.onnx", "whole ONNX file")


@pytest.mark.slow
@rtx
@pytest.mark.parametrize(
    ("mode", "kilobytes"), [("padded", 500), ("padded", 5000), ("bucketed", 5000)]
)  # the graph or the plan does not fit
def test_a_full_disk_costs_one_line(model, mode, kilobytes, monkeypatch):
    monkeypatch.chdir(model.parent)
    limit = kilobytes * 1024
    done = subprocess.run(
        [sys.executable, "-m", "asvit_deploy", "build-engine", "--mode", mode, "--no-check"],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    refused(conftest.Result(done.returncode, done.stdout, done.stderr), "File too large",
            "a limit on file sizes is set here (ulimit -f)")  # fmt: skip
