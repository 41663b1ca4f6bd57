"""The int8 form of an exported model: the fastest that still agrees with PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from asvit_deploy.errors import CheckFailed, UserError
from asvit_deploy.exporting.int8 import Kind, layer_errors, smoothed, to_int8
from asvit_deploy.parity import Parity

# A layer whose rounding moves its output by more stays float32; the first that agrees is taken.
LIMITS = (math.inf, 0.08, 0.03, 0.015)
FEWEST = 4  # pictures: two to quantise by, two to judge

Pictures = Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class Quantised:
    """An int8 model that agrees.

    Attributes:
        model: it.
        parity: how it agreed on pictures that did not quantise it, by the size of the batches.
        fields: for its sidecar: kind, layers, `float32_layers`, and what was tried before.
    """

    model: onnx.ModelProto
    parity: dict[str, Parity]
    fields: dict[str, Any]

    def said(self) -> str:
        """One line."""
        kept, layers = self.fields["float32_layers"], self.fields["layers"]
        line = f"int8 ({self.fields['kind']}): {layers - len(kept)} of {layers} linear layers"
        if kept:
            line += f"; in float32 stay {', '.join(kept)}"
        return line


def quantised(
    model: onnx.ModelProto, kind: Kind, pictures: Pictures, names: Sequence[str],
    judge: Callable[[onnx.ModelProto, Pictures, Sequence[str]], dict[str, Parity]],
) -> Quantised:  # fmt: skip
    """Quantise a float32 model by every second picture; the others judge.

    Args:
        pictures: float32 [3, H, W] each.
        judge: compares a model with PyTorch on pictures.

    Raises:
        UserError: too few pictures, or all are alike.
        CheckFailed: no form agrees.
    """
    pictures, names = _different(pictures, names)
    choosing, judging, labels = pictures[::2], pictures[1::2], names[1::2]
    even = smoothed(model, choosing)
    errors = layer_errors(even, kind, choosing)
    tried: list[dict[str, Any]] = []
    before: set[str] | None = None
    for limit in LIMITS:
        kept = {name for name, error in errors.items() if error > limit}
        if kept == before or len(kept) == len(errors):
            continue
        before = kept
        made = to_int8(even, kind, kept, choosing)
        parity = judge(made, judging, labels)
        failures = [line for one in parity.values() for line in one.failures]
        if not failures:
            layers = [name for name in errors if name in kept]
            return Quantised(made, parity, {
                "kind": kind, "layers": len(errors), "float32_layers": layers,
                "pictures": {"quantised_by": len(choosing), "judged_by": len(judging)},
                "refused": tried,
            })  # fmt: skip
        tried.append({"float32_layers": len(kept), "failures": failures})
    last = tried[-1]["failures"][0] if tried else "every layer would stay float32"
    other = "leave --int8 out" if kind == "dynamic" else "take --int8 dynamic, or leave it out"
    raise CheckFailed(
        f"no int8 ({kind}) form of the model agrees with PyTorch ({last}); nothing was written: "
        f"{other}"
    )


def _different(pictures: Pictures, names: Sequence[str]) -> tuple[Pictures, list[str]]:
    """Each picture once, so that none that quantises judges under another name.

    Raises:
        UserError: too few are left to say anything on others.
    """
    firsts: dict[bytes, int] = {}
    for i, picture in enumerate(pictures):
        firsts.setdefault(picture.tobytes(), i)
    if len(firsts) < FEWEST:
        raise UserError(
            f"--int8 takes {FEWEST} different pictures or more, half of them to judge; of the "
            f"{len(pictures)} given {len(firsts)} differ{'s' * (len(firsts) == 1)}: give more with "
            "--images"
        )
    kept = list(firsts.values())
    return [pictures[i] for i in kept], [names[i] for i in kept]
