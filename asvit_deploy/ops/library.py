"""The op's C++ library for ONNX Runtime: its sources, its place in the cache, its compilation."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from asvit_deploy import child, trusted
from asvit_deploy.disk import FULL, unwritten
from asvit_deploy.errors import UserError
from asvit_deploy.files import cache_dir, make_cache_dir, scratch
from asvit_deploy.ops.headers import WITHOUT, Headers, find_headers, runtime_api
from asvit_deploy.ops.nvcc import find_nvcc, gencode, targets_of
from asvit_deploy.ops.prebuilt import building, complain, differs, usable
from asvit_deploy.status import Say, silent

SOURCES = ("ort_ops.cc", "ort_kernel.h", "threshold_compact.h")
# What the CUDA kernels add; they share the TensorRT plugin's.
CUDA_SOURCES = (
    "ort_cuda.cc", "ort_cuda.h", "../trt_plugins/kernels/threshold_compact.cu",
    "../trt_plugins/kernels/threshold_compact.cuh", "../trt_plugins/kernels/threshold_compact.h",
)  # fmt: skip
FLAGS = ("-std=c++17", "-O3", "-shared")
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden")
# CUDA's runtime goes into the file, hidden: it loads where there is neither CUDA nor a driver.
CUDA_FLAGS = ("-DASVIT_CUDA", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL")

MEND = "run `asvit-deploy build-plugins ort`"

Targets = tuple[str, ...]  # as `nvcc.targets_of` names them; none: no CUDA kernels

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


def library_path(api: int, targets: Targets = ()) -> Path:
    """Where the library for that API version and those GPUs stands in the cache, built or not.

    The name holds a digest of everything that shapes the file, so a stale build has another name.
    """
    flags = (FLAGS, HOST_FLAGS, CUDA_FLAGS if targets else ())
    digest = hashlib.sha256(repr((api, flags, sys.platform, platform.machine())).encode())
    for name in SOURCES + (CUDA_SOURCES if targets else ()):
        digest.update((sources_dir() / name).read_bytes())
    cuda = f"cuda.{'.'.join(targets)}-" if targets else ""
    return cache_dir() / f"libasvit_ort-api{api}-{cuda}{digest.hexdigest()[:16]}.so"


def cuda_targets(library: Path) -> Targets:
    """The GPUs for which a library from the cache has kernels, by its name."""
    match = re.match(r"libasvit_ort-api\d+-cuda\.([\w.]+)-", library.name)
    return tuple(match[1].split(".")) if match else ()


def find_library(cuda: bool | None = None, say: Say = complain) -> Path | None:
    """The library in the user's cache that fits the sources and the installed onnxruntime.

    One that is damaged, or that another user could have written, is passed over.

    Args:
        cuda: with CUDA kernels or without; by default one with them is preferred.
        say: called with a line on what was passed over, and why.

    Raises:
        UserError: there is no cache, or others may write in it.
    """
    runtime = runtime_api()
    found: list[tuple[int, bool, float, Path]] = []
    for path in cache_dir().glob("libasvit_ort-api*.so"):
        match = re.match(r"libasvit_ort-api(\d+)-", path.name)
        if match is None or (runtime is not None and int(match[1]) > runtime):
            continue
        targets = cuda_targets(path)
        fits = cuda is None or cuda == bool(targets)
        if fits and library_path(int(match[1]), targets) == path:
            found.append((int(match[1]), bool(targets), path.lstat().st_mtime, path))
    # Of several, one that was built for another machine's GPUs holds nothing that runs on these.
    here = targets_of(()) if len(found) > 1 else None
    ranked = sorted((api, gpu, cuda_targets(path) == here, changed, path)
                    for api, gpu, changed, path in found)  # fmt: skip
    best_first = (path for *_, path in reversed(ranked))
    return next((path for path in best_first if usable(path, MEND, say)), None)


def find_compiler() -> list[str]:
    """The C++ compiler's command: CXX, g++ or clang++.

    Raises:
        UserError: there is none, or CXX is no command.
    """
    text = os.environ.get("CXX", "")
    try:
        named = shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"no C++ compiler: CXX={text} is no command ({error}); correct it or unset it"
        ) from None
    for command in [named] if named else [["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX={named[0]} is no program here" if named else "neither g++ nor clang++ found"
    raise UserError(
        f"no C++ compiler: {missing}; nothing else needs the library, models run with their "
        "model-local function; to build it, install g++ or set CXX"
    )


def compile_command(
    compiler: list[str], headers: Headers, nvcc: Path | None, targets: Targets
) -> list[str]:
    """The command that compiles the sources, less `-o`; with CUDA kernels where `nvcc` is given."""
    sources = sources_dir()
    system = ["-isystem", str(headers.folder)]
    if nvcc is None:
        return [*compiler, *FLAGS, *HOST_FLAGS, *system, str(sources / SOURCES[0])]
    through = [word for flag in (*compiler[1:], *HOST_FLAGS) for word in ("-Xcompiler", flag)]
    inputs = [
        sources / SOURCES[0],
        *(sources / n for n in CUDA_SOURCES if n.endswith((".cc", ".cu"))),
    ]
    return [str(nvcc), "-ccbin", compiler[0], *FLAGS, *CUDA_FLAGS, *through, *gencode(targets),
            *system, "-I", str(sources.parent / "trt_plugins"), *map(str, inputs)]  # fmt: skip


def compile_library(
    compiler: list[str], headers: Headers, output: Path, nvcc: Path | None = None,
    targets: Targets = (),
) -> None:  # fmt: skip
    """Compile the sources to `output`; with CUDA kernels for `targets` where `nvcc` is given.

    Raises:
        UserError: the compiler fails.
    """
    if reason := run_compiler([*compile_command(compiler, headers, nvcc, targets), "-o", output]):
        raise UserError(
            f"{nvcc or shlex.join(compiler)} cannot compile {sources_dir()} ({reason}); name "
            f"another compiler with CXX; {WITHOUT}"
        )


def run_compiler(command: Sequence[str | Path]) -> str | None:
    """Why a compilation failed, in one line; None when it did not.

    Raises:
        UserError: others may exchange what compilers put into the folder for temporary files.
    """
    trusted.require_temporary()
    with scratch("compiler") as folder:  # compilers that are killed leave what they wrote
        return _compiled(command, {**os.environ, "TMPDIR": str(folder)})


def _compiled(command: Sequence[str | Path], environment: dict[str, str]) -> str | None:
    # What comes out is for us alone, also while it is being written.
    umask = 0o077 if os.name == "posix" else -1
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            umask=umask,
            env=environment,
        )
    except OSError as error:  # a script without its interpreter, a program of another machine
        return f"it cannot be run: {error.strerror}"
    if done.returncode == 0:
        return None
    for number in FULL:
        if (full := os.strerror(number)) in done.stderr:
            # Of which file it said so stands in front: `Fatal error: can't write 80 bytes to …: …`.
            named = re.findall(rf"(/[^\s:]+): {full}", done.stderr)
            raise unwritten(named[0] if named else _output_of(command), OSError(number, full))
    lines = (done.stderr + done.stdout).splitlines() or [f"exit code {done.returncode}"]
    reason = next((line for line in lines if "error" in line or "fatal" in line), lines[-1])
    return reason[:200]


def _output_of(command: Sequence[str | Path]) -> str:
    words = [str(word) for word in command]
    return words[words.index("-o") + 1] if "-o" in words[:-1] else "what it compiles"


def build_ort(
    headers: Path | None = None, force: bool = False, say: Say = silent, cuda: bool | None = None,
    sms: Sequence[str] = (),
) -> Path:  # fmt: skip
    """The library for ONNX Runtime, compiled into the user's cache unless it is there.

    Args:
        headers: folder of ONNX Runtime's C++ headers; else `headers.find_headers` looks.
        force: compile also where the cache holds one.
        say: called with a line on what is used.
        cuda: with kernels for the CUDA provider, or without; by default with them where nvcc is
            and can compile them. The CPU's are always there.
        sms: compute capabilities such as "90" to compile for, as `nvcc.targets_of` takes them.

    Raises:
        UserError: no headers, no compiler, or the result cannot be loaded. The cache keeps what
            it had.
    """
    nvcc = None if cuda is False else find_nvcc()
    if cuda and nvcc is None:
        raise UserError(
            "no CUDA compiler: no nvcc under CUDA_HOME, on the PATH or in /usr/local/cuda; install "
            "the CUDA toolkit or set CUDA_HOME, or leave --cuda out for the CPU alone"
        )
    if headers is None and not force and not sms and (path := find_library(nvcc is not None, say)):
        say(f"built before for {_kernels(cuda_targets(path))}; --force builds it again")
        return path
    compiler = find_compiler()
    found = find_headers(headers, say)
    say(f"headers: {found}")
    say(f"compiler: {shlex.join(compiler)}")
    if nvcc is not None:
        try:
            return _build(compiler, found, force, say, nvcc, sms)
        except UserError as error:
            if cuda:
                raise
            say(f"no CUDA kernels: {error}")
    return _build(compiler, found, force, say)


def _kernels(targets: Targets) -> str:
    return f"CPU and CUDA ({' '.join(targets)})" if targets else "CPU"


def _build(
    compiler: list[str], headers: Headers, force: bool, say: Say, nvcc: Path | None = None,
    sms: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Compile one flavour into the cache, and put it in place once it has been loaded."""
    targets = targets_of(sms) if nvcc else ()
    path = library_path(headers.api, targets)
    say(f"kernels: {_kernels(targets)}")
    if not force and usable(path, MEND, silent):
        return path
    make_cache_dir()
    with building(path) as temporary:
        compile_library(compiler, headers, temporary, nvcc, targets)
        if runtime_api() is not None and (reason := check_library(temporary)):
            raise UserError(f"the library was built, but {reason}; {WITHOUT}")
    return path


def check_library(path: Path) -> str | None:
    """Why this onnxruntime cannot use the op's library `path`, in one line; None when it can."""
    if not path.is_file():
        return "there is no such file"
    if reason := differs(path):
        return reason
    done = child.tried(_PROBE, str(path.resolve()))
    if isinstance(done, str):
        return done
    code, out, err = done
    if code == 0:
        return None
    if code == 3:
        return _reason(out.strip())
    return f"it could not be tried ({(err.strip().splitlines() or ['no reason given'])[-1]})"


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
