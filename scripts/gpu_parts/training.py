"""Training and evaluation on the GPU: the commands themselves, and what a step costs."""

from __future__ import annotations

import json
import os
import subprocess
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from gpu_parts import machine
from gpu_parts.kit import FailPart, Kit, Report, SkipPart, torch_for
from gpu_parts.timing import on_wall, spin

NEEDED = ("click", "tqdm", "PIL", "safetensors", "accelerate", "mlxtend", "scipy")
KINDS = ("dense", "adaptive", "adaptive_with_teacher")
# Of 500 pictures, between two devices or after some steps of fine-tuning; of few, for a rehearsal.
TOP1, TOP1_REHEARSED = 0.02, 0.2


def training(kit: Kit) -> Report:
    """`evaluate` on the GPU and on the CPU, `finetune` in three precisions, times of steps."""
    torch_for(kit)
    if missing := [name for name in NEEDED if util.find_spec(name) is None]:
        raise SkipPart(f"not installed: {', '.join(missing)}")
    checkpoint = kit.file("checkpoint")
    result: Report = {"evaluate": {}, "finetune": {}, "steps": []}
    for device in ("cpu",) if kit.rehearse else ("cuda", "cpu"):
        result["evaluate"][device] = _evaluate(kit, checkpoint, device)
        kit.save(result)
    _judge_evaluations(result)
    wanted = result["evaluate"]["cpu"]["top1"]
    for amp in ("no",) if kit.rehearse else ("no", "bf16", "fp16"):
        result["finetune"][amp] = _finetune(kit, checkpoint, amp)
        kit.save(result)
        allowed = TOP1_REHEARSED if kit.rehearse else TOP1
        if result["finetune"][amp]["top1"] < wanted - allowed:
            raise FailPart(f"finetune --amp {amp} leaves a worse network", result)
    for name, batch in (("as_deit_mini", 2),) if kit.rehearse else (("as_deit_small", 128),):
        for amp in ("no",) if kit.rehearse else ("bf16", "fp16"):
            result["steps"].append(_steps(kit, name, batch, amp))
            kit.save(result)
    return result


def _command(kit: Kit, *words: object, cpu: bool = False) -> str:
    """Run a command of the package; its stdout.

    Raises:
        FailPart: it does not end with 0.
    """
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    done = subprocess.run(
        [*machine.interpreter(), "-m", "asvit_deploy", *map(str, words)], cwd=kit.scratch,
        env=os.environ | {"PYTHONPATH": f"{kit.root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        | hidden, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FailPart(f"{words[0]} ended with {done.returncode}: {last[:300]}")
    return done.stdout


def _evaluate(kit: Kit, checkpoint: Path, device: str) -> Report:
    """One image at a time and 64, on pictures that the checkpoint was not trained on."""
    count = 40 if kit.rehearse else 500
    said = json.loads(_command(
        kit, "evaluate", checkpoint, "--data", "digits", "--limit", count, "--batch-size", 1,
        "--batch-size", 64, "--json", cpu=device == "cpu",
    ))  # fmt: skip
    rows = said["rows"]
    return {"runner": said["runner"], "images": rows[0]["images"],
            "top1": rows[0]["top1"]["value"], "top1_batch_64": rows[1]["top1"]["value"],
            "macs_share": rows[0]["macs_share"], "mean_kept": rows[0]["mean_kept"]}  # fmt: skip


def _judge_evaluations(result: Report) -> None:
    found = result["evaluate"]
    if "cuda" not in found:
        return
    if found["cuda"]["runner"]["device"] == found["cpu"]["runner"]["device"]:
        raise FailPart("evaluate did not use the GPU", result)
    for key in ("top1", "top1_batch_64", "macs_share"):
        if abs(found["cuda"][key] - found["cpu"][key]) > TOP1:
            raise FailPart(f"evaluate differs between the GPU and the CPU: {key}", result)


def _finetune(kit: Kit, checkpoint: Path, amp: str) -> Report:
    """Steps of the digits network from its own weights: everything stays finite."""
    output = kit.scratch / f"{amp}.safetensors"
    steps, limit = (2, 20) if kit.rehearse else (100, 500)
    _command(kit, "finetune", "--data", "digits", "--pretrained", checkpoint, "--budget", 0.65,
             "--steps", steps, "--batch-size", 8 if kit.rehearse else 64, "--log-every", steps // 2,
             "--validation-limit", limit, "--workers", 0 if kit.rehearse else 4, "--amp", amp,
             "-o", output)  # fmt: skip
    lines = [json.loads(line) for line in output.with_suffix(".log.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "step" in line]
    if not rows or not all(np.isfinite([row["loss"], *row["thresholds"]]).all() for row in rows):
        raise FailPart(f"finetune --amp {amp} logs what is no number: {rows[-1:]}")
    (validation,) = [line for line in lines if line.get("event") == "validation"]
    return {"steps": steps, "loss": [row["loss"] for row in rows],
            "images_per_s": rows[-1]["images_per_s"], "top1": validation["top1"],
            "macs": validation["macs"], "thresholds": rows[-1]["thresholds"]}  # fmt: skip


def _steps(kit: Kit, name: str, size: int, amp: str) -> Report:
    """What masks and a teacher add to a step; masks cost the same whatever they hold."""
    import torch

    from asvit_deploy.data.batches import Batch
    from asvit_deploy.models.archs import arch

    side = arch(name).image_size
    torch.manual_seed(1)
    batch = Batch(torch.randn(size, 3, side, side), torch.arange(size) % arch(name).num_classes)
    calls: dict[str, Any] = {}
    peaks = {}
    for kind in KINDS:
        trainer = _trainer(kind, name, size, amp)
        if not kit.rehearse:
            torch.cuda.reset_peak_memory_stats()
        for turn in range(3):
            trainer.step(turn, batch)
        peaks[kind] = None if kit.rehearse else torch.cuda.max_memory_allocated()
        if peaks[kind] == 0:
            raise FailPart("the trainer does not use the GPU")

        def step(turn: int, trainer: Any = trainer) -> None:
            trainer.step(turn, batch)
            if not kit.rehearse:
                torch.cuda.synchronize()

        calls[kind] = step
    spin(kit.device)
    times = on_wall(calls, list(range(30)), 2 if kit.rehearse else 20, 1)
    dense = times["dense"]["p50"]
    return {
        "network": name, "batch": size, "amp": amp, "ms": times,
        "images_per_s": {kind: round(size / value["p50"] * 1e3, 1)
                         for kind, value in times.items()},
        "throughput_over_dense": {kind: round(dense / value["p50"], 4)
                                  for kind, value in times.items()},
        "peak_bytes_with_those_before": peaks,
    }  # fmt: skip


def _trainer(kind: str, name: str, size: int, amp: str) -> Any:
    import torch

    from asvit_deploy.models import build
    from asvit_deploy.models.archs import arch
    from asvit_deploy.training.recipe import Recipe
    from asvit_deploy.training.trainer import Trainer

    config, adaptive = arch(name), kind != "dense"
    recipe = Recipe(steps=10_000, batch_size=size, budget=0.65 if adaptive else None, lr=1e-9,
                    min_lr=0, amp=amp)  # type: ignore[arg-type] # fmt: skip
    torch.manual_seed(0)
    teacher = build(config, adaptive=False).requires_grad_(False)
    return Trainer(build(config, adaptive), teacher if "teacher" in kind else None, recipe)
