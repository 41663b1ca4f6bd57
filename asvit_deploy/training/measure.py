"""What the default checkpoint is held to: figures on held-out placements, with intervals.

Everything runs in the inference form, in float32, batched exactly (a batch mate changes nothing).
Intervals are 95 % bootstrap intervals over placements, paired where two networks are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from asvit_deploy.budget import trace_macs
from asvit_deploy.data.batches import normalise
from asvit_deploy.data.digits import ClutteredDigits
from asvit_deploy.models.vit import ViT
from asvit_deploy.training.selection import forward_selected, random_k

_BATCH = 50
_RESAMPLES = 2000
_RANK_RESAMPLES = 500  # every one of them sorts


@dataclass(frozen=True)
class Record:
    """One row per placement: right or wrong by network (bool [P]), MACs / teacher float64 [P],
    image tokens kept int64 [P, stages], scale and clutter float32 [P]."""

    right: dict[str, NDArray[np.bool_]]
    macs: NDArray[np.float64]
    kept: NDArray[np.int64]
    scale: NDArray[np.float32]
    clutter: NDArray[np.float32]


@torch.inference_mode()
def record(
    model: ViT,
    twin: ViT,
    dense: ViT | None,
    count: int,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Record:
    """Run the networks over the first `count` test placements of a seed.

    Args:
        twin: the model's own weights without thresholds.
        dense: the dense network that it was trained from, if at hand.
    """
    stream, rules = ClutteredDigits("test", seed), model.config.preprocessing
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple[Any, ...]] = []
    names = ["adaptive", "random", "twin", *(["dense"] if dense else [])]
    for start in progress(range(0, count, _BATCH)):
        placed = stream.batch(np.arange(start, min(start + _BATCH, count)))
        images, labels = normalise(placed.images, rules), torch.from_numpy(placed.labels)
        logits, trace = model(images)
        rule = random_k([length - model.config.prefix for length in trace.length], generator)
        all_logits = [logits, forward_selected(model, images, rule)]
        all_logits += [network(images)[0] for network in (twin, dense) if network is not None]
        hits = torch.stack([one.argmax(1) == labels for one in all_logits], 1)
        kept = torch.stack(trace.length, 1) - model.config.prefix
        macs = trace_macs(model.config.released(), trace)  # as the budget that trained it
        rows.append((hits.numpy(), macs.numpy(), kept.numpy(), placed.scale, placed.clutter))
    right, *rest = (np.concatenate(column) for column in zip(*rows))
    return Record(dict(zip(names, right.T)), *rest)


def _interval(draws: NDArray, value: float) -> dict[str, Any]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return {
        "value": round(float(value), 5),
        "interval": [round(float(low), 5), round(float(high), 5)],
    }


def mean_interval(values: NDArray, seed: int = 0) -> dict[str, Any]:
    """Mean with its bootstrap interval; paired differences come in as differences."""
    rng, n = np.random.default_rng(seed), len(values)
    values = values.astype(np.float64)
    draws = np.array([values[rng.integers(0, n, n)].mean() for _ in range(_RESAMPLES)])
    return _interval(draws, values.mean())


def spearman_interval(a: NDArray, b: NDArray, seed: int = 0) -> dict[str, Any]:
    """Spearman's rank correlation with its bootstrap interval."""
    from scipy.stats import spearmanr

    rng, n = np.random.default_rng(seed), len(a)
    picks = (rng.integers(0, n, n) for _ in range(_RANK_RESAMPLES))
    draws = np.array([spearmanr(a[pick], b[pick]).statistic for pick in picks])
    return _interval(draws, spearmanr(a, b).statistic)


def summarise(record: Record, budget: float) -> dict[str, Any]:
    """The figures and, for each floor, whether it is met.

    Floors: dense top-1 >= 90 %; adaptive within 1 point of it; mean MACs within 2 % of the budget;
    random at least 2 points worse; |rho| >= 0.3 between kept tokens and scale or clutter.
    """
    right, kept = record.right, record.kept.mean(1)
    reference = "dense" if "dense" in right else "twin"
    top1 = {name: mean_interval(values) for name, values in right.items()}
    adaptive = right["adaptive"].astype(np.int64)
    loss = mean_interval(right[reference].astype(np.int64) - adaptive)
    gain = mean_interval(adaptive - right["random"])
    macs = mean_interval(record.macs)
    rho = {
        "scale": spearman_interval(record.scale, kept),
        "clutter": spearman_interval(record.clutter, kept),
    }
    quantiles = np.quantile(record.kept, [0, 0.05, 0.5, 0.95, 1], axis=0).T
    return {
        "placements": len(record.macs),
        "budget": budget,
        "reference": reference,
        "top1": top1,
        "reference_minus_adaptive": loss,
        "adaptive_minus_random": gain,
        "macs_over_teacher": macs,
        "spearman_with_kept_tokens": rho,
        "kept_tokens_per_stage": {
            "mean": record.kept.mean(0).round(2).tolist(),
            "min_p5_p50_p95_max": quantiles.round(1).tolist(),
        },
        "floors": {
            "dense_top1_at_least_0.90": top1[reference]["value"] >= 0.90,
            "adaptive_within_0.01_of_dense": loss["value"] <= 0.01,
            "macs_within_0.02_of_budget": abs(macs["value"] / budget - 1) <= 0.02,
            "random_at_least_0.02_worse": gain["value"] >= 0.02,
            "spearman_at_least_0.3": max(abs(r["value"]) for r in rho.values()) >= 0.3,
        },
    }
