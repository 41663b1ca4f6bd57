"""Options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from asvit_deploy.models.config import Activation, Interpolation
from asvit_deploy.runtimes import AUTO, NAMES, OF_KIND
from asvit_deploy.text import MOST_LINE, one_line, printable


class CheckpointPath(click.ParamType):
    """A checkpoint file or folder, `hf-hub:NAME`, or `default`, the one that the package
    carries; those that need a look are looked up later."""

    name = "path"

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        if value == "default" and not Path(value).exists():
            from asvit_deploy.checkpoints import default_checkpoint

            return default_checkpoint()
        if str(value) == "":
            self.fail("an empty path names nothing", param, ctx)
        return Path(value)


class Blocks(click.ParamType):
    """Block numbers, such as 3,6,9."""

    name = "b,b,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        parts = value.replace(",", " ").split()
        if not parts or not all(part.isdecimal() and len(part) < 6 for part in parts):
            self.fail(f"{value!r} is no list of block numbers such as 3,6,9", param, ctx)
        return tuple(map(int, parts))


class Capability(click.ParamType):
    """A GPU generation as its compute capability without the point, such as 86."""

    name = "sm"

    def __init__(self, all_too: bool = False) -> None:
        self.all_too = all_too

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if (value == "all" and self.all_too) or (value.isdecimal() and 2 <= len(value) <= 3):
            return value
        other = ", nor `all`" if self.all_too else ""
        self.fail(f"{value!r} is not a compute capability such as 86 or 120{other}", param, ctx)


class Channels(click.ParamType):
    """A number for each of red, green and blue, or one for all."""

    name = "r,g,b"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        try:
            numbers = tuple(map(float, value.replace(",", " ").split()))
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 3):
            self.fail(f"{value!r} is neither one number nor three such as 0.5,0.5,0.5", param, ctx)
        return numbers * 3 if len(numbers) == 1 else numbers


class ListsTargets(click.Command):
    """Lets `--target-sm 86 89 120` stand for three options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        listing = False
        for arg in args:
            if arg.startswith("-"):
                listing = arg == "--target-sm" or arg.startswith("--target-sm=")
            elif listing and spread[-1] != "--target-sm":
                listing = arg[0:1].isdigit() or arg == "all"
                spread += ["--target-sm"] if listing else []
            spread.append(arg)
        return super().parse_args(ctx, spread)


def target_sm(text: str, all_too: bool = False) -> Any:
    """The option `--target-sm` of a command of class `ListsTargets`."""
    return click.option(
        "--target-sm", multiple=True, type=Capability(all_too), metavar="SM...", help=text
    )


class _Path(click.Path):
    """A path; an empty one would silently be the current folder."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if str(value) == "":
            self.fail("an empty path names nothing", param, ctx)
        return super().convert(value, param, ctx)


# Not readable=True: it would ask that of outputs too, and say less than the one who reads.
PATH = _Path(path_type=Path, readable=False)

checkpoint = click.option(
    "--ckpt", "ckpt", required=True, type=CheckpointPath(),
    help="Checkpoint file, hub folder, or hf-hub:NAME[@REVISION]; `default` is the packaged one.",
)  # fmt: skip
images = click.option(
    "--images", type=PATH, help="Folder of pictures [default: photographs of scikit-image]."
)
ema = click.option("--ema", is_flag=True, help="Use the averaged weights of a training checkpoint.")
limit = click.option("--limit", type=click.IntRange(1), help="Use at most so many pictures.")
skip_limit = click.option(
    "--skip-limit", type=click.IntRange(0), default=0, show_default=True,
    help="Unreadable pictures to pass over.",
)  # fmt: skip
force = click.option("--force", is_flag=True, help="Replace an existing output.")
html = click.option(
    "--html", metavar="FILE", type=PATH,
    help="Also make one page of it here; `report` joins several.",
)  # fmt: skip
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
library = click.option(
    "--library", type=PATH, help="The op's library [default: the one `build-plugins` made]."
)
_ENGINE_CODE = (
    click.option(
        "--plugin", type=PATH,
        help="The op's TensorRT library, for engines [default: the one `build-plugins trt` made].",
    ),
    click.option(
        "--allow-engine-code", is_flag=True,
        help="Run code that an engine brings along (--embed-plugin, --version-compatible).",
    ),
)  # fmt: skip
classes = click.option(
    "--classes", type=PATH,
    help="Names of the network's outputs in their order: text, one a line, or JSON (id2label).",
)  # fmt: skip
_RUNTIMES = ", ".join(NAMES)
runtimes = click.option(
    "--runtime", multiple=True, metavar="A,B,...",
    help=f"Only in these [default: what is installed but openvino-bf16]: {_RUNTIMES}.",
)  # fmt: skip
checked_runtimes = click.option(
    "--runtime", multiple=True, metavar="A,B,...",
    help=f"Only in these [default: onnxruntime and tensorrt]: {_RUNTIMES}; or {AUTO}, what "
    "`bench --save-choice` found.",
)  # fmt: skip
one_runtime = click.option(
    "--runtime", metavar="NAME", help=f"What runs an ONNX file [default: {NAMES[0]}]: "
    f"{', '.join(OF_KIND['onnx'])}; or {AUTO}, what `bench --save-choice` found.",
)  # fmt: skip
choice = click.option(
    "--choice", type=PATH, help=f"What --runtime {AUTO} reads [default: MODEL.choice.json]."
)
models = click.argument("models", nargs=-1, type=PATH)


_FACTS = (
    click.option("--mean", type=Channels(), help="Of pixels from 0 to 1: R,G,B or one number."),
    click.option("--std", type=Channels(), help="Likewise."),
    click.option(
        "--crop-pct", type=float, help="Side of the centre crop over the resized shorter side."
    ),
    click.option(
        "--interpolation", type=click.Choice(get_args(Interpolation)), help="Of the resizing."
    ),
    click.option("--heads", type=click.IntRange(1), help="Attention heads."),
    click.option(
        "--activation", type=click.Choice(get_args(Activation)), help="Between the MLPs' layers."
    ),
)


_METHOD = (
    click.option(
        "--cuts", type=Blocks(), help="Blocks at which tokens leave [default: the method's own]."
    ),
    click.option(
        "--max-kept", type=click.IntRange(1), metavar="ROWS",
        help="Most rows that any picture keeps by thresholds behind the last cut.",
    ),
)  # fmt: skip


def method(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options on where a method cuts and what it may keep."""
    for option in reversed(_METHOD):
        command = option(command)
    return command


def facts(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for what weights cannot tell.

    By default they come from what lies beside or in the checkpoint, else from its arch.
    """
    for option in reversed(_FACTS):
        command = option(command)
    return command


def engine_code(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options for the code that engines may run: `plugin` and `allow_engine_code`."""
    for option in reversed(_ENGINE_CODE):
        command = option(command)
    return command


def status(message: str) -> None:
    """One line to stderr, whatever a file's name holds."""
    click.echo(one_line(message, 4 * MOST_LINE), err=True)


def echo(text: object, lead: str = "") -> None:
    """To stdout, in the terminal's own characters, and none that steers it but line ends: names
    come from anywhere.

    Args:
        lead: words of ours that stand in front, perhaps in a colour, which stays.
    """
    plain = printable(str(text), keep="\n")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    click.echo(lead + plain.encode(encoding, "backslashreplace").decode(encoding))


def echo_json(text: str) -> None:
    """JSON to stdout, which means the same afterwards: json leaves one control as it is."""
    click.echo(text.replace("\x7f", "\\u007f"))
