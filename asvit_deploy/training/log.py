"""The log of a run: JSON lines beside its output."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from asvit_deploy.bounded import open_regular, parse_json
from asvit_deploy.disk import unwritten
from asvit_deploy.errors import UserError
from asvit_deploy.files import check_writable, no_link, write_text
from asvit_deploy.requirements import pip_install

_MOST_LINE = 1 << 20  # bytes; a line of ours has some hundreds


def log_path(output: Path) -> Path:
    """The JSON-lines log of the run that makes `output`."""
    return output.with_suffix(".log.jsonl")


class Log:
    """JSON lines beside the output, one object each; a resumed run drops what it will repeat.

    The file is touched only when there is something to write, and its first line names the run.

    Args:
        known: what decides the run's result; a log of the same is this run's own.
        step: after which a resumed run goes on; None for a new one.
        force: replace a log that is not this run's own.
        tensorboard: a folder for TensorBoard's events, which get the same numbers.
        quiet: write nothing at all; for all processes of a run but one.

    Raises:
        UserError: another file is in its place and `force` is off.
    """

    def __init__(
        self,
        path: Path,
        known: dict[str, Any],
        step: int | None,
        force: bool,
        tensorboard: Path | None = None,
        quiet: bool = False,
    ) -> None:
        self._quiet, self._board = quiet, None
        if quiet:
            return
        start = {"event": "start", "run": _digest(known)}
        before = iter(()) if step is None else _events(path)
        own = next(before, None) == start
        check_writable(path, force or own)
        kept = [event for event in before if _step(event) <= (step or 0)] if own else []
        self._path = path
        self._head: list[dict[str, Any]] | None = [start, *kept]
        if tensorboard is not None:
            self._board = _board(tensorboard, step)

    def write(self, figures: dict[str, Any]) -> None:
        """Add one line; to TensorBoard too, where it has a step.

        Raises:
            UserError: it cannot be written.
        """
        if self._quiet:
            return
        rounded = json.loads(json.dumps(figures), parse_float=lambda x: float(f"{float(x):.6g}"))
        if self._head is not None:
            write_text(self._path, "".join(json.dumps(event) + "\n" for event in self._head))
            self._head = None
        try:
            with open(self._path, "a", opener=no_link) as file:
                file.write(json.dumps(rounded) + "\n")
        except OSError as error:
            raise unwritten(self._path, error) from error
        if self._board is not None and "step" in figures:
            prefix = f"{figures['event']}/" if "event" in figures else ""
            try:
                for name, value in _numbers(rounded):
                    self._board.add_scalar(prefix + name, value, figures["step"])
                self._board.flush()
            except OSError as error:
                raise unwritten(Path(self._board.log_dir), error) from error


def _board(folder: Path, step: int | None) -> Any:
    """TensorBoard's writer, which hides what an earlier run wrote beyond `step`.

    Raises:
        UserError: tensorboard is not installed, or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard needs tensorboard; {pip_install('tensorboard')}") from error
    threading.excepthook = partial(_quiet_board, threading.excepthook)
    try:
        return SummaryWriter(str(folder), purge_step=None if step is None else step + 1)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; name another folder") from error


def _quiet_board(
    report: Callable[[threading.ExceptHookArgs], Any], failed: threading.ExceptHookArgs
) -> None:
    """TensorBoard writes in a thread and keeps an OSError for our next call, which reports it."""
    thread = type(failed.thread).__module__
    if not (isinstance(failed.exc_value, OSError) and thread.startswith("tensorboard.")):
        report(failed)


def _numbers(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers among figures, those of lists and of objects in them by a name of their own."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield from _numbers({f"{name}.{i}": item for i, item in enumerate(value)}, prefix)
        elif isinstance(value, int | float) and name not in ("step", "epoch"):
            yield prefix + name, value


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines; a killed run may leave half a line."""
    if not path.is_file():
        return
    with open_regular(path, "log") as file:
        while line := file.readline(_MOST_LINE):
            with contextlib.suppress(ValueError):
                event = parse_json(line.decode(errors="replace"))
                if isinstance(event, dict):
                    yield event


def _step(event: dict[str, Any]) -> float:
    """Where in the run an event belongs; after its end where it does not say."""
    step = event.get("step")
    return step if isinstance(step, int) else math.inf


def _digest(known: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
