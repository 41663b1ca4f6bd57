"""One part in this process; whatever happens is in its group's file at every moment."""

from __future__ import annotations

import faulthandler
import importlib
import json
import math
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from asvit_deploy.files import write_text
from gpu_parts import machine
from gpu_parts.kit import FailPart, Kit, Report, SkipPart
from gpu_parts.table import PARTS, Part

CUT_OFF = "ended before it was done; what it had is kept"


def clean(value: Any) -> Any:
    """The value as plain JSON: no NaN, no infinity, no numpy."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [clean(item) for item in value]
    if hasattr(value, "tolist"):
        return clean(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def keep(output: Path, part: Part, report: Report) -> None:
    """Put one part's report into its group's file, beside those of the others."""
    path = output / f"{part.group}.json"
    group = json.loads(path.read_text()) if path.is_file() else {}
    group[part.name] = clean(report)
    write_text(path, json.dumps(group, indent=1) + "\n")


def execute(part: Part, kit: Kit) -> Report:
    """Run a part; whatever it raises becomes its outcome."""
    module, function = part.code.split(":")
    try:
        run = getattr(importlib.import_module(f"gpu_parts.{module}"), function)
        return {"outcome": "passed", "result": run(kit)}
    except SkipPart as reason:
        return {"outcome": "skipped", "reason": str(reason)}
    except FailPart as error:
        return {"outcome": "failed", "reason": error.reason, "result": error.result}
    except Exception as error:  # one part's surprise must not cost the others
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        code = where.tb_frame.f_code if where else None
        place = f" ({Path(code.co_filename).name}:{where.tb_lineno})" if where and code else ""
        words = " ".join(str(error).split())[:400]
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {words}{place}"}


def main(name: str, root: Path, output: Path, rehearse: bool, limit: float) -> None:
    """The process of one part."""
    part, start = PARTS[name], time.perf_counter()
    faulthandler.enable()
    signal.alarm(math.ceil(limit) + 5)  # should the one that watches be gone
    before = {} if rehearse else {"gpu_before": machine.state()}
    partial: Report = {"outcome": "ended", "reason": CUT_OFF, **before}

    def report(more: Report) -> None:
        took = {"seconds": round(time.perf_counter() - start, 1)}
        keep(output, part, {**partial, **more, **took})

    report({})
    with tempfile.TemporaryDirectory(prefix="gpu_suite_") as scratch:
        kit = Kit(root, Path(scratch), rehearse, lambda result: report({"result": result}))
        _environment(kit)
        done = execute(part, kit)
        if done["outcome"] == "failed" and done.get("result") is None:
            done.pop("result", None)
            known = json.loads((output / f"{part.group}.json").read_text())[name].get("result")
            done |= {"result": known} if known else {}
        if done["outcome"] != "ended":
            partial.pop("reason", None)
        after = {} if rehearse else {"gpu_after": machine.state()}
        report({**done, **after})


def _environment(kit: Kit) -> None:
    """Prebuilt libraries in place of a compiler; nothing is written outside the scratch folder."""
    cache = kit.scratch / "cache"
    (cache / "asvit-deploy").mkdir(parents=True)
    built = kit.root / "cache" / "asvit-deploy"
    for entry in built.iterdir() if built.is_dir() else ():
        (cache / "asvit-deploy" / entry.name).symlink_to(entry)
    os.environ["XDG_CACHE_HOME"] = str(cache)
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    try:
        os.environ["ASVIT_KERNEL"] = str(kit.file("kernel"))
    except SkipPart:
        os.environ.pop("ASVIT_KERNEL", None)
