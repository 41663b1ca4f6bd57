"""What numbers a network computes in: one row a precision, read by every room.

A precision goes by two names. Commands, file names and the limits of `parity` say `fp16`; sidecars,
metadata and PyTorch say `float16`. Nothing here imports ONNX or PyTorch before it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    import torch

# What a graph can be rewritten to (`exporting.half`); float32 is what it is exported in.
Half = Literal["fp16", "bf16"]


@dataclass(frozen=True)
class Precision:
    """One precision.

    Attributes:
        option: its name in commands and file names, and its key in `parity.LIMITS`.
        name: its name in sidecars, in metadata and in PyTorch.
        onnx_name: its name in `onnx.TensorProto`.
        tensorrt_name: its name in TensorRT's `DataType`.
        half: whether `exporting.half` writes it into a float32 graph.
        missing: runtimes that lack kernels for it on a CPU.
    """

    option: str
    name: str
    onnx_name: str
    tensorrt_name: str
    half: bool = False
    missing: frozenset[str] = frozenset()

    @property
    def onnx_type(self) -> int:
        """As `onnx.TensorProto.DataType`."""
        import onnx

        return onnx.TensorProto.DataType.Value(self.onnx_name)

    @property
    def tensor_type(self) -> str:
        """As ONNX's schemas and ONNX Runtime's sessions write it: `tensor(float16)`."""
        return f"tensor({self.onnx_name.lower()})"

    @property
    def torch_type(self) -> torch.dtype:
        import torch

        return getattr(torch, self.name)

    @property
    def rewritten(self) -> Half | None:
        """What `exporting.half` is asked for; None where the graph stays as it is exported."""
        return cast(Half, self.option) if self.half else None

    def runs_on(self, runtime: str) -> bool:
        """Whether that runtime has kernels for it on a CPU."""
        return runtime not in self.missing


FLOAT32 = Precision("float32", "float32", "FLOAT", "FLOAT")
TABLE = (
    FLOAT32,
    Precision("fp16", "float16", "FLOAT16", "HALF", True),
    Precision(
        "bf16", "bfloat16", "BFLOAT16", "BF16", half=True, missing=frozenset({"onnxruntime"})
    ),
    Precision("int8", "int8", "INT8", "INT8"),  # linear layers alone, see `exporting.int8`
)


def of_option(option: str | None) -> Precision:
    """By its name in commands; None, no option at all, is float32.

    Raises:
        KeyError: there is none of that name.
    """
    return FLOAT32 if option is None else {row.option: row for row in TABLE}[option]


def of_name(name: str) -> Precision:
    """By its name in sidecars.

    Raises:
        KeyError: there is none of that name.
    """
    return {row.name: row for row in TABLE}[name]


def of_tensor_type(kind: str) -> Precision:
    """By the type that ONNX Runtime gives an input or an output, such as `tensor(float)`.

    Raises:
        KeyError: there is none of that type.
    """
    return {row.tensor_type: row for row in TABLE}[kind]


HALVES = tuple(row for row in TABLE if row.half)
OPTIONS = tuple(row.option for row in TABLE)
NAMES = tuple(row.name for row in TABLE)
