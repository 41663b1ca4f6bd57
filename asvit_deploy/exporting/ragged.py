"""Ragged attention in standard nodes: pictures of like length together, so that little is padded.

There is no loop in our graphs (`runners.onnx_bounds`), and one padded batch would pay for its
longest picture in every product: at eight pictures, three quarters more. So pictures are ordered by
their rows and cut into `GROUPS`, each padded to its own longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import onnxscript

GROUPS = 4


class _Group(NamedTuple):
    """Pictures of like length.

    Attributes:
        place: int64 [B', M'], the packed row at each place; where nothing is, its picture's first.
        hidden: float32 [B', 1, M'], -inf where nothing is, else 0.
    """

    place: Any
    hidden: Any


class _Layout(NamedTuple):
    """Where packed rows stand in the groups: int64 [T], places of all groups counted through."""

    groups: list[_Group]
    slot: Any


def translation(opset: int) -> Callable:
    """For `ops.ragged.NAME`; what lengths alone say is worked out once for each of them."""
    op = onnxscript.values.Opset("", opset)
    known: dict[int, tuple[Any, _Layout]] = {}

    def ragged(qkv: Any, length: Any, heads: int, bias: Any = None) -> Any:
        if id(length) not in known:
            known[id(length)] = length, _layout(op, length)
        layout, width = known[id(length)][1], qkv.shape[1] // 3
        by_head = op.Constant(value_ints=[-1, 3, heads, width // heads])
        # Rows inwards, one axis moved: a plain copy of blocks. Behind the gather it would not be.
        rows = op.Transpose(op.Reshape(qkv, by_head), perm=[1, 2, 0, 3])  # (3, H, T, Dh)
        flat = op.Constant(value_ints=[heads, -1, width // heads])
        contexts = []
        for group in layout.groups:
            query, key, value = op.Split(
                op.Gather(rows, group.place, axis=2), axis=0, num_outputs=3
            )  # each (1, H, B', M', Dh)
            factor = op.CastLike(op.Constant(value_float=(width // heads) ** -0.5), query)
            logits = op.MatMul(op.Mul(query, factor), op.Transpose(key, perm=[0, 1, 2, 4, 3]))
            added = group.hidden
            if bias is not None:
                own = op.Unsqueeze(op.Gather(bias, group.place), op.Constant(value_ints=[1]))
                added = op.Add(own, added)
            weight = op.Softmax(op.Add(logits, op.CastLike(added, logits)), axis=4)
            contexts.append(op.Reshape(op.MatMul(weight, value), flat))
        context = op.Gather(op.Concat(*contexts, axis=1), layout.slot, axis=1)  # (H, T, Dh)
        joined = op.Constant(value_ints=[-1, width])
        return op.Reshape(op.Transpose(context, perm=[1, 0, 2]), joined)

    return ragged


def _layout(op: Any, length: Any) -> _Layout:
    """The groups of int64 [B] lengths."""
    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    first_axis = op.Constant(value_int=0)
    images = op.Shape(length)  # [1]
    # As float32, which all runtimes sort and which is exact for them.
    falling, order = op.TopK(op.Cast(length, to=1), images, axis=0, largest=1, sorted=1)
    falling = op.Cast(falling, to=7)
    start = op.Gather(op.CumSum(length, first_axis, exclusive=1), order)
    last = op.Sub(images, one)
    quarter = op.Constant(value_ints=[GROUPS])
    groups, widths, low = [], [], zero
    for number in range(1, GROUPS + 1):
        high = op.Div(op.Mul(images, op.Constant(value_ints=[number])), quarter)
        # The first is the longest; of an empty group, which there may be, any picture's will do.
        most = op.Gather(falling, op.Min(low, last))  # [1]
        columns = op.Range(first_axis, op.Squeeze(most, zero), op.Constant(value_int=1))
        own = op.Unsqueeze(op.Slice(falling, low, high, zero), one)  # (B', 1)
        real = op.Less(columns, own)
        begins = op.Unsqueeze(op.Slice(start, low, high, zero), one)
        place = op.Add(begins, op.Where(real, columns, first_axis))
        nothing, never = (op.Constant(value_float=v) for v in (0.0, float("-inf")))
        groups.append(_Group(place, op.Unsqueeze(op.Where(real, nothing, never), one)))
        widths.append(op.Expand(most, op.Sub(high, low)))
        low = high
    before = op.CumSum(op.Concat(*widths, axis=0), first_axis, exclusive=1)
    rank = op.TopK(op.Cast(order, to=1), images, axis=0, largest=0, sorted=1)[1]
    begins = op.Unsqueeze(op.Gather(before, rank), one)  # (B, 1), pictures in their own order
    most = op.Squeeze(op.Gather(falling, zero), zero)
    columns = op.Range(first_axis, most, op.Constant(value_int=1))
    flat = op.Constant(value_ints=[-1])
    real = op.Reshape(op.Less(columns, op.Unsqueeze(length, one)), flat)
    places = op.Reshape(op.Add(begins, columns), flat)
    return _Layout(groups, op.Gather(places, op.Squeeze(op.NonZero(real), zero)))
