"""What scoring and compaction cost, from ONNX Runtime's profiler.

Differences of noisy totals cannot show a share of 1 %; the profiler's kernel times can. Which node
belongs where is read off the optimised graph itself, by the stage values' names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from asvit_deploy import graph
from asvit_deploy.files import scratch
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


def stages_of_nodes(model: onnx.ModelProto, stages: int) -> dict[str, int]:
    """Node name -> how many cuts lie in front of it, with what the tokens of those cuts need.

    Scoring and compaction are in the stage that they end. Of a node that no cut needs it is
    `stages`: what follows the last one.
    """
    opened = graph.opened(model).graph
    values = graph.values_of(opened)
    found = {node.name: stages for node in opened if node.name}
    for s in reversed(range(stages)):
        ends = [values[name] for name in (f"compact_{s}", f"length_{s}") if name in values]
        found |= {node.name: s for node in graph.upstream(ends) if node.name}
    return found


def shares(
    source: Path | onnx.ModelProto,
    images: Sequence[NDArray[np.float32]],
    library: Path | None = None,
    warmup: int = 10,
) -> dict[str, Any]:
    """Shares of all kernel time on one thread, one image at a time.

    Returns:
        `scoring`, `compaction` and `both` as fractions and `kernel_ms`, each the median over the
        images, so that a run that the machine disturbed does not count; `op`, how the op ran;
        `stages_ms`, kernel time up to the first cut, between two cuts, and behind the last one.
    """
    with scratch("profile") as folder:
        prefix = folder / "profile"
        runner = OrtRunner(load_model(source), library, threads=1, record=False, profile=prefix)
        for i in range(warmup + len(images)):
            runner.infer(images[i % len(images)][None])
        events = runner.end_profiling()
        optimised = onnx.load(f"{prefix}.optimized.onnx")
    spent = _spent(events, classify_nodes(optimised, runner.stages), _KINDS, "network", warmup)
    parts = range(runner.stages + 1)
    staged = _spent(
        events, stages_of_nodes(optimised, runner.stages), parts, runner.stages, warmup
    )  # fmt: skip
    return {
        **_medians(spent), "stages_ms": (np.median(staged, axis=0) / 1e3).tolist(),
        "op": "library" if library else "function",
    }  # fmt: skip


def _spent(
    events: Sequence[dict[str, Any]], parts: Mapping[str, Any], columns: Sequence[Any], rest: Any,
    warmup: int,
) -> NDArray[np.float64]:  # fmt: skip
    """Microseconds of each run after the first `warmup` by part: [runs, parts].

    Args:
        parts: a node's part, by its name; that of others is `rest`.
        columns: the parts in order.
    """
    runs = sorted(e["ts"] for e in events if e["cat"] == "Session" and e["name"] == "model_run")
    place = {part: column for column, part in enumerate(columns)}
    spent = np.zeros((len(runs), len(columns)))
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            part = parts.get(event["name"].removesuffix("_kernel_time"), rest)
            run = np.searchsorted(runs, event["ts"], "right") - 1
            spent[run, place[part]] += event["dur"]
    return spent[warmup:]


def _medians(spent: NDArray[np.float64]) -> dict[str, float]:
    """Medians of shares and kernel time over runs: microseconds [runs, kinds]."""
    whole = spent.sum(1)
    scoring, compaction, _ = spent.T / whole
    return {
        "scoring": float(np.median(scoring)),
        "compaction": float(np.median(compaction)),
        "both": float(np.median(scoring + compaction)),
        "kernel_ms": float(np.median(whole)) / 1e3,
    }
