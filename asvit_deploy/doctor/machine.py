"""The machine: compilers, the op's library, processor, GPU."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from asvit_deploy.doctor.finding import Finding
from asvit_deploy.doctor.installation import Installation, output_of
from asvit_deploy.errors import UserError
from asvit_deploy.processor import cpu_name, usable_cores

_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def compiler(site: Installation) -> list[Finding]:
    """The C++ compiler that `build-plugins` would take, tried on one standard header."""
    from asvit_deploy.ops.library import find_compiler

    try:
        command = find_compiler()
    except UserError as error:
        remedy = "install g++ or clang++, or name one in CXX (only for build-plugins)"
        detail = str(error).partition(";")[0].removeprefix("no C++ compiler: ")
        named = bool(os.environ.get("CXX"))
        return [Finding("C++ compiler", "broken" if named else "missing", detail, remedy)]
    version = (output_of([*command, "--version"]) or "version unknown").splitlines()[0]
    said = f"{' '.join(command)}: {version}"
    test = [*command, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    if output_of(test, "#include <vector>\n") is None:
        remedy = "install the C++ standard library's headers (libstdc++-dev or build-essential)"
        return [Finding("C++ compiler", "broken", f"{said}, compiles no C++17", remedy)]
    return [Finding("C++ compiler", "ok", said)]


def nvcc(site: Installation) -> list[Finding]:
    """The CUDA compiler that `build-plugins` would take."""
    from asvit_deploy.ops.nvcc import find_nvcc

    remedy = "install the CUDA toolkit (only to compile CUDA kernels)"
    path = find_nvcc()
    if path is None:
        return [Finding("nvcc", "missing", "not found", remedy)]
    version = output_of([str(path), "--version"])
    if version is None:
        return [Finding("nvcc", "broken", f"{path} cannot be run", remedy)]
    release = re.search(r"release (\S+?),", version)
    return [Finding("nvcc", "ok", f"{path}: {release[1] if release else 'version unknown'}")]


# Looks only: `find_headers` would download where nothing is found.
_ASK_LIBRARY = """
import json, os, pathlib
from asvit_deploy.errors import UserError
from asvit_deploy.ops import headers, library
runtime, named = headers.runtime_api(), os.environ.get("ORT_INCLUDE_DIR")
given = named and headers.read_headers(pathlib.Path(named), "given")
path, nowhere, found, passed = None, None, [given], []
try:
    found = found if named else headers.present()
    path = library.find_library(say=passed.append)
except (UserError, OSError) as error:
    found, nowhere = found if named else list(headers.installed()), str(error)
fit = [str(h) for h in found if h and not headers.unfit(h, runtime)]
print(json.dumps({"headers": fit, "named": named, "library": path and str(path), "passed": passed,
                  "nowhere": nowhere, "trouble": path and library.check_library(path)}))
"""


def op_library(site: Installation) -> list[Finding]:
    """ONNX Runtime's C++ headers on this machine, and the built library of the op."""
    names = ("ORT headers", "op library")
    answer = site.ask(_ASK_LIBRARY)
    if "error" in answer:
        remedy = "repair onnxruntime first; models run without the library"
        return [Finding(name, "broken", answer["error"], remedy) for name in names]
    return [
        _headers(answer["headers"], answer["named"]),
        _library(answer["library"], answer["trouble"], answer["nowhere"], answer["passed"]),
    ]


def _headers(fit: list[str], named: str | None) -> Finding:
    if fit:
        return Finding("ORT headers", "ok", fit[0])
    if named:
        detail = f"ORT_INCLUDE_DIR={named} holds none that fit"
        remedy = "name the headers of the installed onnxruntime's version or an older one"
        return Finding("ORT headers", "broken", detail, remedy)
    remedy = "`asvit-deploy build-plugins ort` obtains them on Debian; else set ORT_INCLUDE_DIR"
    return Finding("ORT headers", "missing", "none on this machine", remedy)


def _library(
    path: str | None, trouble: str | None, nowhere: str | None, passed: list[str]
) -> Finding:
    from asvit_deploy.ops.library import cuda_targets

    if nowhere is not None:
        detail, _, remedy = nowhere.partition("; ")
        if "no home folder" not in detail:
            return _passed_over("op library", nowhere, " (models also run without it)")
        return Finding("op library", "missing", detail, f"{remedy} (models also run without it)")
    if path is None and passed:
        return _passed_over("op library", passed[0], " (models also run without it)")
    if path is None:
        remedy = "`asvit-deploy build-plugins ort` (models also run without, on their function)"
        return Finding("op library", "missing", "not built", remedy)
    if trouble:
        remedy = "`asvit-deploy build-plugins ort --force`"
        return Finding("op library", "broken", f"{path}: {trouble}", remedy)
    cuda = " ".join(cuda_targets(Path(path)))
    return Finding("op library", "ok", f"{path}, {f'CPU and CUDA ({cuda})' if cuda else 'CPU'}")


def _passed_over(name: str, reason: str, more: str = "") -> Finding:
    """The row of a library that is there and not loaded: damaged, or not ours alone."""
    detail, _, remedy = reason.partition("; ")
    return Finding(name, "broken", detail, f"{remedy}{more}")


def trt_plugin(site: Installation) -> list[Finding]:
    """The built TensorRT plugin, loaded in a child."""
    from asvit_deploy.ops.trt_library import check_trt_library, find_trt_plugin

    name = "TensorRT plugin"
    passed: list[str] = []
    try:
        path = find_trt_plugin(passed.append)
    except UserError as error:
        return [_passed_over(name, str(error))]
    if path is None and passed:
        return [_passed_over(name, passed[0])]
    if path is None:
        remedy = "`asvit-deploy build-plugins trt` (`build-engine --mode padded` needs none)"
        return [Finding(name, "missing", "not built", remedy)]
    if trouble := check_trt_library(path):
        remedy = "`asvit-deploy build-plugins trt --force`"
        return [Finding(name, "broken", f"{path}: {trouble}", remedy)]
    version = re.match(r"trt-([\d.]+)-", path.parent.name)
    return [Finding(name, "ok", f"{path}, headers {version[1] if version else 'unknown'}")]


def cpu(site: Installation) -> list[Finding]:
    """The processor, and how much of it is ours."""
    return [Finding("CPU", "ok", cpu_line(cpu_name(), usable_cores(), _read("/proc/cpuinfo"),
                                          _read("/sys/fs/cgroup/cpu.max")))]  # fmt: skip


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cpu_line(name: str, cores: int, cpuinfo: str, quota: str) -> str:
    """Name, usable cores, a container's quota, and the instructions that speed low precision up.

    `cpuinfo` and `quota` are the texts of /proc/cpuinfo and of cgroup's cpu.max.
    """
    line = f"{name}, {cores} usable core{'s' * (cores != 1)}"
    share = re.match(r"(\d+) (\d+)", quota)
    if share and int(share[1]) < cores * int(share[2]):
        line += f", limited to the time of {int(share[1]) / int(share[2]):g}"
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    if match:
        flags = set(match[1].split())
        line += f"; {' '.join(flag for flag in _CPU_FLAGS if flag in flags) or 'no AVX2'}"
    return line


def gpu(site: Installation) -> list[Finding]:
    """NVIDIA GPUs, as the driver sees them."""
    query = "name,compute_cap,memory.total,driver_version"
    answer = output_of(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    if answer:
        return [Finding("GPU", "ok", gpu_line(line)) for line in answer.splitlines()]
    if answer is None and shutil.which("nvidia-smi"):
        remedy = "see what nvidia-smi says; the driver may need a restart or an update"
        return [Finding("GPU", "broken", "nvidia-smi fails", remedy)]
    return [Finding("GPU", "missing", "no NVIDIA GPU (only engines and CUDA need one)")]


def gpu_line(csv: str) -> str:
    """A row of nvidia-smi (name, compute capability, memory, driver) in words."""
    name, capability, memory, driver = (part.strip() for part in csv.split(","))
    return f"{name}, SM {capability}, {memory}, driver {driver}"


CHECKS = (compiler, nvcc, op_library, trt_plugin, cpu, gpu)
