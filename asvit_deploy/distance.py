"""How far a network's outputs lie from those of its dense twin, picture by picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from asvit_deploy import similarity
from asvit_deploy.models.config import ArchConfig


def measure(config: ArchConfig) -> str:
    """What `distance` is of that network's output."""
    if config.output == "embedding":
        return "1 - cosine"
    return "|difference|" if config.num_classes == 1 else "KL"


def distance(config: ArchConfig, dense: Tensor, other: Tensor) -> NDArray[np.float64]:
    """Of each picture's output [P, C] from the dense network's, float64 [P]; 0 where equal.

    Raises:
        UserError: an embedding without a direction.
    """
    if config.output == "embedding":
        similarity.directions(dense.numpy(), f"{config.name}, dense,")
        similarity.directions(other.numpy(), config.name)
        return 1 - similarity.cosines(dense.numpy(), other.numpy())
    if config.num_classes == 1:
        return (other.double() - dense.double()).abs()[:, 0].numpy()
    log_p, log_q = dense.double().log_softmax(1), other.double().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).numpy()
