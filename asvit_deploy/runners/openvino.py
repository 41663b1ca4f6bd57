"""OpenVINO on the CPU, over a model of ours in standard ops.

A kept count that it has not seen makes it compile kernels, once for each number of rows. `warm_up`
pays for that before anyone waits.

`asvit_deploy.graph` is imported where a graph is changed, as in `onnx_runtime`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray

from asvit_deploy import child
from asvit_deploy.errors import UserError
from asvit_deploy.models.config import OUTPUTS
from asvit_deploy.ops import onnx_op
from asvit_deploy.processor import require_threads
from asvit_deploy.requirements import pip_install
from asvit_deploy.runners.base import Prediction, RunnerBase, decode, require_images, stack
from asvit_deploy.runners.onnx_runtime import (
    count_stages,
    is_padded,
    load_model,
    op_of,
    precision_of,
    rows_in,
)

Hint = Literal["f32", "bf16"]
_TYPES = {"f32": "float32", "bf16": "bfloat16"}


def why_not(hint: Hint = "f32") -> str | None:
    """Why it cannot run here, with what to do; None where it can."""
    if importlib.util.find_spec("openvino") is None:
        return f"openvino is not installed; {pip_install('openvino')}"
    if hint == "bf16" and "BF16" not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "this CPU has no bfloat16 for OpenVINO to compute in; name openvino"
    return None


def import_openvino() -> Any:
    """The module, without its telemetry: on import that keeps an identifier in the home folder.

    OpenVINO does without the package where it is not installed, and looks for it no second time.

    Raises:
        UserError: it cannot be imported.
    """
    absent = object()
    before = sys.modules.get("openvino_telemetry", absent)
    if before is absent:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    except Exception as error:  # one that is damaged may raise anything
        line = " ".join(str(error).split())[:120]
        raise UserError(f"openvino cannot be imported ({line}); install it again") from None
    finally:
        if before is absent:
            del sys.modules["openvino_telemetry"]
    return openvino


@functools.cache
def _core() -> Any:
    """The one of this process.

    On a CPU with AVX-512 each gives the thread a signal stack, and the earlier one's back when it
    ends, be that gone or not: after two, a signal that Python handles would end the process.
    """
    return import_openvino().Core()


def standard_ops(model: onnx.ModelProto, name: str = "the model") -> onnx.ModelProto:
    """The model with the op written out, which OpenVINO does not do by itself.

    Raises:
        UserError: it holds the op without its function.
    """
    from asvit_deploy.graph import with_lengths_from_zero

    if onnx_op.nodes_of(model.graph) and not model.functions:
        raise UserError(f"{name} {LACKS_FUNCTION}")
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    return with_lengths_from_zero(model)


LACKS_FUNCTION = (
    f"holds {onnx_op.OP_TYPE} without its function (--ops custom), so OpenVINO cannot run it; "
    "export it with --ops auto or standard"
)


class OpenVinoRunner(RunnerBase):
    """A compiled model of ours, with one stream; not to be called by two threads at once.

    Args:
        source: an ONNX file or a loaded model.
        threads: 0 leaves the choice to OpenVINO.
        record: also return kept tokens and scores (adds outputs to the model in memory).
        hint: what it computes in. OpenVINO's own choice is bfloat16 where the CPU has it, which
            keeps other tokens; float32 means float32 on every backend.
        name: what errors call a loaded model; a file has its own.
        stages: how many it has, where another tool may have taken that out of the file.
        rows: P and the rows that each stage adds, likewise.
        foreign: it is first compiled and run in a child, for it may never end.

    Raises:
        UserError: openvino is missing, the model cannot be compiled, or there are fewer cores than
            `threads`.
    """

    def __init__(
        self,
        source: Path | onnx.ModelProto,
        threads: int = 1,
        record: bool = True,
        hint: Hint = "f32",
        name: str = "the model",
        stages: int | None = None,
        rows: tuple[int, int] | None = None,
        foreign: bool = False,
    ) -> None:
        if lacking := why_not(hint):
            raise UserError(lacking)
        require_threads(threads)
        model = load_model(source)
        name = str(source) if isinstance(source, Path) else name
        self.stages = count_stages(model) if stages is None else stages
        self.padded, self.precision = is_padded(model), precision_of(model)
        self.op = op_of(model, None)
        self._rows = rows_in(model) if rows is None else rows
        shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
        self.batch, self.image_size = shape[0] or None, shape[2]
        if record and self.stages:
            from asvit_deploy.graph import with_stage_outputs

            model = with_stage_outputs(model, self.stages)
        self._outputs = _outputs_of(name, model, self.stages, record)
        data = standard_ops(model, name).SerializeToString()
        core = _core()
        try:
            made = core.read_model(data)
            self.learns_shapes = _rows_vary(made)
        except Exception as error:
            raise UserError(_failure(name, str(error))) from None
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": threads,
            # Two processes with pinned threads would share one core and leave the next idle.
            "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
        if not self.learns_shapes:
            # 2026.4.1 ends the process where it generates code for such graphs and one thread.
            config["SNIPPETS_MODE"] = "DISABLE"
        if foreign:
            _require_end(data, name, config)
        try:
            self._compiled = core.compile_model(made, "CPU", config)
            self._request = self._compiled.create_infer_request()
        except Exception as error:
            raise UserError(_failure(name, str(error))) from None
        self._usual = str(core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string())
        self._device = str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip()
        self._name = name

    def infer(self, images: NDArray[np.float32]) -> Any:
        """What it hands back is overwritten by the next call."""
        return self._request.infer(
            {0: _owned(images)}, share_inputs=True, share_outputs=True
        )  # fmt: skip

    def __call__(self, images: NDArray[np.float32]) -> Prediction:
        """images float32 [B, 3, H, W]; a static model runs them one by one.

        Kept tokens and scores are there as far as the model puts them out.
        """
        require_images(images)
        if self.batch == 1 and len(images) > 1:
            return stack([self(image[None]) for image in images])
        try:
            found = self.infer(images)
        except Exception as error:
            raise UserError(_failure(self._name, str(error))) from None
        output, *rest = (np.array(found[place]) for place in self._outputs)
        lengths, index, scores, into = (
            rest[i * self.stages : (i + 1) * self.stages] for i in range(4)
        )
        if scores:
            return decode(output, lengths, index, scores, *self._rows, into)
        return Prediction(np.asarray(output, np.float32), lengths, prefix=self._rows[0])

    def warm_up(self, images: Iterable[NDArray[np.float32]]) -> None:
        """Compile kernels for the numbers of rows that these pictures show, float32 [3, H, W] each.

        Pictures like those that will come are best, such as those that calibrated: on 64
        photographs of another kind nothing was left to see of the time that new counts take.
        """
        for image in images:
            self.infer(image[None])

    def describe(self) -> dict[str, str]:
        hint = self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        said = {
            "backend": f"openvino {import_openvino().__version__.split('-')[0]}",
            "provider": "CPU",
            "precision": _TYPES.get(hint, hint) if hint != "f32" else self.precision,
            "device": self._device,
            "op": self.op,
            "precision_hint": hint,
        }
        if self._usual != hint:
            said["precision_hint"] += f" (its own choice here would be {self._usual})"
        return said


def _owned(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """OpenVINO shares memory only with what it might write to."""
    return np.require(images, np.float32, ["C", "W"])


def _rows_vary(model: Any) -> bool:
    """Whether shapes inside depend on the picture, so that new ones cost time.

    Args:
        model: as OpenVINO reads it; one of any batch counts by a single picture.
    """
    given = model.input(0)
    shape = given.get_partial_shape()
    if shape[0].is_dynamic:
        single = model.clone()
        shape[0] = 1
        single.reshape({0: shape})
        model = single
    return bool(model.is_dynamic())


def _outputs_of(name: str, model: onnx.ModelProto, stages: int, record: bool) -> list[int]:
    """Places of the network's own output, `length_s`, and `index_s`, `scores_s`, `into_s` if there.

    Raises:
        UserError: the network's own is gone, or the counts of a stage are gone.
    """
    there = [output.name for output in model.graph.output]
    own = next((output for output in OUTPUTS if output in there), None)
    wanted = [f"length_{s}" for s in range(stages)]
    gone = [*([] if own else [" or ".join(OUTPUTS)]), *(n for n in wanted if n not in there)]
    if own is None or gone:
        raise UserError(
            f"{name} has no output {gone[0]}; export it again, and keep its outputs' names"
        )
    more = [f"{kind}_{s}" for kind in ("index", "scores") for s in range(stages)]
    if record and set(more) <= set(there):
        wanted += more
        into = [f"into_{s}" for s in range(stages)]
        wanted += into if set(into) <= set(there) else []
    return [there.index(output) for output in (own, *wanted)]


# --- a graph of another's making ----------------------------------------------------------------

_SECONDS, _WAIT = 60, 240  # of processor time, and in all; DeiT-B compiles and runs in five
_CODE = """
import json, resource, sys, time
import numpy as np
from asvit_deploy.memory import memory
from asvit_deploy.runners.openvino import import_openvino
openvino = import_openvino()
most, seconds, config = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
data = sys.stdin.buffer.read()
try:
    with memory.within(most):
        end = int(time.process_time()) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (end, end + 1))
        core = openvino.Core()
        made = core.compile_model(core.read_model(data), "CPU", config)
        given = made.input(0).get_partial_shape()
        shape = [1 if size.is_dynamic else size.get_length() for size in given]
        made.create_infer_request().infer({0: np.zeros(shape, np.float32)})
except Exception as error:
    print(" ".join(str(error).split()) or "more memory than it may take")
    sys.exit(3)
"""


def _require_end(data: bytes, name: str, config: dict[str, Any]) -> None:
    """Compile and run a graph once in a child.

    Raises:
        UserError: it takes more memory or time than any network of ours, or cannot be run.
    """
    most = (2 << 30) + 6 * len(data)
    done = child.tried(_CODE, str(most), str(_SECONDS), json.dumps(config), given=data, wait=_WAIT)
    if isinstance(done, str):
        raise UserError(
            f"{name} cannot be run by OpenVINO within {_SECONDS} s and the memory of its network "
            f"({done}); export it again"
        )
    code, out, err = done
    if code:
        raise UserError(_failure(name, out if code == 3 else err.strip()[-200:]))


def _failure(name: str, error: str) -> str:
    """One line for what OpenVINO said: its own place in whose sources is of no use."""
    lines = [line.strip() for line in re.sub(r"Exception from \S+:\d+:", "", error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Check '")]
    return f"{name} cannot be run by OpenVINO ({' '.join(said)[:160]}); export it again"
