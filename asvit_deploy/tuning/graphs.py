"""What is run: each candidate as a file that `export` would write, in each precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from asvit_deploy.checkpoints.load import Checkpoint, save_checkpoint
from asvit_deploy.checkpoints.places import source_of
from asvit_deploy.errors import CheckFailed, UserError
from asvit_deploy.evaluation.model_bench import as_precise
from asvit_deploy.evaluation.sweep_points import static_rival
from asvit_deploy.exporting.export import Made, in_int8, made
from asvit_deploy.exporting.to_onnx import to_onnx
from asvit_deploy.files import sha256
from asvit_deploy.graph import give_thresholds
from asvit_deploy.models.vit import ViT
from asvit_deploy.parity import Parity
from asvit_deploy.precision import FLOAT32
from asvit_deploy.reduction.base import Reduction
from asvit_deploy.runners.trt_plan import gpu_name
from asvit_deploy.runtimes import ONNXRUNTIME, OPENVINO_BF16, TENSORRT, TORCH
from asvit_deploy.sidecar import sidecar_path
from asvit_deploy.tuning import engines
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
        mode: of an engine, as `engines.modes_of`.
        graph: an engine's CUDA graph is replayed.
        library: ONNX Runtime takes the op from its compiled library, not from the file.
    """

    kind: str
    candidate: Candidate | None
    runtime: str
    precision: str
    singly: bool = False
    reduction: Reduction | None = None
    packed: bool = False
    mode: str = ""
    graph: bool = False
    library: bool = False

    @property
    def of(self) -> str:
        """The network that it runs."""
        own = "dense" if self.candidate is None else self.candidate.name
        return f"static counts of {own}" if self.kind == "static" else own

    @property
    def name(self) -> str:
        shown = f"{self.runtime}, {self.of}"
        shown += f", {self.precision}" * (self.precision != FLOAT32.name)
        shown += f", {self.mode}" * (self.mode not in ("", "dense", "static"))
        shown += ", CUDA graph" * self.graph + ", op's library" * self.library
        return shown + ", one at a time" * self.singly + ", packed" * self.packed

    def size(self, batch: int) -> str:
        """What its graph takes at that batch, as `to_onnx` names it; for engines see `Graphs`."""
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
                **({"mode": self.mode, "graph": self.graph} if self.mode else {}),
                **({"library": True} if self.library else {}),
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
        builder: of engines, where some are measured.
        library: the op's, for ONNX Runtime, where it is built.
    """

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, dense: ViT,
        pictures: Sequence[NDArray], names: Sequence[str], say: Callable[[str], None],
        builder: engines.Engines | None = None, library: Path | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.checkpoint, self.dense = folder, checkpoint, dense
        self.pictures, self.names, self.say = list(pictures), list(names), say
        self._made: dict[_Key, _Filed] = {}
        self._static: dict[tuple[str, str, str], str] = {}
        self._traces: dict[str, str] = {}  # files by method, cuts and batch
        self.builder, self.library = builder, library
        self._engines: dict[tuple[str, str, str, int], Path | str] = {}  # or why there is none
        self._count = 0

    def network(self, candidate: Candidate | None, rival: Reduction | None = None) -> ViT:
        own = None if candidate is None else candidate.reduction
        return self.dense.with_reduction(rival or own)

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

    def _filed(
        self, candidate: Candidate | None, precision: str, batch: str,
        rival: Reduction | None = None,
    ) -> _Filed:  # fmt: skip
        """Args: rival: how tokens leave in place of the candidate's own way."""
        name = "dense" if candidate is None else candidate.name
        key = name + " static" * (rival is not None), precision, batch
        if key not in self._made:
            if precision == INT8:
                one = self._int8(candidate, name)
            else:
                network = self.network(candidate, rival)
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
        own = None if leaves is None else {**state_of(leaves), "thresholds": None}
        key = json.dumps([own, batch])  # what else a method learned stands in its graph
        if leaves is not None and key in self._traces:
            proto = onnx.load(str(self.folder / self._traces[key]))
            if give_thresholds(proto, [one.item() for one in leaves.boundaries()]):
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
        for name in [name for name in self._engines if name[0] not in names]:
            self._remove(self._engines.pop(name))

    @staticmethod
    def _remove(engine: Path | str) -> None:
        if isinstance(engine, Path):
            if engine.is_dir():
                shutil.rmtree(engine)
            else:
                engine.unlink(missing_ok=True)

    def size(self, entry: Entry, batch: int) -> str:
        """As `Entry.size`; of an engine, what the graph takes that it is built from."""
        if entry.runtime == TENSORRT:
            return engines.source_size(entry.leaves, entry.mode, batch, self.dense.config)
        return entry.size(batch)

    def runnable(self, entry: Entry, batch: int = 1) -> Runnable:
        """A file that a worker can run.

        Raises:
            UserError: it cannot be made.
        """
        leaves = entry.leaves
        state = None if leaves is None else state_of(leaves)
        if entry.runtime == TORCH:
            model = self._dense_checkpoint()
        elif entry.runtime == TENSORRT:
            model = self.engine(entry, batch).name
        else:
            model = self._file(entry, entry.size(batch))
        library = str(self.library) if entry.library else None
        return Runnable(entry.name, entry.runtime, entry.precision, entry.kind, model, state,
                        entry.singly, entry.graph, library)  # fmt: skip

    def depends(self, entry: Entry, batch: int) -> dict[str, Any]:
        """What measurements of an entry depend on beside its fields, JSON-ready: an engine's are of
        that very plan on that GPU."""
        if entry.library:
            assert self.library is not None
            return {"library": sha256(self.library)}
        if entry.runtime != TENSORRT:
            return {}
        try:
            return {"plans": engines.plans_of(self.engine(entry, batch)), "gpu": gpu_name()}
        except UserError as error:
            return {"refused": str(error)}

    def build_seconds(self, entries: Sequence[Entry], batch: int) -> float:
        """What the engines that are missing for these take, going by those that were built."""
        keys = {self._key(one, batch) for one in entries if one.runtime == TENSORRT}
        return 0.0 if self.builder is None else self.builder.cost(len(keys - set(self._engines)))

    def engine(self, entry: Entry, batch: int) -> Path:
        """An engine or a bundle, built once; with and without CUDA graphs it is the same.

        Raises:
            UserError: it cannot be built, or was refused.
        """
        key = self._key(entry, batch)
        if key not in self._engines:
            try:
                self._engines[key] = self._built(entry, batch)
            except (UserError, CheckFailed) as error:
                self._engines[key] = str(error)
        found = self._engines[key]
        if isinstance(found, str):
            raise UserError(found)
        return found

    def refuse(self, entry: Entry, batch: int, why: str) -> None:
        """From now on an engine cannot be had: it did not run where it was to be judged."""
        self._engines[self._key(entry, batch)] = why

    def _key(self, entry: Entry, batch: int) -> tuple[str, str, str, int]:
        return entry.of, entry.precision, entry.mode, 1 if entry.mode == "bucketed" else batch

    def _built(self, entry: Entry, batch: int) -> Path:
        assert self.builder is not None
        leaves, config, size = entry.leaves, self.dense.config, self.size(entry, batch)
        filed = self._filed(entry.candidate, FLOAT32.name, size, entry.reduction)
        source = self.folder / filed.file
        if not sidecar_path(source).is_file():
            filed.loaded(self.folder).write(source, source=self._source)
        compact = None
        if entry.mode == "dynamic":
            assert leaves is not None
            assert entry.candidate is not None
            compact = engines.compact_at(leaves, entry.candidate.kept, config)
        options = engines.options_for(entry.mode, entry.precision, size, batch,
                                      self.builder.targets, compact)  # fmt: skip
        ending = "bucketed" if entry.mode == "bucketed" else "engine"
        output = self.folder / f"{self._count}.{ending}"
        self._count += 1
        return self.builder.build(source, output, options, replace(entry, graph=False).name)

    @cached_property
    def _source(self) -> dict[str, Any]:
        """Where the network comes from, as sidecars have it."""
        return source_of(self.checkpoint.path, format=self.checkpoint.format, ema=False)

    def _file(self, entry: Entry, size: str) -> str:
        precision = INT8 if entry.precision == INT8 else FLOAT32.name
        try:
            if entry.kind == "static":
                return self._rival(entry, size, precision)
            return self._filed(entry.candidate, precision, size).file
        except CheckFailed as error:
            raise UserError(str(error)) from error

    def _rival(self, entry: Entry, size: str, precision: str) -> str:
        """A static rival, for timing alone; in int8 the layers of its candidate's are quantised."""
        key = entry.of, size, precision
        if key not in self._static:
            proto = to_onnx(self.network(entry.candidate, entry.reduction), size)
            if precision == INT8:
                proto = as_precise(self._filed(entry.candidate, INT8, "1").fields, proto)
            self._static[key] = self._write(proto)
        return self._static[key]

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
    if engines.is_engine(precision):
        return TENSORRT
    return next((name for name in (ONNXRUNTIME, *runtimes) if name in runtimes), ONNXRUNTIME)


def artefacts_of(
    candidate: Candidate | None, precision: str, runtimes: Sequence[str]
) -> list[Entry]:
    """What is run to judge a candidate, or the dense network, in a precision: one file, or an
    engine for each mode."""
    kind = "dense" if candidate is None else "adaptive"
    one = Entry(kind, candidate, judging_runtime(precision, runtimes), precision)
    if one.runtime != TENSORRT:
        return [one]
    return [replace(one, mode=mode) for mode in engines.modes_of(one.leaves)]
