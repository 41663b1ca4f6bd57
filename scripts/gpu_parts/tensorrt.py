"""Engines of the default checkpoint: built, checked against PyTorch, and timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import util

from asvit_deploy.runners.trt_flavour import FLAVOURS
from gpu_parts.kit import FailPart, Kit, Report, SkipPart
from gpu_parts.machine import gpu

MODES = ("dynamic", "padded", "bucketed")
NOT_RTX = ("90", "100")
# What the commands import beside what the suite itself needs.
NEEDED = ("click", "tqdm", "PIL", "safetensors", "skimage", "onnxruntime")


def tensorrt(kit: Kit) -> Report:
    """Every flavour that is installed, in every mode."""
    flavours = [name for name, flavour in FLAVOURS.items() if flavour.module]
    if not flavours:
        raise SkipPart("neither TensorRT nor TensorRT-RTX is installed")
    if missing := [name for name in NEEDED if util.find_spec(name) is None]:
        raise SkipPart(f"the commands need what is not installed: {', '.join(missing)}")
    model = kit.file("model")
    result: Report = {}
    for flavour in flavours:
        for mode in MODES:
            ending = "bucketed" if mode == "bucketed" else f"{mode}.engine"
            engine = kit.scratch / f"digits.{flavour}.{ending}"
            said = result[f"{flavour} {mode}"] = {}
            if flavour == "tensorrt-rtx" and not kit.rehearse and gpu()["sm"] in NOT_RTX:
                said["skipped"] = "TensorRT-RTX runs on no GPU of this kind"
                continue
            try:
                command(kit, "build-engine", "--onnx", str(model), "-o", str(engine), "--fp16",
                        "--flavour", flavour, "--mode", mode)  # fmt: skip
                for word in () if kit.rehearse else ("check", "bench"):
                    said[word] = json.loads(command(kit, word, str(engine), "--json"))
            except FailPart as error:  # one mode's failure must not cost the others
                said["failed"] = error.reason
            kit.save(result)
    failed = [f"{name}: {said['failed']}" for name, said in result.items() if "failed" in said]
    if failed:
        raise FailPart("; ".join(failed), result)
    return result


def command(kit: Kit, *words: str) -> str:
    """Run one of our commands; what it prints.

    Raises:
        FailPart: it ends with an error.
    """
    done = subprocess.run(
        [sys.executable, "-m", "asvit_deploy", *words], cwd=kit.scratch, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": str(kit.root)},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FailPart(f"asvit-deploy {words[0]} ended with {done.returncode}: {last[:300]}")
    return done.stdout
