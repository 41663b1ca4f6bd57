"""The process in which graphs run: what crashes here ends its own rows, and nothing else.

    asvit_deploy.child.command("from asvit_deploy.tuning import worker; worker.main()", FOLDER)

FOLDER holds `job.json`, the pictures and the graphs; results go there too. A line on
stdin begins a job, as many as there are; to import the runtimes takes longer than most of them. On
stdout one empty line stands for each picture or round, and `ALIVE` between them for runs that take
long, so that whoever waits can tell a slow run from one that hangs. Which variant is about to run
is written to `mark` first.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from asvit_deploy.artefacts.engine_file import EngineArtefact
from asvit_deploy.artefacts.onnx_file import RUNTIMES
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.errors import UserError
from asvit_deploy.evaluation.sweep import OneAtATime, batches_of
from asvit_deploy.evaluation.timing import Variant, interleave
from asvit_deploy.files import FULL
from asvit_deploy.processor import usable_cores
from asvit_deploy.runners.base import Runner, RunnerBase
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner, torch_threads
from asvit_deploy.runtimes import TENSORRT, TORCH

if TYPE_CHECKING:
    from asvit_deploy.runners.tensorrt import TensorRTRunner

JOB, MARK, RESULT, PICTURES = "job.json", "mark", "result.npz", "pictures.npy"
SAID = "said.json"
_MARK = 8  # bytes
DONE = "done"  # what ends a job on stdout
ALIVE = "alive"
_SIGN = 1.0  # seconds between signs of life: a short run is not to be timed with one
FEWEST = 20  # rounds that a deadline may leave; a bootstrap of fewer says little
LATE = "late"  # in `said.json`: the deadline came before that
DISK_FULL = 28  # exit code


class Marked(RunnerBase):
    """A runner that says, before each run, which it is: a few millionths of a second."""

    def __init__(self, runner: Runner, number: int, mark: int) -> None:
        self.runner, self._text, self._mark = runner, f"{number:<{_MARK}}".encode(), mark
        self.learns_shapes = getattr(runner, "learns_shapes", False)
        self._said = time.monotonic()

    def mark(self) -> None:
        os.pwrite(self._mark, self._text, 0)
        if (now := time.monotonic()) - self._said > _SIGN:
            self._said = now
            print(ALIVE, flush=True)

    def infer(self, images: NDArray[np.float32]) -> Any:
        self.mark()
        return self.runner.infer(images)

    def __call__(self, images: NDArray[np.float32]) -> Any:
        self.mark()
        return self.runner(images)

    def describe(self) -> dict[str, str]:
        return self.runner.describe()


class OnHost(RunnerBase):
    """An engine whose output is fetched, for that of every other runtime lies on the host too."""

    def __init__(self, runner: TensorRTRunner) -> None:
        self.runner = runner

    def infer(self, images: NDArray[np.float32]) -> Any:
        return self.runner.infer(images)[self.runner.output].cpu()

    def __call__(self, images: NDArray[np.float32]) -> Any:
        return self.runner(images)

    def describe(self) -> dict[str, str]:
        return self.runner.describe()


class _Late(Exception):
    """The deadline came before anything was measured."""


def main() -> None:
    """Do what `job.json` in the folder `sys.argv[1]` says, once for each line of stdin."""
    folder = Path(sys.argv[1])
    for _ in sys.stdin:
        job = json.loads((folder / JOB).read_text())
        try:
            with torch_threads(job["threads"] or usable_cores()), _marking(folder) as mark:
                {"outputs": _outputs, "time": _time}[job["task"]](folder, job, mark)
        except UserError as error:
            (folder / SAID).write_text(json.dumps({"refused": str(error)}))
        except _Late:
            (folder / SAID).write_text(json.dumps({LATE: True}))
        except OSError as error:
            if error.errno not in FULL:
                raise
            sys.exit(DISK_FULL)
        print(DONE, flush=True)


@contextlib.contextmanager
def _marking(folder: Path) -> Iterator[int]:
    mark = os.open(folder / MARK, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        yield mark
    finally:
        os.close(mark)


def _opened(
    folder: Path, job: dict[str, Any], mark: int, ended: Callable[[], bool] = lambda: False
) -> list[Variant]:
    found, loaded = [], dict[str, Any]()
    for number, one in enumerate(job["variants"]):
        if ended():
            raise _Late
        os.pwrite(mark, f"{number:<{_MARK}}".encode(), 0)
        if one["runtime"] == TORCH:
            runner: Runner = TorchRunner(_network(folder, one, loaded))
        elif one["runtime"] == TENSORRT:
            runner = _engine(folder / one["model"], one["graph"])
        elif one["library"]:
            runner = OrtRunner(folder / one["model"], Path(one["library"]), threads=job["threads"],
                               record=False)  # fmt: skip
        else:
            model = onnx.load(folder / one["model"])
            runner = RUNTIMES[one["runtime"]].model(model, job["threads"])
        marked: Runner = Marked(runner, number, mark)
        marked = OneAtATime(marked) if one["singly"] else marked
        found.append(Variant(one["name"], one["runtime"], one["kind"] != "dense", marked,
                             one["precision"]))  # fmt: skip
        _tick()
    return found


def _network(folder: Path, one: dict[str, Any], loaded: dict[str, Any]) -> Any:
    """PyTorch's, of the dense checkpoint with the variant's reduction."""
    from asvit_deploy.checkpoints.load import build_model, load_checkpoint
    from asvit_deploy.tuning.contenders import reduction_of

    if "dense" not in loaded:
        loaded["dense"] = build_model(load_checkpoint(folder / one["model"]), dense=True)
    dense, state = loaded["dense"], one["reduction"]
    if state is None:
        return dense
    return dense.with_reduction(reduction_of(state, dense.config.prefix))


def _engine(path: Path, graph: bool) -> Runner:
    from asvit_deploy.runners.tensorrt import TensorRTRunner

    artefact = open_artefact(path)
    assert isinstance(artefact, EngineArtefact)
    runner = artefact.runner(graph)
    return OnHost(runner) if isinstance(runner, TensorRTRunner) else runner


def _tick() -> None:
    print(flush=True)


def _outputs(folder: Path, job: dict[str, Any], mark: int) -> None:
    """Outputs and kept rows of one variant on every picture, one at a time."""
    (variant,) = _opened(folder, job, mark)
    pictures = np.load(folder / PICTURES, mmap_mode="r")
    outputs, lengths, start = [], [], time.perf_counter()
    for place in job["which"]:
        made = variant.runner(np.ascontiguousarray(pictures[place : place + 1]))
        outputs.append(made.output)
        lengths.append([int(n[0]) for n in made.lengths])
        _tick()
    seconds = (time.perf_counter() - start) / len(outputs)
    _save(folder, {"described": variant.runner.describe(), "seconds": seconds},
          output=np.concatenate(outputs), lengths=np.array(lengths, np.int64))  # fmt: skip


def _time(folder: Path, job: dict[str, Any], mark: int) -> None:
    """Every variant in turn on the same batches; as many rounds as there are seconds for."""
    until = job["until"]

    def ended() -> bool:
        return until is not None and time.monotonic() > until

    variants = _opened(folder, job, mark, ended)
    pictures = np.load(folder / PICTURES, mmap_mode="r")
    shown = [np.ascontiguousarray(pictures[i]) for i in job["which"]]
    batches = batches_of(shown, job["batch"])
    learning = any(getattr(v.runner, "learns_shapes", False) for v in variants)
    # Where kernels are compiled for counts not seen before, every picture has a round first.
    warmup = len(batches) if learning else min(len(batches), job["warmup"])
    first: dict[str, NDArray[np.float64]] = {}
    interleave(variants, batches, warmup, 0, progress=_tick, first=first, ended=ended)
    lengths = _lengths(variants, batches, ended)
    if ended():
        raise _Late
    once = sum(float(np.median(seconds)) for seconds in first.values())
    low, high = job["rounds"]
    runs = int(np.clip(job["seconds"] / max(once, 1e-9), low, high))
    seconds = interleave(variants, batches, 0, runs, seed=job["seed"], progress=_tick, ended=ended)
    done = len(seconds[variants[0].name])
    if done < min(runs, FEWEST):
        raise _Late
    described = [variant.runner.describe() for variant in variants]
    arrays: dict[str, NDArray] = {
        f"seconds_{i}": seconds[variant.name] for i, variant in enumerate(variants)
    }
    arrays |= {f"lengths_{i}": one for i, one in enumerate(lengths)}
    _save(folder, {"described": described, "warmup": warmup, "runs": done, "planned": runs},
          **arrays)  # fmt: skip


def _lengths(
    variants: Sequence[Variant], batches: Sequence[NDArray[np.float32]], ended: Callable[[], bool]
) -> list[NDArray[np.int64]]:
    """Rows behind each cut of every picture, int64 [batches, B, cuts]; no cuts when dense."""
    found = []
    for variant in variants:
        rows = []
        for batch in batches:
            if ended():
                raise _Late
            made = variant.runner(batch) if variant.adaptive else None
            none = np.empty((len(batch), 0), np.int64)
            rows.append(none if made is None else np.stack(made.lengths, axis=1))
        found.append(np.stack(rows))
        _tick()
    return found


def _save(folder: Path, said: dict[str, Any], **arrays: NDArray) -> None:
    np.savez(folder / RESULT, **arrays)  # type: ignore[arg-type]
    (folder / SAID).write_text(json.dumps(said))
