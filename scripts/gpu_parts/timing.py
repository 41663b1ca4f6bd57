"""Times of several functions in turns, so that what drifts meets them all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]


def figures(milliseconds: list[float]) -> dict[str, float]:
    """Median and spread in milliseconds."""
    low, middle, high = np.percentile(milliseconds, (10, 50, 90))
    return {"p10": round(float(low), 5), "p50": round(float(middle), 5),
            "p90": round(float(high), 5), "n": len(milliseconds)}  # fmt: skip


def spin(device: str, seconds: float = 0.5) -> None:
    """Keep the GPU busy until its clocks are up."""
    if device == "cpu":
        return
    a = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()


def on_device(
    calls: Mapping[Any, Call], device: str, rounds: int, burst: int = 1
) -> dict[Any, dict[str, float]]:
    """Milliseconds of each call between two events, as the GPU works them off one after another.

    The queue is never empty, so that what the host takes to launch is not in them. On a CPU: wall
    time.

    Args:
        rounds: samples of each call; each round goes through all of them in another order.
        burst: calls between two events.
    """
    spin(device)
    order, times = list(calls), {name: [] for name in calls}  # type: ignore[var-annotated]
    shuffle = random.Random(0)
    for turn in range(-2 if rounds > 2 else 0, rounds):
        shuffle.shuffle(order)
        for name, value in _one_round(calls, order, device, burst).items():
            if turn >= 0:
                times[name].append(value / burst)
    return {name: figures(values) for name, values in times.items()}


def _one_round(
    calls: Mapping[Any, Call], order: list[Any], device: str, burst: int
) -> dict[Any, float]:
    if device == "cpu":
        found = {}
        for name in order:
            start = time.perf_counter()
            for _ in range(burst):
                calls[name]()
            found[name] = (time.perf_counter() - start) * 1e3
        return found
    events = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in order}
    torch.cuda._sleep(4_000_000)  # about two milliseconds, in which the first calls queue up
    for name in order:
        events[name][0].record()
        for _ in range(burst):
            calls[name]()
        events[name][1].record()
    torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) for name, (begin, end) in events.items()}


def on_wall(
    calls: Mapping[str, Callable[[Any], Any]], feeds: list[Any], rounds: int, warm: int = 10
) -> dict[str, dict[str, float]]:
    """Milliseconds until each call has its result on the host, in turns.

    Args:
        calls: each takes one of `feeds` and returns when its result is there.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0)
    for i in range(-warm, rounds):
        shuffle.shuffle(order)
        for name in order:
            start = time.perf_counter()
            calls[name](feeds[i % len(feeds)])
            if i >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: figures(values) for name, values in times.items()}
