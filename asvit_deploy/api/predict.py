"""`asvit_deploy.predict`."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asvit_deploy.api.inputs import PathLike, optional_path, path_of, require_at_least
from asvit_deploy.api.runner import runner_of
from asvit_deploy.errors import UserError
from asvit_deploy.runtimes import chosen_one, require_auto, require_library_used
from asvit_deploy.status import Say, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asvit_deploy.artefacts.onnx_file import OnnxArtefact
    from asvit_deploy.classes.network import ClassNames
    from asvit_deploy.data.skips import Skips
    from asvit_deploy.drawing.album import Album, Answer
    from asvit_deploy.models.config import ArchConfig
    from asvit_deploy.runners import base

_BEST = 5


@dataclass(frozen=True)
class Guess:
    """A class: its number among the outputs, its name, and its probability from 0 to 1."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Near:
    """The nearest of the other pictures: the file, and the cosine of the two embeddings."""

    image: str
    cosine: float


@dataclass(frozen=True)
class Prediction:
    """What a network says of one picture.

    Attributes:
        image: the file.
        image_tokens: how many tokens the picture is cut into.
        top: the five best classes, the best first; empty where there is one output or an embedding.
        score: that one output.
        label: its name, where it has one.
        embedding: what a network without classes says, float32 [C].
        nearest: by that; None where no other picture was read, or its norm is 0.
        kept: the image tokens that each stage kept, by their number among all of them.
        skipped: why the picture could not be read; everything else is empty then.
        drawn: the picture of which tokens stay, where these were to be saved.
    """

    image: str
    image_tokens: int
    top: tuple[Guess, ...] = ()
    score: float | None = None
    label: str | None = None
    embedding: tuple[float, ...] | None = None
    nearest: Near | None = None
    kept: tuple[tuple[int, ...], ...] = ()
    skipped: str | None = None
    drawn: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """What `asvit-deploy predict --json` prints."""
        if self.skipped is not None:
            return {"image": self.image, "skipped": self.skipped}
        drawn = {} if self.drawn is None else {"drawn": self.drawn}
        if self.embedding is not None:
            return {
                "image": self.image, "embedding": list(self.embedding), "norm": self.norm,
                "nearest": asdict(self.nearest) if self.nearest else None,
                "kept": [list(stage) for stage in self.kept], **drawn,
            }  # fmt: skip
        alone = {} if self.score is None else {"score": self.score, "label": self.label}
        top, kept = [asdict(guess) for guess in self.top], [list(stage) for stage in self.kept]
        return {"image": self.image, "top": top, **alone, "kept": kept, **drawn}

    @property
    def norm(self) -> float | None:
        """Of the embedding, Euclidean."""
        return None if self.embedding is None else math.hypot(*self.embedding)

    @property
    def answer(self) -> Answer | None:
        """The best class, or the one output, as drawings have it."""
        from asvit_deploy.drawing.album import Answer

        if self.score is not None:
            return Answer(self.label or "", score=self.score)
        best = self.top[0] if self.top else None
        return Answer(best.label, best.index, best.probability) if best else None


def predict(
    model: PathLike, pictures: PathLike | Sequence[PathLike], *, skip_limit: int = 0,
    classes: PathLike | None = None, library: PathLike | None = None, runtime: str | None = None,
    choice: PathLike | None = None, save: PathLike | None = None, force: bool = False,
    say: Say = silent,
) -> list[Prediction]:  # fmt: skip
    """Top-5, or the score of a network with one output, or an embedding and its nearest among the
    pictures; and kept tokens of each picture.

    The options are those of `asvit-deploy predict`.

    Args:
        model: an ONNX artefact.
        pictures: files, or one; all are read before the first is looked at.
        runtime: onnxruntime, openvino, openvino-bf16, or torch, which runs its checkpoint; or auto,
            which is what `bench(save_choice=...)` found fastest.
        choice: what auto reads, by default `MODEL.choice.json`.
        save: a folder for pictures of which tokens stay, as `asvit_deploy.visualize` makes it;
            `force` replaces one that was made so.
        say: gets a line on where the labels come from, and on what was skipped.

    Raises:
        UserError: bad input; the runtime is missing, or cannot run the model; more pictures than
            `skip_limit` cannot be read, or none can; an embedding is not finite; there are no
            tokens to draw, or `save` cannot be written.
    """
    require_at_least(0, skip_limit=skip_limit)
    chosen, chosen_by = chosen_one(runtime), optional_path(choice)
    require_auto(chosen_by, (chosen or "",))
    require_library_used(library, (chosen,) if chosen else ())
    if force and save is None:
        raise UserError("--force replaces what --save made; add --save, or leave it out")
    model, named = path_of(model), optional_path(classes)
    several = [pictures] if isinstance(pictures, (str, os.PathLike)) else list(pictures)
    if not several:
        raise UserError("no picture is named; name one or more")
    paths = [path_of(picture) for picture in several]
    from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library
    from asvit_deploy.classes.network import of_fields

    artefact = OnnxArtefact(model, find_op_library(optional_path(library)))
    found = of_fields(model, artefact.fields, named, say)
    embeds = artefact.config.output == "embedding"
    if not embeds and (found is None or found.firm):  # of others it has said so already
        say(f"labels: {_origin(model, found, named, artefact.config.num_classes)}")
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
                one = _embedded(said, model, str(path), tokens)
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


def _embedded(prediction: base.Prediction, model: Path, name: str, tokens: int) -> Prediction:
    import numpy as np

    kept = tuple(tuple(stage[0].tolist()) for stage in prediction.kept or [])
    vector = prediction.output[0]
    if not np.isfinite(vector).all():
        raise UserError(
            f"{model} gives numbers that are not finite for {name}; export weights that did not "
            "diverge"
        )
    # As short as float32 reads back, and not as long as float64 writes it.
    numbers = tuple(float(str(value)) for value in vector)
    return Prediction(name, tokens, embedding=numbers, kept=kept)


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


def predicted(
    prediction: base.Prediction, name: str, tokens: int, labels: Sequence[str] | None
) -> Prediction:
    """What a network with classes, or one output, says of a batch of one picture."""
    import numpy as np

    kept = tuple(tuple(stage[0].tolist()) for stage in prediction.kept or [])
    logits = prediction.output[0].astype(np.float64)
    if len(logits) == 1:  # softmax would call it certain, whatever it is
        label = labels[0] if labels else None
        return Prediction(name, tokens, score=float(logits[0]), label=label, kept=kept)
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    labels = labels or [f"class {i}" for i in range(len(logits))]
    best = np.argsort(-probability)[:_BEST]
    top = tuple(Guess(int(i), labels[i], float(probability[i])) for i in best)
    return Prediction(name, tokens, top, kept=kept)
