"""ONNX artefacts, and the runtimes that run them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import onnx

from asvit_deploy import sidecar
from asvit_deploy.artefacts.artefact import Artefact, Opener, Ways
from asvit_deploy.artefacts.reference import check_fields
from asvit_deploy.checkpoints.facts import fields_of
from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import DESCRIBED
from asvit_deploy.models.config import STEM_WIDTH, ArchConfig
from asvit_deploy.ops import onnx_op
from asvit_deploy.precision import FLOAT32, NAMES, of_name
from asvit_deploy.runners import onnx_bounds, onnx_runtime, openvino
from asvit_deploy.runners.base import Reference, Runner
from asvit_deploy.runners.onnx_runtime import OrtRunner, arithmetic_of, load_model
from asvit_deploy.runtimes import ONNXRUNTIME, OPENVINO, OPENVINO_BF16, TORCH, of_kind
from asvit_deploy.text import one_line

# Sidecar fields that two artefacts share if they can be compared token by token.
_OF_THE_NETWORK = ("arch", "image_size", "num_classes", "stages", "reduction")
_Runner = TypeVar("_Runner", bound=Runner)


@dataclass
class OnnxArtefact(Artefact):
    """An ONNX artefact of ours, opened.

    Attributes:
        path: the file.
        library: the op's ONNX Runtime library, or None to run the function.
        original: the artefact that another tool may have made this file from; then `fields` are
            the original's where the file has no sidecar of its own.
        fields: the sidecar.
        borrowed: why `fields` are the original's, or None.

    Raises:
        UserError: it is no such artefact, or has nothing to do with the original.
    """

    path: Path
    library: Path | None = None
    original: OnnxArtefact | None = None
    fields: dict[str, Any] = field(init=False)
    borrowed: str | None = field(default=None, init=False)
    _tried: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.path.is_file() and self.path.suffix != ".onnx":
            raise UserError(
                f"{self.path} is no ONNX file; name one in .onnx, or make it with "
                "`asvit-deploy export --ckpt FILE`"
            )
        try:
            self.fields = sidecar.read(self.path)
        except UserError:
            if self.original is None or not self.path.is_file():
                raise
            self._borrow(self.original)
            return
        if self.fields.get("kind") != "onnx":
            raise UserError(
                f"{self.path} is no ONNX file but of kind {self.fields.get('kind')}; name an "
                ".onnx file"
            )
        check_fields(self.path, self.fields)
        if self.original is not None:
            self.refuse_other_network(self.original)

    def _borrow(self, original: OnnxArtefact) -> None:
        """Take the original's fields, once the file takes the original's pictures."""
        weights = {tensor.name for tensor in self.model.graph.initializer}
        inputs = [info for info in self.model.graph.input if info.name not in weights]
        shapes = [[d.dim_value for d in info.type.tensor_type.shape.dim] for info in inputs]
        size = original.config.image_size
        if len(shapes) != 1 or len(shapes[0]) != 4 or any(
            given not in (0, wanted) for given, wanted in zip(shapes[0][1:], (3, size, size))
        ):  # fmt: skip
            raise UserError(
                f"{self.path} takes inputs of shapes {shapes} and not pictures of {size} pixels as "
                f"{original.path} does; name a file that was made from it"
            )
        several = original.fields["batch"] if original.dynamic_batch else "dynamic"
        self.fields = {**original.fields, "batch": "1" if shapes[0][0] == 1 else several}
        there = sidecar.sidecar_path(self.path).is_file()
        self.borrowed = "its sidecar is not its own" if there else "it has no sidecar"

    def refuse_other_network(self, other: OnnxArtefact) -> None:
        """Raise UserError where `other` is no reference for this one, in one line that says why."""
        for made in (_network_fields, _traits, lambda artefact: fields_of(artefact.config)):
            for (key, ours), theirs in zip(made(self).items(), made(other).values()):
                if ours != theirs:
                    raise UserError(
                        f"{other.path} is no reference for {self.path}: {key} is {theirs} there, "
                        f"{ours} here; name an artefact of the same network"
                    )

    @cached_property
    def model(self) -> onnx.ModelProto:
        def refuse(reason: str) -> NoReturn:
            raise UserError(f"{self.path} {reason}; export it again")

        model, own = load_model(self.path), "fields" in vars(self)
        if own:
            onnx_bounds.check_ours(model, refuse)
            said, found = self.fields["precision"], arithmetic_of(model)
            if said not in NAMES or of_name(said).option != found:
                refuse(f"computes in {found} and its sidecar says {said[:40]!r}")
        config = self.config if own or self.original is None else self.original.config
        onnx_bounds.check_runnable(model, _largest(config), refuse)
        return model

    def libraries(self) -> dict[str, Path | None]:
        """ONNX Runtime's ways: `function` where the file holds it, `library` if given, `dense`.

        Raises:
            UserError: there is none.
        """
        if not self.adaptive:
            return {"dense": None}
        if self.fields["mode"] == "static":
            return {"static": None}
        ways: dict[str, Path | None] = {}
        if self.model.functions or not onnx_op.nodes_of(self.model.graph):
            ways["function"] = None
        if self.library is not None and onnx_op.nodes_of(self.model.graph):
            ways["library"] = self.library
        if not ways:
            raise UserError(
                f"{self.path} was exported with --ops custom and the op's library is not built; "
                "run `asvit-deploy build-plugins ort`"
            )
        return ways

    @property
    def parity(self) -> str:
        """Which of `parity.LIMITS` holds."""
        return arithmetic_of(self.model)

    @property
    def notes(self) -> tuple[str, ...]:
        if self.borrowed is None or self.original is None:
            return ()
        return (
            f"{self.path}: {self.borrowed}; preprocessing, stages and thresholds are those of "
            f"{self.original.path}; judged as {self.parity}",
        )

    def judge(self) -> Reference:
        """The original in its first way, or PyTorch."""
        if self.original is None:
            return super().judge()
        return self.original.runner(next(iter(self.original.libraries().values())))

    def require_runnable(self) -> None:
        """ONNX Runtime runs anywhere."""

    def runner(self, library: Path | None, threads: int = 1, record: bool = True) -> OrtRunner:
        """The artefact in ONNX Runtime."""
        return self._opened(partial(OrtRunner, library=library), threads, record)

    def openvino_runner(
        self, hint: openvino.Hint = "f32", threads: int = 1, record: bool = True
    ) -> openvino.OpenVinoRunner:
        """The artefact in OpenVINO."""
        return self._opened(partial(openvino.OpenVinoRunner, hint=hint), threads, record)

    def _opened(self, make: Callable[..., _Runner], threads: int, record: bool) -> _Runner:
        """A runner that knows what the sidecar says; the first of all is tried in a child."""
        stages = len(self.boundaries) if self.adaptive else 0
        rows = self.fields.get("prefix", 1), self.fields.get("appended", 0)
        runner = make(
            self.model, threads=threads, record=record, name=str(self.path), stages=stages,
            foreign=not self._tried, rows=rows,
        )  # fmt: skip
        self._tried = True
        return runner

    def in_runtime(self, runtime: str | None = None) -> Runner:
        """It in one runtime, recording: in ONNX Runtime with the op's library, where there is one,
        unless another is named.

        Raises:
            UserError: that runtime is missing, or cannot run it.
        """
        if runtime in (None, ONNXRUNTIME):
            return self.runner(list(self.libraries().values())[-1])
        return next(iter(self.ways(runtimes=(runtime,)).values()))

    def ways(
        self, threads: int = 1, record: bool = True, runtimes: Sequence[str] = ()
    ) -> Ways:  # fmt: skip
        wanted = of_kind(self.path, "onnx", runtimes)
        openers: dict[str, Opener] = {}
        of_ways: dict[str, str] = {}
        parity: dict[str, str] = {}
        for name, runtime in RUNTIMES.items():
            if name not in wanted and (wanted or not runtime.usual):
                continue
            if lacking := runtime.lacks(self):
                if wanted:
                    raise UserError(lacking)
                continue
            own = runtime.ways(self, threads, record)
            openers |= own
            of_ways |= dict.fromkeys(own, name)
            if (limits := runtime.parity(self)) != self.parity:
                parity |= dict.fromkeys(own, limits)
        if TORCH in wanted:
            eager = partial(self._eager, threads)
            openers[TORCH], of_ways[TORCH], parity[TORCH] = eager, TORCH, FLOAT32.option
        if not openers:
            lines = "; ".join(self.lacking().values())
            raise UserError(f"nothing that is installed here runs {self.path}: {lines}")
        return Ways(openers, of_ways, parity)

    def _eager(self, threads: int) -> Runner:
        from asvit_deploy.runners.pytorch import TorchRunner

        self.model  # noqa: B018  # which must be what its sidecar says, though its checkpoint runs
        return TorchRunner(self.reference, threads=threads)

    def lacking(self) -> dict[str, str]:
        """Why runtimes that are usual do not run it here, one line each, by their names."""
        usual = {name: one.lacks(self) for name, one in RUNTIMES.items() if one.usual}
        return {name: line for name, line in usual.items() if line}


def _no_ort(artefact: OnnxArtefact) -> str | None:
    return onnx_runtime.why_not()


def _own_parity(artefact: OnnxArtefact) -> str:
    return artefact.parity


@dataclass(frozen=True)
class Runtime:
    """What runs ONNX models.

    Attributes:
        ways: of an artefact, with so many threads and recording or not; their names are no other
            runtime's.
        model: any ONNX model of ours, such as a dense twin, with so many threads, not recording.
        lacks: why it cannot run an artefact, in one line; None where it can.
        parity: which of `parity.LIMITS` holds for an artefact there.
        usual: it is run where nobody names a runtime.
    """

    ways: Callable[[OnnxArtefact, int, bool], dict[str, Opener]]
    model: Callable[[onnx.ModelProto, int], Runner]
    lacks: Callable[[OnnxArtefact], str | None]
    parity: Callable[[OnnxArtefact], str] = _own_parity
    usual: bool = True


def _ort_ways(artefact: OnnxArtefact, threads: int, record: bool) -> dict[str, Opener]:
    return {
        way: partial(artefact.runner, library, threads, record)
        for way, library in artefact.libraries().items()
    }


def _ort_model(model: onnx.ModelProto, threads: int) -> OrtRunner:
    return OrtRunner(model, threads=threads, record=False)


def _openvino(hint: openvino.Hint) -> Runtime:
    """OpenVINO, in one precision; its only way bears its own name."""
    name = OPENVINO if hint == "f32" else OPENVINO_BF16

    def parity(artefact: OnnxArtefact) -> str:
        return artefact.parity if hint == "f32" or artefact.parity == "int8" else hint

    def lacks(artefact: OnnxArtefact) -> str | None:
        if lacking := openvino.why_not(hint):
            return lacking
        bare = onnx_op.nodes_of(artefact.model.graph) and not artefact.model.functions
        return f"{artefact.path} {openvino.LACKS_FUNCTION}" if bare else None

    return Runtime(
        lambda artefact, threads, record: {
            name: partial(artefact.openvino_runner, hint, threads, record)
        },
        lambda model, threads: openvino.OpenVinoRunner(model, threads, record=False, hint=hint),
        lacks,
        parity,
        usual=hint == "f32",
    )


# By the name that rows of `bench` call it. A further runtime is a row here: `check` and `bench`
# find it, and whatever else asks an artefact for its ways.
RUNTIMES = {
    ONNXRUNTIME: Runtime(_ort_ways, _ort_model, _no_ort),
    OPENVINO: _openvino("f32"),
    OPENVINO_BF16: _openvino("bf16"),
}


def _largest(config: ArchConfig) -> int:
    """Values that a tensor of such a network may hold for one picture, with room to spare."""
    rows, hidden = config.rows, config.hidden
    patch = 3 * config.patch_size**2
    return 8 * max(
        3 * config.image_size**2, STEM_WIDTH * config.image_size**2 // 4, config.heads * rows**2,
        rows * max(hidden, 3 * config.dim, patch), config.dim * max(hidden, 3 * config.dim, patch),
        config.dim * config.num_classes, STEM_WIDTH**2 * 49,
    )  # fmt: skip


def _network_fields(artefact: OnnxArtefact) -> dict[str, Any]:
    fields = {key: artefact.fields.get(key) for key in _OF_THE_NETWORK}
    return {**fields, "output": artefact.fields.get("output", "logits")}


def _traits(artefact: OnnxArtefact) -> dict[str, Any]:
    return {name: getattr(artefact.config, name) for name in DESCRIBED}


def _to_stderr(line: str) -> None:
    print(one_line(line), file=sys.stderr)


def find_op_library(named: Path | None, say: Callable[[str], None] = _to_stderr) -> Path | None:
    """The library given, or the one that `build-plugins` made, or None.

    Args:
        say: gets a line on why there is none.

    Raises:
        UserError: the library given cannot be used.
    """
    from asvit_deploy.ops.library import check_library, find_library

    def missing(why: str) -> None:
        say(f"no library, {' '.join(why.splitlines())}")

    if named is None:
        try:
            return find_library(say=missing)
        except (UserError, OSError) as error:
            # It is an addition: what it does, the function in the file does too.
            reason = str(error)
            if isinstance(error, PermissionError):
                reason = f"{error.filename} may not be read"
            missing(reason)
            return None
    # A library without the op would load, and the function would silently run in its place.
    if trouble := check_library(named):
        raise UserError(
            f"{named} cannot be used: {trouble}; `asvit-deploy build-plugins ort` makes one"
        )
    return named.resolve()
