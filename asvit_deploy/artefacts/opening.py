"""One way to open any artefact, and to find the ones that a folder holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from asvit_deploy import sidecar
from asvit_deploy.artefacts import bundle
from asvit_deploy.artefacts.artefact import Artefact
from asvit_deploy.artefacts.engine_file import BundleArtefact, EngineArtefact
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.errors import UserError
from asvit_deploy.runners.trt_plan import NOTHING, Allowed

ENGINES: dict[str, type[EngineArtefact]] = {"engine": EngineArtefact, "bucketed": BundleArtefact}


def kind_of(path: Path) -> str | None:
    """What the ending of a name stands for: "onnx", "engine", "bucketed" and so on, or None."""
    return {**sidecar.KINDS, **bundle.KINDS}.get(path.suffix)


def open_artefact(
    path: Path,
    library: Path | None = None,
    allowed: Allowed = NOTHING,
    original: Path | None = None,
) -> Artefact:
    """An ONNX file, an engine or a bundle of ours, checked against its sidecar or manifest.

    What has none of their endings is opened as an ONNX file, which says what is wrong with it.

    Args:
        library: the op's library of a runtime on the CPU; None runs the function in the file.
        allowed: the code that an engine may run beside its own kernels.
        original: the ONNX artefact that another tool made this ONNX file from; it is what the file
            is compared with.

    Raises:
        UserError: it is not whole, not ours, of another network than the original, or an engine
            and an original is given.
    """
    if (engine := ENGINES.get(kind_of(path) or "")) is not None:
        artefact = engine(path, allowed)
        if original is not None:
            raise UserError(
                f"{path} is an engine, which is compared with PyTorch; leave --reference out"
            )
        return artefact
    return OnnxArtefact(path, library, OnnxArtefact(original, library) if original else None)


def artefacts_here(*kinds: str) -> list[Path]:
    """The artefacts of these kinds that the current folder's sidecars describe, in name order.

    Raises:
        UserError: there is none.
    """
    if found := sidecar.find(Path(), *kinds):
        return found
    raise UserError(
        f"no {' or '.join(kinds)} artefact in {Path().resolve()}; "
        "run `asvit-deploy export --ckpt FILE` here, or name one"
    )


def engines_of(folder: Path, onnx: Path, say: Callable[[str], None] = lambda _: None) -> list[Path]:
    """The engines and bundles of a folder that were built from an ONNX file there, in name order.

    Args:
        say: gets a line on why one that is there could not be read.
    """
    bundles = [path for path in folder.iterdir() if path.suffix in bundle.KINDS and path.is_dir()]
    found = [*sidecar.find(folder, "engine"), *sorted(bundles)]
    sidecar.read(onnx)  # one that cannot be read is no engine's fault
    engines = []
    for path in found:
        try:
            if ENGINES[str(kind_of(path))](path).built_from(onnx):
                engines.append(path)
        except UserError as error:
            say(str(error))
    return engines


def paths_of(models: str | Path | Sequence[str | Path]) -> list[Path]:
    """One path or several, as paths."""
    return [Path(model) for model in ([models] if isinstance(models, str | Path) else models)]
