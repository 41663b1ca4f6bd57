"""What scoring and compaction cost, from ONNX Runtime's profiler.

Differences of noisy totals cannot show a share of 1 %; the profiler's kernel times can. Which node
belongs where is read off the optimised graph itself, by the stage values' names.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from asvit_deploy import graph
from asvit_deploy.runners.onnx_runtime import OrtRunner, load_model

_KINDS = ("scoring", "compaction", "network")


def classify_nodes(model: onnx.ModelProto, stages: int) -> dict[str, str]:
    """Node name -> "scoring" or "compaction"; every other node is the network itself.

    Scoring is what the scores need and the tokens do not; compaction is what lies between the
    scores and the compacted tokens.
    """
    values = graph.values_of(graph.opened(model).graph)

    def found(stage: int, *names: str) -> list[ir.Value]:
        wanted = (values.get(f"{name}_{stage}") for name in names)
        return [value for value in wanted if value is not None]

    kinds: dict[str | None, str] = {}
    for s in range(stages):
        tokens, scores = found(s, "tokens"), found(s, "scores")
        scoring = graph.upstream(scores) - graph.upstream(tokens)
        compaction = graph.upstream(found(s, "compact", "length"), stop=[*tokens, *scores])
        kinds |= {node.name: "scoring" for node in scoring}
        kinds |= {node.name: "compaction" for node in compaction}
    return {name: kind for name, kind in kinds.items() if name}


def shares(
    source: Path | onnx.ModelProto,
    images: Sequence[NDArray[np.float32]],
    library: Path | None = None,
    warmup: int = 10,
) -> dict[str, Any]:
    """Shares of all kernel time on one thread, one image at a time.

    Returns:
        `scoring`, `compaction` and `both` as fractions and `kernel_ms`, each the median over the
        images, so that a run that the machine disturbed does not count; `op`, how the op ran.
    """
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "profile"
        runner = OrtRunner(load_model(source), library, threads=1, record=False, profile=prefix)
        for i in range(warmup + len(images)):
            runner.infer(images[i % len(images)][None])
        events = runner.end_profiling()
        optimised = onnx.load(f"{prefix}.optimized.onnx")
    medians = _medians(events, classify_nodes(optimised, runner.stages), warmup)
    return {**medians, "op": "library" if library else "function"}


def _medians(
    events: Sequence[dict[str, Any]], kinds: dict[str, str], warmup: int
) -> dict[str, float]:
    """Shares and kernel time of each run after the first `warmup`, then their medians."""
    runs = sorted(e["ts"] for e in events if e["cat"] == "Session" and e["name"] == "model_run")
    spent = np.zeros((len(runs), len(_KINDS)))  # microseconds
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            kind = kinds.get(event["name"].removesuffix("_kernel_time"), "network")
            run = np.searchsorted(runs, event["ts"], "right") - 1
            spent[run, _KINDS.index(kind)] += event["dur"]
    spent = spent[warmup:]
    whole = spent.sum(1)
    scoring, compaction, _ = spent.T / whole
    return {
        "scoring": float(np.median(scoring)),
        "compaction": float(np.median(compaction)),
        "both": float(np.median(scoring + compaction)),
        "kernel_ms": float(np.median(whole)) / 1e3,
    }
