"""Which runtimes and precisions a run measures here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asvit_deploy.errors import UserError
from asvit_deploy.precision import FLOAT32, OPTIONS
from asvit_deploy.runners import onnx_runtime, openvino, trt_plan
from asvit_deploy.runtimes import ONNXRUNTIME, OPENVINO, OPENVINO_BF16, TENSORRT, TORCH, chosen
from asvit_deploy.tuning.engines import EXACT, as_engine, is_engine
from asvit_deploy.tuning.graphs import BF16, INT8

MOST_BATCH = 256
FP16 = "fp16"
# The least useful last.
_ORDER = (FLOAT32.name, EXACT, as_engine(FP16), as_engine(BF16), INT8, BF16)


@dataclass(frozen=True)
class Means:
    """What is measured.

    Attributes:
        runtimes: in float32, but for engines.
        precisions: of adaptive networks, those of engines by `engines.as_engine`; dense float32 is
            always there to compare with.
        batches: each once; the verdict is of the first.
        left_out: what there is not, and why.
    """

    runtimes: tuple[str, ...]
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    left_out: tuple[str, ...] = ()

    @property
    def engines(self) -> bool:
        return any(map(is_engine, self.precisions))

    def cheaper(self) -> Means | None:
        """With the least useful left out: later batches, then runtimes, then precisions."""
        if len(self.batches) > 1:
            return Means(self.runtimes, self.precisions, self.batches[:-1])
        if len(self.runtimes) > 1:
            return Means(self.runtimes[:1], self.precisions, self.batches)
        if len(self.precisions) > 1:
            return Means(self.runtimes, self.precisions[:-1], self.batches)
        return None


def means(
    runtime: str | Sequence[str] | None, precision: str | Sequence[str] | None,
    batch: int | str | Sequence[int],
) -> Means:  # fmt: skip
    """What is asked for, and by default what is at hand.

    Raises:
        UserError: something that was named is missing here, or is none.
    """
    named, wanted = chosen(runtime), _precisions(precision)
    lacking = {ONNXRUNTIME: onnx_runtime.why_not, OPENVINO: openvino.why_not,
               TENSORRT: trt_plan.why_not}  # fmt: skip
    for name in named:
        if name in lacking and (line := lacking[name]()):
            raise UserError(line)
    left_out = []
    runtimes = [name for name in named if name != OPENVINO_BF16]
    for name in lacking if not named else ():
        if line := lacking[name]():
            left_out.append(f"{name}: {line}")
        else:
            runtimes.append(name)
    if not named:
        runtimes.append(TORCH)
    elif not runtimes:
        runtimes = [OPENVINO]
    found = _found(wanted, named, runtimes, left_out)
    own = tuple(name for name in runtimes if name != TENSORRT)
    return Means(own, found, _batches(batch), tuple(left_out))


def _precisions(given: str | Sequence[str] | None) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given or ())
    names = list(dict.fromkeys(name.strip() for text in texts for name in text.split(",")))
    for name in names:
        if name not in OPTIONS:
            raise UserError(f"precision has {name!r}; give some of {', '.join(OPTIONS)}")
    return names


def _found(
    wanted: Sequence[str], named: Sequence[str], runtimes: Sequence[str], left_out: list[str]
) -> tuple[str, ...]:
    """The precisions, those named or those at hand; an engine's are its own."""
    lacks = _lacking(named, runtimes)
    run = {name for name, line in lacks.items() if line is None and name != FP16}
    if tuple(runtimes) == (TENSORRT,):
        run.remove(FLOAT32.name)
    forms = {name: [name] * (name in run) for name in OPTIONS}
    for name in (FLOAT32.name, FP16, BF16) if TENSORRT in runtimes else ():
        forms[name].append(as_engine(name))
    for name in wanted:
        if not forms[name]:
            raise UserError(str(lacks[name]))
    if OPENVINO_BF16 in named and (line := lacks[BF16]):
        raise UserError(line)
    labels = {label for name in wanted or OPTIONS for label in forms[name]}
    if not wanted:
        labels.discard(as_engine(BF16))  # float16 is as fast and rounds less: for who asks for it
        left_out += [f"{name}: {lacks[name]}" for name in (INT8, BF16)
                     if lacks[name] and not named]  # fmt: skip
    # A runtime that only one precision runs in brings that precision along.
    labels |= {BF16} if OPENVINO_BF16 in named else set()
    return tuple(label for label in _ORDER if label in labels)


def _lacking(named: Sequence[str], runtimes: Sequence[str]) -> dict[str, str | None]:
    """Why a precision is not run here, engines aside but for fp16; None where it is."""
    lacks = {FLOAT32.name: None, FP16: None, INT8: None, BF16: openvino.why_not("bf16")}
    if line := trt_plan.why_not():
        lacks[FP16] = f"fp16 is run by {TENSORRT} alone: {line}"
    if named and TENSORRT not in named:
        lacks[FP16] = f"fp16 is run by {TENSORRT}, which --runtime leaves out; name it too"
    if ONNXRUNTIME not in runtimes:
        lacks[INT8] = f"int8 is run by {ONNXRUNTIME}, which --runtime leaves out; name it too"
    if named and OPENVINO not in named and OPENVINO_BF16 not in named:
        lacks[BF16] = f"bf16 is run by {OPENVINO_BF16}, which --runtime leaves out; name it too"
    return lacks


def _batches(given: int | str | Sequence[int]) -> tuple[int, ...]:
    items = given.split(",") if isinstance(given, str) else [given] if isinstance(
        given, int) else list(given)  # fmt: skip
    found = []
    for item in items:
        text = str(item).strip()
        if isinstance(item, bool) or not text.isdecimal() or not 1 <= int(text) <= MOST_BATCH:
            raise UserError(
                f"batch has {text[:20]!r}; give whole numbers from 1 to {MOST_BATCH} such as 1,8"
            )
        found.append(int(text))
    if not found:
        raise UserError("batch is empty; give whole numbers such as 1,8")
    return tuple(dict.fromkeys(found))
