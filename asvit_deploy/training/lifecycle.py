"""How a run starts, is stopped and goes on: its claims, state, log, and the signals that end it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from asvit_deploy.checkpoints.load import Checkpoint
from asvit_deploy.errors import Interrupted
from asvit_deploy.sidecar import claimed
from asvit_deploy.training.log import Log, log_path
from asvit_deploy.training.processes import together
from asvit_deploy.training.recipe import Running
from asvit_deploy.training.state import load_state, save_state, state_path
from asvit_deploy.training.trainer import Trainer


def average_path(output: Path) -> Path:
    """Where the moving average of the weights goes, beside the weights themselves."""
    return output.with_name(f"{output.stem}.ema{output.suffix}")


def interrupted(step: int, output: Path) -> Interrupted:
    """What ends a run that was asked to stop, once its state is saved."""
    return Interrupted(
        f"stopped after step {step}; {state_path(output)} holds it, go on with --resume"
    )


@contextlib.contextmanager
def claims(
    output: Path, trainer: Trainer, replace: bool, inputs: Sequence[Checkpoint | None]
) -> Iterator[None]:
    """No other run makes the output, or its moving average, meanwhile.

    Args:
        replace: whether what is there may be replaced.
        inputs: what the average must not replace.

    Raises:
        UserError: in all processes; another run is making it, or it cannot be written.
    """
    main = trainer.accelerator.is_main_process
    with contextlib.ExitStack() as held:
        with together(trainer.accelerator):
            if main:
                held.enter_context(claimed(output, "checkpoint", replace))
            if main and trainer.recipe.ema:
                paths = [given.path for given in inputs if given is not None]
                beside = average_path(output)
                held.enter_context(claimed(beside, "checkpoint", replace, *paths))
        yield


class Progress:
    """Where a run stands on disk: its log, and the state from which it can go on.

    Attributes:
        first: the step that comes next when the run starts: 0, or that of the saved state.
        log: of this run, continued where it goes on.

    Raises:
        UserError: there is nothing to resume, the state belongs to another run, or the log would
            replace another file.
    """

    def __init__(
        self, trainer: Trainer, output: Path, identity: dict[str, Any], resume: bool,
        running: Running, force: bool,
    ) -> None:  # fmt: skip
        self.output, self._trainer, self._saved = output, trainer, -1
        # Data first: with other pictures the number of steps may differ too, which says less.
        self._known = {**identity, **asdict(trainer.recipe)}
        self._main, self.first = trainer.accelerator.is_main_process, 0
        with together(trainer.accelerator):
            if resume:
                self.first = load_state(state_path(output), trainer, self._known)
            since = self.first if resume else None
            self.log = Log(log_path(output), self._known, since, force, running.tensorboard,
                           quiet=not self._main)  # fmt: skip

    def save(self, step: int) -> None:
        """Keep the state after `step` steps, once."""
        if step != self._saved:
            with together(self._trainer.accelerator):
                if self._main:
                    save_state(state_path(self.output), step, self._trainer, self._known)
        self._saved = step


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM put themselves into the list; a second one acts at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for number in before:
            signal.signal(number, note)
    except ValueError:  # not the main thread: the caller handles signals
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def kept_when_stopped(output: Path, steps: int) -> Iterator[None]:
    """A stop after the last step loses nothing either: the state of that step is saved."""
    before = None

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # not the main thread
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise interrupted(steps, output) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
