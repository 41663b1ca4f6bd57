"""The one runner of an artefact that a command uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asvit_deploy.files import sha256
from asvit_deploy.runtimes import AUTO, ONNXRUNTIME

if TYPE_CHECKING:
    from asvit_deploy.artefacts.artefact import Artefact
    from asvit_deploy.artefacts.onnx_file import OnnxArtefact
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


def running_as(
    artefact: OnnxArtefact, runtime: str | None, choice: Path | None
) -> dict[str, str | int | None]:
    """What `runner_of` would open, so far as answers depend on it: `runtime`, `way`, `threads`,
    `precision`, and digests of the op's `library` and of the `engine` that are in use.

    Raises:
        UserError: as `runner_of`, so far as it shows without opening one.
    """
    found: dict[str, Any] = {"engine": None, "threads": 1}
    if runtime == AUTO:
        from asvit_deploy.artefacts.runtime_choice import read_choice

        said = read_choice(artefact, choice).fields
        found |= {name: said[name] for name in ("runtime", "way", "threads", "precision")}
        found["engine"] = said.get("engine", {}).get("digest")
    else:
        own = runtime or ONNXRUNTIME
        ways = list(artefact.libraries() if own == ONNXRUNTIME else artefact.ways(runtimes=(own,)))
        # As `OnnxArtefact.in_runtime` takes them.
        found |= {"runtime": own, "way": ways[-1 if own == ONNXRUNTIME else 0]}
        found["precision"] = artefact.parity
    library = artefact.library if found["way"] == "library" else None
    found["library"] = None if library is None else sha256(library)
    return found
