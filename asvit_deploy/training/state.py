"""The state of an unfinished run: one file, whole at every moment."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asvit_deploy.bounded import UNREADABLE, open_regular
from asvit_deploy.checkpoints import bounds
from asvit_deploy.checkpoints.damage import Damaged, check_archive, digest
from asvit_deploy.checkpoints.reading import quoted
from asvit_deploy.checkpoints.refused import Refused
from asvit_deploy.errors import UserError
from asvit_deploy.files import write_bytes
from asvit_deploy.memory import memory
from asvit_deploy.training.state_form import misfit

if TYPE_CHECKING:
    from asvit_deploy.training.trainer import Trainer


# What a run was before there was a choice.
_BEFORE = {"method": "threshold", "per_picture": False, "cuts": None, "train": "all",
           "labels": "data"}  # fmt: skip


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
    step, saved = content.get("step"), content.get("recipe")
    if type(step) is not int or not isinstance(saved, Mapping):
        raise UserError(damaged)
    saved = {**_BEFORE, **saved}
    changed = [key for key in recipe if saved.get(key) != recipe[key]]
    if changed:
        differences = ", ".join(
            f"{key} {_said(saved.get(key))}, not {_said(recipe[key])}" for key in changed
        )
        raise UserError(
            f"{path} belongs to a run with {differences}; "
            "use the same options and data, or --force without --resume to start over"
        )
    if not 0 <= step <= trainer.recipe.steps:
        raise UserError(damaged)
    if odd := misfit(content, trainer):
        raise UserError(f"{path} does not fit this network ({odd}); delete it and start over")
    trainer.model.load_state_dict(content["model"])
    trainer.optimizer.load_state_dict(content["optimizer"])
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(content["scaler"])
    if trainer.average is not None:
        trainer.average.load_state_dict(content["average"])
    try:
        torch.set_rng_state(content["rng"])
    except RuntimeError as error:  # numbers that its generator never has
        raise UserError(damaged) from error
    return step


def _said(value: Any) -> str:
    """A value of a recipe; of a file's, which may be anything, a short word."""
    return value if isinstance(value, str) and len(value) <= 100 else quoted(value)


def _read(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, once it is whole.

    Raises:
        UserError: there is none, it cannot be read, or it is damaged.
    """
    if not path.is_file():
        what = "is no file" if os.path.lexists(path) else "does not exist"
        raise UserError(f"nothing to resume: {path} {what}; run without --resume")
    damaged = f"{path} is damaged; delete it and start over"
    try:
        bounds.check(path)
        with (
            open_regular(path, "state") as file,
            memory.within(2 * path.stat().st_size + bounds.SPARE),
        ):
            check_archive(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise Damaged("it holds no dict")
        own = content.pop("digest", None)  # states of earlier versions have none
        if own is not None and own != digest(content):
            raise Damaged("its digest differs")
    except UserError:
        raise
    except Damaged as error:
        raise UserError(damaged) from error
    except Refused as refused:
        raise UserError(f"{path} {refused}; delete it and start over") from refused
    except OSError as error:
        what = "the disk" if error.errno in UNREADABLE else "its permissions"
        raise UserError(f"{path} cannot be read: {error.strerror}; check {what}") from error
    except Exception as error:  # torch answers to bad bytes with nearly any exception
        raise UserError(damaged) from error
    return content
