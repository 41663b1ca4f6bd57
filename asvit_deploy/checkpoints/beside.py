"""When what a method learned need not hold its network: where that lies beside it, unchanged."""

from __future__ import annotations

from pathlib import Path

import torch

from asvit_deploy.checkpoints.learned import BACKBONE, backbone_of
from asvit_deploy.checkpoints.load import Checkpoint, load_checkpoint
from asvit_deploy.checkpoints.network import LEARNED
from asvit_deploy.checkpoints.shards import is_index
from asvit_deploy.models.vit import ViT
from asvit_deploy.reduction.ltmp import LTMP


def backbone_beside(target: Path, model: ViT, checkpoint: Checkpoint) -> Path | None:
    """The network beside which the output need hold what ltmp learned alone; None where the output
    is to hold all: of other methods, in another folder, in place of the network, or of a network
    that its file alone, read without options, would not give again.

    Args:
        model: what is to be written.
        checkpoint: what it was made from, its weights unchanged.
    """
    if not isinstance(model.reduction, LTMP) or not checkpoint.path.is_file():
        return None
    place = checkpoint.path
    if checkpoint.adaptive:
        if BACKBONE not in checkpoint.metadata:
            return None
        place = backbone_of(place, checkpoint.metadata)
    if place.absolute().parent.resolve() != target.absolute().parent.resolve() or is_index(place):
        return None
    if target.exists() and target.samefile(place):
        return None
    return place if _again(load_checkpoint(place), model, checkpoint) else None


def _again(plain: Checkpoint, model: ViT, checkpoint: Checkpoint) -> bool:
    """Whether a plain load gives the network that was made something of."""
    own = {key: value for key, value in checkpoint.state.items() if not LEARNED.match(key)}
    return (
        plain.config.released() == model.config.released()
        and plain.state.keys() == own.keys()
        and all(torch.equal(plain.state[key], value) for key, value in own.items())
    )


def beside_line(target: Path, backbone: Path) -> str:
    """What to say of such an output."""
    return f"{target}: thresholds alone; it stays beside its network, {backbone.name}"
