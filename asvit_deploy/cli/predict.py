"""`asvit-deploy predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asvit_deploy.cli import options

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from asvit_deploy.models.registry import ArchConfig


@click.command()
@click.argument("model", type=options.PATH)
@click.argument("pictures", metavar="IMAGE...", nargs=-1, required=True, type=options.PATH)
@options.skip_limit
@options.library
@options.as_json
def command(
    model: Path,
    pictures: tuple[Path, ...],
    skip_limit: int,
    library: Path | None,
    as_json: bool,
) -> None:
    """Top-5 and kept tokens of each picture.

    \b
    asvit-deploy predict as_deit_s.onnx cat.jpg dog.jpg
    """
    from asvit_deploy.evaluate.session import Session, find_op_library

    session = Session(model, find_op_library(library))
    runner = session.runner(list(session.libraries().values())[-1])
    results: list[dict[str, Any]] = []
    for path, image in _loaded(pictures, session.config, skip_limit):
        if isinstance(image, str):
            results.append({"image": str(path), "skipped": image})
        else:
            results.append(_predict(runner, str(path), image, session.fields))
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    for result in results:
        if "skipped" in result:
            click.echo(f"{result['image']}: skipped ({result['skipped']})")
            continue
        click.echo(result["image"])
        for guess in result["top"]:
            click.echo(f"  {guess['probability']:7.2%}  {guess['label']}")
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
    from asvit_deploy.data.skips import Skips
    from asvit_deploy.errors import UserError
    from asvit_deploy.images import preprocess

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


def _predict(runner: Any, name: str, image: Any, fields: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    prediction = runner(image[None])
    logits = prediction.logits[0].astype(np.float64)
    probability = np.exp(logits - logits.max())
    probability /= probability.sum()
    labels = fields["classes"] or [f"class {i}" for i in range(len(logits))]
    return {
        "image": name,
        "top": [
            {"index": int(i), "label": labels[i], "probability": float(probability[i])}
            for i in np.argsort(-probability)[:5]
        ],
        "kept": [stage[0].tolist() for stage in prediction.kept or []],
    }
