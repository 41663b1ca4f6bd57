"""Graphs run in a child of ours: a runtime that crashes or hangs ends its own rows there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy import child
from asvit_deploy.tuning.worker import DISK_FULL, JOB, MARK, PICTURES, RESULT, SAID

PATIENCE = 300  # seconds without a sign of life; DeiT-B at 384 px compiles in ten
_CODE = "from asvit_deploy.tuning import worker; worker.main()"


@dataclass(frozen=True)
class Runnable:
    """What a worker runs.

    Attributes:
        model: a file in the workshop's folder.
        reduction: as `contenders.state_of`, for PyTorch, whose file is the dense checkpoint.
        kind: "dense", "adaptive" or "static".
        singly: a batch, one picture after the other.
    """

    name: str
    runtime: str
    precision: str
    kind: str
    model: str
    reduction: dict[str, Any] | None = None
    singly: bool = False


class Crashed(Exception):
    """A worker ended without a result.

    Attributes:
        variant: number of the one that ran, or None where it did not come so far.
        why: in one line.
    """

    def __init__(self, variant: int | None, why: str) -> None:
        super().__init__(why)
        self.variant, self.why = variant, why


@dataclass(frozen=True)
class Result:
    said: dict[str, Any]
    arrays: dict[str, NDArray]


class Workshop:
    """A temporary folder of pictures and graphs, and the children that run them.

    Args:
        images: float32 [n, 3, H, W].
        threads: 0: every core.
    """

    def __init__(self, folder: Path, images: NDArray[np.float32], threads: int) -> None:
        self.folder, self.threads = folder, threads
        np.save(folder / PICTURES, images)

    def outputs(
        self, one: Runnable, which: Sequence[int], tick: Callable[[], object]
    ) -> Result:  # fmt: skip
        """`output` float32 [pictures, C] and `lengths` int64 [pictures, cuts].

        Raises:
            Crashed: it could not be run.
        """
        return self._run({"task": "outputs", "which": list(which)}, [one], tick)

    def timed(
        self, variants: Sequence[Runnable], which: Sequence[int], batch: int, seconds: float,
        rounds: tuple[int, int], seed: int, tick: Callable[[], object],
    ) -> Result:  # fmt: skip
        """`seconds_I` [rounds] and `lengths_I` int64 [batches, B, cuts] of variant number I.

        Args:
            which: places of the pictures.
            seconds: that the timed rounds may take about, between the fewest and most `rounds`.

        Raises:
            Crashed: one of them could not be run.
        """
        job = {"task": "time", "which": list(which), "batch": batch, "seconds": seconds,
               "rounds": list(rounds), "warmup": 8, "seed": seed}  # fmt: skip
        return self._run(job, variants, tick)

    def _run(
        self, job: dict[str, Any], variants: Sequence[Runnable], tick: Callable[[], object]
    ) -> Result:
        for name in (MARK, RESULT, SAID):
            (self.folder / name).unlink(missing_ok=True)
        whole = {**job, "threads": self.threads, "variants": [vars(one) for one in variants]}
        (self.folder / JOB).write_text(json.dumps(whole))
        with tempfile.TemporaryFile() as err:
            ended = _wait(child.command(_CODE, str(self.folder)), err, tick)
            err.seek(0)
            said = err.read().decode(errors="replace")
        if ended is not None or not (self.folder / SAID).is_file():
            raise Crashed(self._marked(), ended or _last_line(said))
        with np.load(self.folder / RESULT) as found:
            arrays = {name: found[name] for name in found.files}
        return Result(json.loads((self.folder / SAID).read_text()), arrays)

    def _marked(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / MARK).read_bytes())
        return None


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it ended without a word"


def _wait(
    command: Sequence[str], err: Any, tick: Callable[[], object]
) -> str | None:  # fmt: skip
    """Let a child run to its end; in one line how it ended, where that was by a signal."""
    environment = {**os.environ, "PYTHONFAULTHANDLER": ""}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=err, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        for _ in _signs(process):
            tick()
        process.wait(PATIENCE)
    except (TimeoutError, subprocess.TimeoutExpired):
        return f"it gave no sign of life for {PATIENCE} s"
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
    if process.returncode == DISK_FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if process.returncode < 0:
        return f"the process crashed ({signal.Signals(-process.returncode).name})"
    return None


def _signs(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """One for each line that it writes. Raises TimeoutError."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(PATIENCE):
                raise TimeoutError
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                return
            yield from (None for _ in range(data.count(b"\n")))
