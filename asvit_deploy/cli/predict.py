"""`asvit-deploy predict`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from asvit_deploy.cli import options


@click.command()
@click.argument("model", type=options.PATH)
@click.argument("pictures", metavar="IMAGE...", nargs=-1, required=True, type=options.PATH)
@options.library
@options.as_json
def command(model: Path, pictures: tuple[Path, ...], library: Path | None, as_json: bool) -> None:
    """Top-5 and kept tokens of each picture.

    \b
    asvit-deploy predict as_deit_s.onnx cat.jpg dog.jpg
    """
    from asvit_deploy.evaluate.session import Session, find_op_library
    from asvit_deploy.images import load_picture, preprocess

    session = Session(model, find_op_library(library))
    runner = session.runner(list(session.libraries().values())[-1])
    loaded = [(str(path), preprocess(load_picture(path), session.config)) for path in pictures]
    results = [_predict(runner, name, image, session.fields) for name, image in loaded]
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    for result in results:
        click.echo(result["image"])
        for guess in result["top"]:
            click.echo(f"  {guess['probability']:7.2%}  {guess['label']}")
        if result["kept"]:
            kept = ", ".join(str(len(stage)) for stage in result["kept"])
            tokens = session.fields["image_tokens"]
            click.echo(f"  kept tokens per stage: {kept} of {tokens}")


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
