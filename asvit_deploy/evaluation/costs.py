"""What the tokens that a network kept cost, image by image and over all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from asvit_deploy.models.config import ArchConfig
from asvit_deploy.models.macs import Cuts, dense_macs, model_macs, teacher_macs
from asvit_deploy.runners.base import Prediction


def kept_of(prediction: Prediction, config: ArchConfig) -> NDArray[np.int64]:
    """Image tokens left after each stage: int64 [B, stages], no columns when dense."""
    lengths = np.array(prediction.lengths, np.int64)
    return lengths.reshape(-1, len(prediction.output)).T - config.prefix


def macs_of(kept: NDArray[np.int64], config: ArchConfig, cuts: Cuts = None) -> NDArray[np.float64]:
    """float64 [P], of image tokens left after each stage [P, stages].

    Args:
        cuts: as `model_macs`.
    """
    if not kept.shape[1]:
        return np.full(len(kept), float(dense_macs(config)))
    lengths = list((kept + config.prefix).astype(np.float64).T)
    return np.asarray(model_macs(config, lengths, cuts), np.float64)


def histogram_kept(kept: NDArray[np.int64], config: ArchConfig) -> list[list[int]]:
    """Per stage, at k the images that kept k image tokens, of [P, stages] (Figure 5)."""
    return [np.bincount(k, minlength=config.image_tokens + 1).tolist() for k in kept.T]


def summarise_costs(
    kept: NDArray[np.int64], macs: NDArray[np.float64], config: ArchConfig
) -> dict[str, Any]:
    """Figures for JSON.

    Returns:
        `gmacs`, and `macs_share` of the teacher, which is what a budget means; per stage
        `mean_kept`, `quantiles_kept` (0, 5, 50, 95, 100 %) and `histogram_kept`; `image_tokens`.
    """
    tokens, mean = config.image_tokens, float(macs.mean())
    return {
        "gmacs": mean / 1e9,
        "macs_share": mean / teacher_macs(config),
        "mean_kept": kept.mean(0).tolist(),
        "quantiles_kept": np.quantile(kept, [0, 0.05, 0.5, 0.95, 1], axis=0).T.tolist(),
        "histogram_kept": histogram_kept(kept, config),
        "image_tokens": tokens,
    }
