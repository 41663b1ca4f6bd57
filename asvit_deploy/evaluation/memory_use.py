"""Memory of one way to run a model: measured in a process that does nothing else (Linux)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from asvit_deploy import child
from asvit_deploy.evaluation.timing import Memory
from asvit_deploy.files import put, scratch

_WAIT = 600  # seconds
_PICTURES = 16  # of which each may keep another number of tokens
# The peak starts anew once the model is open: what reading the file takes in between is no matter
# of how it runs.
_CODE = """
import gc, json, sys
import numpy as np
from pathlib import Path
from asvit_deploy.artefacts.onnx_file import RUNTIMES
from asvit_deploy.runners.onnx_runtime import OrtRunner

runtime, model, library, threads, pictures = json.loads(sys.argv[1])
images = np.load(pictures)

def resident(name):
    with open("/proc/self/status") as status:
        lines = dict(line.partition(":")[::2] for line in status)
    return int(lines[name].split()[0]) / 1024

if runtime == "onnxruntime":
    import onnxruntime
else:
    from asvit_deploy.runners.openvino import import_openvino
    import_openvino()
gc.collect()
before = resident("VmRSS")
if library:
    runner = OrtRunner(Path(model), Path(library), threads=threads, record=False)
else:
    runner = RUNTIMES[runtime].model(Path(model), threads)
gc.collect()
opened = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
for image in images:
    runner.infer(image[None])
print(json.dumps({"opened": opened - before, "peak": resident("VmHWM") - before}))
"""


def memory_use(
    runtime: str, model: Path | onnx.ModelProto, library: Path | None,
    images: Sequence[NDArray[np.float32]], threads: int = 1,
) -> Memory | str:  # fmt: skip
    """What a process holds that opens a model and runs pictures through it one by one.

    Args:
        runtime: a name in `artefacts.onnx_file.RUNTIMES`.
        library: the op's library for ONNX Runtime, or None for the function.
        images: float32 [3, H, W] each; the first 16 run.

    Returns:
        MiB beside what the libraries take; or why it is not known, in one line.
    """
    if sys.platform != "linux":
        return "memory is measured on Linux only"
    with scratch("memory") as folder:
        if isinstance(model, onnx.ModelProto):
            proto, model = model, folder / "model.onnx"
            put(model, proto.SerializeToString())
        pictures = folder / "pictures.npy"
        np.save(pictures, np.stack(images[:_PICTURES]))
        job = [runtime, str(model), library and str(library), threads, str(pictures)]
        done = child.tried(_CODE, json.dumps(job), wait=_WAIT)
    if isinstance(done, str):
        return done.replace("loading it", "running it")
    code, said, complained = done
    if code:
        return (complained.strip().splitlines() or ["it failed"])[-1][:160]
    found: Memory = json.loads(said)
    return found
