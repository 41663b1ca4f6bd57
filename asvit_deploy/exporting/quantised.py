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
from asvit_deploy.exporting.int8 import (
    Kind,
    layer_errors,
    require_float32,
    smoothed,
    to_int8,
)
from asvit_deploy.parity import Parity

# A layer whose rounding moves its output by more stays float32; the first that agrees is taken.
LIMITS = (math.inf, 0.08, 0.03, 0.015)
FEWEST = 4  # pictures: two to quantise by, two to judge
_PLAIN = 0.02  # standard deviation over a normalised picture; a grey level is 0.004 to 0.02
_ALIKE = 0.05  # of two pictures' difference, over that of the first

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
        if out := self.fields["pictures"].get("left_out"):
            plural = "s" * (out > 1)
            line += f"; {out} picture{plural} of one colour, or like another, left out"
        return line


def quantised(
    model: onnx.ModelProto, kind: Kind, pictures: Pictures, names: Sequence[str],
    judge: Callable[[onnx.ModelProto, Pictures, Sequence[str]], dict[str, Parity]],
    name: str = "the model",
) -> Quantised:  # fmt: skip
    """Quantise a float32 model by every second picture; the others judge.

    Args:
        pictures: float32 [3, H, W] each.
        judge: compares a model with PyTorch on pictures.
        name: how messages call the model.

    Raises:
        UserError: the model is in half precision or int8 already; or the pictures are too few, or
            too much alike.
        CheckFailed: no form agrees.
    """
    require_float32(model, name)
    given = len(pictures)
    pictures, names = _different(pictures, names)
    left_out = given - len(pictures)
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
                "pictures": {"quantised_by": len(choosing), "judged_by": len(judging)}
                | ({"left_out": left_out} if left_out else {}),
                "refused": tried,
            })  # fmt: skip
        tried.append({"float32_layers": len(kept), "failures": failures})
    last = tried[-1]["failures"][0] if tried else "every layer would stay float32"
    other = "leave --int8 out" if kind == "dynamic" else "take --int8 dynamic, or leave it out"
    raise CheckFailed(
        f"no int8 ({kind}) form of {name} agrees with PyTorch ({last}); nothing was written: "
        f"{other}"
    )


def _different(pictures: Pictures, names: Sequence[str]) -> tuple[Pictures, list[str]]:
    """Each picture once, so that none that quantises judges under another name.

    Those of one colour show no range that others have, and are left out too.

    Raises:
        UserError: too few are left to say anything on others.
    """
    kept: list[int] = []
    spreads = [float(picture.std(axis=(1, 2)).max()) for picture in pictures]
    for i, picture in enumerate(pictures):
        if spreads[i] > _PLAIN and not any(
            np.sqrt(np.square(picture - pictures[k]).mean()) < _ALIKE * spreads[k] for k in kept
        ):
            kept.append(i)
    if len(kept) < FEWEST:
        plain = sum(spread <= _PLAIN for spread in spreads)
        raise UserError(
            f"--int8 takes {FEWEST} different pictures or more, half of them to judge; of the "
            f"{len(pictures)} given {len(kept)} differ{'s' * (len(kept) == 1)}"
            + (f"; {plain} {'is' if plain == 1 else 'are'} of one colour" if plain else "")
            + ": give more with --images"
        )
    return [pictures[i] for i in kept], [names[i] for i in kept]
