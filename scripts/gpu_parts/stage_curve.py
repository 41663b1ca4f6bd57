"""What a stage costs in every bucket: replay times of each captured graph."""

from __future__ import annotations

import gc
from typing import Any

from gpu_parts import networks
from gpu_parts.kit import Kit, Report, torch_for
from gpu_parts.timing import on_device

# Pixels are those of the network; (network, batch, type, a step between buckets).
_RUNS = (
    (0, 1, "half", 16), (1, 1, "half", 16), (0, 8, "half", 16), (0, 1, "float32", 16),
    (1, 8, "half", 64),
)  # fmt: skip


def stage_curve(kit: Kit) -> Report:
    """Every stage in every bucket, and beside them the dense and the static top-k network whole."""
    torch_for(kit)
    loaded = [networks.load(kit, name) for name in networks.names(kit)]
    result: Report = {"unit": "ms of one replay, GPU time between events", "runs": []}
    for which, batch, dtype, step in _RUNS:
        if which < len(loaded):
            precision = kit.half if dtype == "half" else dtype
            step = 64 if kit.rehearse else step
            run = _curve(kit, loaded[which], kit.batch(batch), precision, step)
            result["runs"].append(run)
            kit.save(result)
            gc.collect()
    return result


def _curve(kit: Kit, network: networks.Network, batch: int, dtype: str, step: int) -> Report:
    import torch

    from asvit_deploy.runners.torch_stages import StaticModel, TorchStages

    buckets = (*range(step, network.rows, step), network.rows)
    given: dict[str, Any] = {"batch": batch, "dtype": getattr(torch, dtype), "device": kit.device}
    stages = TorchStages(network.model, buckets, **given)
    calls: dict[Any, Any] = {(0, network.rows): stages.first}
    calls |= stages.later
    for name, lengths in (("dense", None), ("top_k", network.mean_kept)):
        calls[name] = StaticModel(network.model, lengths, **given).whole
    with torch.no_grad():
        stages.images.copy_(network.batch(batch))
        stages.length.fill_(2)  # every bucket holds it; the time does not depend on it
        times = on_device(calls, kit.device, rounds=2 if kit.rehearse else 40, burst=1)
    smallest = [min(b for b in buckets if b >= kept) for kept in network.mean_kept]
    path = [(0, network.rows), *((s + 1, b) for s, b in enumerate(smallest))]
    return {
        "network": network.name, "pixels": network.config.image_size, "batch": batch,
        "precision": dtype, "buckets": list(buckets),
        "stages": [{"stage": key[0], "bucket": key[1], **value} for key, value in times.items()
                   if isinstance(key, tuple)],
        "dense": times["dense"], "top_k": times["top_k"], "top_k_rows": network.mean_kept,
        "stages_at_the_mean": {"buckets": smallest,
                               "p50": round(sum(times[key]["p50"] for key in path), 5)},
    }  # fmt: skip
