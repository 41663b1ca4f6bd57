"""Which runtimes and precisions a run measures here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from asvit_deploy.errors import UserError
from asvit_deploy.precision import FLOAT32, OPTIONS
from asvit_deploy.runners import onnx_runtime, openvino
from asvit_deploy.runtimes import ONNXRUNTIME, OPENVINO, OPENVINO_BF16, TENSORRT, TORCH, chosen
from asvit_deploy.tuning.graphs import BF16, INT8

MOST_BATCH = 256


@dataclass(frozen=True)
class Means:
    """What is measured.

    Attributes:
        runtimes: in float32.
        precisions: of adaptive networks; dense float32 is always there to compare with.
        batches: each once; the verdict is of the first.
        left_out: what there is not, and why.
    """

    runtimes: tuple[str, ...]
    precisions: tuple[str, ...]
    batches: tuple[int, ...]
    left_out: tuple[str, ...] = ()

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
    named = chosen(runtime)
    if TENSORRT in named:
        raise UserError(
            f"tune measures what runs ONNX files, and {TENSORRT} runs engines; leave it out, and "
            "bench an engine that `asvit-deploy build-engine` makes of the winner"
        )
    wanted = _precisions(precision)
    lacking = {ONNXRUNTIME: onnx_runtime.why_not, OPENVINO: openvino.why_not}
    left_out = []
    runtimes = [name for name in named if name != OPENVINO_BF16]
    for name in runtimes:
        if name in lacking and (line := lacking[name]()):
            raise UserError(line)
    if not named:
        for name in (ONNXRUNTIME, OPENVINO):
            if line := lacking[name]():
                left_out.append(f"{name}: {line}")
            else:
                runtimes.append(name)
        runtimes.append(TORCH)
    elif not runtimes:
        runtimes = [OPENVINO]
    found = _found(wanted, named, runtimes, left_out)
    if not named and importlib.util.find_spec("tensorrt") is not None:
        left_out.append(f"{TENSORRT}: engines are no ONNX files; `asvit-deploy bench` times them")
    return Means(tuple(runtimes), found, _batches(batch), tuple(left_out))


def _precisions(given: str | Sequence[str] | None) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given or ())
    names = list(dict.fromkeys(name.strip() for text in texts for name in text.split(",")))
    for name in names:
        if name not in OPTIONS:
            raise UserError(f"precision has {name!r}; give some of {', '.join(OPTIONS)}")
        if name == "fp16":
            raise UserError(
                "precision fp16 is for engines on a GPU: `asvit-deploy build-engine --fp16` makes "
                "one of the winner; give float32, int8 or bf16 here"
            )
    return names


def _found(
    wanted: Sequence[str], named: Sequence[str], runtimes: Sequence[str], left_out: list[str]
) -> tuple[str, ...]:
    """The precisions, those named or those at hand."""
    able = {FLOAT32.name: None, INT8: None, BF16: openvino.why_not("bf16")}
    if ONNXRUNTIME not in runtimes:
        able[INT8] = f"int8 is run by {ONNXRUNTIME}, which --runtime leaves out; name it too"
    if named and OPENVINO not in named and OPENVINO_BF16 not in named:
        able[BF16] = f"bf16 is run by {OPENVINO_BF16}, which --runtime leaves out; name it too"
    for name in wanted:
        if line := able[name]:
            raise UserError(line)
    if OPENVINO_BF16 in named and (line := able[BF16]):
        raise UserError(line)
    if wanted:
        # A runtime that only one precision runs in brings that precision along.
        return tuple(dict.fromkeys([*wanted, *([BF16] if OPENVINO_BF16 in named else [])]))
    usual = [name for name, line in able.items() if line is None]
    left_out += [f"{name}: {line}" for name, line in able.items() if line and not named]
    return tuple(usual)


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
