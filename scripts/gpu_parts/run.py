"""`gpu_suite run`: the parts in order of value, each in its own process, within a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from asvit_deploy.errors import UserError
from asvit_deploy.files import write_text
from gpu_parts import machine, prepared
from gpu_parts.child import CUT_OFF, keep
from gpu_parts.kit import Report
from gpu_parts.table import PARTS, SUMMARY, Part

SPARE = 6.0  # seconds at the end for what is not a part
GRACE = 3.0  # seconds between asking a process to end and ending it


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Ended(Exception):
    """We were asked to end."""


def make_output(output: Path) -> None:
    """The folder for the results, without those of an earlier run.

    Raises:
        UserError: it cannot be made or written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
        for name in [f"{group}.json" for group in {p.group for p in PARTS.values()}] + [SUMMARY]:
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror or error}); name another folder with -o"
        ) from None


def run_part(part: Part, root: Path, output: Path, rehearse: bool, limit: float) -> Report:
    """Run one part in a process of its own and end it in time; its report."""
    words = ["part", part.name, "--prepared", str(root), "-o", str(output), "--limit", str(limit)]
    words += ["--rehearse"] if rehearse else []
    command = [*machine.interpreter(), str(root / "gpu_suite"), *words]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as scratch:
        # A process group of its own, so that what it started ends with it.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                   env=os.environ | {"TMPDIR": scratch},
                                   preexec_fn=os.setpgrp)  # fmt: skip
        reason = None
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            reason = f"over its {limit:.0f} seconds; {CUT_OFF}"
        finally:
            _end(process)
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
    for leftover in output.glob(".*.tmp"):  # of a write that was cut off
        leftover.unlink(missing_ok=True)
    report = _report_of(part, output)
    if report is None or report["outcome"] == "ended":
        if reason is None:
            last = f": {said[-1][:300]}" if said else ""
            reason = f"its process ended with {process.returncode}{last}"
        report = {**(report or {}), "outcome": "ended", "reason": reason,
                  "seconds": round(time.perf_counter() - start, 1)}  # fmt: skip
        if said:
            report["said"] = said[-8:]
        keep(output, part, report)
    return report


def _report_of(part: Part, output: Path) -> Report | None:
    try:
        return json.loads((output / f"{part.group}.json").read_text())[part.name]
    except (OSError, ValueError, KeyError):
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end the part that runs, and the summary is still written."""

    def handler(number: int, frame: Any) -> None:
        raise Ended

    old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


def run_parts(
    root: Path, output: Path, minutes: float, rehearse: bool, only: Sequence[str], summary: Report
) -> None:
    """Run the parts in turn; `summary` and the files are whole after every one of them."""
    end = time.monotonic() + minutes * 60 - SPARE
    for name, part in PARTS.items():
        if only and name not in only:
            continue
        left = end - time.monotonic()
        if left < min(part.least, part.limit):
            report: Report = {"outcome": "not run", "reason": "out of time", "seconds": 0.0}
            keep(output, part, report)
        else:
            say(f"{name} …")
            report = run_part(part, root, output, rehearse, min(part.limit, left))
        known = ("outcome", "reason", "seconds")
        said: Report = {key: report[key] for key in known if key in report}
        summary["parts"][name] = {**said, "file": f"{part.group}.json"}
        if targets := _targets(report.get("result") or {}):
            summary["parts"][name]["targets"] = targets
        write_summary(output, summary)
        say(f"{name:17} {said['outcome']:8} {said['seconds']:6.1f} s  {said.get('reason', '')}")


def _targets(result: Any, path: str = "") -> Report:
    """Every figure of a result that has something to reach, by its place."""
    if isinstance(result, dict) and {"value", "target", "met"} <= set(result):
        return {path: result}
    found: Report = {}
    for key, value in enumerate(result) if isinstance(result, list) else _items(result):
        found |= _targets(value, f"{path}.{key}" if path else str(key))
    return found


def _items(result: Any) -> Iterable[tuple[Any, Any]]:
    return result.items() if isinstance(result, dict) else ()


def write_summary(output: Path, summary: Report) -> None:
    write_text(output / SUMMARY, json.dumps(summary, indent=1) + "\n")


def command(root: Path, output: Path, minutes: float, rehearse: bool, only: Sequence[str]) -> int:
    """The command; its exit code: 0, or 1 where a part is wrong or ended early.

    Raises:
        UserError: nothing can be run.
    """
    start = time.monotonic()
    if unknown := [name for name in only if name not in PARTS]:
        raise UserError(f"no part is called {unknown[0]}; the parts are {', '.join(PARTS)}")
    if not minutes > 0:
        raise UserError(f"--minutes {minutes:g} is no time; give more than 0")
    manifest = prepared.check(root)
    summary: Report = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "rehearsal": rehearse,
        "prepared": {key: manifest[key] for key in ("sms", "missing", "made_by")},
    }
    if rehearse:
        if not manifest["host"]:
            raise UserError(f"{root} holds no host twins; prepare it with --rehearse too")
    else:
        summary["gpu"] = machine.gpu()
        prepared.refuse_other_gpu(root, manifest, summary["gpu"])
        summary["gpu"]["state"] = machine.state()
    summary |= {"versions": machine.versions(), "parts": {}}
    make_output(output)
    write_summary(output, summary)
    left = minutes - (time.monotonic() - start) / 60
    try:
        with _ended_by_signals():
            run_parts(root, output, left, rehearse, only, summary)
    except Ended:
        summary["reason"] = "ended from outside; the parts that ran are kept"
        say(summary["reason"])
    summary["seconds"] = round(time.monotonic() - start, 1)
    write_summary(output, summary)
    say(f"written: {output}")
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    outcomes = {part["outcome"] for part in summary["parts"].values()}
    return 1 if outcomes & {"failed", "ended"} or "reason" in summary else 0
