"""What scoring and compaction cost, from ONNX Runtime's profiler.

Differences of noisy totals cannot show a share of 1 %; the profiler's kernel times can. Which node
belongs where is read off the optimised graph itself, by the stage values' names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from asvit_deploy.runners.onnx_runtime import OrtRunner, load_model


def _ancestors(graph: onnx.GraphProto, values: Iterable[str], stop: Iterable[str] = ()) -> set[str]:
    """Names of the nodes that `values` depend on, not looking past `stop`."""
    producer = {name: node for node in graph.node for name in node.output if name}
    seen, waiting, nodes = set(stop), list(values), set()
    while waiting:
        value = waiting.pop()
        if value in seen or value not in producer:
            continue
        seen.add(value)
        nodes.add(producer[value].name)
        waiting.extend(producer[value].input)
    return nodes


def classify_nodes(graph: onnx.GraphProto, stages: int) -> dict[str, str]:
    """Node name -> "scoring" or "compaction"; every other node is the network itself.

    Scoring is what the scores need and the tokens do not; compaction is what lies between the
    scores and the compacted tokens.
    """
    kinds: dict[str, str] = {}
    for s in range(stages):
        inputs, outputs = (f"tokens_{s}", f"scores_{s}"), (f"compact_{s}", f"length_{s}")
        network = _ancestors(graph, [inputs[0]])
        kinds |= dict.fromkeys(_ancestors(graph, [inputs[1]]) - network, "scoring")
        kinds |= dict.fromkeys(_ancestors(graph, outputs, stop=inputs), "compaction")
    return kinds


def shares(
    source: Path | onnx.ModelProto,
    images: Sequence[NDArray[np.float32]],
    library: Path | None = None,
    warmup: int = 10,
) -> dict[str, Any]:
    """Shares of all kernel time on one thread, one image at a time.

    Returns:
        `scoring`, `compaction` and `both` as fractions, `kernel_ms` per image.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "profile"
        runner = OrtRunner(load_model(source), library, threads=1, record=False, profile=prefix)
        for i in range(warmup + len(images)):
            runner.infer(images[i % len(images)][None])
        events = runner.end_profiling()
        optimised = onnx.load(f"{prefix}.optimized.onnx")
    kinds = classify_nodes(optimised.graph, runner.stages)
    runs = sorted(e["ts"] for e in events if e["cat"] == "Session" and e["name"] == "model_run")
    totals = {"scoring": 0.0, "compaction": 0.0, "network": 0.0}
    for event in events:
        if event["cat"] != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        if event["ts"] < runs[warmup]:
            continue
        node = event["name"].removesuffix("_kernel_time")
        totals[kinds.get(node, "network")] += event["dur"]
    whole = sum(totals.values())
    return {
        "scoring": totals["scoring"] / whole,
        "compaction": totals["compaction"] / whole,
        "both": (totals["scoring"] + totals["compaction"]) / whole,
        "kernel_ms": whole / 1e3 / len(images),
        "op": "library" if library else "function",
    }
