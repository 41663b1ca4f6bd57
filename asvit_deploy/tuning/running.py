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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy import child
from asvit_deploy.disk import require_temporary_folder
from asvit_deploy.tuning.clock import OutOfTime
from asvit_deploy.tuning.worker import (
    ALIVE,
    DISK_FULL,
    DONE,
    JOB,
    LATE,
    MARK,
    PICTURES,
    RESULT,
    SAID,
)

PATIENCE = 300  # seconds without a sign of life; DeiT-B at 384 px compiles in ten
_SHARE = 32  # pictures at a time that are waited for so long; for more of them longer
_CODE = "from asvit_deploy.tuning import worker; worker.main()"


@dataclass(frozen=True)
class Runnable:
    """What a worker runs.

    Attributes:
        model: a file, or a bundle of engines, in the workshop's folder.
        reduction: as `contenders.state_of`, for PyTorch, whose file is the dense checkpoint.
        kind: "dense", "adaptive" or "static".
        singly: a batch, one picture after the other.
        graph: an engine replays a CUDA graph.
        library: the op's, which ONNX Runtime loads in place of the file's function.
    """

    name: str
    runtime: str
    precision: str
    kind: str
    model: str
    reduction: dict[str, Any] | None = None
    singly: bool = False
    graph: bool = False
    library: str | None = None


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
    """A temporary folder of pictures and graphs, and the child that runs them; another after one
    that crashed.

    Args:
        images: float32 [n, 3, H, W].
        threads: 0: every core.
    """

    def __init__(self, folder: Path, images: NDArray[np.float32], threads: int) -> None:
        self.folder, self.threads = folder, threads
        self._child: _Child | None = None
        _save(folder / PICTURES, images)

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.end()
            self._child = None

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
        until: float | None = None,
    ) -> Result:  # fmt: skip
        """`seconds_I` [rounds] and `lengths_I` int64 [batches, B, cuts] of variant number I.

        Args:
            which: places of the pictures.
            seconds: that the timed rounds may take about, between the fewest and most `rounds`.
            until: as `time.monotonic`; then it stops, with fewer rounds (`planned` in what is said
                has how many there should have been).

        Raises:
            Crashed: one of them could not be run.
            OutOfTime: it stopped before there were rounds enough.
        """
        job = {"task": "time", "which": list(which), "batch": batch, "seconds": seconds,
               "rounds": list(rounds), "warmup": 8, "seed": seed, "until": until}  # fmt: skip
        return self._run(job, variants, tick)

    def _run(
        self, job: dict[str, Any], variants: Sequence[Runnable], tick: Callable[[], object]
    ) -> Result:
        for name in (MARK, RESULT, SAID):
            (self.folder / name).unlink(missing_ok=True)
        whole = {**job, "threads": self.threads, "variants": [vars(one) for one in variants]}
        (self.folder / JOB).write_text(json.dumps(whole))
        if self._child is None:
            self._child = _Child(self.folder)
        try:
            patience = PATIENCE * max(1.0, job.get("batch", 1) / _SHARE)
            self._child.work(tick, patience)
        except BaseException as error:
            marked = self._marked()
            self.close()
            if isinstance(error, _Ended):
                raise Crashed(marked, str(error)) from None
            raise
        said = json.loads((self.folder / SAID).read_text())
        if "refused" in said:
            raise Crashed(self._marked(), said["refused"])
        if LATE in said:
            raise OutOfTime
        with np.load(self.folder / RESULT) as found:
            arrays = {name: found[name] for name in found.files}
        return Result(said, arrays)

    def _marked(self) -> int | None:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / MARK).read_bytes())
        return None


def _save(path: Path, array: NDArray) -> None:
    """As `np.save`, which does not say why where a disk is full."""
    whole = np.ascontiguousarray(array)
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(whole)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(whole.data)


def _last_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it ended without a word"


class _Ended(Exception):
    """In one line how a child ended before its work was done."""


class _Child:
    """A process of `worker`, which waits for work."""

    def __init__(self, folder: Path) -> None:
        place = require_temporary_folder()
        self._err = tempfile.TemporaryFile(dir=place)  # noqa: SIM115  # until `end`
        self._process = subprocess.Popen(
            child.command(_CODE, str(folder)), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._err, start_new_session=True,
        )  # fmt: skip

    def work(self, tick: Callable[[], object], patience: float) -> None:
        """One job, to its end.

        Args:
            patience: seconds without a sign of life.

        Raises:
            _Ended: it crashed, failed or hangs.
            OSError: the disk is full.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone; stdout ends too
            stdin.write(b"\n")
            stdin.flush()
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while selector.select(patience):
                data = os.read(stdout.fileno(), 1 << 16)
                if not data:
                    raise _Ended(self._how())
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if line != ALIVE.encode():
                        tick()
                    if line == DONE.encode():
                        return
        raise _Ended(f"it gave no sign of life for {patience:.0f} s")

    def _how(self) -> str:
        """Raises OSError where the disk was full."""
        code = self._process.wait(PATIENCE)
        if code == DISK_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if code < 0:
            return f"the process crashed ({signal.Signals(-code).name})"
        self._err.seek(0)
        return _last_line(self._err.read().decode(errors="replace"))

    def end(self) -> None:
        process = self._process
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what a runtime started
            process.wait()
        for pipe in (process.stdin, process.stdout, self._err):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
