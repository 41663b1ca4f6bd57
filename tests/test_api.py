"""The package's functions: each does what its command does, under the same names."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import signal
import subprocess
import sys
import typing
from pathlib import Path

import click
import pytest
from conftest import raises_one_line
from PIL import Image
from skimage import data

import asvit_deploy
from asvit_deploy.checkpoints import default_checkpoint
from asvit_deploy.cli.main import COMMANDS

FUNCTIONS = (
    "bench",
    "build_engine",
    "calibrate",
    "check",
    "evaluate",
    "export",
    "finetune",
    "load",
    "package",
    "predict",
    "report",
    "save",
    "tune",
    "visualize",
)
WITHOUT_COMMAND = ("load", "save")  # fmt: skip
LATER = {"bench": "asvit_deploy.evaluation.bench", "check": "asvit_deploy.evaluation.checking"}
ERRORS = ("CheckFailed", "Interrupted", "UserError")
# Options of how a command prints, which a function has no use for.
PRINTING = {"as_json", "help"}


def function(name: str) -> typing.Callable[..., typing.Any]:
    """A public function; `check` and `bench` may still live in their commands alone."""
    if place := LATER.get(name):
        there = importlib.util.find_spec(place)
        if there is None or not hasattr(importlib.import_module(place), name):
            pytest.skip(f"{place} has no function {name} yet")
    return getattr(asvit_deploy, name)


def command_of(name: str) -> click.Command:
    return importlib.import_module(f"asvit_deploy.cli.{name}").command


def option_name(parameter: click.Parameter) -> str:
    """What Python calls it: an argument's own name, else the long spelling of an option."""
    if isinstance(parameter, click.Argument):
        return str(parameter.name)
    longest = max(parameter.opts, key=len)
    return longest.lstrip("-").replace("-", "_")


def defaults_of(command: click.Command) -> dict[str, object]:
    """What a command passes on where an option is not given, by the option's name."""
    needed: list[str] = []
    for parameter in command.params:
        if parameter.required or isinstance(parameter, click.Argument):
            needed += ["x"] if isinstance(parameter, click.Argument) else [parameter.opts[-1], "x"]
    context = command.make_context(str(command.name), needed)
    return {option_name(p): context.params[p.name] for p in command.params if p.name}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in WITHOUT_COMMAND])
def test_a_function_has_its_commands_options_and_defaults(name: str) -> None:
    command, signature = command_of(name), inspect.signature(function(name))
    parameters = {k: v for k, v in signature.parameters.items() if k != "say"}
    own = {option_name(p): p for p in command.params if p.name not in PRINTING}
    assert parameters.keys() == own.keys()
    defaults = defaults_of(command)
    for option, parameter in own.items():
        if parameter.required:
            assert parameters[option].default is inspect.Parameter.empty, option
        elif not isinstance(parameter, click.Argument):
            given, wanted = parameters[option].default, defaults[option]
            # None of an option that may be repeated is the empty tuple.
            assert given == wanted or (given is None and wanted == ()), option


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_typed_and_documented(name: str) -> None:
    found = function(name)
    assert found.__module__.startswith("asvit_deploy.")
    assert "Raises:" in (found.__doc__ or "")
    signature = inspect.signature(found)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
    assert signature.parameters["say"].default("nobody listens") is None


def test_every_command_but_those_of_the_machine_is_a_function() -> None:
    commands = {name.replace("-", "_") for name in COMMANDS}
    assert commands - set(FUNCTIONS) == {"build_plugins", "doctor"}
    assert sorted(asvit_deploy.__all__) == sorted([*FUNCTIONS, *ERRORS])
    assert set(asvit_deploy.__all__) <= set(dir(asvit_deploy))


def test_the_package_is_typed() -> None:
    assert Path(asvit_deploy.__file__).with_name("py.typed").is_file()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tune_everything'"):
        asvit_deploy.tune_everything  # noqa: B018


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_names_are_there_before_anything_heavy_is_imported() -> None:
    code = """
import sys, asvit_deploy
dir(asvit_deploy), asvit_deploy.UserError
print([name for name in ("torch", "onnx", "numpy", "click") if name in sys.modules])
"""
    assert run_python(code).strip() == "[]"


@pytest.mark.slow
def test_functions_stay_functions_once_every_module_is_imported() -> None:
    """A submodule becomes an attribute of the package, under its own name."""
    names = [
        module.name
        for module in pkgutil.walk_packages(asvit_deploy.__path__, "asvit_deploy.")
        if not module.name.endswith("__main__") and not module.name.startswith("asvit_deploy._cpp")
    ]
    assert len(names) > 100
    public = [name for name in FUNCTIONS if name not in LATER]
    code = f"""
import importlib, inspect
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # an extra that is not installed
        assert not str(error.name).startswith("asvit_deploy"), error
import asvit_deploy
for name in {public!r}:
    assert inspect.isfunction(getattr(asvit_deploy, name)), name
print("ok", *(name for name in {FUNCTIONS!r} if inspect.ismodule(vars(asvit_deploy).get(name))))
"""
    assert run_python(code).split() == ["ok"]


@pytest.fixture(scope="module")
def default_small() -> Path:
    """The checkpoint that the package carries."""
    return default_checkpoint()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "cat.png"
    Image.fromarray(data.chelsea()).save(path)
    return path


@pytest.fixture(scope="module")
def exported(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    return asvit_deploy.export(str(mini_checkpoint), output=str(folder / "mini.onnx")).output


def test_load_gives_the_network(mini_checkpoint: Path) -> None:
    import torch

    said: list[str] = []
    network = asvit_deploy.load(str(mini_checkpoint), say=said.append)
    assert not network.training
    side = network.config.image_size
    logits, trace = network(torch.zeros(2, 3, side, side))
    assert logits.shape == (2, network.config.num_classes)
    assert all(length.shape == (2,) for length in trace.length)
    assert said
    assert all(str(mini_checkpoint) in line for line in said)
    assert asvit_deploy.load(mini_checkpoint, dense=True).threshold_values() == []


def test_load_takes_the_facts_that_are_given(mini_checkpoint: Path) -> None:
    network = asvit_deploy.load(mini_checkpoint, mean=0.25, std=[0.5, 0.25, 0.125])
    assert network.config.preprocessing.mean == (0.25, 0.25, 0.25)
    assert network.config.preprocessing.std == (0.5, 0.25, 0.125)


@pytest.mark.slow
def test_save_keeps_what_load_gave(mini_checkpoint: Path, tmp_path: Path, capsys) -> None:
    import torch

    network = asvit_deploy.load(mini_checkpoint, mean=0.25)
    path = asvit_deploy.save(network, str(tmp_path / "again.safetensors"))
    assert path == tmp_path / "again.safetensors"
    again = asvit_deploy.load(path)
    assert again.threshold_values() == network.threshold_values()
    assert again.config == network.config
    images = torch.randn(2, 3, network.config.image_size, network.config.image_size)
    assert again(images)[0].equal(network(images)[0])
    assert json.loads(again.metadata["preprocessing_from"])["mean"] == "option --mean"
    assert asvit_deploy.export(path, output=tmp_path / "again.onnx").parity["batch 1"].passed
    assert capsys.readouterr().out == ""


def test_save_of_a_dense_twin_says_nothing_of_a_budget(tmp_path: Path) -> None:
    network = asvit_deploy.load("default", dense=True)
    assert "budget" in network.metadata
    again = asvit_deploy.load(asvit_deploy.save(network, tmp_path / "dense.safetensors"))
    assert not again.adaptive
    assert "budget" not in again.metadata
    assert json.loads(again.metadata["classes"]) == json.loads(network.metadata["classes"])


def test_load_takes_a_state_dict_with_its_configs(tmp_path: Path) -> None:
    import torch
    from checkpoint_files import HF, PREPROCESSOR, dense_state

    config = {**HF, "id2label": {i: f"bird {i}" for i in range(7)}, "image_size": 32}
    said: list[str] = []
    network = asvit_deploy.load(
        dense_state(), config=config, preprocessor=PREPROCESSOR, say=said.append
    )
    assert network.config.preprocessing.std == (0.3,) * 3
    assert network.config.eps == 1e-6
    assert any("from its preprocessor" in line for line in said)
    path = asvit_deploy.save(network, tmp_path / "birds.safetensors")
    assert json.loads(asvit_deploy.load(path).metadata["classes"])[6] == "bird 6"
    before = network.cls_token.detach().clone()
    state = dense_state()
    again = asvit_deploy.load(state, config=config)
    state["cls_token"].add_(1)  # a copy was taken
    assert torch.equal(again.cls_token, before)


def test_load_looks_into_wrappers_and_refuses_its_own() -> None:
    import torch
    from checkpoint_files import HF
    from hub_files import vit_state

    class Birds(torch.nn.Module):
        config: typing.ClassVar = {**HF, "num_attention_heads": 12}

        def state_dict(self, *args, **kwargs):  # type: ignore[override]
            return vit_state()

    network = asvit_deploy.load(torch.nn.DataParallel(Birds()))
    assert network.config.heads == 12
    raises_one_line(lambda: asvit_deploy.load(network), "one that load gave", "save")


@pytest.mark.slow
def test_load_takes_a_module_of_timms() -> None:
    import families
    import torch

    library = families.timm()
    for name, more in (
        ("vit_small_patch16_224", {"num_heads": 12}),
        ("vit_base_patch16_clip_quickgelu_224", {"num_classes": 512}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 56}),
    ):
        made = library.create_model(name, depth=2, **more).eval()
        network = asvit_deploy.load(made)
        images = torch.randn(1, 3, network.config.image_size, network.config.image_size)
        with torch.no_grad():
            wanted = made(images)
            apart = (network(images)[0] - wanted).abs().max()
        assert apart <= 1e-5 * wanted.abs().max(), name


@pytest.mark.slow
def test_export_writes_what_the_command_writes(
    cli, mini_checkpoint: Path, tmp_path: Path, capsys
) -> None:
    command = cli("export", "--ckpt", mini_checkpoint, "-o", "command.onnx")
    assert command.code == 0, command.err
    said: list[str] = []
    result = asvit_deploy.export(mini_checkpoint, output="function.onnx", say=said.append)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert result.output == Path("function.onnx")
    assert result.parity["batch 1"].passed
    assert [line for line in command.err.splitlines() if line in said] == said
    ours, theirs = (json.loads(Path(f"{n}.onnx.json").read_text()) for n in ("function", "command"))
    for fields in (ours, theirs):  # the command line is in the file
        del fields["command"], fields["digest"], fields["sha256"]
    assert ours == theirs


@pytest.mark.slow
def test_calibrate_returns_what_it_wrote(mini_checkpoint: Path, tmp_path: Path, capsys) -> None:
    result = asvit_deploy.calibrate(
        mini_checkpoint, budget=0.8, limit=8, output=str(tmp_path / "c.safetensors")
    )
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert result.report["macs_ratio"] == pytest.approx(0.8, rel=0.01)
    again = asvit_deploy.load(result.output)
    assert again.threshold_values() == pytest.approx(list(result.thresholds))


@pytest.mark.slow
def test_predict_takes_one_picture_or_several(exported: Path, picture: Path, capsys) -> None:
    one = asvit_deploy.predict(str(exported), str(picture))
    two = asvit_deploy.predict(exported, [picture, picture])
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert two == [*one, *one]
    best = one[0].top
    assert [guess.probability for guess in best] == sorted(
        (g.probability for g in best), reverse=True
    )
    assert all(0 <= token < one[0].image_tokens for stage in one[0].kept for token in stage)


@pytest.mark.slow
def test_predict_prints_as_the_command_does(cli, exported: Path, picture: Path) -> None:
    broken = Path("broken.png")
    broken.write_bytes(b"no picture")
    pictures = [picture, broken]
    results = asvit_deploy.predict(exported, pictures, skip_limit=1)
    shown = cli("predict", exported, *pictures, "--skip-limit", 1, "--json")
    assert json.loads(shown.out) == [result.as_dict() for result in results]
    assert results[1].skipped


@pytest.mark.slow
def test_evaluate_returns_the_report_and_leaves_torch_as_it_was(
    cli, default_small: Path, tmp_path: Path, capsys
) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        result = asvit_deploy.evaluate(
            default_small, data="digits", limit=8, batch_size=[1, 4], output=tmp_path / "r.json"
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert capsys.readouterr().out == ""
    assert [row["batch_size"] for row in result.rows] == [1, 4]
    assert json.loads((tmp_path / "r.json").read_text()) == result.as_dict()
    command = cli("evaluate", default_small, "--data", "digits", "--limit", 8, "--batch-size", 1,
                  "--batch-size", 4, "--json")  # fmt: skip
    assert json.loads(command.out) == result.as_dict()


@pytest.mark.slow
def test_finetune_returns_what_it_wrote(default_small: Path, tmp_path: Path, capsys) -> None:
    said: list[str] = []
    result = asvit_deploy.finetune(
        "digits", pretrained=str(default_small), steps=2, batch_size=4,
        thresholds=(0.01, 0.02, 0.03), validation_limit=8,
        output=str(tmp_path / "t.safetensors"), say=said.append,
    )  # fmt: skip
    assert capsys.readouterr().out == ""
    assert result.output.is_file()
    assert result.validation["images"] == 8
    assert result.fit is not None
    assert any("2 steps of 4" in line for line in said)
    assert asvit_deploy.load(result.output).threshold_values()


@pytest.mark.slow
def test_finetune_shows_nothing_where_nobody_listens(default_small: Path, tmp_path, capsys) -> None:
    asvit_deploy.finetune(
        "digits", pretrained=default_small, dense=True, steps=1, batch_size=4, validation_limit=4,
        output=tmp_path / "d.safetensors",
    )  # fmt: skip
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.slow
def test_finetune_is_interrupted_and_goes_on(default_small: Path, tmp_path, monkeypatch) -> None:
    from asvit_deploy.training import run as training_run

    options = {
        "pretrained": default_small, "dense": True, "steps": 2, "batch_size": 4,
        "validation_limit": 4,
    }  # fmt: skip

    def train(name: str, **more: typing.Any) -> dict[str, typing.Any]:
        result = asvit_deploy.finetune("digits", **options, output=tmp_path / name, **more)
        return asvit_deploy.load(result.output).state_dict()

    whole = train("whole.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "stop_signals",
                      lambda: contextlib.nullcontext([signal.SIGTERM]))  # fmt: skip
        with pytest.raises(asvit_deploy.Interrupted, match="go on with --resume"):
            train("stopped.safetensors")
    assert not (tmp_path / "stopped.safetensors").exists()
    resumed = train("stopped.safetensors", resume=True)
    assert all(resumed[key].equal(value) for key, value in whole.items())


@pytest.mark.slow
def test_a_file_is_replaced_only_with_force(mini_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.onnx"
    target.write_text("mine")
    with pytest.raises(asvit_deploy.UserError, match="exists already"):
        asvit_deploy.export(mini_checkpoint, output=target)
    assert target.read_text() == "mine"
    assert asvit_deploy.export(mini_checkpoint, output=target, force=True).output == target


BAD: list[tuple[str, tuple[object, ...], dict[str, object], tuple[str, ...]]] = [
    ("export", ("",), {}, ("an empty path",)),
    ("export", ("gone.pt",), {}, ("gone.pt", "does not exist")),
    ("export", ("default",), {"batch": "2"}, ("batch='2'", "dynamic")),
    ("export", ("default",), {"batch": 1}, ("batch=1", "dynamic")),
    ("export", ("default",), {"ops": "none"}, ("ops='none'", "custom")),
    ("export", ("default",), {"skip_limit": -1}, ("skip_limit=-1",)),
    ("export", ("default",), {"mean": "red"}, ("--mean",)),
    ("export", ("default",), {"mean": [0.5, 0.5]}, ("--mean",)),
    ("export", ("default",), {"heads": 7}, ("--heads 7",)),
    ("calibrate", ("default",), {"limit": 0}, ("limit=0",)),
    ("calibrate", ("default",), {"seed": 2**63}, ("seed=",)),
    ("calibrate", ("default",), {"seed": 0.5}, ("seed=0.5",)),
    ("build_engine", ("x.onnx",), {"mode": "fast"}, ("mode='fast'", "padded")),
    ("build_engine", ("x.onnx",), {"flavour": "rtx"}, ("flavour='rtx'", "tensorrt-rtx")),
    ("build_engine", ("x.onnx",), {"fp16": True, "bf16": True}, ("--fp16 and --bf16",)),
    ("build_engine", ("x.onnx",), {"batch": (1, 2)}, ("batch=(1, 2)",)),
    ("build_engine", ("x.onnx",), {"batch": 5}, ("batch=5",)),
    ("build_engine", ("x.onnx",), {"batch": (0, 1, 2)}, ("batch=0",)),
    ("build_engine", ("x.onnx",), {"level": 6}, ("level=6",)),
    ("build_engine", ("x.onnx",), {"buckets": [16]}, ("--buckets needs --mode bucketed",)),
    ("build_engine", (), {}, ("no onnx artefact",)),
    ("evaluate", ("default",), {"data": ""}, ("--data is empty",)),
    ("evaluate", ("default",), {"data": "digits", "batch_size": []}, ("batch_size is empty",)),
    ("evaluate", ("default",), {"data": "digits", "batch_size": "4"}, ("batch_size='4'",)),
    ("evaluate", ("default",), {"data": "digits", "batch_size": 0}, ("batch_size=0",)),
    ("evaluate", ("default",), {"data": "digits", "batch_rule": "mean"}, ("batch_rule='mean'",)),
    ("predict", ("x.onnx", []), {}, ("no picture is named",)),
    ("predict", ("x.onnx", ["a.png"]), {}, ("x.onnx", "does not exist")),
    ("finetune", ("digits",), {}, ("--pretrained FILE",)),
    ("finetune", ("digits",), {"arch": "as_deit_mini", "dense": True, "steps": 0}, ("steps=0",)),
    ("finetune", ("digits",), {"arch": "as_deit_mini", "dense": True, "workers": 2000},
     ("workers=2000",)),
    ("finetune", ("digits",), {"arch": "as_deit_mini", "dense": True, "batch_size": True},
     ("batch_size=True",)),
    ("finetune", ("digits",), {"arch": "as_deit_mini", "dense": True, "lr": "x"}, ("lr='x'",)),
    ("finetune", ("digits",), {"pretrained": "default", "thresholds": 0.5}, ("thresholds=0.5",)),
    ("finetune", ("digits",), {"pretrained": "default", "stages": "abc"}, ("stages='abc'",)),
    ("finetune", ("digits",), {"pretrained": "default", "save_every": "1"}, ("save_every='1'",)),
    ("finetune", ("digits",), {"pretrained": "default", "amp": 3}, ("--amp 3",)),
    ("calibrate", ("default",), {"budget": "0.5"}, ("budget='0.5'",)),
    ("calibrate", ("default",), {"budget": float("nan")}, ("budget nan",)),
    ("load", ("default",), {"mean": object()}, ("--mean",)),
    ("load", ("default",), {"image_size": "56"}, ("image_size='56'",)),
    ("load", ("gone.pt",), {}, ("gone.pt",)),
    ("load", ("default",), {"config": {}}, ("config", "weights in memory", "default")),
    ("load", (3,), {}, ("int cannot be loaded",)),
    ("load", ({},), {}, ("dict cannot be loaded",)),
    ("load", ({"a": 1},), {}, ("the state dict", "no weights")),
    ("load", ({"a": 1},), {"config": [1]}, ("config is no dictionary",)),
    ("load", ({"a": 1},), {"config": {"model_type": "swin"}}, ("the state dict", "a Swin")),
    ("save", (None, "x.safetensors"), {}, ("NoneType cannot be saved",)),
    ("load", ("default",), {"image_size": 57}, ("57",)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "options", "words"), BAD)
def test_bad_input_is_one_line_and_writes_nothing(
    name, arguments, options, words, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    raises_one_line(lambda: getattr(asvit_deploy, name)(*arguments, **options), *words)
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_a_head_of_other_outputs(tmp_path: Path) -> None:
    import torch

    network = asvit_deploy.load("default")
    network.head = torch.nn.Linear(network.config.dim, 3)
    path = tmp_path / "three.safetensors"
    raises_one_line(lambda: asvit_deploy.save(network, path), "3 outputs", "config says 10")
    assert not path.exists()
    network.config = network.config.at(num_classes=3)
    assert asvit_deploy.load(asvit_deploy.save(network, path)).config.num_classes == 3
