"""A process that has imported what takes long, and forks itself for each piece of code it is given.

Reads one JSON object a line: `code` (its further lines are indented by four), `path`, `folder`,
`environment`, and `seconds`, after which the child is ended. Writes one for each: `used` (MiB
beside what was there), `seconds` (of processor time, with its children's), `said`; or `failed`,
what ended the child.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from PIL import Image

import asvit_deploy.checkpoints.load
import asvit_deploy.data.decode
import asvit_deploy.runners.onnx_runtime
from asvit_deploy.errors import UserError

LIBRARIES = (torch, onnx, onnxruntime, asvit_deploy)


def taken() -> tuple[int, float]:
    """MiB at most, and seconds of processor time; of this process or of a child of it."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(one.ru_maxrss for one in both) >> 10, sum(r.ru_utime + r.ru_stime for r in both)


def done(job: dict[str, Any]) -> dict[str, Any]:
    """In the child: the code's outcome and what it took."""
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    before, said = taken(), "fine"
    try:
        exec(f"if True:\n    {job['code']}", {"path": Path(job["path"])})
    except UserError as error:
        said = str(error)
    after = taken()
    return {"used": after[0] - before[0], "seconds": after[1] - before[1], "said": said}


def child(job: dict[str, Any], answer: int) -> None:
    signal.alarm(job["seconds"])
    try:
        said = done(job)
    except BaseException:
        said = {"failed": traceback.format_exc()}
    with open(answer, "w") as file:
        json.dump(said, file)


def serve() -> None:
    Image.init()  # the formats' modules, else the first picture's memory
    for line in sys.stdin:
        reading, writing = os.pipe()
        if not (number := os.fork()):
            os.close(reading)
            try:
                child(json.loads(line), writing)
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading) as file:
            said = file.read()
        status = os.waitpid(number, 0)[1]
        said = said or json.dumps({"failed": f"ended with {os.waitstatus_to_exitcode(status)}"})
        print(said, file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    serve()
