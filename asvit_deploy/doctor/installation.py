"""A Python installation from outside: what its metadata says, and what its libraries answer.

A library is asked in a child process with a time-out, so that one that crashes or hangs costs a
line and not the caller.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

TIMEOUT = 90  # seconds for one library to import and answer; a cold disk is slow


@dataclass(frozen=True)
class Installation:
    """A module path, and the versions of the distributions found on it."""

    path: tuple[str, ...]
    versions: dict[str, str]

    @staticmethod
    def of(path: Sequence[str] | None = None) -> Installation:
        """Read the metadata on `path` (default `sys.path`); the first of a name counts."""
        path = tuple(os.path.abspath(entry) for entry in (sys.path if path is None else path))
        versions: dict[str, str] = {}
        for found in metadata.distributions(path=list(path)):
            name = found.metadata["Name"]
            if name:  # a half-removed package has a folder and no name
                versions.setdefault(re.sub(r"[-_.]+", "-", name).lower(), found.version)
        return Installation(path, versions)

    def matching(self, pattern: str) -> list[str]:
        """Names of installed distributions that match from end to end, sorted."""
        return sorted(name for name in self.versions if re.fullmatch(pattern, name))

    def said(self, names: Sequence[str]) -> str:
        """'onnxruntime 1.20 and onnxruntime-gpu 1.21'."""
        return " and ".join(f"{name} {self.versions[name]}" for name in names)

    def ask(self, code: str, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Run `code` in a child; the JSON object that it prints last, or {"error": one line}."""
        # From the root folder, so that no file in the user's folder shadows a library.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(self.path),
            "OMP_NUM_THREADS": "1",
        }
        try:
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, errors="replace",
                timeout=timeout, env=environment, cwd=os.sep, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"gave no answer in {timeout:g} s"}
        if done.returncode < 0:
            return {"error": f"crashed with {signal.Signals(-done.returncode).name}"}
        if done.returncode:
            return {"error": _last_line(done.stderr) or f"ended with exit code {done.returncode}"}
        try:
            return json.loads(_last_line(done.stdout))
        except json.JSONDecodeError:
            return {"error": "gave no answer"}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def output_of(command: Sequence[str], given: str = "") -> str | None:
    """What a program prints, or None where it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
