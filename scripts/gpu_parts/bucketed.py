"""The bucketed network in PyTorch with CUDA graphs, beside dense and static top-k."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_parts import networks
from gpu_parts.kit import Kit, Report, target, torch_for
from gpu_parts.timing import on_wall, spin

OVER_TOP_K = 1.05
_RUNS = ((0, 1, 16, 100), (1, 1, 16, 60), (0, 8, 16, 60), (0, 64, 16, 30), (1, 8, 64, 30),
         (1, 64, 64, 15))  # fmt: skip


def bucketed(kit: Kit) -> Report:
    """Half precision, wall time from pictures on the device to logits on the host."""
    torch_for(kit)
    loaded = [networks.load(kit, name) for name in networks.names(kit)]
    result: Report = {"unit": "ms until the logits are on the host", "rows": []}
    for which, batch, step, rounds in _RUNS:
        if which < len(loaded) and not (kit.rehearse and batch > 8):
            rounds = 3 if kit.rehearse else rounds
            row = measure(kit, loaded[which], kit.batch(batch), step, rounds)
            result["rows"].append(row)
            if len(result["rows"]) == 1:
                ratio = row["bucketed_over_top_k"]
                result["bucketed_over_top_k"] = target(ratio, OVER_TOP_K, at_most=True)
            kit.save(result)
    return result


def measure(kit: Kit, network: networks.Network, batch: int, step: int, rounds: int) -> Report:
    """One row."""
    import torch

    from asvit_deploy.models.macs import dense_macs, model_macs
    from asvit_deploy.runners.bucketed import BucketedRunner
    from asvit_deploy.runners.torch_stages import StaticModel, TorchStages

    lengths, config = network.mean_kept, network.config
    buckets = (*range(step, network.rows, step), network.rows)
    dtype = getattr(torch, kit.half)
    given: dict[str, Any] = {"batch": batch, "dtype": dtype, "device": kit.device}
    runner = BucketedRunner(TorchStages(network.model, buckets, **given), len(config.stages),
                            buckets)  # fmt: skip
    executed: list[list[int]] = []

    def run_buckets(images: Any) -> Any:
        logits = runner.infer(images)
        executed.append([shape[1] for shape in runner.executed])
        return logits

    calls = {
        "dense": StaticModel(network.model, None, **given).infer,
        "top_k": StaticModel(network.model, lengths, **given).infer,
        "bucketed": run_buckets,
    }
    feeds = [network.batch(batch, first).to(kit.device) for first in range(len(network.pictures))]
    spin(kit.device)
    times = on_wall(calls, feeds, rounds, warm=1 if kit.rehearse else 10)
    p50 = {name: value["p50"] for name, value in times.items()}
    return {
        "network": network.name, "pixels": config.image_size, "batch": batch,
        "precision": kit.half, "buckets": list(buckets), "rows_kept": lengths,
        "macs_ratio": dense_macs(config) / model_macs(config, lengths),
        "mean_buckets": np.mean(executed, 0).round(1).tolist(), "ms": times,
        "bucketed_over_top_k": p50["bucketed"] / p50["top_k"],
        "speedup_over_dense": {name: p50["dense"] / p50[name] for name in ("top_k", "bucketed")},
        "fastest": min(p50, key=lambda name: p50[name]),
    }  # fmt: skip
