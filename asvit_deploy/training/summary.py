"""How a run ended, in lines for people."""

from __future__ import annotations

from collections.abc import Iterator

from asvit_deploy.checkpoints.beside import beside_line
from asvit_deploy.training.run import Trained

_NAMED = 10  # skipped pictures


def summary(result: Trained) -> Iterator[str]:
    """How the network ended, its average first, and which pictures were skipped."""
    if result.average:
        yield from _of_network(result.average, "its moving average: ")
    yield from _of_network(result, "")
    if result.backbone is not None:
        yield beside_line(result.output, result.backbone)
    if skipped := result.skipped:
        more, plural = ", …" * (len(skipped) > _NAMED), "s" * (len(skipped) > 1)
        yield (
            f"skipped {len(skipped)} unreadable picture{plural}: "
            f"{', '.join(skipped[:_NAMED])}{more}"
        )


def _of_network(result: Trained, of: str) -> Iterator[str]:
    """Its MACs, whether they are those asked for, and what validation says."""
    if fit := result.fit:
        yield (
            f"{of}{fit.after:.4f} of the dense MACs on {fit.pictures} training pictures, "
            f"budget {fit.budget:g}"
        )
        if fit.missed:
            yield (
                f"{of}missed the budget by {fit.off:+.1%}: these weights' scores are too much "
                "alike for any thresholds; train longer, or start from better weights"
            )
    if result.validation:
        numbers = {n: v for n, v in result.validation.items() if not isinstance(v, list)}
        yield of + ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
