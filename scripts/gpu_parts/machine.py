"""What machine this is: the GPU as its driver gives it, its clocks, and versions."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from asvit_deploy.errors import UserError

NEEDED = ("torch", "numpy", "onnx")
LEAST_TORCH = (2, 8)
PACKAGES = ("asvit-deploy", "onnxruntime", "onnxruntime-gpu", "tensorrt", "triton",
            "tensorrt-rtx-cu13-bindings", "cuda-bindings")  # fmt: skip

# Asked in a process of its own: importing torch takes seconds and, where it is broken, the process.
_ASK = """
import importlib, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        module = importlib.import_module(name)
        found[name] = str(getattr(module, "__version__", "unknown"))
    except BaseException as error:
        found[name] = None
        found[name + " error"] = f"{type(error).__name__}: {error}"[:200]
try:
    import torch
    found["torch CUDA"] = torch.version.cuda
    found["torch sees a GPU"] = torch.cuda.is_available()
except BaseException as error:
    found["torch CUDA"] = f"{type(error).__name__}: {error}"[:200]
print(json.dumps(found))
"""


def interpreter() -> list[str]:
    """This Python, for a child, with as little of the surroundings as this one."""
    return [sys.executable, "-B", *(["-I"] if sys.flags.isolated else [])]


def libraries() -> dict[str, Any]:
    """Versions of what the suite needs, as a child imports them.

    Raises:
        UserError: one is missing, or torch is too old.
    """
    done = subprocess.run([*interpreter(), "-c", _ASK, *NEEDED], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        words = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"{sys.executable} cannot import {', '.join(NEEDED)}: {words[:200]}")
    found = json.loads(lines[-1])
    for name in NEEDED:
        if found[name] is None:
            raise UserError(
                f"{name} cannot be imported by {sys.executable} ({found[f'{name} error']}); "
                f"the suite needs {', '.join(NEEDED)} and nothing else"
            )
    numbers = re.match(r"(\d+)\.(\d+)", found["torch"])
    if numbers is None or (int(numbers[1]), int(numbers[2])) < LEAST_TORCH:
        raise UserError(
            f"torch {found['torch']} is too old: the suite needs "
            f"{'.'.join(map(str, LEAST_TORCH))} or newer"
        )
    return found


def versions() -> dict[str, Any]:
    """Libraries that the suite needs, and others that happen to be installed."""
    found = libraries()
    for name in PACKAGES:
        with contextlib.suppress(Exception):
            found[name] = metadata.version(name)
    return {**found, "python": platform.python_version(), "cpus": os.cpu_count(),
            "kernel": platform.release()}  # fmt: skip


def gpu() -> dict[str, Any]:
    """Name, compute capability and driver of the first GPU, as the driver itself gives them.

    Raises:
        UserError: there is no driver or no GPU.
    """
    none = "no NVIDIA GPU here ({}); --rehearse runs every part's host side without one"
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise UserError(none.format("no driver: libcuda.so.1 is missing")) from None
    count, device, version = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise UserError(none.format("the driver finds none"))
    name, sm = ctypes.create_string_buffer(200), [ctypes.c_int(), ctypes.c_int()]
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    cuda.cuDeviceGetName(name, 200, device)
    for value, attribute in zip(sm, (75, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    kernel = Path("/proc/driver/nvidia/version")
    match = re.search(r"\s(\d+\.\d+[.\d]*)\s", kernel.read_text()) if kernel.is_file() else None
    return {
        "name": name.value.decode(), "sm": f"{sm[0].value}{sm[1].value}",
        "driver": (match[1] if match else None) or state().get("driver"),
        "driver_cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
    }  # fmt: skip


def state() -> dict[str, Any]:
    """Clocks in MHz, power in W, temperature in °C and driver of the first GPU; what is known."""
    found: dict[str, Any] = {}
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return found
        device, text = ctypes.c_void_p(), ctypes.create_string_buffer(80)
        nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device))
        if not nvml.nvmlSystemGetDriverVersion(text, 80):
            found["driver"] = text.value.decode()
        for name, function, kind in (
            ("sm_mhz", nvml.nvmlDeviceGetClockInfo, 1),
            ("memory_mhz", nvml.nvmlDeviceGetClockInfo, 2),
            ("most_sm_mhz", nvml.nvmlDeviceGetMaxClockInfo, 1),
            ("celsius", nvml.nvmlDeviceGetTemperature, 0),
        ):  # fmt: skip
            value = ctypes.c_uint()
            if not function(device, kind, ctypes.byref(value)):
                found[name] = value.value
        power = ctypes.c_uint()
        if not nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(power)):
            found["watts"] = power.value / 1000
    except (OSError, AttributeError):
        pass
    return found
