"""The state of an unfinished run: one file, whole at every moment."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asvit_deploy.checkpoints import bounds
from asvit_deploy.checkpoints.damage import Damaged, check_archive, digest
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError
from asvit_deploy.files import write_bytes
from asvit_deploy.memory import memory

if TYPE_CHECKING:
    from asvit_deploy.training.trainer import Trainer


def state_path(output: Path) -> Path:
    """Where the unfinished run of `output` keeps its state."""
    return output.with_name(output.name + ".unfinished.pt")


def save_state(path: Path, step: int, trainer: Trainer, recipe: dict[str, Any]) -> None:
    """Replace the state by that after `step` steps.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    content: dict[str, Any] = {
        "step": step,
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "average": trainer.average.state_dict() if trainer.average is not None else {},
        "rng": torch.get_rng_state(),
        "recipe": recipe,
    }
    content["digest"] = digest(content)
    # By way of memory: where the disk is full, torch's own writer hides what the system said.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getbuffer())


def load_state(path: Path, trainer: Trainer, recipe: dict[str, Any]) -> int:
    """Put a state back and return its step.

    Raises:
        UserError: there is none, it is damaged, or it belongs to a run with another recipe.
    """
    content = _read(path)
    damaged = f"{path} is damaged; delete it and start over"
    try:
        step, saved = int(content["step"]), dict(content["recipe"])
    except Exception as error:  # it may hold anything
        raise UserError(damaged) from error
    changed = [key for key in recipe if saved.get(key) != recipe[key]]
    if changed:
        differences = ", ".join(f"{key} {saved.get(key)}, not {recipe[key]}" for key in changed)
        raise UserError(
            f"{path} belongs to a run with {differences}; "
            "use the same options and data, or --force without --resume to start over"
        )
    if not 0 <= step <= trainer.recipe.steps:
        raise UserError(damaged)
    try:
        trainer.model.load_state_dict(content["model"])
        trainer.optimizer.load_state_dict(content["optimizer"])
        if trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(content["scaler"])
        if trainer.average is not None:
            trainer.average.load_state_dict(content["average"])
        torch.set_rng_state(content["rng"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this network; delete it and start over") from error
    return step


def _read(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, once it is whole.

    Raises:
        UserError: there is none, it cannot be read, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"nothing to resume: {path} does not exist; run without --resume")
    damaged = f"{path} is damaged; delete it and start over"
    try:
        bounds.check(path)
        with open(path, "rb") as file, memory.within(2 * path.stat().st_size + bounds.SPARE):
            check_archive(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
        own = content.pop("digest", None)  # states of earlier versions have none
        if own is not None and own != digest(content):
            raise Damaged("its digest differs")
    except UserError:
        raise
    except Damaged as error:
        raise UserError(damaged) from error
    except Refused as refused:
        raise UserError(f"{path} {refused}; delete it and start over") from refused
    except PermissionError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; check its permissions"
        ) from error
    except Exception as error:  # torch answers to bad bytes with nearly any exception
        raise UserError(damaged) from error
    return content
