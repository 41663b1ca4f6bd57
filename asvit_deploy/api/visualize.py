"""`asvit_deploy.visualize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asvit_deploy.answers import predicted
from asvit_deploy.api.inputs import PathLike, optional_path, path_of, require_at_least
from asvit_deploy.api.runner import runner_of
from asvit_deploy.errors import UserError
from asvit_deploy.runtimes import (
    TENSORRT,
    chosen_one,
    require_auto,
    require_library_used,
    require_used,
)
from asvit_deploy.status import Say, hide_bar, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from asvit_deploy.artefacts.artefact import Artefact
    from asvit_deploy.data.images import ImageSet
    from asvit_deploy.drawing.album import Album, Answer, Drawn
    from asvit_deploy.runners.base import Prediction, Runner


@dataclass(frozen=True)
class Visualization:
    """Drawings of which tokens stay.

    Attributes:
        output: the folder that they lie in, with `kept.json` on what they show.
        gallery: the drawing of easy, normal and hard pictures.
        pictures: what was drawn, in the order of the pictures.
        runner: what ran the model, as `Runner.describe`.
        images: where the pictures come from.
        account: how many were skipped and passed over, by reason and ending.
    """

    output: Path
    gallery: Path
    pictures: tuple[Drawn, ...]
    runner: dict[str, str]
    images: str
    account: dict[str, Any]


def visualize(
    model: PathLike, *, images: PathLike | None = None, output: PathLike | None = None,
    limit: int = 64, skip_limit: int = 0, panels: int = 6, classes: PathLike | None = None,
    runtime: str | None = None, choice: PathLike | None = None, library: PathLike | None = None,
    plugin: PathLike | None = None, allow_engine_code: bool = False, force: bool = False,
    say: Say = silent,
) -> Visualization:  # fmt: skip
    """Draw which tokens stay, cut by cut: a PNG for each picture, and a gallery of some.

    A drawing begins with the crop that the network sees. Behind a cut, tokens that stay show it
    unchanged; tokens that have gone are pale or, where the method hands on what they carry, in the
    colour of their group, and so is a frame around the token that took them. The options are those
    of `asvit-deploy visualize`.

    Args:
        model: an ONNX artefact, or an engine or bundle that says which tokens stay.
        images: folder of pictures, or None for the photographs of scikit-image.
        output: the folder, by default the model's stem and `.visualized`, here. One that is there
            may hold drawings of ours alone.
        limit: use at most so many pictures.
        panels: cuts that a drawing shows at most, the first and the last among them.
        runtime, choice, classes, library: as `asvit_deploy.predict`.
        plugin, allow_engine_code: of engines, as `asvit_deploy.check`.
        force: replace drawings that are there.
        say: gets status lines; a progress bar is shown only where this is given.

    Raises:
        UserError: bad input; no token leaves, or which do is not recorded; the runtime is missing,
            or cannot run the model; more pictures than `skip_limit` cannot be read, or none can; or
            the folder cannot be written, or holds other files.
    """
    require_at_least(1, limit=limit, panels=panels)
    require_at_least(0, skip_limit=skip_limit)
    chosen, chosen_by = chosen_one(runtime), optional_path(choice)
    require_auto(chosen_by, (chosen or "",))
    require_library_used(library, (chosen,) if chosen else ())
    model, folder = path_of(model), optional_path(images)
    from asvit_deploy.data.images import open_images
    from asvit_deploy.drawing.album import GALLERY, album, check_target, require_cuts
    from asvit_deploy.evaluation.machine import machine

    target = optional_path(output) or Path(f"{model.stem}.visualized")
    artefact = _opened(model, chosen, library, plugin, allow_engine_code, say)
    require_cuts(artefact)
    check_target(target, force)
    _refuse_among_pictures(target, folder)
    labels = _labels(artefact, optional_path(classes), say)
    runner = runner_of(artefact, chosen, chosen_by, say)
    pictures = open_images(folder, artefact.config, limit, skip_limit, say)
    with album(target, artefact, force, panels) as drawings:
        _draw(drawings, runner, pictures, labels, say)
        count = len(drawings.drawn)
        say(f"{model}: {count} picture{'s' * (count != 1)} drawn ({pictures.source})")
        drawings.finish(runner.describe(), pictures.source, pictures.account, machine())
    return Visualization(
        target, target / GALLERY, tuple(drawings.drawn), runner.describe(), pictures.source,
        pictures.account,
    )  # fmt: skip


def _refuse_among_pictures(target: Path, images: Path | None) -> None:
    """Raises UserError where pictures would be replaced by their drawings, or drawings taken for
    pictures, this time or the next."""
    if images is None:
        return
    pictures, drawings = images.resolve(), target.resolve()
    if pictures == drawings or drawings in pictures.parents:
        raise UserError(f"{target} holds the pictures themselves; name another folder with -o")
    if pictures in drawings.parents:
        raise UserError(
            f"{target} lies in {images}, so its drawings would be taken for pictures; name another "
            "folder with -o"
        )


def _opened(
    model: Path, runtime: str | None, library: PathLike | None, plugin: PathLike | None,
    allow_engine_code: bool, say: Say,
) -> Artefact:  # fmt: skip
    from asvit_deploy.artefacts.onnx_file import find_op_library
    from asvit_deploy.artefacts.opening import kind_of, open_artefact
    from asvit_deploy.runners.trt_plan import Allowed, named_plugin

    kind = kind_of(model) or "onnx"
    require_used((runtime,) if runtime else (), (kind,))
    if kind != "onnx":
        require_library_used(library, (TENSORRT,))
    allowed = Allowed(named_plugin(optional_path(plugin)), allow_engine_code)
    found = find_op_library(optional_path(library), say) if kind == "onnx" else None
    artefact = open_artefact(model, found, allowed)
    artefact.require_runnable()
    for note in artefact.notes:
        say(note)
    return artefact


def _labels(artefact: Artefact, given: Path | None, say: Say) -> Sequence[str] | None:
    """Names of the network's outputs, where it has any."""
    from asvit_deploy.classes.network import of_fields

    found = of_fields(artefact.path, artefact.fields, given, say)
    return found.names if found else None


def _draw(
    drawings: Album, runner: Runner, pictures: ImageSet, labels: Sequence[str] | None, say: Say
) -> None:
    """One picture at a time, as `predict` runs them."""
    from tqdm import tqdm

    embeds = drawings.artefact.config.output == "embedding"
    shown = tqdm(pictures.inputs(), total=len(pictures), desc="visualize", disable=hide_bar(say),
                 leave=False)  # fmt: skip
    for name, pixels in shown:
        found = runner(pixels[None])
        drawings.add(name, pixels, found, None if embeds else _answer(found, name, labels))


def _answer(found: Prediction, name: str, labels: Sequence[str] | None) -> Answer | None:
    return predicted(found, name, 0, labels).answer
