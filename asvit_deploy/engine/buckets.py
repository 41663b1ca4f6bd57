"""How many rows a segment may take: a short list of sizes, one optimisation profile each."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from asvit_deploy.engine.job import Profile
from asvit_deploy.errors import UserError

STEP = 16  # of the automatic buckets: a tile of the GPU's matrix units


def parse_buckets(text: str) -> tuple[int, ...] | None:
    """`16,32,197` as numbers; None for `auto`.

    Raises:
        UserError: it is neither.
    """
    if text.strip() == "auto":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--buckets {text!r} is no list of numbers; write --buckets 64,128,197, or auto"
        ) from None


def choose_buckets(
    wanted: Sequence[int] | None, rows: int, name: str, prefix: int = 1
) -> tuple[int, ...]:
    """The buckets of a network, rising.

    Args:
        wanted: as the user gave them, class token included; None takes the multiples of `STEP`.
        rows: M, what an image that keeps every token has, class token included; the last bucket.
        name: how messages call the model.
        prefix: P, the rows that never leave; a bucket holds them and one image token at least.

    Raises:
        UserError: a bucket below P + 1 or above `rows`, or the largest is below `rows`.
    """
    if wanted is None:
        return (*range(STEP, rows, STEP), rows)
    buckets = sorted(set(wanted))
    for bucket in buckets:
        if not prefix < bucket <= rows:
            raise UserError(
                f"--buckets {bucket} does not fit {name}: its tokens, class token included, take "
                f"{prefix + 1} to {rows} rows"
            )
    if not buckets or buckets[-1] < rows:
        given = ",".join(map(str, buckets))
        raise UserError(
            f"--buckets {given} does not cover {name}: an image that keeps every token takes "
            f"{rows} rows; add {rows}"
        )
    return tuple(buckets)


def profiles_of(segment: onnx.ModelProto, buckets: Sequence[int]) -> list[Profile]:
    """One profile per bucket in which nothing varies; none where the shapes are fixed anyway."""
    varying = {}
    for info in segment.graph.input:
        dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
        if not all(dims):
            varying[info.name] = dims
    if not varying:
        return []

    def fixed(dims: list[int], bucket: int) -> tuple[int, ...]:
        return tuple(dim or bucket for dim in dims)

    return [
        {name: (fixed(dims, bucket),) * 3 for name, dims in varying.items()} for bucket in buckets
    ]
