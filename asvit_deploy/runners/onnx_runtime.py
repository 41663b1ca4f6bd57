"""ONNX Runtime, with or without the op's library.

`asvit_deploy.graph` is imported where a graph is changed and not above: the GPU suite runs where
torch, numpy and onnx are all there is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray

from asvit_deploy.errors import UserError, shortened
from asvit_deploy.memory import memory
from asvit_deploy.models.config import OUTPUTS
from asvit_deploy.ops import onnx_op
from asvit_deploy.precision import FLOAT32, HALVES
from asvit_deploy.processor import require_threads
from asvit_deploy.requirements import pip_install
from asvit_deploy.runners import onnx_bounds, onnx_trial
from asvit_deploy.runners.base import Prediction, RunnerBase, decode, require_images, stack

# Float32 means float32 on every backend.
_INTEGER = frozenset(
    ("ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "MatMulNBits",
     "QLinearConv", "QLinearMatMul", "QuantizeLinear")
)  # fmt: skip
# Bytes beside those of the weights, twice; a session with DeiT-B's takes 1.4 times, and 30 MiB.
_SPARE, _PER_PICTURE = 512 << 20, 128 << 20
# Pictures of a packed file, as many as it has groups, so that attention pads none. Larger parts
# outgrow a core's cache: 32 of DeiT-S took 1.2 times as long at once.
PART = 4
PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}


def why_not() -> str | None:
    """Why it cannot run here, with what to do; None where it can."""
    return _missing() if importlib.util.find_spec("onnxruntime") is None else None


def _missing() -> str:
    return f"onnxruntime is not installed; {pip_install('onnxruntime')} (CUDA: onnxruntime-gpu)"


def import_onnxruntime():
    """The module, or a line that says how to get it."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(_missing()) from None
    return onnxruntime


def session_options(threads: int):
    """Options that every session of ours has; 0 threads leave the choice to ONNX Runtime.

    Raises:
        UserError: onnxruntime is missing, or there are fewer cores than `threads`.
    """
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = require_threads(threads)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # failures come back as exceptions; warnings are not ours
    # Spinning threads burn the core that a neighbour would use.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def load_model(source: Path | onnx.ModelProto) -> onnx.ModelProto:
    """Read an ONNX file.

    Raises:
        UserError: it is not one.
    """
    if isinstance(source, onnx.ModelProto):
        return source

    def refuse(reason: str) -> NoReturn:
        raise UserError(f"{source} {reason}; export it again")

    try:
        model = onnx_bounds.read(source, refuse)
        onnx.checker.check_model(model)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{source} does not exist; `asvit-deploy export` makes it") from None
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{source} is not a whole ONNX file ({reason[0][:80]}); export it again"
        ) from None
    return model


def count_stages(model: onnx.ModelProto) -> int:
    """Stages of a model of ours, by its `length_s` outputs; 0 when it is dense."""
    return sum(output.name.startswith("length_") for output in model.graph.output)


def is_padded(model: onnx.ModelProto) -> bool:
    """Whether a model of ours keeps every row and masks what was dropped."""
    return any(p.key == "asvit_mode" and p.value == '"padded"' for p in model.metadata_props)


def is_packed(model: onnx.ModelProto) -> bool:
    """Whether a model of ours works out the rows of all its pictures in one [T, D]."""
    return any(p.key == "asvit_batch" and p.value == '"packed"' for p in model.metadata_props)


def precision_of(model: onnx.ModelProto) -> str:
    """What a model of ours computes in, as its metadata says: "float32", "float16" or "bfloat16".

    A file of another origin says nothing and counts as float32.
    """
    said = {entry.key: entry.value for entry in model.metadata_props}
    return said.get("asvit_precision", FLOAT32.name).strip('"')


def arithmetic_of(model: onnx.ModelProto) -> str:
    """What a file computes in by its nodes and weights: "float32", "fp16", "bf16" or "int8"."""
    if any(node.op_type in _INTEGER for node in model.graph.node):
        return "int8"
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    return next((row for row in HALVES if row.onnx_type in kinds), FLOAT32).option


def op_of(model: onnx.ModelProto, library: Path | None) -> str:
    """What removes the tokens: "library", "function", "standard" (plain nodes) or "none"."""
    if onnx_op.nodes_of(model.graph):
        return "library" if library else "function"
    return "standard" if count_stages(model) else "none"


def rows_in(model: onnx.ModelProto) -> tuple[int, int]:
    """P of a model of ours, and the rows that each stage adds, as its metadata say."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    numbers = []
    for key, usual in (("asvit_prefix", 1), ("asvit_appended", 0)):
        value = entries.get(key, "")
        numbers.append(int(value) if value.isdecimal() and len(value) < 5 else usual)
    return numbers[0], numbers[1]


class OrtRunner(RunnerBase):
    """A session over a model of ours.

    On one thread, packed batches whose tokens are not recorded go through it `PART` at a time.

    Args:
        source: an ONNX file or a loaded model.
        library: the op's C++ library; without it the model-local function runs.
        threads: intra-op threads; 0 leaves the choice to ONNX Runtime.
        record: also return kept tokens and scores (adds outputs to the model in memory).
        profile: prefix of the profiler's output file, or None.
        optimize: False runs the nodes as they stand.
        name: what errors call a loaded model; a file has its own.
        stages: how many it has, where another tool may have taken that out of the file.
        rows: P and the rows that each stage adds, likewise.
        foreign: it is first run elsewhere, see `onnx_trial`.

    Raises:
        UserError: onnxruntime is missing, model or library cannot be loaded, or there are fewer
            cores than `threads`.
    """

    def __init__(
        self,
        source: Path | onnx.ModelProto,
        library: Path | None = None,
        threads: int = 1,
        record: bool = True,
        profile: Path | None = None,
        provider: str = "CPUExecutionProvider",
        optimize: bool = True,
        name: str = "the model",
        stages: int | None = None,
        foreign: bool = False,
        rows: tuple[int, int] | None = None,
    ) -> None:
        ort = import_onnxruntime()
        model = load_model(source)
        name = str(source) if isinstance(source, Path) else name
        self.stages = count_stages(model) if stages is None else stages
        self.padded = is_padded(model)
        self.precision, self.op = precision_of(model), op_of(model, library)
        self._rows = rows_in(model) if rows is None else rows
        self.batch, self.image_size = _pictures_of(model, name)
        self.runs_beside = provider == "CPUExecutionProvider"
        self._tried = False  # a first run within bounds; those that are timed are free of them
        self._most: int | None = None
        in_parts = threads == 1 and not record and is_packed(model)
        self._part = PART if in_parts else None
        self._replayed: tuple[onnx.ModelProto, Path | None, str] = model, library, name
        options = session_options(threads)
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile)
            options.optimized_model_filepath = f"{profile}.optimized.onnx"
        try:
            if library is not None:
                options.register_custom_ops_library(str(library))
            if record and self.stages:
                from asvit_deploy.graph import with_stage_outputs

                model = with_stage_outputs(model, self.stages)
            data = model.SerializeToString()
            chosen = (provider, PROVIDER_OPTIONS.get(provider, {}))
            # CUDA maps far more than it uses.
            if provider == "CPUExecutionProvider":
                self._most = _SPARE + 2 * len(data)
                if foreign:
                    require_end(data, name, library)
            with self._limited():
                self.session = ort.InferenceSession(data, options, providers=[chosen])
        except UserError:
            raise
        except Exception as error:
            raise UserError(_load_failure(name, library, str(error))) from None
        self._input = self.session.get_inputs()[0].name
        self._outputs = _outputs_of(name, self.session, self.stages, record)

    def infer(self, images: NDArray[np.float32]) -> list[NDArray]:
        return self._by_parts(self._unbounded if self._tried else self._bounded, images)

    def _unbounded(self, images: NDArray[np.float32]) -> list[NDArray]:
        return self.session.run(self._outputs, {self._input: images})

    def _by_parts(
        self, run: Callable[[NDArray[np.float32]], list[NDArray]], images: NDArray[np.float32]
    ) -> list[NDArray]:
        """Outputs of all images: without what is recorded, each has a row for every image."""
        if self._part is None or len(images) <= self._part:
            return run(images)
        starts = range(0, len(images), self._part)
        found = [run(images[start : start + self._part]) for start in starts]
        return [np.concatenate(each) for each in zip(*found)]

    def _limited(self, pictures: int = 1) -> contextlib.AbstractContextManager[None]:
        if self._most is None:
            return contextlib.nullcontext()
        return memory.within(self._most + _PER_PICTURE * pictures)

    def _bounded(
        self, images: NDArray[np.float32], session: Any = None, **more: NDArray
    ) -> list[NDArray]:
        """A run that ends: what the shapes of a graph do not show comes out then.

        Args:
            session: in place of the runner's own, with `more` inputs.

        Raises:
            UserError: it takes more memory or time than any network of ours.
        """
        options = import_onnxruntime().RunOptions()
        try:
            with self._limited(len(images)), onnx_bounds.time_limit(options, len(images)):
                outputs = (session or self.session).run(
                    self._outputs, {self._input: images, **more}, options
                )
        except Exception as error:
            raise _run_failure(self._replayed[2], str(error)) from None
        self._tried = True
        return outputs

    def __call__(self, images: NDArray[np.float32]) -> Prediction:
        """images float32 [B, 3, H, W]; a static model runs them one by one.

        Kept tokens and scores are there as far as the model puts them out.
        """
        require_images(images)
        if self.batch == 1 and len(images) > 1:
            return stack([self(image[None]) for image in images])
        return self._decoded(self._by_parts(self._bounded, images))

    def _decoded(self, outputs: list[NDArray]) -> Prediction:
        output, *rest = outputs
        lengths, index, scores, into = (
            rest[i * self.stages : (i + 1) * self.stages] for i in range(4)
        )
        if scores:
            return decode(output, lengths, index, scores, *self._rows, into)
        return Prediction(np.asarray(output, np.float32), lengths, prefix=self._rows[0])

    def replay(
        self, images: NDArray[np.float32], kept: Sequence[NDArray[np.int64]],
        into: Sequence[NDArray[np.int64]] | None = None,
    ) -> Prediction:  # fmt: skip
        """As `Reference.replay`; where what leaves goes is its own to say."""
        before = [np.arange(self._replay.tokens), *kept]
        decisions = {
            f"decision_{s}": np.isin(alive, now).astype(np.float32)[None]
            for s, (alive, now) in enumerate(zip(before, kept))
        }
        return self._decoded(self._bounded(images, self._replay.session, **decisions))

    @functools.cached_property
    def _replay(self) -> _Replay:
        from asvit_deploy.graph import with_decisions, with_stage_outputs

        model, library, name = self._replayed
        options = session_options(1)
        if library is not None:
            options.register_custom_ops_library(str(library))
        given = with_decisions(with_stage_outputs(model, self.stages), self.stages)
        try:
            with self._limited():
                session = import_onnxruntime().InferenceSession(
                    given.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:
            raise UserError(_load_failure(name, library, str(error))) from None
        shapes = {output.name: output.shape for output in self.session.get_outputs()}
        return _Replay(session, shapes["scores_0"][1])

    def describe(self) -> dict[str, str]:
        ort = import_onnxruntime()
        return {
            "backend": f"onnxruntime {ort.__version__}",
            "provider": self.session.get_providers()[0],
            "precision": self.precision,
            "device": ort.get_device(),
            "op": self.op,
        }

    def end_profiling(self) -> list[dict]:
        """The profiler's events so far, its file removed."""
        path = Path(self.session.end_profiling())
        events = json.loads(path.read_text())
        path.unlink()
        return events


@dataclass(frozen=True)
class _Replay:
    """A session to which what stays is given, and how many image tokens come to its first stage."""

    session: Any
    tokens: int


def _pictures_of(model: onnx.ModelProto, name: str) -> tuple[int | None, int]:
    """The batch that a model takes, None for any, and the side of its pictures.

    Raises:
        UserError: its one input is no pictures.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [info for info in model.graph.input if info.name not in weights]
    shapes = [[d.dim_value for d in info.type.tensor_type.shape.dim] for info in inputs]
    shape = shapes[0] if len(shapes) == 1 else []
    square = len(shape) == 4 and shape[1] in (0, 3) and shape[2] == shape[3] and shape[2] >= 0
    if not square or shape[0] < 0:
        said = shortened(", ".join(map(str, shapes)) or "none", 80)
        raise UserError(
            f"{name} takes inputs of shapes {said} and not one of square pictures; export it again"
        )
    return shape[0] or None, shape[2]


def _outputs_of(name: str, session: Any, stages: int, record: bool) -> list[str]:
    """The outputs to ask for: the network's own, `length_s`, and `index_s`, `scores_s` if there.

    Raises:
        UserError: the network's own is gone, or the counts of a stage are gone.
    """
    there = [output.name for output in session.get_outputs()]
    wanted = {
        kind: [f"{kind}_{s}" for s in range(stages)]
        for kind in ("length", "index", "scores", "into")
    }
    own = next((name for name in OUTPUTS if name in there), None)
    if own is None or not set(wanted["length"]) <= set(there):
        gone = " or ".join(OUTPUTS)
        if own is not None:
            gone = next(name for name in wanted["length"] if name not in there)
        raise UserError(
            f"{name} has no output {gone}; export it again, and keep its outputs' names"
        )
    recorded = record and {*wanted["index"], *wanted["scores"]} <= set(there)
    more = [*wanted["index"], *wanted["scores"]] if recorded else []
    if recorded and {*wanted["into"]} <= set(there):
        more += wanted["into"]
    return [own, *wanted["length"], *more]


def require_end(data: bytes, name: str, library: Path | None = None) -> None:
    """Run a foreign graph once in a child, see `onnx_trial`.

    Args:
        data: it, serialised.

    Raises:
        UserError: it takes more memory or time than any network of ours, or cannot be run.
    """
    most = _SPARE + 2 * len(data) + _PER_PICTURE
    if failed := onnx_trial.failure(data, library, most):
        loaded, error = failed
        raise (
            _run_failure(name, error) if loaded else UserError(_load_failure(name, library, error))
        )


def _run_failure(name: str, error: str) -> UserError:
    line = " ".join(error.split())
    return UserError(
        f"{name} cannot be run by ONNX Runtime within {onnx_bounds.SECONDS} s a picture and the "
        f"memory of its network ({line[:120]}); export it again"
    )


def _load_failure(name: str, library: Path | None, error: str) -> str:
    """One line for what ONNX Runtime said, and what to do where that is known."""
    line = " ".join(error.split())
    if f"{onnx_op.OP_TYPE}" in line and "not a registered function/op" in line:
        return (
            f"{name} holds {onnx_op.OP_TYPE} without its function (--ops custom); run "
            "`asvit-deploy build-plugins ort`, or export with --ops auto"
        )
    if library is not None and (str(library) in line or "custom op" in line.lower()):
        return (
            f"{library} cannot be used by this ONNX Runtime ({line[:160]}); run "
            "`asvit-deploy build-plugins ort --force`"
        )
    return f"{name} cannot be loaded by ONNX Runtime ({line[:200]}); export it again"
