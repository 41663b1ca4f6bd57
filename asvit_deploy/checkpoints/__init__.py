"""Checkpoints that the package carries."""

from __future__ import annotations

from pathlib import Path

from asvit_deploy.errors import UserError


def default_checkpoint() -> Path:
    """The small AS-ViT trained on digits (see `scripts/train_default`).

    Raises:
        UserError: the installation lacks it.
    """
    path = Path(__file__).with_name("as_vit_digits.safetensors")
    if not path.is_file():
        raise UserError(f"{path} is missing from this installation; reinstall asvit-deploy")
    return path
