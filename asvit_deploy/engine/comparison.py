"""The graph that an engine is built from, compared with PyTorch before the build."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from asvit_deploy import precision as precisions
from asvit_deploy.data.images import open_images
from asvit_deploy.engine.source import Source
from asvit_deploy.errors import CheckFailed, UserError
from asvit_deploy.exporting.half import rounded
from asvit_deploy.graph import with_function
from asvit_deploy.parity import Parity, compare
from asvit_deploy.precision import Half
from asvit_deploy.runners import onnx_runtime
from asvit_deploy.runners.base import Reference, Remembered, Runner
from asvit_deploy.runners.onnx_runtime import OrtRunner
from asvit_deploy.runners.pytorch import TorchRunner

_LISTS = ("flips", "top1_changes", "neighbour_changes")
_LISTED = 50  # flips in a sidecar: bfloat16 can have thousands


@dataclass(frozen=True)
class Comparison:
    """How a graph compares: with what, on which pictures, the verdict, and how many pictures could
    not be read."""

    reference: str
    pictures: str
    parity: Parity
    skipped: int = 0

    def fields(self) -> dict[str, Any]:
        """For a sidecar: every figure, and the first of the flips and of the changes of top-1 or
        nearest neighbour."""
        said = self.parity.as_dict()
        lists: list[str] = [key for key in _LISTS if key in said]
        counts = {f"{key}_in_all": len(said[key]) for key in lists}
        firsts = {key: said[key][:_LISTED] for key in lists}
        return {"reference": self.reference, "pictures": self.pictures, "skipped": self.skipped,
                **said, **counts, **firsts}  # fmt: skip

    @property
    def summary(self) -> str:
        """What a person needs to know of it, in one line."""
        p = self.parity
        said = f"agrees with {self.reference} on {p.images} images ({self.pictures})"
        if p.flips:
            said += f"; {p.images - p.equal_sets} keep other tokens, all within rounding"
        if p.output == "embedding":
            said += f"; cosine 1 - {p.cosine_error:.1e} or more"
        if p.top1_changes:
            said += f"; near ties of top-1 turned over: {len(p.top1_changes)}"
        if p.neighbour_changes:
            said += f"; near ties of the nearest neighbour: {len(p.neighbour_changes)}"
        return said + (f"; score noise {max(p.noise):.1e}" if p.noise else "")


def require_end(source: Source) -> None:
    """Run the graph in a child first; those that are made of it compute the same.

    Raises:
        UserError: see `onnx_runtime.require_end`.
    """
    if not source.tried:
        onnx_runtime.require_end(with_function(source.model).SerializeToString(), str(source.path))
        source.tried = True


def reference_of(source: Source) -> tuple[Reference, str]:
    """What the graphs of an artefact are compared with, and how messages call it."""
    assert source.artefact is not None
    if source.reference is None:
        try:
            source.reference = Remembered(TorchRunner(source.artefact.reference)), "PyTorch"
        except UserError:
            runner = Remembered(OrtRunner(with_function(source.model)))
            source.reference = (
                runner, "the float32 ONNX file (its checkpoint is gone or changed)"
            )  # fmt: skip
    return source.reference


def compare_graph(
    source: Source,
    graph: onnx.ModelProto,
    precision: Half | None,
    images: Path | None,
    limit: int,
    candidate: Runner | None = None,
    skip_limit: int = 0,
    say: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare a graph with PyTorch, or with the float32 ONNX where the checkpoint is gone.

    A half graph runs as its `rounded` twin: each result rounded to half, as the GPU will.

    Args:
        images: folder of pictures, or None for the sample photographs.
        limit: at most so many of them.
        candidate: runs the graph; None for ONNX Runtime with the graph as a whole.
        skip_limit, say: see `open_images`.

    Raises:
        CheckFailed: the graph is not within the limits of `parity`.
    """
    assert source.artefact is not None
    require_end(source)
    pictures = open_images(images, source.artefact.config, limit, skip_limit, say)
    loaded, names = pictures.loaded()
    reference, with_what = reference_of(source)
    if candidate is None and precision:
        candidate = OrtRunner(rounded(with_function(graph)), optimize=False)
    elif candidate is None:
        candidate = OrtRunner(with_function(graph))
    limits = precisions.of_option(precision).option
    boundaries, output = source.artefact.boundaries, source.artefact.config.output
    parity = compare(reference, candidate, loaded, names, boundaries, limits, output=output)
    if not parity.passed:
        raise CheckFailed(
            f"the {limits} graph of {source.path} does not match {with_what} "
            f"({'; '.join(parity.failures)}); nothing was built "
            "(--no-check builds it all the same)"
        )
    return Comparison(with_what, pictures.source, parity, len(pictures.skipped))
