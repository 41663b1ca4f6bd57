"""`asvit_deploy.save`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from asvit_deploy.api.inputs import PathLike, path_of
from asvit_deploy.errors import UserError
from asvit_deploy.status import Say, silent

if TYPE_CHECKING:
    from torch import nn

    from asvit_deploy.models.vit import ViT

# What the network itself says anew, and what is true of an adaptive one alone.
_OWN = ("format", "schema", "arch", "image_size", "num_classes", "stages", "reduction",
        "architecture", "preprocessing", "heads", "eps", "backbone")  # fmt: skip
_ADAPTIVE = ("budget", "budget_by", "calibration")


def save(
    model: nn.Module, output: PathLike, *, force: bool = False, say: Say = silent
) -> Path:  # fmt: skip
    """Write a network as a checkpoint that every command takes, whole or not at all.

    Its class names, its preprocessing and where each fact came from are kept in it.

    Args:
        model: what `load` gave, trained further or not; or a module that `load` takes, of which
            it is asked first.
        output: the `.safetensors`; its sidecar goes beside it.
        force: replace a file that is there.
        say: gets what `load` says.

    Returns:
        The file.

    Raises:
        UserError: `model` is no such module, holds values that are not finite, or `output` cannot
            be written or is there without `force`.
    """
    import json

    from torch import nn

    from asvit_deploy import sidecar
    from asvit_deploy.api.load import load
    from asvit_deploy.checkpoints.load import save_checkpoint
    from asvit_deploy.models.vit import ViT

    target = path_of(output)
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(model).__name__} cannot be saved; pass a network that load gave")
    with sidecar.claimed(target, "checkpoint", force):
        network = model if isinstance(model, ViT) else load(model, say=say)
        _check_outputs(network)
        dropped = _OWN if network.adaptive else (*_OWN, *_ADAPTIVE)
        kept = {key: value for key, value in network.metadata.items() if key not in dropped}
        if len(json.loads(kept.get("classes", "[]"))) != network.config.num_classes:
            kept.pop("classes", None)
            kept.pop("classes_from", None)
        save_checkpoint(target, network, kept)
    return target


def _check_outputs(network: ViT) -> None:
    """Raises UserError where a head was replaced by hand: `load` would refuse what it says."""
    head, said = getattr(network, "head", None), network.config.num_classes
    if head is not None and (holds := head.weight.shape[0]) != said:
        raise UserError(
            f"the network's head gives {holds} outputs and its config says {said}; set "
            "network.config = network.config.at(num_classes=...) to that of the head"
        )
