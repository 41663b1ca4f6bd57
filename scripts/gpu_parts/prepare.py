"""`gpu_suite prepare`: one folder that holds all that a GPU machine without network will need."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from asvit_deploy import files
from asvit_deploy.errors import UserError
from asvit_deploy.ops.kernel import build_kernel
from asvit_deploy.ops.library import build_ort, find_compiler, run_compiler
from asvit_deploy.ops.nvcc import ALL_SMS, find_nvcc, gencode, targets_of
from asvit_deploy.ops.trt_library import build_trt, find_trt_headers, sources_dir
from gpu_parts import prepared
from gpu_parts.kit import MANIFEST, Report

MAX_BYTES = 55 << 20
# What of the checkout the parts need; by the C++ sources the plugin's cache knows what it holds.
COPIED = ("asvit_deploy", "plugins", "trt_plugins")
HERE = Path(__file__).resolve().parent

Say = Callable[[str], None]


@dataclass
class Shelf:
    """What has been put into the folder: paths by role, and what is missing with its reason."""

    folder: Path
    device: dict[str, str] = field(default_factory=dict)
    host: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def put(self, kind: str, role: str, make: Callable[[], Path], name: str) -> None:
        """Copy what `make` gives; its error is noted, and the parts that need it will say so."""
        try:
            made = make()
        except UserError as error:
            self.missing[f"{kind} {role}"] = str(error)
            return
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if made != target:
            shutil.copy2(made, target)
        getattr(self, kind)[role] = name


def prepare(
    folder: Path, sms: Sequence[str], rehearse: bool, say: Say, checkout: Path
) -> dict[str, object]:
    """Make the folder, whole or not at all; an earlier preparation there is replaced.

    Args:
        sms: compute capabilities such as "90"; none with `rehearse` alone.
        rehearse: put host twins in too, over which the parts' host side runs without a GPU.
        checkout: this project's.

    Returns:
        the manifest.

    Raises:
        UserError: the folder is something else, no compiler, an unknown SM, or the result is over
            55 MiB.
    """
    _refuse(folder, sms, rehearse, checkout)
    from gpu_parts.prepare_data import start_export, write_all

    with files.atomic_folder(folder) as place:
        _copy_code(place, checkout)
        export = start_export(place, checkout)
        try:
            shelf = Shelf(place)
            if sms:
                _device_code(shelf, sms, say, checkout)
            if rehearse:
                _host_code(shelf, say, checkout)
            say("writing weights, pictures and cases")
            data, missing = write_all(place, checkout, rehearse, export)
        finally:
            export.kill()
        manifest: Report = {
            "schema": prepared.SCHEMA, "sms": list(sms), "device": shelf.device,
            "host": shelf.host, "data": data, "missing": {**shelf.missing, **missing},
            "made_by": {"python": platform.python_version(), "commit": _commit(checkout)},
        }  # fmt: skip
        paths = sorted(path for path in place.rglob("*") if path.is_file())
        manifest["sha256"] = {str(path.relative_to(place)): files.sha256(path) for path in paths}
        (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _refuse_large(place)
    for what, why in manifest["missing"].items():
        say(f"not prepared: {what}: {why}")
    return manifest


def _refuse(folder: Path, sms: Sequence[str], rehearse: bool, checkout: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        try:
            prepared.read(folder)
        except UserError:
            raise UserError(
                f"{folder} exists and holds something else; name a folder that does not exist"
            ) from None
    if not folder.parent.is_dir():
        raise UserError(f"cannot write {folder}: the folder {folder.parent} does not exist")
    for sm in sms:
        if sm not in ALL_SMS:
            raise UserError(f"--sm {sm} is no GPU that we know; name some of {', '.join(ALL_SMS)}")
    if not sms and not rehearse:
        raise UserError("for which GPU? name its compute capability, such as --sm 90")
    if sms and find_nvcc() is None:
        raise UserError("no nvcc: install the CUDA toolkit or set CUDA_HOME")
    for name in COPIED:
        if not (checkout / name).is_dir():
            raise UserError(f"{checkout} is no checkout of this project: {name} is missing")


def _copy_code(place: Path, checkout: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors*", ".*", "*.pyc")
    for name in COPIED:
        shutil.copytree(checkout / name, place / name, ignore=ignore)
    shutil.copytree(HERE, place / HERE.name, ignore=ignore)
    shutil.copy2(HERE.parent / "gpu_suite", place / "gpu_suite")


def _device_code(shelf: Shelf, sms: Sequence[str], say: Say, checkout: Path) -> None:
    """Everything with CUDA code in it, under the names that the package's own cache gives."""
    cache = "cache/asvit-deploy"
    plugin: list[Path] = []

    def build_plugin() -> Path:
        plugin.append(build_trt(sms=sms, say=say))
        return plugin[0]

    try:
        name = build_plugin().parent.name
    except UserError as error:
        shelf.missing["device plugin"] = str(error)
    else:
        for library in sorted(plugin[0].parent.glob("*.so")):
            role = "plugin" if library == plugin[0] else "autoreg"
            shelf.put("device", role, lambda path=library: path, f"{cache}/{name}/{library.name}")  # type: ignore[misc]
    for role, make in (
        ("kernel", lambda: build_kernel(cuda=True, say=say, sms=sms)),
        ("onnxruntime", lambda: build_ort(say=say, cuda=True, sms=sms)),
    ):
        try:
            built = make()
        except UserError as error:
            shelf.missing[f"device {role}"] = str(error)
            continue
        shelf.put("device", role, lambda path=built: path, f"{cache}/{built.name}")  # type: ignore[misc]
    for role, source, flags, name in (
        ("driver", "gpu_driver.cu", ["-lineinfo", "-ldl"], "bin/gpu_driver"),
        ("switch", "gpu_switch.cu", ["-shared", "-Xcompiler", "-fPIC"], "bin/libgpu_switch.so"),
    ):
        shelf.put("device", role, lambda s=source, f=flags, n=name: _nvcc(  # type: ignore[misc]
            checkout / "scripts" / s, shelf.folder / n, f, sms, say), name)  # fmt: skip


def _nvcc(source: Path, output: Path, flags: list[str], sms: Sequence[str], say: Say) -> Path:
    nvcc = find_nvcc()
    assert nvcc is not None, "was asked before"
    headers = find_trt_headers(say).flags if source.name == "gpu_driver.cu" else []
    say(f"compiling {source.name} with {nvcc} for {' '.join(targets_of(sms))}")
    command: list[str | Path] = [nvcc, "-ccbin", find_compiler()[0], "-std=c++17", "-O2", "-cudart"]
    command += ["static", *gencode(targets_of(sms)), *headers, source, "-o", output, *flags]
    output.parent.mkdir(parents=True, exist_ok=True)
    if reason := run_compiler(command):
        raise UserError(f"{nvcc} cannot compile {source.name} ({reason})")
    return output


def _host_code(shelf: Shelf, say: Say, checkout: Path) -> None:
    """The same over host memory: CUDA's runtime is a header of the tests, the kernel its twin."""

    def driver() -> Path:
        output = shelf.folder / "host" / "gpu_driver"
        output.parent.mkdir(parents=True, exist_ok=True)
        include: list[str | Path] = [
            "-I",
            checkout / "tests" / "cpp" / "gpu",
            "-I",
            sources_dir() / "no_cuda",
        ]
        command = [*find_compiler(), "-std=c++17", "-O1", *include, *find_trt_headers(say).flags,
                   "-x", "c++", checkout / "scripts" / "gpu_driver.cu", "-o", output,
                   "-ldl"]  # fmt: skip
        if reason := run_compiler(command):
            raise UserError(f"gpu_driver.cu cannot be compiled for host memory ({reason})")
        return output

    say("building the host twins")
    shelf.put("host", "plugin", lambda: build_trt(twin=True), "host/libasvit_trt_host.so")
    shelf.put("host", "kernel", lambda: build_kernel(cuda=False), "host/libasvit_kernel_host.so")
    shelf.put("host", "onnxruntime", lambda: build_ort(cuda=False), "host/libasvit_ort_host.so")
    shelf.put("host", "driver", driver, "host/gpu_driver")


def _commit(checkout: Path) -> str | None:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=checkout,
                              capture_output=True, text=True)  # fmt: skip
    except OSError:
        return None
    return done.stdout.strip() or None


def _refuse_large(place: Path) -> None:
    sizes = {path: path.stat().st_size for path in place.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        named = ", ".join(f"{p.relative_to(place)} {sizes[p] / 2**20:.1f}" for p in largest)
        raise UserError(
            f"the folder would take {total / 2**20:.1f} MiB, {MAX_BYTES >> 20} allowed (the "
            f"largest: {named} MiB); name fewer SMs"
        )


def size_of(folder: Path) -> float:
    """MiB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def command(folder: Path, sms: Sequence[str], rehearse: bool, checkout: Path) -> None:
    """The command: what was made, on stderr."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    unique = list(dict.fromkeys(sms))
    manifest = prepare(folder, unique, rehearse, say, checkout)
    made = f"SM {', '.join(unique)}" if unique else "rehearsals"
    count = len(manifest["sha256"])  # type: ignore[arg-type]
    say(f"prepared for {made}: {folder}, {count} files, {size_of(folder):.1f} MiB")
