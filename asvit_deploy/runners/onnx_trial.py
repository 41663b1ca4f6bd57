"""A foreign graph's first session and run, in a child that can be stopped at any moment.

ONNX Runtime computes what is constant as it makes a session, and ends a run between two nodes only:
neither has an end that could be set from within the process, and a fault in it would be ours.
"""

from __future__ import annotations

from pathlib import Path

from asvit_deploy import child

SECONDS = 12  # of processor time; the largest network here takes one, its session with it
_WAIT = 120  # seconds in all, on a machine that others use

_CODE = """
import resource, sys, time
import numpy as np, onnxruntime
from asvit_deploy.memory import memory
library, most, seconds = sys.argv[1], *map(int, sys.argv[2:])
data, doing = sys.stdin.buffer.read(), "load"
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 4
try:
    with memory.within(most):
        end = int(time.process_time()) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (end, end + 1))
        if library:
            options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        doing, given = "run", session.get_inputs()[0]
        shape = [size if isinstance(size, int) else 1 for size in given.shape]
        session.run(None, {given.name: np.zeros(shape, np.float32)})
except Exception as error:
    print(doing, " ".join(str(error).split()))
    sys.exit(3)
"""


def failure(data: bytes, library: Path | None, most: int) -> tuple[bool, str] | None:
    """Make a session of a graph and run it on a black picture, elsewhere.

    Args:
        data: the graph, serialised.
        library: the op's C++ library.
        most: bytes of memory that it may take beside its own.

    Returns:
        None where both went well; else whether there was a session, and what went wrong.
    """
    done = child.tried(_CODE, str(library or ""), str(most), str(SECONDS), given=data, wait=_WAIT)
    if isinstance(done, str):
        return True, f"more than {SECONDS} s" if "SIGXCPU" in done or "not end" in done else done
    code, out, err = done
    if code == 0:
        return None
    doing, _, said = out.strip().partition(" ") if code == 3 else ("load", "", err.strip()[-200:])
    return doing == "run", said
