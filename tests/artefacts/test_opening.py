"""One way to open any artefact: what it says of itself, and its ways to run."""

from __future__ import annotations

import onnx
import pytest
import torch
from conftest import raises_one_line

from asvit_deploy import sidecar
from asvit_deploy.artefacts import bundle
from asvit_deploy.artefacts.artefact import Ways
from asvit_deploy.artefacts.engine_file import BundleArtefact, EngineArtefact
from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library
from asvit_deploy.artefacts.opening import artefacts_here, engines_of, open_artefact, paths_of
from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.exporting.export import export
from asvit_deploy.parity import LIMITS
from asvit_deploy.processor import usable_cores
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
OF_THE_FILE = ("schema", "sha256", "digest")

ORT = ("onnxruntime",)  # others may be installed or not


@pytest.fixture
def engine(mini_artifacts, tmp_path):
    """Makes a file or folder that passes for an engine of the small model."""
    model = sidecar.read(mini_artifacts["1", "auto"])
    source = {**sidecar.source_of(mini_artifacts["1", "auto"]), "checkpoint": model["source"]}
    kept = {key: value for key, value in model.items() if key not in OF_THE_FILE}

    def make(name, **fields):
        path = tmp_path / name
        bucketed = path.suffix == ".bucketed"
        own = {"kind": "bucketed" if bucketed else "engine", "flavour": "tensorrt-rtx",
               "flavour_version": "1.2", "mode": "bucketed" if bucketed else "dynamic",
               "target_sms": [], "plugin": None, "source": source, **fields}  # fmt: skip
        if bucketed:
            bundle.write(path, {"stage_0.engine": b"no plan"}, {**kept, "buckets": [197], **own})
        else:
            sidecar.write(path, b"no plan", {**kept, **own})
        return path

    return make


def test_every_kind_answers_the_same_questions(mini_artifacts, engine, mini_config):
    paths = [mini_artifacts["1", "auto"], engine("x.engine"), engine("x.bucketed")]
    opened = [open_artefact(path) for path in paths]
    assert [type(artefact) for artefact in opened] == [OnnxArtefact, EngineArtefact, BundleArtefact]
    for artefact, path in zip(opened, paths):
        assert artefact.path == path
        assert artefact.config == mini_config.saving()
        assert artefact.adaptive
        assert not artefact.dynamic_batch
        assert artefact.parity in LIMITS
        assert artefact.notes == ()
        assert len(artefact.reference.thresholds) == 3, "the checkpoint behind an engine's ONNX"
        assert not artefact.dense_reference.threshold_values()
        assert isinstance(artefact.judge(), TorchRunner)
        assert artefact.fields["arch"] == "as_deit_mini"


@pytest.mark.slow
def test_ways_of_an_onnx_file(mini_artifacts, op_library):
    auto = mini_artifacts["1", "auto"]
    assert list(open_artefact(auto).ways(runtimes=ORT)) == ["function"]
    ways = open_artefact(auto, op_library).ways(runtimes=ORT)
    assert ways.runtimes == {"function": "onnxruntime", "library": "onnxruntime"}
    assert [runner.describe()["op"] for runner in ways.values()] == ["function", "library"]
    for ops, way in (("standard", "function"), ("custom", "library")):
        artefact = open_artefact(mini_artifacts["1", ops], op_library)
        assert list(artefact.ways(runtimes=ORT)) == [way]
    raises_one_line(
        open_artefact(mini_artifacts["1", "custom"]).ways, "--ops custom", "build-plugins ort"
    )


@pytest.mark.slow
def test_a_dense_file_has_one_way(mini_checkpoint, tmp_path):
    checkpoint = load_checkpoint(mini_checkpoint)
    images = open_images(None, checkpoint.config, limit=1)
    export(checkpoint, tmp_path / "dense.onnx", images, dense=True)
    artefact = open_artefact(tmp_path / "dense.onnx")
    ways = artefact.ways(runtimes=ORT)
    assert (list(ways), artefact.adaptive) == (["dense"], False)
    assert ways["dense"](images[:1][0][None]).lengths == []
    assert not artefact.reference.threshold_values()


def test_a_way_is_opened_where_it_is_asked_for_and_once(mini_artifacts, tmp_path):
    broken = tmp_path / "lib.so"
    broken.write_bytes(b"no library")
    ways = open_artefact(mini_artifacts["1", "auto"], broken).ways(runtimes=ORT)
    assert len(ways) == 2, "neither is open yet"
    assert ways["function"] is ways["function"]
    raises_one_line(lambda: ways["library"], "lib.so cannot be used")
    with pytest.raises(KeyError):
        Ways({}, {})["function"]


def test_runners_get_their_threads_and_record_what_they_are_asked_for(mini_artifacts, photos):
    artefact = open_artefact(mini_artifacts["1", "auto"])
    image = photos[0][None]
    assert artefact.ways()["function"](image).kept is not None
    cores = usable_cores()
    bare = artefact.ways(threads=cores, record=False)["function"]
    assert bare(image).kept is None
    assert bare.session.get_session_options().intra_op_num_threads == cores


def test_the_original_judges_what_was_made_from_it(mini_artifacts, tmp_path):
    original = mini_artifacts["1", "auto"]
    proto = onnx.load(original)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "other.onnx")
    raises_one_line(lambda: open_artefact(tmp_path / "other.onnx"), "has no sidecar")
    artefact = open_artefact(tmp_path / "other.onnx", original=original)
    assert isinstance(artefact.judge(), OrtRunner)
    (note,) = artefact.notes
    assert note.startswith(f"{tmp_path / 'other.onnx'}: it has no sidecar; preprocessing, stages")
    assert note.endswith("judged as float32")


@no_gpu
@pytest.mark.parametrize("name", ["x.engine", "x.bucketed"])
def test_an_engine_without_a_gpu_opens_and_has_no_way(engine, name):
    artefact = open_artefact(engine(name))
    for call in (artefact.ways, artefact.require_runnable, artefact.runner):
        raises_one_line(call, f"{name} is an engine and runs on an NVIDIA GPU")


@pytest.mark.parametrize(("name", "mode", "ways"), [
    ("x.engine", "dynamic", ["engine"]),
    ("x.engine", "padded", ["engine", "engine, CUDA graph"]),
    ("x.engine", "dense", ["engine", "engine, CUDA graph"]),
    ("x.bucketed", "bucketed", ["engine", "engine, CUDA graph"]),
])  # fmt: skip
def test_ways_of_engines(engine, monkeypatch, name, mode, ways):
    """With a GPU; none is opened here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = open_artefact(engine(name, mode=mode)).ways()
    assert list(found) == ways
    assert set(found.runtimes.values()) == {"tensorrt-rtx"}


def test_what_is_refused(engine, mini_artifacts, mini_checkpoint, tmp_path):
    onnx_file = mini_artifacts["1", "auto"]
    for name in ("x.engine", "x.bucketed"):
        path = engine(name)
        raises_one_line(lambda path=path: open_artefact(path, original=onnx_file),
                        f"{name} is an engine", "leave --reference out")  # fmt: skip
        raises_one_line(lambda path=path: open_artefact(onnx_file, original=path), name)
    foreign = engine("f.engine", mode="foreign")
    raises_one_line(lambda: open_artefact(foreign), "foreign ONNX file")
    odd = engine("o.engine", precision="int4")
    raises_one_line(lambda: open_artefact(odd), "says precision 'int4'")
    for name, words in {"gone.onnx": "does not exist", "gone.engine": "does not exist",
                        "gone.bucketed": "does not exist", ".": "is a folder"}.items():  # fmt: skip
        path = tmp_path / name
        raises_one_line(lambda path=path: open_artefact(path), words)
    raises_one_line(lambda: open_artefact(mini_checkpoint), "is no ONNX file; name one in .onnx")


@pytest.mark.slow
def test_engines_are_found_by_the_file_they_were_built_from(engine, mini_artifacts, tmp_path):
    ours = mini_artifacts["1", "auto"]
    made = [engine("a.engine"), engine("b.bucketed")]
    engine("other.engine", source={**sidecar.source_of(mini_artifacts["1", "custom"]),
                                   "checkpoint": sidecar.read(ours)["source"]})  # fmt: skip
    engine("foreign.engine", mode="foreign")
    lines: list[str] = []
    assert engines_of(tmp_path, ours, lines.append) == made
    (line,) = lines
    assert "foreign.engine was built from a foreign ONNX file" in line


def test_artefacts_of_the_current_folder(mini_artifacts, tmp_path, monkeypatch):
    monkeypatch.chdir(mini_artifacts["1", "auto"].parent)
    assert mini_artifacts["1", "custom"].is_file()
    assert [path.name for path in artefacts_here("onnx")] == sorted(
        path.name for path in mini_artifacts.values()
    )
    monkeypatch.chdir(tmp_path)
    raises_one_line(lambda: artefacts_here("onnx"), f"no onnx artefact in {tmp_path}; run")


def test_paths_by_name_or_several(tmp_path):
    assert paths_of(str(tmp_path)) == paths_of(tmp_path) == paths_of((str(tmp_path),)) == [tmp_path]
    assert paths_of(()) == []


def test_no_library_is_said_to_whoever_listens(monkeypatch, tmp_path, capsys):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (cache / "asvit-deploy").mkdir(parents=True)
    cache.chmod(0o777)  # another user could have put a library there
    lines: list[str] = []
    assert find_op_library(None, lines.append) is None
    assert capsys.readouterr() == ("", "")
    assert all(line.startswith("no library, ") for line in lines)
    assert lines, "the folder is not to be trusted"
