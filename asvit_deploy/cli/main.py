"""The `asvit-deploy` command. Each subcommand is a module, imported only when it runs."""

from __future__ import annotations

import errno
import importlib
import sys
from collections.abc import Iterator
from typing import NoReturn

import click
from click.utils import PacifyFlushWrapper

from asvit_deploy import __version__
from asvit_deploy.bounded import UNREADABLE
from asvit_deploy.disk import (
    FULL,
    NO_TEMPORARY,
    is_full,
    lacks_temporary,
    temporary_folder,
    unwritten,
)
from asvit_deploy.errors import CheckFailed, Interrupted, UserError, shortened
from asvit_deploy.status import first_process
from asvit_deploy.text import one_line

# name -> one line of help; the module is the name with dashes as underscores and holds `command`.
COMMANDS = {
    "finetune": "Train: budget-aware fine-tuning, or a dense teacher.",
    "calibrate": "Find thresholds that meet a MACs budget, without training.",
    "tune": "Is it worth it here, and what is lost? A go with its model, or a no-go.",
    "export": "Checkpoint to one ONNX file, checked against PyTorch.",
    "build-engine": "ONNX to a TensorRT engine.",
    "check": "Parity with PyTorch: outputs, top-1 or neighbours, kept tokens.",
    "bench": "Latency, MACs and kept tokens beside the dense model.",
    "evaluate": "Top-1 or agreement of embeddings, MACs and kept tokens over pictures.",
    "predict": "Top-5 and kept tokens of pictures.",
    "visualize": "Pictures of which tokens stay, cut by cut.",
    "report": "One page of what the others wrote as JSON: the verdict first.",
    "package": "A model repository for Triton, preprocessing included.",
    "build-plugins": "Compile the C++ libraries into the user cache.",
    "doctor": "What is installed, what clashes, what to do about it.",
}


# What may fail anywhere, and is no defect of ours.
_OF_THE_MACHINE = (*UNREADABLE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


class LazyGroup(click.Group):
    """A group that knows its commands' names and help without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"asvit_deploy.cli.{name.replace('-', '_')}")
        return module.command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="asvit-deploy")
def group() -> None:
    """Adaptive ViTs from checkpoint to checked ONNX and TensorRT.

    \b
    asvit-deploy export --ckpt as_deit_s.pt
    asvit-deploy build-engine --fp16
    asvit-deploy bench
    """


def _access_failure(error: OSError) -> str | None:
    """One line for what the system refuses; None where it is a defect of ours."""
    if error.errno in FULL:
        if error.filename is not None:
            return str(unwritten(str(error.filename), error))
        places = (temporary_folder() or "/tmp", ".")
        full = next((place for place in places if is_full(place)), None)
        if full is not None:
            return str(unwritten(full, error))
        return (
            f"cannot write the output, or a temporary file: {error.strerror}; free space, or set "
            "TMPDIR to another disk"
        )
    if error.errno in _OF_THE_MACHINE and error.filename is None:
        return f"the system does not go on: {error.strerror}; check it, then run it again"
    if error.filename is None:
        return None
    if error.errno in UNREADABLE:
        return (
            f"cannot read {shortened(error.filename)}: {error.strerror}; check the disk, or copy "
            "the file from elsewhere"
        )
    advice = "; check the permissions on it and its folders" * isinstance(error, PermissionError)
    return f"cannot access {shortened(error.filename)}: {error.strerror}{advice}"


def _began(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it began as: libraries catch one in mid-import, raise their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _end_interrupted() -> NoReturn:
    click.echo("Interrupted; nothing was changed.", err=True)
    sys.exit(130)


def _refuse(reason: str) -> NoReturn:
    """One line, whatever a file's name holds."""
    click.echo(f"Error: {one_line(reason)}", err=True)
    sys.exit(2)


def _explain(error: Exception) -> None:
    """End here where it began as what is no defect: an interrupt, no place for temporary files."""
    for first in _began(error):
        if isinstance(first, KeyboardInterrupt):
            _end_interrupted()
        if isinstance(first, OSError) and lacks_temporary(first):
            _refuse(NO_TEMPORARY)


def main(args: list[str] | None = None) -> None:
    """Run the command; exit 0 when good, 1 when a check failed, 2 on bad input, 3 and 4 where
    tune says no go and not shown, 130 if stopped."""
    try:
        code = group.main(args, prog_name="asvit-deploy", standalone_mode=False)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f" ({context.command_path} --help lists the options)" if context else ""
        _refuse(error.format_message().rstrip(".") + where)
    except UserError as error:
        _refuse(str(error))
    except SystemExit:
        # click answers to a closed pipe with exit code 1, which is a failed check's here. Whoever
        # reads, such as `head`, has seen enough.
        if type(sys.stdout) is PacifyFlushWrapper:
            sys.exit(141)
        raise
    except OSError as error:
        line = _access_failure(error)
        if line is None:
            _explain(error)
            raise
        _refuse(line)
    except Interrupted as error:
        if first_process():
            click.echo(error, err=True)
        sys.exit(130)
    except CheckFailed as error:
        click.echo(f"Failed: {error}", err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        _end_interrupted()
    except Exception as error:
        _explain(error)
        raise
    sys.exit(code if isinstance(code, int) else 0)
