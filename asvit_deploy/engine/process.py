"""Run the builder's process: relay its progress, and turn whatever ends it into one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asvit_deploy import child
from asvit_deploy.disk import FULL, is_full, unfitting, unwritten
from asvit_deploy.engine.job import Job
from asvit_deploy.errors import UserError
from asvit_deploy.ops import onnx_op
from asvit_deploy.requirements import pip_install_extra
from asvit_deploy.runners.trt_flavour import Flavour

# (phase, steps done, steps in all)
Progress = Callable[[str, int, int], None]


@dataclass
class Outcome:
    """What the builder said: its version, the layers it counted, of each output TensorRT's name of
    its type and its shape (-1 where it varies), its warnings in order."""

    version: str = ""
    layers: int = 0
    plugin_layers: int = 0
    outputs: dict[str, list[str | int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def run(job: Job, flavour: Flavour, folder: Path, name: str, progress: Progress) -> Outcome:
    """Build in a child process.

    Args:
        folder: a private folder for the job's files.
        name: how messages call the graph.
        progress: called with how far the build is.

    Raises:
        UserError: the builder refused the graph or an option, or its process ended.
    """
    path = folder / "job.json"
    job.save(path)
    outcome = Outcome()
    last: dict[str, Any] = {"event": "none"}
    stage = "starting"
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            child.command("from asvit_deploy.engine.worker import main; main()", str(path)),
            stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**flavour.environment(folder), "TMPDIR": str(folder)},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    last = json.loads(line)
                except ValueError:  # its last words, cut off
                    last = {"event": "none"}
                if last["event"] == "stage":
                    stage = last["name"]
                elif last["event"] == "warning":
                    outcome.warnings.append(last["message"])
                elif last["event"] == "progress":
                    progress(last["phase"], last["done"], last["of"])
            process.wait()
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        printed = errors.read().decode(errors="replace")
    if last["event"] == "done":
        outcome.version = last["version"]
        outcome.layers, outcome.plugin_layers = last["layers"], last["plugin_layers"]
        outcome.outputs = last["outputs"]
        return outcome
    if last["event"] == "error":
        if is_full(folder):
            raise unfitting(job.plan)
        raise UserError(f"{flavour.title} cannot build {name}: {_reason(last)}")
    found = re.search(r"OSError: \[Errno (\d+)\]", printed)
    if found and (number := int(found[1])) in FULL:
        raise unwritten(job.plan, OSError(number, os.strerror(number)))
    if is_full(folder):
        raise unfitting(job.plan)
    raise UserError(_ended(process.returncode, stage, printed, job, flavour, name))


def _line(text: str) -> str:
    """One line of at most 300 characters."""
    return " ".join(text.split())[:300]


# Where the parser stood and what the node looked like, which it logs before the cause.
_PLACE = re.compile(r"While parsing|---")
_CAUSE = re.compile(r"ERROR:|Assertion|not found")


def _reason(error: dict[str, Any]) -> str:
    """The first error that TensorRT logged says more than what came of it."""
    log = [message for message in error["log"] if "cudaError" not in message]
    if len(rest := [message for message in log if not _PLACE.search(message)]) < len(log):
        log = [message for message in rest if _CAUSE.search(message)] or rest
    text = _line(log[0] if log else error["message"])
    if onnx_op.OP_TYPE in text:
        text += "; build the plugin with `asvit-deploy build-plugins trt`"
    return text


def _ended(code: int, stage: str, printed: str, job: Job, flavour: Flavour, name: str) -> str:
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
    lines = [line for line in printed.splitlines() if line.strip()]
    said = f" ({_line(lines[-1])})" if lines else ""
    what = f"{job.plugin}" if stage == "loading the plugin" else name
    if stage == "loading the plugin":
        remedy = (
            "name another library with --plugin, or build it with `asvit-deploy build-plugins trt`"
        )
    else:
        remedy = f"reinstall it with {pip_install_extra(flavour.extra)} if this goes on"
    return (
        f"{flavour.title} was ended {how} while {stage}: {what}{said}; "
        f"nothing was written; {remedy}"
    )
