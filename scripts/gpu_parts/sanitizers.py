"""The plugin under compute-sanitizer."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from gpu_parts.calls import TYPES, chains, check, check_chain, random_calls, stored_calls
from gpu_parts.kit import FailPart, Kit, Report, SkipPart


def find_sanitizer() -> str:
    """compute-sanitizer: on the PATH, under CUDA_HOME, beside nvcc, or in /usr/local/cuda.

    Raises:
        SkipPart: it is nowhere.
    """
    nvcc = shutil.which("nvcc")
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    places = [os.environ.get("PATH", "")]
    places += [str(home / name) for home in homes for name in ("bin", "compute-sanitizer")]
    for place in places:
        if found := shutil.which("compute-sanitizer", path=place):
            return found
    raise SkipPart("compute-sanitizer is not installed")


def sanitize(kit: Kit, tool: str) -> Report:
    """Run a selection of calls under a tool."""
    driver, plugin = kit.program("driver"), kit.file("plugin")
    wrapper, log = kit.scratch / tool, kit.scratch / f"{tool}.log"
    wrapper.write_text(
        f"#!/bin/sh\nexec {shlex.quote(find_sanitizer())} --tool {tool} --error-exitcode 9 "
        f'--log-file {shlex.quote(str(log))} {shlex.quote(str(driver))} "$@"\n'
    )
    wrapper.chmod(0o755)
    calls = [call for kind in range(len(TYPES)) for call in stored_calls(kit.root, kind)[kind::3]]
    calls += random_calls(40, 3)
    try:
        check(wrapper, plugin, calls)
        check(wrapper, plugin, calls[::8], "graph")
        first, *_, last = chains(kit.root, 1)
        for chain in (first, last):  # of one prefix row and of five
            check_chain(wrapper, plugin, chain, 64)
    except FailPart as error:
        text = log.read_text(errors="replace") if log.is_file() else ""
        if "Device not supported" in text:
            raise SkipPart(f"{tool} does not support this device") from None
        raise FailPart(f"{' '.join(text.split())[:400] or error.reason}") from None
    said = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return {"calls": len(calls), "summary": said[-1].strip("= ") if said else ""}


def memcheck(kit: Kit) -> Report:
    """No access out of bounds, no leak."""
    return sanitize(kit, "memcheck")


def racecheck(kit: Kit) -> Report:
    """No race in shared memory."""
    return sanitize(kit, "racecheck")


def synccheck(kit: Kit) -> Report:
    """No barrier used wrongly."""
    return sanitize(kit, "synccheck")
