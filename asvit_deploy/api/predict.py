"""`asvit_deploy.predict`."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

from asvit_deploy.answers import Near, Prediction, embedded, predicted
from asvit_deploy.api.inputs import PathLike, optional_path, path_of, require_at_least
from asvit_deploy.api.runner import runner_of, running_as
from asvit_deploy.errors import UserError
from asvit_deploy.runtimes import chosen_one, require_auto, require_library_used
from asvit_deploy.status import Say, first_process, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asvit_deploy.artefacts.onnx_file import OnnxArtefact
    from asvit_deploy.bulk.running import Written
    from asvit_deploy.classes.network import ClassNames
    from asvit_deploy.data.skips import Skips
    from asvit_deploy.drawing.album import Album
    from asvit_deploy.models.config import ArchConfig


@overload
def predict(
    model: PathLike, pictures: PathLike | Sequence[PathLike], *, skip_limit: int = 0,
    classes: PathLike | None = None, library: PathLike | None = None, runtime: str | None = None,
    choice: PathLike | None = None, save: PathLike | None = None, force: bool = False,
    say: Say = silent,
) -> list[Prediction]: ...  # fmt: skip
@overload
def predict(
    model: PathLike, *, data: PathLike, output: PathLike, batch: int | None = None,
    skip_limit: int = 0, classes: PathLike | None = None, library: PathLike | None = None,
    runtime: str | None = None, choice: PathLike | None = None, force: bool = False,
    say: Say = silent,
) -> Written | None: ...  # fmt: skip
def predict(
    model: PathLike, pictures: PathLike | Sequence[PathLike] = (), *,
    data: PathLike | None = None, output: PathLike | None = None, batch: int | None = None,
    skip_limit: int = 0, classes: PathLike | None = None, library: PathLike | None = None,
    runtime: str | None = None, choice: PathLike | None = None, save: PathLike | None = None,
    force: bool = False, say: Say = silent,
) -> list[Prediction] | Written | None:  # fmt: skip
    """Top-5, or the score of a network with one output, or an embedding and its nearest among the
    pictures; and kept tokens of each picture.

    The options are those of `asvit-deploy predict`.

    Args:
        model: an ONNX artefact.
        pictures: files, or one; all are read before the first is looked at.
        data: in place of these, a folder of pictures or of shards, or a shard: each picture once,
            without its neighbours, into `output`, see `asvit_deploy.bulk`.
        output: a new file, .jsonl, or .npz of embeddings.
        batch: pictures at a time, by default 16 of a file of packed batches and else 1.
        runtime: onnxruntime, openvino, openvino-bf16, or torch, which runs its checkpoint; or auto,
            which is what `bench(save_choice=...)` found fastest.
        choice: what auto reads, by default `MODEL.choice.json`.
        save: a folder for pictures of which tokens stay, as `asvit_deploy.visualize` makes it;
            `force` replaces one that was made so, or `output`.
        say: gets a line on where the labels come from, and on what was skipped.

    Returns:
        What the network says of each picture; of `data` what was written, or None where another
        process of `torchrun` will write it.

    Raises:
        UserError: bad input; the runtime is missing, or cannot run the model; more pictures than
            `skip_limit` cannot be read, or none can; an embedding is not finite; there are no
            tokens to draw, or `save` or `output` cannot be written, or is of another run.
        Interrupted: a run over `data` was stopped; it goes on when it is called again.
    """
    require_at_least(0, skip_limit=skip_limit)
    chosen, chosen_by = chosen_one(runtime), optional_path(choice)
    require_auto(chosen_by, (chosen or "",))
    require_library_used(library, (chosen,) if chosen else ())
    several = [pictures] if isinstance(pictures, (str, os.PathLike)) else list(pictures)
    written = _require_one_kind(several, data, output, batch, save, force)
    say = say if written is None or first_process() else silent
    model, named = path_of(model), optional_path(classes)
    paths = [path_of(picture) for picture in several]
    from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library
    from asvit_deploy.classes.network import of_fields

    artefact = OnnxArtefact(model, find_op_library(optional_path(library)))
    found = of_fields(model, artefact.fields, named, say)
    embeds = artefact.config.output == "embedding"
    if not embeds and (found is None or found.firm):  # of others it has said so already
        say(f"labels: {_origin(model, found, named, artefact.config.num_classes)}")
    if written is not None:
        from asvit_deploy.bulk.running import Bulk

        bulk = Bulk(artefact, *written, found.names if found else None, batch, skip_limit)
        running = running_as(artefact, chosen, chosen_by)
        return bulk.run(lambda: runner_of(artefact, chosen, chosen_by, say), running, force, say)
    drawings = optional_path(save)
    if drawings is not None:
        from asvit_deploy.drawing.album import check_target, require_cuts

        require_cuts(artefact)
        check_target(drawings, force)
        if any(drawings.resolve() in path.resolve().parents for path in paths):
            raise UserError(
                f"--save {drawings} holds a picture that is named, and what is there would be "
                "replaced; name another folder"
            )
    runner = runner_of(artefact, chosen, chosen_by, say)
    labels, tokens = found.names if found else None, artefact.fields["image_tokens"]
    loaded, skips = _loaded(paths, artefact.config, skip_limit, say)
    predictions = list[Prediction]()
    with _album(drawings, artefact, force) as album:
        for path, image in loaded:
            if isinstance(image, str):
                predictions.append(Prediction(str(path), tokens, skipped=image))
                continue
            said = runner(image[None])
            if embeds:
                one = embedded(said, model, str(path), tokens)
            else:
                one = predicted(said, str(path), tokens, labels)
            if album is not None:
                file = album.add(str(path), image, said, one.answer).file
                one = replace(one, drawn=str(album.path / file))
            predictions.append(one)
        if album is not None:
            account = {"skipped": len(skips), "skipped_by_reason": skips.by_reason()}
            album.finish(runner.describe(), "those named", account)
    return _with_nearest(predictions) if embeds else predictions


def _require_one_kind(
    pictures: Sequence[PathLike], data: PathLike | None, output: PathLike | None,
    batch: int | None, save: PathLike | None, force: bool,
) -> tuple[Path, Path] | None:  # fmt: skip
    """Where the pictures of a bulk run lie and where it writes; None for pictures that are named.

    Raises:
        UserError: it is neither, or something of both.
    """
    if data is None:
        if output is not None or batch is not None:
            raise UserError("--output and --batch go with --data; name a folder or shards with it")
        if not pictures:
            raise UserError(
                "no picture is named; name one or more, or a folder or shards with --data"
            )
        if force and save is None:
            raise UserError("--force replaces what --save made; add --save, or leave it out")
        return None
    if pictures:
        raise UserError("pictures are named beside --data; name either")
    if save is not None:
        raise UserError("--save draws pictures that are named; `visualize` draws those of a folder")
    if output is None:
        raise UserError("--data takes an output; add -o FILE, in .jsonl, or .npz of embeddings")
    require_at_least(1, batch=batch)
    return path_of(data), path_of(output)


@contextlib.contextmanager
def _album(path: Path | None, artefact: OnnxArtefact, force: bool) -> Iterator[Album | None]:
    """The album to draw into, where one is wanted."""
    if path is None:
        yield None
        return
    from asvit_deploy.drawing.album import album

    with album(path, artefact, force) as made:
        yield made


def _loaded(
    paths: Sequence[Path], config: ArchConfig, skip_limit: int, say: Say
) -> tuple[list[tuple[Path, NDArray | str]], Skips]:
    """Every picture as input, or why it was skipped."""
    from asvit_deploy.data.decode import PictureError, load_picture
    from asvit_deploy.data.images import preprocess
    from asvit_deploy.data.skips import Skips

    skips = Skips(skip_limit, say)
    loaded: list[tuple[Path, NDArray | str]] = []
    for path in paths:
        try:
            loaded.append((path, preprocess(load_picture(path), config)))
        except PictureError as error:
            skips.add(str(path), error)
            loaded.append((path, error.reason))
    if all(isinstance(image, str) for _, image in loaded):
        raise UserError(f"none of the {len(paths)} pictures can be read ({skips.summary()})")
    return loaded, skips


def _origin(model: Path, found: ClassNames | None, given: Path | None, count: int) -> str:
    """Where the labels come from."""
    if found is None and count == 1:
        return f"{model} has one output, a score"
    if found is None:
        return f"numbers of the outputs, {model} has no class names; --classes FILE gives them"
    return found.origin if given else f"those of {model} ({found.origin})"


def _with_nearest(predictions: list[Prediction]) -> list[Prediction]:
    """Each with the nearest of the others that could be read."""
    import numpy as np

    from asvit_deploy.similarity import nearest, units

    read = [i for i, one in enumerate(predictions) if one.embedding is not None]
    made, found = units(np.array([predictions[i].embedding for i in read])), list(predictions)
    for mine, other in enumerate(nearest(made).tolist()):
        cosine = float(made[mine] @ made[other])
        if other >= 0 and math.isfinite(cosine):
            near = Near(predictions[read[other]].image, min(1.0, cosine))
            found[read[mine]] = replace(predictions[read[mine]], nearest=near)
    return found
