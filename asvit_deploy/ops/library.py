"""The op's C++ library for ONNX Runtime: its sources, its place in the cache, its compilation."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from asvit_deploy import files
from asvit_deploy.errors import UserError
from asvit_deploy.ops.headers import (
    WITHOUT,
    Headers,
    Say,
    cache_dir,
    find_headers,
    make_cache_dir,
    runtime_api,
    silent,
)

SOURCES = ("ort_ops.cc", "threshold_compact.h")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")

# Loads the library in a process of its own, since a bad one may end the process, and asks ONNX
# Runtime for a kernel of the op.
_PROBE = """
import sys
try:
    import onnx, onnxruntime
except ImportError as error:
    sys.exit(f"no probe: {error}")
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
model = onnx.parser.parse_model('''
    <ir_version: 10, opset_import: ["": 20, "asvit": 1]>
    probe (float[B,M,D] tokens, float[B,N] scores, float threshold)
        => (float[B,K,D] compact, int64[B,K] index, int64[B] length, int64 size) {
        compact, index, length, size = asvit.ThresholdCompact (tokens, scores, threshold)
    }''').SerializeToString()
try:
    options.register_custom_ops_library(sys.argv[1])
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
except Exception as error:
    print(" ".join(str(error).split()))
    sys.exit(3)
"""


def sources_dir() -> Path:
    """The folder of the C++ sources: in the wheel, or in the checkout.

    Raises:
        UserError: they are in neither place.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_cpp" / "plugins", package.parent / "plugins"):
        if all((folder / name).is_file() for name in SOURCES):
            return folder
    raise UserError(f"the C++ sources are not beside {package}; install asvit-deploy again")


def library_path(api: int) -> Path:
    """Where the library for that API version stands in the cache, built or not.

    The name holds a digest of everything that shapes the file, so a stale build has another name.
    """
    digest = hashlib.sha256(repr((api, FLAGS, sys.platform, platform.machine())).encode())
    for name in SOURCES:
        digest.update((sources_dir() / name).read_bytes())
    return cache_dir() / f"libasvit_ort-api{api}-{digest.hexdigest()[:16]}.so"


def find_library() -> Path | None:
    """The library in the user's cache that fits the sources and the installed onnxruntime."""
    runtime = runtime_api()
    names = (re.match(r"libasvit_ort-api(\d+)-", path.name) for path in cache_dir().glob("*.so"))
    for api in sorted({int(match[1]) for match in names if match}, reverse=True):
        path = library_path(api)
        if path.is_file() and (runtime is None or api <= runtime):
            return path
    return None


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX, g++ or clang++.

    Raises:
        UserError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX={named[0]} is no program here" if named else "neither g++ nor clang++ found"
    raise UserError(
        f"no C++ compiler: {missing}; nothing else needs the library, models run with their "
        "model-local function; to build it, install g++ or set CXX"
    )


def compile_library(compiler: list[str], headers: Headers, output: Path) -> None:
    """Compile the sources to `output`.

    Raises:
        UserError: the compiler fails.
    """
    sources = sources_dir()
    command = [*compiler, *FLAGS, "-isystem", str(headers.folder), str(sources / SOURCES[0])]
    done = subprocess.run(
        [*command, "-o", str(output)], capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise UserError(
            f"{shlex.join(compiler)} cannot compile {sources} ({reason[:200]}); {WITHOUT}"
        )


def build_ort(headers: Path | None = None, force: bool = False, say: Say = silent) -> Path:
    """The library for ONNX Runtime, compiled into the user's cache unless it is there.

    Args:
        headers: folder of ONNX Runtime's C++ headers; else `headers.find_headers` looks.
        force: compile also where the cache holds one.
        say: is told what is used.

    Raises:
        UserError: no headers, no compiler, or the result cannot be loaded. The cache keeps what
            it had.
    """
    if headers is None and not force and (path := find_library()):
        say("built before; --force builds it again")
        return path
    compiler = find_compiler()
    found = find_headers(headers, say)
    path = library_path(found.api)
    say(f"headers: {found}")
    say(f"compiler: {shlex.join(compiler)}")
    if path.is_file() and not force:
        return path
    make_cache_dir()
    with files.atomic(path) as temporary:
        compile_library(compiler, found, temporary)
        if runtime_api() is not None and (reason := check_library(temporary)):
            raise UserError(f"the library was built, but {reason}; {WITHOUT}")
    return path


def check_library(path: Path) -> str | None:
    """Why this onnxruntime cannot use the op's library `path`, in one line; None when it can."""
    if not path.is_file():
        return "there is no such file"
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, str(path.resolve())],
        capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"loading it ends the process ({signal.Signals(-done.returncode).name})"
    if done.returncode == 3:
        return _reason(done.stdout.strip())
    return (
        f"it could not be tried ({(done.stderr.strip().splitlines() or ['no reason given'])[-1]})"
    )


def _reason(message: str) -> str:
    """ONNX Runtime's words about a library, put plainly where they are known."""
    if match := re.search(r"this custom op library needs ONNX Runtime API.*", message):
        return f"it was built for another ONNX Runtime: {match[0]}"
    if "not a registered function/op" in message:
        return "it does not hold asvit::ThresholdCompact"
    if "RegisterCustomOps" in message and "symbol" in message:
        return "it is a library, but not of ONNX Runtime ops"
    if re.search(r"invalid ELF header|file too short|not a mach-o|slice is not valid", message):
        return "it is not a shared library"
    return f"ONNX Runtime cannot load it ({message[:200]})"
