"""From an artefact back to the checkpoint it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asvit_deploy.errors import UserError
from asvit_deploy.files import sha256
from asvit_deploy.models.checkpoint import build_model, load_checkpoint
from asvit_deploy.models.registry import ArchConfig, arch
from asvit_deploy.models.vit import AdaptiveViT


def config_of(fields: dict[str, Any]) -> ArchConfig:
    """The architecture that a sidecar describes."""
    return arch(fields["arch"]).at(fields["image_size"], fields["num_classes"])


def source_checkpoint(artifact: Path, fields: dict[str, Any]) -> Path:
    """Where the artefact's checkpoint is: at its recorded path, or by name beside the artefact.

    Raises:
        UserError: it is gone, or has other contents now.
    """
    recorded = Path(fields["source"]["path"])
    there = [path for path in (recorded, artifact.parent / recorded.name) if path.is_file()]
    for path in there:
        if sha256(path) == fields["source"]["sha256"]:
            return path
    if there:
        raise UserError(
            f"{there[0]} changed since {artifact} was exported from it; export it again"
        )
    raise UserError(f"the checkpoint of {artifact}, {recorded}, is gone; put it back or re-export")


def reference_model(artifact: Path, fields: dict[str, Any], dense: bool = False) -> AdaptiveViT:
    """The PyTorch model that an artefact must agree with; `dense` gives its dense twin.

    Raises:
        UserError: as `source_checkpoint` and `load_checkpoint`.
    """
    path = source_checkpoint(artifact, fields)
    checkpoint = load_checkpoint(
        path, fields["image_size"], fields["arch"], ema=fields["source"].get("ema", False)
    )
    return build_model(checkpoint, dense=dense)
