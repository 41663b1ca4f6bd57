"""What is run: each candidate as a file that `export` would write, in each precision."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from asvit_deploy.checkpoints.load import Checkpoint, save_checkpoint
from asvit_deploy.errors import CheckFailed, UserError
from asvit_deploy.evaluation.sweep_points import static_rival
from asvit_deploy.exporting.export import Made, in_int8, made
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.graph import give_thresholds
from asvit_deploy.models.vit import ViT
from asvit_deploy.parity import Parity
from asvit_deploy.precision import FLOAT32
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.runtimes import ONNXRUNTIME, OPENVINO_BF16, TORCH
from asvit_deploy.tuning.contenders import Candidate, state_of
from asvit_deploy.tuning.running import Runnable

INT8, BF16 = "int8", "bf16"
EXECUTED = "executed"  # how its budgets count, as `calibrate --budget-by` calls it
_COMPARED = 16  # pictures, as `export` takes
_QUANTISED = 32  # likewise


@dataclass(frozen=True)
class Entry:
    """A variant before anything is made for it.

    Attributes:
        candidate: None: the dense network.
        reduction: how tokens leave, where it is not the candidate's own but a static rival's.
    """

    kind: str
    candidate: Candidate | None
    runtime: str
    precision: str
    singly: bool = False
    reduction: Reduction | None = None
    packed: bool = False

    @property
    def name(self) -> str:
        own = "dense" if self.candidate is None else self.candidate.name
        if self.kind == "static":
            own = f"static counts of {own}"
        shown = f"{self.runtime}, {own}" + f", {self.precision}" * (self.precision != FLOAT32.name)
        return shown + ", one at a time" * self.singly + ", packed" * self.packed

    def size(self, batch: int) -> str:
        """What its graph takes at that batch, as `to_onnx` names it."""
        if batch == 1 or self.singly:
            return "1"
        return "packed" if self.packed else "dynamic"

    @property
    def leaves(self) -> Reduction | None:
        if self.kind == "dense":
            return None
        assert self.candidate is not None
        return self.reduction or self.candidate.reduction

    def fields(self) -> dict[str, Any]:
        """What tells its measurements from others'."""
        leaves = self.leaves
        return {"kind": self.kind, "runtime": self.runtime, "precision": self.precision,
                "singly": self.singly, "packed": self.packed,
                "reduction": leaves and state_of(leaves)}  # fmt: skip


_Key = tuple[str, str, str]  # of a candidate: name, precision, batch


@dataclass(frozen=True)
class _Filed:
    """As `Made`, its graph in a file."""

    file: str
    fields: dict[str, Any]
    parity: dict[str, Parity]

    def loaded(self, folder: Path) -> Made:
        return Made(onnx.load(str(folder / self.file)), self.fields, self.parity)


class Graphs:
    """Files of one network, each made once, where something is to run it.

    Args:
        folder: where they go.
        checkpoint: dense or adaptive.
        pictures, names: those that calibrate.
        say: gets a line on what int8 leaves out.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, dense: ViT,
        pictures: Sequence[NDArray], names: Sequence[str], say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.folder, self.checkpoint, self.dense = folder, checkpoint, dense
        self.pictures, self.names, self.say = list(pictures), list(names), say
        self._made: dict[_Key, _Filed] = {}
        self._static: dict[tuple[str, str], str] = {}
        self._traces: dict[str, str] = {}  # files by method, cuts and batch
        self._count = 0

    def network(self, candidate: Candidate | None) -> ViT:
        return self.dense.with_reduction(None if candidate is None else candidate.reduction)

    def described(self, candidate: Candidate | None) -> Checkpoint:
        """The checkpoint as a candidate's file describes it."""
        metadata = dict(self.checkpoint.metadata)
        if candidate is None or candidate.budget is not None:
            for name in ("budget", "budget_by", "calibration"):
                metadata.pop(name, None)
        if candidate is not None and candidate.budget is not None:
            metadata |= {"budget": str(candidate.budget), "budget_by": EXECUTED}
        return replace(self.checkpoint, metadata=metadata)

    def artefact(self, candidate: Candidate | None, precision: str, batch: str = "1") -> Made:
        """A candidate as it would be exported; None: the dense network.

        Raises:
            UserError, CheckFailed: it cannot be, in that precision.
        """
        return self._filed(candidate, precision, batch).loaded(self.folder)

    def _filed(self, candidate: Candidate | None, precision: str, batch: str) -> _Filed:
        name = "dense" if candidate is None else candidate.name
        key = name, precision, batch
        if key not in self._made:
            if precision == INT8:
                one = self._int8(candidate, name)
            else:
                network = self.network(candidate)
                one = made(
                    network, self.described(candidate), self.pictures[:_COMPARED],
                    self.names[:_COMPARED], Path(f"{name}.onnx"), batch,
                    traced=self._traced(network, batch),
                )  # fmt: skip
            # On disk and not in memory: DeiT-B takes 350 MB, and there are many.
            self._made[key] = _Filed(self._write(one.proto), one.fields, one.parity)
        return self._made[key]

    def _traced(self, network: ViT, batch: str) -> onnx.ModelProto:
        """A network's graph; tracing is what takes longest, so those that differ in nothing but
        thresholds share it. `made` compares each with PyTorch."""
        leaves = network.reduction
        key = json.dumps([None if leaves is None else leaves.fields(), batch])
        if leaves is not None and key in self._traces:
            proto = onnx.load(str(self.folder / self._traces[key]))
            if give_thresholds(proto, [float(one) for one in leaves.boundaries()]):
                return proto
        proto = to_onnx(network, batch)
        if leaves is not None and leaves.boundaries():
            self._traces[key] = self._write(proto)
        return proto

    def _write(self, proto: onnx.ModelProto) -> str:
        name = f"{self._count}.onnx"
        self._count += 1
        onnx.save(proto, str(self.folder / name))
        return name

    def _int8(self, candidate: Candidate | None, name: str) -> Made:
        one = self.artefact(candidate, FLOAT32.name)
        network = self.network(candidate)
        found, line = in_int8(one, network, "dynamic", self.pictures[:_QUANTISED],
                              self.names[:_QUANTISED], name)  # fmt: skip
        self.say(f"{name}: {line}")
        return found

    def forget(self, keep: Sequence[Candidate]) -> None:
        """Remove the files of all other candidates."""
        names = {"dense", *(one.name for one in keep)}
        for key in [key for key in self._made if key[0] not in names]:
            (self.folder / self._made.pop(key).file).unlink(missing_ok=True)

    def runnable(self, entry: Entry, batch: int = 1) -> Runnable:
        """A file that a worker can run.

        Raises:
            UserError: it cannot be made.
        """
        leaves = entry.leaves
        state = None if leaves is None else state_of(leaves)
        if entry.runtime == TORCH:
            model = self._dense_checkpoint()
        else:
            model = self._file(entry, entry.size(batch))
        return Runnable(entry.name, entry.runtime, entry.precision, entry.kind, model, state,
                        entry.singly)  # fmt: skip

    def _file(self, entry: Entry, size: str) -> str:
        if entry.kind == "static":
            key = entry.name, size
            if key not in self._static:
                network = self.dense.with_reduction(entry.leaves)
                self._static[key] = self._write(to_onnx(network, size))
            return self._static[key]
        precision = INT8 if entry.precision == INT8 else FLOAT32.name
        try:
            return self._filed(entry.candidate, precision, size).file
        except CheckFailed as error:
            raise UserError(str(error)) from error

    def _dense_checkpoint(self) -> str:
        name = "dense.safetensors"
        if not (self.folder / name).is_file():
            save_checkpoint(self.folder / name, self.network(None), {})
        return name


def rivals(entry: Entry, dense: ViT) -> Entry | None:
    """The same ranking with fixed counts at the candidate's mean MACs; None where it has them."""
    candidate = entry.candidate
    assert candidate is not None
    made, _ = static_rival(dense.config, candidate.reduction, candidate.share)
    return None if made is None else replace(entry, kind="static", reduction=made)


def judging_runtime(precision: str, runtimes: Sequence[str]) -> str:
    """What runs the pictures that judge a precision.

    Float32 is the same in every runtime, as `export` has seen by comparing it with PyTorch, so one
    of them speaks for all.
    """
    if precision == INT8:
        return ONNXRUNTIME
    if precision == BF16:
        return OPENVINO_BF16
    return next(name for name in (ONNXRUNTIME, *runtimes) if name in runtimes)
