"""The command itself: quick, lazy, and with exit codes that mean something."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import subprocess
import sys

import click
import pytest
from conftest import cpu_seconds

from asvit_deploy import __version__
from asvit_deploy.cli.main import COMMANDS, main
from asvit_deploy.errors import CheckFailed, UserError

HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "skimage", "scipy", "numpy", "PIL")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "asvit_deploy", *args], capture_output=True, text=True, check=False
    )


def module_of(name: str) -> str:
    return f"asvit_deploy.cli.{name.replace('-', '_')}"


def imported_by(statement: str) -> set[str]:
    """Names of HEAVY that a fresh interpreter holds after `statement`."""
    code = f"import sys; {statement}; print(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_is_instant() -> None:
    """Of processor time, the least of a few runs: the command's own cost on a busy machine too."""
    seconds = []
    for _ in range(8):
        start = cpu_seconds()
        done = run("--help")
        seconds.append(cpu_seconds() - start)
        assert done.returncode == 0
    assert min(seconds) < 0.3


def test_help_lists_every_command() -> None:
    output = run("--help").stdout
    assert output.startswith("Usage: asvit-deploy ")
    for name, line in COMMANDS.items():
        assert name in output
        assert line in " ".join(output.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not imported_by("import asvit_deploy")
    assert not imported_by("import asvit_deploy.cli.main")


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_lazy_and_explains_itself(name: str) -> None:
    command = importlib.import_module(module_of(name)).command
    assert isinstance(command, click.Command)
    assert command.help
    assert command.get_short_help_str(200)
    assert not imported_by(f"import {module_of(name)}")


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help_works(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"asvit-deploy {name}" in capsys.readouterr().out


def test_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert __version__ in done.stdout


@pytest.mark.parametrize(
    "args", [("no-such-command",), ("--no-such-option",), ("doctor", "--no-such-option")]
)
def test_wrong_usage_is_exit_2(args: tuple[str, ...]) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert not done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("x.pt is empty; pass another"), 2, "Error: x.pt is empty; pass another\n"),
        (CheckFailed("3 of 9 differ"), 1, "Failed: 3 of 9 differ\n"),
        (KeyboardInterrupt(), 130, None),
        (click.Abort(), 130, None),
        (click.ClickException("no"), 2, "Error: no\n"),
        (
            PermissionError(13, "Permission denied", "a/x.pt"), 2,
            "Error: cannot access a/x.pt: Permission denied; "
            "check the permissions on it and its folders\n",
        ),
        (
            OSError(36, "File name too long", "x.pt"), 2,
            "Error: cannot access x.pt: File name too long\n",
        ),
    ],
)  # fmt: skip
def test_exit_code_and_line_of_each_ending(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str | None,
) -> None:
    @click.command()
    def ending() -> None:
        raise error

    monkeypatch.setitem(COMMANDS, "ending", "Ends.")
    monkeypatch.setitem(sys.modules, "asvit_deploy.cli.ending", _module_with(ending))
    with pytest.raises(SystemExit) as end:
        main(["ending"])
    captured = capsys.readouterr()
    assert end.value.code == code
    assert not captured.out
    # Click ends the "^C" that the terminal shows with an empty line of its own.
    said = captured.err.lstrip("\n")
    assert said.count("\n") == 1
    assert said == line if line else said.startswith("Interrupted")


def _module_with(command: click.Command) -> object:
    module = type(sys)("asvit_deploy.cli.ending")
    module.command = command  # type: ignore[attr-defined]
    return module


def test_an_interrupt_that_a_library_turned_into_its_own_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch's exporter does when Ctrl-C falls into an import of its own."""

    @click.command()
    def ending() -> None:
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise AttributeError("half imported")  # noqa: B904
        except AttributeError as error:
            raise RuntimeError("export failed") from error

    monkeypatch.setitem(COMMANDS, "ending", "Ends.")
    monkeypatch.setitem(sys.modules, "asvit_deploy.cli.ending", _module_with(ending))
    with pytest.raises(SystemExit) as end:
        main(["ending"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "Interrupted; nothing was changed.\n"


@pytest.mark.parametrize("defect", [RuntimeError("ours"), OSError("ours")])
def test_a_defect_of_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, defect: Exception
) -> None:
    @click.command()
    def ending() -> None:
        raise defect

    monkeypatch.setitem(COMMANDS, "ending", "Ends.")
    monkeypatch.setitem(sys.modules, "asvit_deploy.cli.ending", _module_with(ending))
    with pytest.raises(type(defect), match="ours"):
        main(["ending"])


def test_ctrl_c_in_a_real_process_is_exit_130() -> None:
    code = """
import sys, time, types, click
from asvit_deploy.cli import main as cli
@click.command()
def command():
    print("ready", flush=True)
    time.sleep(60)
cli.COMMANDS["ending"] = "Ends."
sys.modules["asvit_deploy.cli.ending"] = types.SimpleNamespace(command=command)
cli.main(["ending"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Interrupted" in err


def test_ctrl_c_while_the_command_is_imported_is_exit_130() -> None:
    code = """
import sys
class Interrupts:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from asvit_deploy.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "Interrupted; nothing was changed.\n"


def test_files_never_take_the_numbers_of_streams_that_are_closed() -> None:
    code = """
import os, sys
from asvit_deploy.__main__ import open_all_streams
open_all_streams()
print("seen by nobody", file=sys.stderr)
os._exit(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT))
"""
    for closed in ("2>&-", "<&-", "<&- >&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code, os.devnull],
            check=False,
        )
        assert done.returncode > 2, closed
