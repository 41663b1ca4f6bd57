"""The op's kernel without any framework around it: its two steps, on memory that the caller owns.

What the libraries for ONNX Runtime and TensorRT carry inside is here a library of its own, called
through ctypes: CUDA's kernel for device memory, or its host twin for host memory. Between the two
steps the caller learns how many rows stay, and so can choose the buffer that they go to.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asvit_deploy.errors import UserError
from asvit_deploy.files import cache_dir, make_cache_dir
from asvit_deploy.ops.library import find_compiler, run_compiler
from asvit_deploy.ops.nvcc import find_nvcc, gencode, targets_of
from asvit_deploy.ops.prebuilt import building, usable
from asvit_deploy.ops.trt_library import KERNEL, TWIN, sources_dir
from asvit_deploy.status import Say, silent

FLAGS = ("-std=c++17", "-O3", "-shared")
GIVEN = "ASVIT_KERNEL"


class _Call(ctypes.Structure):
    """`AsvitThresholdCompact` of trt_plugins/kernels/threshold_compact.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "rows", "width")),
        *((name, ctypes.c_int32) for name in ("element_bytes", "size_bytes")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "tokens", "scores", "threshold", "compact", "index", "length", "size", "workspace",
            )
        ),
        ("prefix", ctypes.c_int64),
    )  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """What the first step takes and leaves: addresses of B images of M rows.

    Attributes:
        images, rows: B and M.
        scores: float32 [B, M-P].
        threshold: float32, one number.
        length: int64 [B], filled.
        size: int64, one number, filled: the highest length.
        workspace: 2·B·M bytes, filled.
        prefix: P, the rows at the front of each image that always stay.
    """

    images: int
    rows: int
    scores: int
    threshold: int
    length: int
    size: int
    workspace: int
    prefix: int = 1


class Kernel:
    """The loaded library; all arguments are addresses in its kind of memory.

    CUDA launches on the current device: it has to be the one of the addresses and of the stream
    (`runners.place.Place.current`).

    Args:
        path: from `build_kernel`.

    Raises:
        UserError: it cannot be loaded, or takes another kind of call.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be loaded ({error})") from None
        # A library made elsewhere may be of another version, which would misread what it is given.
        describe = getattr(self._library, "asvitThresholdCompactCallBytes", None)
        if describe is None or describe() != ctypes.sizeof(_Call):
            raise UserError(
                f"{path} is no kernel of this version of asvit-deploy; build it again, or unset "
                f"{GIVEN}"
            )
        for name in ("asvitThresholdCompactCount", "asvitThresholdCompactGather"):
            function = getattr(self._library, name)
            function.argtypes = (ctypes.POINTER(_Call), ctypes.c_void_p)
            function.restype = ctypes.c_int32

    def count(self, given: Counted, stream: int = 0) -> None:
        """Step one: put the counting on `stream`; it fills length, size and workspace.

        Raises:
            RuntimeError: the shapes are not allowed (M is 2 to 4096, P 1 to M-1), or CUDA refuses.
        """
        self._do("asvitThresholdCompactCount", self._call(given), stream)

    def gather(
        self, given: Counted, tokens: int, width: int, element_bytes: int, compact: int,
        index: int, size: int | None = None, stream: int = 0,
    ) -> None:  # fmt: skip
        """Step two: fill compact T [B, size, D] and index int64 [B, size], -1 and zeros behind.

        Args:
            given: as step one has left it.
            tokens: T [B, M, D], elements of 2 or 4 bytes.
            width: D.
            size: where a number from the highest length to M stands, int64; by default that of
                step one.

        Raises:
            RuntimeError: the shapes are not allowed, or CUDA refuses.
        """
        call = self._call(given)
        call.tokens, call.width, call.element_bytes = tokens, width, element_bytes
        call.compact, call.index, call.size = compact, index, size or given.size
        self._do("asvitThresholdCompactGather", call, stream)

    @staticmethod
    def _call(given: Counted) -> _Call:
        return _Call(
            images=given.images, rows=given.rows, size_bytes=8, scores=given.scores,
            threshold=given.threshold, length=given.length, size=given.size,
            workspace=given.workspace, prefix=given.prefix,
        )  # fmt: skip

    def _do(self, name: str, call: _Call, stream: int) -> None:
        if status := getattr(self._library, name)(ctypes.byref(call), stream):
            shape = f"B={call.images}, M={call.rows}, P={call.prefix}"
            raise RuntimeError(f"{name} ended with {status} for {shape}")


def build_kernel(cuda: bool, say: Say = silent, sms: Sequence[str] = ()) -> Path:
    """The kernel's library for device memory (`cuda`) or host memory, in the user's cache.

    Where there is no compiler, the environment variable ASVIT_KERNEL names one built elsewhere.

    Args:
        sms: compute capabilities such as "90", as `nvcc.targets_of` takes them.

    Raises:
        UserError: no compiler, or it fails; ASVIT_KERNEL names no file; or others may write in the
            cache.
    """
    if given := os.environ.get(GIVEN):
        if not Path(given).is_file():
            raise UserError(f"{GIVEN}={given} is no file; correct it or unset it")
        return Path(given)
    sources, nvcc = sources_dir(), find_nvcc() if cuda else None
    if cuda and nvcc is None:
        raise UserError("no CUDA compiler: no nvcc; install the CUDA toolkit or set CUDA_HOME")
    targets = targets_of(sms) if cuda else ("host",)
    digest = hashlib.sha256(repr((FLAGS, targets, sys.platform, platform.machine())).encode())
    for file in sorted((sources / "kernels").iterdir()):
        digest.update(file.read_bytes())
    name = f"libasvit_kernel-{'.'.join(targets)}-{digest.hexdigest()[:16]}.so"
    path = cache_dir() / name
    if usable(path, "it is built again"):
        return path
    compiler = find_compiler()
    command = [*compiler, *FLAGS, "-fPIC", str(sources / TWIN)]
    if nvcc is not None:
        command = [str(nvcc), "-ccbin", compiler[0], *FLAGS, "-Xcompiler", "-fPIC", "-cudart",
                   "static", *gencode(targets), str(sources / KERNEL)]  # fmt: skip
    say(f"compiling the kernel with {command[0]} for {' '.join(targets)}")
    make_cache_dir()
    with building(path) as temporary:
        if reason := run_compiler([*command, "-o", temporary]):
            raise UserError(f"{command[0]} cannot compile {sources} ({reason})")
    return path
