"""No sidecar says what code is loaded; what a plan carries runs where the user allows it."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import raises_one_line, refused

from asvit_deploy import sidecar
from asvit_deploy.artefacts import bundle
from asvit_deploy.artefacts.engine_file import EngineArtefact
from asvit_deploy.errors import UserError
from asvit_deploy.files import sha256
from asvit_deploy.ops import trt_library
from asvit_deploy.runners.trt_plan import NOTHING, Allowed, load_plan, named_plugin, plugin_for

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def signed_engine(mini_artifacts, tmp_path, monkeypatch):
    """Makes an engine that is none, with a sidecar that says whatever its writer likes."""
    monkeypatch.chdir(tmp_path)
    model = sidecar.read(mini_artifacts["1", "auto"])
    kept = {k: v for k, v in model.items() if k not in ("schema", "sha256", "digest")}
    source = {**sidecar.source_of(mini_artifacts["1", "auto"]), "checkpoint": model["source"]}

    def make(**fields: object) -> Path:
        own = {"kind": "engine", "flavour": "tensorrt-rtx", "flavour_version": "1.2",
               "mode": "dynamic", "target_sms": [], "plugin": None, "source": source}  # fmt: skip
        sidecar.write(Path("x.engine"), b"no plan" * 100, {**kept, **own, **fields})
        return Path("x.engine")

    return make


@pytest.fixture
def no_plugin_here(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no_cache"))


@pytest.mark.parametrize("path", ["planted.so", "./planted.so", "absolute", "deep/../planted.so"])
def test_a_plugin_that_a_sidecar_names_is_not_loaded(
    rtx, signed_engine, planted, mark, no_plugin_here, path, tmp_path
):
    trt = importlib.import_module(rtx.module)
    shutil.copy(planted, tmp_path / "planted.so")
    (tmp_path / "deep").mkdir()
    with open("planted.so", "ab") as file:
        file.write(b".nv_fatbin")  # what distinguished a plugin for GPUs from a host twin
    named = str(tmp_path / "planted.so") if path == "absolute" else path
    record = {"path": named, "sha256": sha256(Path("planted.so")), "embedded": False}
    session = EngineArtefact(signed_engine(plugin=record))
    raises_one_line(
        lambda: load_plan(trt, rtx, b"no plan", session.fields, str(session.path)),
        "x.engine needs the TensorRT plugin, which is not built here", "--plugin",
    )  # fmt: skip
    assert not mark.left()
    registry = trt.get_plugin_registry()
    registry.load_library(str(Path("planted.so").resolve()))
    assert mark.left(), "the old way"


def test_the_cache_s_plugin_is_taken_whatever_the_sidecar_says(
    signed_engine, monkeypatch, tmp_path, capsys
):
    ours = tmp_path / "ours.so"
    ours.write_bytes(b"ours")
    monkeypatch.setattr(trt_library, "find_trt_plugin", lambda: ours)
    for number, record in enumerate([
        {"path": "/tmp/planted.so", "sha256": "0" * 64, "embedded": False}, {"path": 3}, {}, "text",
        ["list"], 7, {"sha256": None, "embedded": 0}, True,
    ]):  # fmt: skip
        fields = EngineArtefact(signed_engine(plugin=record)).fields
        assert plugin_for(fields, f"{number}.engine") == ours, record
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{number}.engine was built with another file of the plugin")


CARRIES = {
    "embedded": {"plugin": {"path": "x", "sha256": "0" * 64, "embedded": True}},
    "embedded, oddly": {"plugin": {"embedded": 1}},
    "version": {"version_compatible": True},
    "version, oddly": {"version_compatible": "yes"},
}


@pytest.mark.parametrize("fields", CARRIES.values(), ids=CARRIES)
def test_code_in_an_engine_runs_only_by_an_option(rtx, signed_engine, monkeypatch, fields):
    """The runtime is TensorRT's own; only what it is asked for is looked at."""
    trt = importlib.import_module(rtx.module)
    asked = []

    class Runtime(trt.Runtime):
        def deserialize_cuda_engine(self, plan):
            asked.append(self.engine_host_code_allowed)
            return super().deserialize_cuda_engine(plan)

    monkeypatch.setattr(trt, "Runtime", Runtime)
    said = EngineArtefact(signed_engine(**fields)).fields
    words = ["x.engine carries code", "--allow-engine-code", "build it again"]
    raises_one_line(lambda: load_plan(trt, rtx, b"no plan", said, "x.engine"), *words)
    assert asked == [], "not even opened"
    allowed = Allowed(engine_code=True)
    raises_one_line(lambda: load_plan(trt, rtx, b"no", said, "x.engine", allowed), "cannot load")
    plain = EngineArtefact(signed_engine()).fields
    for given in (NOTHING, allowed):
        raises_one_line(lambda given=given: load_plan(trt, rtx, b"no", plain, "x", given), "cannot")
    assert asked == [True, False, False], "never for an engine that says it carries none"


@no_gpu
@pytest.mark.parametrize("command", ["check", "bench"])
@pytest.mark.parametrize("fields", CARRIES.values(), ids=CARRIES)
def test_commands_refuse_code_in_an_engine(cli, signed_engine, command, fields):
    engine = signed_engine(**fields)
    refused(cli(command, engine), "x.engine carries code that would run", "--allow-engine-code")
    refused(cli(command, engine, "--allow-engine-code"), "an NVIDIA GPU")


@no_gpu
@pytest.mark.parametrize("command", ["check", "bench"])
def test_bundles_are_judged_alike(cli, signed_engine, command):
    fields = sidecar.read(
        signed_engine(version_compatible=True, mode="bucketed", buckets=[64, 197])
    )
    kept = {k: v for k, v in fields.items() if k not in ("schema", "sha256", "digest")}
    bundle.write(Path("x.bucketed"), {"stage_0.engine": b"no plan"}, {**kept, "kind": "bucketed"})
    refused(cli(command, "x.bucketed"), "x.bucketed carries code", "--allow-engine-code")
    refused(cli(command, "x.bucketed", "--allow-engine-code"), "an NVIDIA GPU")


@pytest.mark.parametrize(("name", "value"), [
    ("flavour", "os"), ("flavour", 3), ("flavour", None), ("flavour_version", 1),
    ("target_sms", "86"), ("mode", None), ("precision", "int4"),
])  # fmt: skip
def test_odd_fields_of_an_engine_are_one_line(cli, signed_engine, name, value):
    if name == "flavour" and value == "os":
        from asvit_deploy.runners.trt_plan import import_flavour

        raises_one_line(lambda: import_flavour(value), "'os'", "build the engine again")
        return
    refused(cli("check", signed_engine(**{name: value})), "x.engine", f"says {name} ")


# ---------------------------------------------------------------- --plugin


@pytest.fixture(scope="module")
def cuda_plugin(trt_headers) -> Path:
    """The plugin for GPUs, which loads on any machine."""
    try:
        return trt_library.build_trt(sms=["86"])
    except UserError as error:
        pytest.skip(str(error))


@no_gpu
@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_named_plugin_is_tried_first_in_a_child(
    cli, signed_engine, command, cuda_plugin, planted, trt_headers, monkeypatch, tmp_path
):
    engine = signed_engine(plugin={"sha256": "0" * 64, "embedded": False})
    whole = cuda_plugin.read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "header": whole[:64], "none": b"text",
                       "flipped": whole[:64] + b"\xff" * 200 + whole[264:]}.items():  # fmt: skip
        Path(name).write_bytes(data)
        refused(cli(command, engine, "--plugin", name), f"{name} cannot be used", "makes one")
    os.mkfifo("pipe")
    for name in ("pipe", "gone", "."):
        refused(cli(command, engine, "--plugin", name), f"{name} cannot be used: there is no such")
    refused(cli(command, engine, "--plugin", planted), "but not of TensorRT plugins")
    # A byte of its code, which no loader minds: the digest that was built with it does.
    place = len(whole) // 3
    Path("byte.so").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
    shutil.copy(f"{cuda_plugin}.sha256", "byte.so.sha256")
    refused(cli(command, engine, "--plugin", "byte.so"), "byte.so cannot be used", "sha256")
    twin = trt_library.build_trt(twin=True)
    refused(cli(command, engine, "--plugin", twin), "holds no CUDA code")
    refused(cli(command, engine, "--plugin", cuda_plugin), "an NVIDIA GPU")


def test_a_named_plugin_comes_before_the_cache_s(rtx, cuda_plugin, signed_engine, no_plugin_here):
    """Loaded by TensorRT's own registry; the plan is none, and that is all that is wrong."""
    trt = importlib.import_module(rtx.module)
    record = {"sha256": sha256(cuda_plugin), "embedded": False}
    fields = EngineArtefact(signed_engine(plugin=record)).fields
    allowed = Allowed(named_plugin(cuda_plugin))
    raises_one_line(lambda: load_plan(trt, rtx, b"no", fields, "x", allowed), "cannot load x,")
    names = {creator.name for creator in trt.get_plugin_registry().all_creators}
    assert "ThresholdCompact" in names
