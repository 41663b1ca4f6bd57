"""Small reports of every kind, as the commands write them, and pages of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from asvit_deploy import sidecar
from asvit_deploy.drawing import figure
from asvit_deploy.page.reading import of_dicts, read_files
from asvit_deploy.page.rendering import page_of
from asvit_deploy.page.writing import MOST_BYTES

TOKENS = 16
MACHINE = {"cpu": "AMD EPYC", "cores": 2, "system": "Linux x86_64", "python": "3.11.7",
           "versions": {"asvit-deploy": "0.1.0", "onnxruntime": "1.32.0"}}  # fmt: skip


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def _row(name: str, ms: float, adaptive: bool, **more: Any) -> dict[str, Any]:
    return {"name": name, "runtime": name.split(",")[0], "adaptive": adaptive,
            "precision": "float32", "p50_ms": ms, "p90_ms": 1.05 * ms, "p99_ms": 1.2 * ms,
            **more}  # fmt: skip


def _sweep() -> dict[str, Any]:
    def point(at: float, gain: dict[str, float]) -> dict[str, Any]:
        rows = [{"name": kind, "runtime": "onnxruntime", "kind": kind, "singly": False,
                 "p50_ms": ms} for kind, ms in (("dense", 9.0), ("adaptive", 6.0))]  # fmt: skip
        rows[1]["speedup"] = gain
        return {"at": at, "rows": rows, "notes": [], "busy": None, "macs": {"share": 0.65}}

    return {"over": "batch", "notes": ["int8 takes no batch"],
            "points": [point(1, interval(1.5, 1.4, 1.6)), point(8, interval(1.1, 0.9, 1.2))],
            "verdict": ["onnxruntime: adaptive wins at batch 1, the smallest tried"]}  # fmt: skip


def bench() -> dict[str, Any]:
    """Of `bench`: 1.48 times as fast, the same top-1 on 63 of 64 pictures."""
    line = {"ms_per_token": 0.1, "ms_at_none": 1.0, "r2": 0.9, "pictures": 3,
            "points": [[10, 2.0], [12, 2.2], [14, 2.4]]}  # fmt: skip
    return {
        "kind": "model", "model": "models/as_deit_s.onnx", "sha256": "ab" * 32,
        "arch": "as_deit_small", "threads": 1, "warmup": 20, "runs": 150,
        "images": "64 pictures in photos", "image_count": 64, "skipped": 0,
        "macs": {"dense_gmacs": 4.6, "adaptive_gmacs": 3.0, "ratio": 1.53,
                 "mean_kept": [12.5, 6.0], "image_tokens": TOKENS},
        "rows": [
            _row("onnxruntime, dense", 95.4, False),
            _row("onnxruntime, adaptive (library)", 64.5, True, way="library",
                 speedup=interval(1.48, 1.44, 1.5), over_kept=line,
                 share_of_macs_ratio=interval(0.96, 0.95, 0.97)),
            _row("onnxruntime, topk", 65.0, True, speedup=interval(1.46, 1.4, 1.5)),
        ],
        "agreement": {"top1": 63 / 64, "top5": 0.97, "kl": 0.001},
        "methods": {"topk": {"macs_share": 0.65, "agreement": {"top1": 0.875, "top5": 0.8,
                                                               "kl": 0.01}}},
        "profile": [{"op": "library", "scoring": 0.01, "compaction": 0.02, "both": 0.03}],
        "notes": ["no openvino rows: it is not installed"], "busy": "the machine was busy",
        "verdict": "onnxruntime, adaptive (library) wins over dense in the same runtime",
        "sweeps": [_sweep()], "machine": MACHINE, "command": "asvit-deploy bench as_deit_s.onnx",
        "histogram_kept": [[0] * 10 + [20, 24, 20] + [0] * 4, [0] * 5 + [10, 54] + [0] * 10],
    }  # fmt: skip


def engine() -> dict[str, Any]:
    """Of `bench` of an engine."""

    def row(name: str, kind: str, ms: float, **more: Any) -> dict[str, Any]:
        clock = {"p50": ms, "p90": 1.1 * ms, "p99": 1.3 * ms}
        return {"name": name, "kind": kind, "gpu_ms": clock, "wall_ms": clock, **more}

    return {
        "kind": "engine", "model": "as_deit_s.fp16.engine", "arch": "as_deit_small",
        "flavour": "tensorrt", "version": "10.14", "precision": "float16", "mode": "dynamic",
        "gpu": "NVIDIA L4", "warmup": 5, "runs": 50, "images": "photographs", "image_count": 8,
        "macs": {"image_tokens": TOKENS, "mean_kept": [9.0, 4.0]},
        "agreement": {"cosine": 0.991, "low": 0.99, "high": 0.992, "p10": 0.98, "neighbour": 1.0},
        "rows": [row("dynamic", "adaptive", 0.8, speedup=interval(0.9, 0.85, 0.95)),
                 row("dense", "dense", 0.7)],
        "against_kept": {"dynamic": [{"kept": [8 + i, 4], "wall_ms": 0.7 + 0.01 * i}
                                     for i in range(4)]},
        "verdict": "dense wins", "machine": MACHINE, "command": "asvit-deploy bench x.engine",
    }  # fmt: skip


def flip(place: int, borderline: bool) -> dict[str, Any]:
    return {"image": f"{place}.jpg", "stage": 1, "token": place, "score": 0.5, "threshold": 0.5,
            "margin": 1e-7 if borderline else 0.25, "allowed": 1e-6, "borderline": borderline,
            "turned": False}  # fmt: skip


def check(run: str = "library, batch 1", wrong: int = 0) -> dict[str, Any]:
    """Of `check`: passed with one near tie, or failed with some wrong flips."""
    return {
        "kind": "check", "model": "as_deit_s.onnx", "sha256": "ab" * 32, "run": run,
        "images": "200 pictures", "skipped": 0,
        "reference": {"backend": "torch 2.13.0"}, "machine": MACHINE,
        "command": "asvit-deploy check as_deit_s.onnx --json",
        "parity": {
            "precision": "float32", "images": 200, "equal_sets": 199 - wrong, "top1_equal": 200,
            "logit_error": 3.2e-7, "noise": [1e-7, 2e-7], "passed": not wrong,
            "flips": [flip(0, True), *(flip(n, False) for n in range(1, wrong + 1))], "turns": [],
            "top1_changes": [{"image": "0.jpg", "reference": 3, "candidate": 4, "margin": 1e-8,
                              "borderline": True}],
            "failures": ["flips beyond rounding"] if wrong else [],
        },
    }  # fmt: skip


def evaluate(dense: bool = False) -> dict[str, Any]:
    """Of `evaluate`: top-1 of 1,000 pictures."""
    kept = [] if dense else [12.0, 6.0]
    return {
        "kind": "evaluate", "model": "as_deit_s.onnx", "data": "imagenet/val",
        "batch_rule": "exact", "arch": "as_deit_small", "output": "logits",
        "runner": {"backend": "onnxruntime 1.32.0"}, "taken": 1000, "skipped": 0,
        "rows": [{"batch_size": 1, "images": 1000, "num_classes": 1000,
                  "top1": interval(0.798, 0.772, 0.822) if dense else interval(0.79, 0.764, 0.814),
                  "top5": interval(0.95, 0.93, 0.96), "gmacs": 3.0, "macs_share": 0.65,
                  "mean_kept": kept, "image_tokens": TOKENS,
                  "histogram_kept": [[0] * 12 + [1000] + [0] * 4 for _ in kept]}],
        "machine": MACHINE, "command": "asvit-deploy evaluate as_deit_s.onnx --data imagenet/val",
    }  # fmt: skip


def calibrate() -> dict[str, Any]:
    """Of `calibrate`: size-passing beside ToMe."""
    spread = {"mean": 0.1, "low": 0.05, "high": 0.2}
    tried = {"macs_ratio": 0.65, "distance": spread, "behind_chosen": None,
             "agreement": {"top1": 0.95, "top5": 0.9, "kl": 0.01}}  # fmt: skip
    return {
        "kind": "calibrate", "output": "as_deit_s.safetensors", "method": "size-passing",
        "why": "the best of three", "budget": 0.65, "macs_ratio": 0.6498, "measure": "KL",
        "pictures": "64 photographs", "choosing_images": 32, "judging_images": 32,
        "kept_tokens": [{"mean": 12, "min": 12, "max": 12}], "blocks": [3],
        "methods": {"size-passing": tried, "tome": {**tried, "behind_chosen": spread}},
        "thresholds": None, "no_thresholds": "it was not asked for", "out_of_reach": {},
        "machine": MACHINE, "command": "asvit-deploy calibrate --ckpt deit_s.pth",
    }  # fmt: skip


def every() -> list[dict[str, Any]]:
    return [bench(), engine(), check(), evaluate(), calibrate()]


def changed(report: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy in which one place, such as "rows.0.p50_ms", holds something else."""
    made = copy.deepcopy(report)
    *way, last = path.split(".")
    inner: Any = made
    for step in way:
        inner = inner[int(step) if isinstance(inner, list) else step]
    inner[int(last) if isinstance(inner, list) else last] = value
    return made


def page(*reports: dict[str, Any]) -> str:
    return page_of(of_dicts(reports), MOST_BYTES)


def page_of_files(*paths: Path) -> str:
    return page_of(read_files(paths), MOST_BYTES)


def saved(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def drawings(folder: Path, count: int = 7, side: int = 48, **fields: Any) -> Path:
    """`visualize`'s folder: a picture keeps as many tokens as its number says; its `kept.json`."""
    import numpy as np

    folder.mkdir(exist_ok=True)
    pictures = []
    for place in range(count):
        noise = np.random.default_rng(place).integers(0, 255, (side, side, 3), np.uint8)
        panel = figure.Panel(noise, "input", "16 tokens")
        name = f"{place + 1:04}-p.png"
        figure.row("p", "", "", [panel] * 3).save(folder / name)
        kept = list(range(1 + place % TOKENS))
        pictures.append({"image": f"p{place}.jpg", "file": name, "kept": [kept, kept[:1]],
                         "into": None, "added": [0, 0],
                         "answer": {"label": "cat", "index": 3, "probability": 0.9,
                                    "score": None}})  # fmt: skip
    said = {"kind": "visualize", "model": "as_deit_s.onnx", "sha256": "ab" * 32,
            "image_tokens": TOKENS, "blocks": [3, 6], "panels": [0, 1], "images": f"{count} photos",
            "skipped": 0, "runner": {"backend": "onnxruntime 1.32.0"}, "pictures": pictures,
            "machine": MACHINE, "command": "asvit-deploy visualize as_deit_s.onnx",
            **fields}  # fmt: skip
    path = folder / "kept.json"
    path.write_text(sidecar.signed(said, indent=None))
    return path
