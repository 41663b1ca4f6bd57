"""What a run is fed with: numbered batches made ahead, each process's share, unreadable pictures.

A batch follows from its number alone, so that a run which goes on from a state sees what it would
have seen.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from asvit_deploy.data.batches import Batch
from asvit_deploy.data.skips import too_many
from asvit_deploy.data.sources import Source
from asvit_deploy.errors import UserError
from asvit_deploy.training.processes import in_all
from asvit_deploy.training.recipe import Recipe


class _Numbered(Dataset):
    """Batch number `step` as item `step`: what worker processes of a `DataLoader` ask for."""

    def __init__(self, source: Source, size: int, part: range) -> None:
        self._source, self._size, self._part = source, size, part

    def __getitem__(self, step: int) -> Batch | UserError:
        """A refusal is returned: a worker process would wrap it in a traceback of its own."""
        try:
            return self._source.train_batch(step, self._size, self._part)
        except UserError as error:
            return error


def batches(
    source: Source, first: int, recipe: Recipe, part: range, workers: int
) -> Iterator[tuple[int, Batch | UserError]]:
    """Numbered batches, or why there is none, made ahead: by worker processes, or the next one by
    a thread.

    Args:
        part: see `share`.
        workers: so many processes; 0 is the thread.
    """
    steps, numbered = range(first, recipe.steps), _Numbered(source, recipe.batch_size, part)
    if workers:
        loader: DataLoader[Batch | UserError] = DataLoader(
            numbered, batch_size=None, sampler=steps, num_workers=workers,
            pin_memory=torch.cuda.is_available(), worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # else its seeds are numbers that a run's draws lack
        )  # fmt: skip
        yield from zip(steps, _handed_over(loader))
        return
    with ThreadPoolExecutor(1) as worker:
        ahead = worker.submit(numbered.__getitem__, first)
        for step in steps:
            batch = ahead.result()
            if step + 1 < recipe.steps:
                ahead = worker.submit(numbered.__getitem__, step + 1)
            yield step, batch


def _leave_signals_to_the_run(worker: int) -> None:
    """A signal to the whole group must not end worker processes before the run has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _handed_over(loader: DataLoader[Batch | UserError]) -> Iterator[Batch | UserError]:
    """The loader's batches; where a worker process dies, why there is none."""
    before = signal.getsignal(signal.SIGCHLD)
    made = iter(loader)
    # Torch would raise wherever the run is at that moment, such as in the middle of a step. It also
    # notices, if seconds later, when the next batch does not come.
    with contextlib.suppress(ValueError):  # not the main thread, where torch changes nothing
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    while True:
        try:
            batch = next(made, None)
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            message = str(error)
            if "in DataLoader worker" in message:  # raised by its own code, with its traceback
                raise
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in message:
                raise
            # The others: what it was handing over broke off.
            batch = UserError(
                "a process of --workers was killed, perhaps because memory ran out; with fewer "
                "--workers if need be, go on with --resume, or start anew where no step was made"
            )
        if batch is None:
            return
        yield batch


def share(accelerator: Accelerator, recipe: Recipe) -> range:
    """The pictures of each batch that this process sees, by their number within it.

    Raises:
        UserError: the batch does not divide among the processes, or separates pictures that are
            mixed with each other.
    """
    size, processes = recipe.batch_size, accelerator.num_processes
    if size % processes:
        raise UserError(
            f"--batch-size {size} is that of all processes together and does not divide by their "
            f"{processes}; try {math.ceil(size / processes) * processes}"
        )
    own = size // processes
    parts = [range(process * own, (process + 1) * own) for process in range(processes)]
    for part in parts:  # of all, so that all processes refuse
        recipe.augmentation.check_part(size, part)
    return parts[accelerator.process_index]


@dataclass
class Skipped:
    """Pictures that this process could not read since it started, and how many may be so in all."""

    accelerator: Accelerator
    limit: int
    names: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)  # of all processes, when they last met

    def fresh(self) -> int:
        """How many of this process's the others may not know yet."""
        return len(self.names - self.known)

    def everywhere(self) -> set[str]:
        """Those of all processes, which must all ask."""
        self.known = in_all(self.accelerator, self.names)
        return self.known

    def too_many(self) -> bool:
        """Whether they are more than the limit; for all processes to ask."""
        return len(self.everywhere()) > self.limit

    def check(self) -> None:
        """Raises UserError, in all processes, once there are more than the limit."""
        if self.too_many():
            names = self.known
            raise too_many(f"cannot read {min(names)}", len(names), self.limit)
