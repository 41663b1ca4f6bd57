"""The one runner of an artefact that a command uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from asvit_deploy.runtimes import AUTO

if TYPE_CHECKING:
    from asvit_deploy.artefacts.artefact import Artefact
    from asvit_deploy.runners.base import Runner


def runner_of(
    artefact: Artefact, runtime: str | None, choice: Path | None, say: Callable[[str], None]
) -> Runner:
    """It in a runtime, recording.

    Args:
        runtime: one of `runtimes.NAMES`, or auto; None is ONNX Runtime, or the engine's own.
        choice: what auto reads, by default `MODEL.choice.json`.
        say: gets a line on what auto runs.

    Raises:
        UserError: that runtime is missing, or cannot run it.
    """
    from asvit_deploy.artefacts.onnx_file import OnnxArtefact

    if isinstance(artefact, OnnxArtefact):
        if runtime != AUTO:
            return artefact.in_runtime(runtime)
        from asvit_deploy.artefacts.runtime_choice import run_as_chosen

        (runner,) = run_as_chosen(artefact, choice, say).values()
        return runner
    return next(iter(artefact.ways(runtimes=(runtime,) if runtime else ()).values()))
