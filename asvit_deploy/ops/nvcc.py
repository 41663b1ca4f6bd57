"""CUDA's compiler: where it is, and for which GPUs it compiles."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ALL_SMS = ("75", "80", "86", "87", "89", "90", "100", "110", "120", "121")
# Where no GPU can be asked: intermediate code for the oldest, which any later driver compiles.
PORTABLE = "ptx75"


def find_nvcc() -> Path | None:
    """CUDA's compiler: under CUDA_HOME or CUDA_PATH, on the PATH, or in /usr/local/cuda."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    found = shutil.which("nvcc")
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    places += [Path(found)] if found else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((place for place in places if os.access(place, os.X_OK)), None)


def detected_sms() -> tuple[str, ...]:
    """Compute capabilities of this machine's GPUs ("86"), empty where there are none."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = set(re.findall(r"^(\d+)\.(\d)\s*$", done.stdout, re.MULTILINE))
    return tuple(sorted((major + minor for major, minor in found), key=int))


def targets_of(sms: Sequence[str]) -> tuple[str, ...]:
    """What is compiled for: the GPUs named ("all" stands for `ALL_SMS`), else the ones here.

    After the last one named stands its intermediate code, for GPUs that come later.
    """
    chosen = set(ALL_SMS if "all" in sms else sms or detected_sms())
    if not chosen:
        return (PORTABLE,)
    ordered = sorted(chosen, key=int)
    return (*(f"sm{sm}" for sm in ordered), f"ptx{ordered[-1]}")


def gencode(targets: Sequence[str]) -> list[str]:
    """nvcc's options for those targets."""
    words = []
    for target in targets:
        number = target.lstrip("smptx")
        kind = "sm" if target.startswith("sm") else "compute"
        words += ["-gencode", f"arch=compute_{number},code={kind}_{number}"]
    return words
