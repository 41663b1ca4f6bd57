"""`asvit-deploy predict`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.cli import options

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asvit_deploy.classes.network import ClassNames
    from asvit_deploy.models.config import ArchConfig


@click.command()
@click.argument("model", type=options.PATH)
@click.argument("pictures", metavar="IMAGE...", nargs=-1, required=True, type=options.PATH)
@options.skip_limit
@options.classes
@options.library
@options.as_json
def command(
    model: Path,
    pictures: tuple[Path, ...],
    skip_limit: int,
    classes: Path | None,
    library: Path | None,
    as_json: bool,
) -> None:
    """Top-5, or the score of a network with one output, and kept tokens of each picture.

    \b
    asvit-deploy predict as_deit_s.onnx cat.jpg dog.jpg
    """
    from asvit_deploy.artefacts.onnx_file import Session, find_op_library
    from asvit_deploy.classes.network import of_fields

    session = Session(model, find_op_library(library))
    found = of_fields(model, session.fields, classes, options.status)
    if found is None or found.firm:  # of others it has told already
        options.status(f"labels: {_told(model, found, classes, session.config.num_classes)}")
    runner = session.runner(list(session.libraries().values())[-1])
    labels = found.names if found else None
    results: list[dict[str, Any]] = []
    for path, image in _loaded(pictures, session.config, skip_limit):
        if isinstance(image, str):
            results.append({"image": str(path), "skipped": image})
        else:
            results.append(_predict(runner, str(path), image, labels))
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    for result in results:
        if "skipped" in result:
            click.echo(_printable(f"{result['image']}: skipped ({result['skipped']})"))
            continue
        click.echo(_printable(result["image"]))
        for guess in result["top"]:
            click.echo(_printable(f"  {guess['probability']:7.2%}  {guess['label']}"))
        if "score" in result:
            of = f"  {result['label']}" if result["label"] else ""
            click.echo(_printable(f"  score {result['score']:.6g}{of}"))
        if result["kept"]:
            kept = ", ".join(str(len(stage)) for stage in result["kept"])
            tokens = session.fields["image_tokens"]
            click.echo(f"  kept tokens per stage: {kept} of {tokens}")


def _loaded(
    paths: tuple[Path, ...], config: ArchConfig, skip_limit: int
) -> list[tuple[Path, NDArray | str]]:
    """Every picture as input, or why it was skipped; all are read before the first is looked at.

    Raises:
        UserError: more cannot be read than may be skipped, or none can.
    """
    from asvit_deploy.data.decode import PictureError, load_picture
    from asvit_deploy.data.images import preprocess
    from asvit_deploy.data.skips import Skips
    from asvit_deploy.errors import UserError

    skips = Skips(skip_limit, options.status)
    loaded: list[tuple[Path, NDArray | str]] = []
    for path in paths:
        try:
            loaded.append((path, preprocess(load_picture(path), config)))
        except PictureError as error:
            skips.add(str(path), error)
            loaded.append((path, error.reason))
    if all(isinstance(image, str) for _, image in loaded):
        raise UserError(f"none of the {len(paths)} pictures can be read ({skips.told()})")
    return loaded


def _told(model: Path, found: ClassNames | None, given: Path | None, count: int) -> str:
    """Where the labels come from."""
    if found is None and count == 1:
        return f"{model} has one output, a score"
    if found is None:
        return f"numbers of the outputs, {model} has no class names; --classes FILE gives them"
    return found.origin if given else f"those of {model} ({found.origin})"


def _printable(text: str) -> str:
    """In the terminal's own characters, and none that steers it: names come from anywhere."""
    plain = "".join(c if c >= " " and not "\x7f" <= c < "\xa0" else repr(c)[1:-1] for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def _predict(runner: Any, name: str, image: Any, labels: Sequence[str] | None) -> dict[str, Any]:
    """One picture for JSON: `top`, or `score` and `label` where there is one output; `kept`."""
    import numpy as np

    prediction = runner(image[None])
    kept = [stage[0].tolist() for stage in prediction.kept or []]
    logits = prediction.logits[0].astype(np.float64)
    if len(logits) == 1:  # softmax would call it certain, whatever it is
        label = labels[0] if labels else None
        return {"image": name, "top": [], "score": float(logits[0]), "label": label, "kept": kept}
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    labels = labels or [f"class {i}" for i in range(len(logits))]
    return {
        "image": name,
        "top": [
            {"index": int(i), "label": labels[i], "probability": float(probability[i])}
            for i in np.argsort(-probability)[:5]
        ],
        "kept": kept,
    }
