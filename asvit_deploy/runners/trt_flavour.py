"""Which TensorRT: the enterprise one or TensorRT-RTX, found without importing either.

Importing a binding loads libraries that may end the process, so that is left to the build's own
process (`engine.worker`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from asvit_deploy.errors import UserError
from asvit_deploy.requirements import pip_install, pip_install_extra


@dataclass(frozen=True)
class Flavour:
    """One TensorRT.

    Attributes:
        name: as `--flavour` takes it.
        title: as people call it.
        modules: Python modules that are this binding; pip's `-bindings` package has a longer name.
        libraries: the package of pip that carries the shared libraries.
        library: the file name under which its ONNX parser opens the library again.
        extra: what to install.
        enterprise: has timing caches, inspector, version and hardware compatibility, builds for
            the GPU it finds. Not so RTX, which builds for any GPU on a machine without one.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    libraries: str
    library: str
    extra: str
    enterprise: bool

    @property
    def module(self) -> str | None:
        """The installed module's name, or None."""
        return next((name for name in self.modules if importlib.util.find_spec(name)), None)

    def environment(self, folder: Path) -> dict[str, str]:
        """The environment of a process that builds with it.

        RTX's parser opens `libtensorrt_rtx.so` at the first plugin and ends the process where pip's
        package holds only `libtensorrt_rtx.so.1`: a link of that name goes into `folder`, ahead on
        the loader's path.
        """
        environment = dict(os.environ)
        environment["POLYGRAPHY_USE_TENSORRT_RTX"] = "0" if self.enterprise else "1"
        link = folder / self.library
        library = None if self.enterprise else _packaged(self.libraries, f"{self.library}.*")
        if library is not None and not library.with_name(self.library).exists():
            link.symlink_to(library)
            paths = [str(folder), environment.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
        return environment


ENTERPRISE = Flavour(
    "tensorrt", "TensorRT", ("tensorrt", "tensorrt_bindings"), "tensorrt_libs", "libnvinfer.so",
    "tensorrt", enterprise=True,
)  # fmt: skip
RTX = Flavour(
    "tensorrt-rtx", "TensorRT-RTX", ("tensorrt_rtx", "tensorrt_rtx_bindings"), "tensorrt_rtx_libs",
    "libtensorrt_rtx.so", "rtx", enterprise=False,
)  # fmt: skip
FLAVOURS = {flavour.name: flavour for flavour in (ENTERPRISE, RTX)}


def _packaged(package: str, pattern: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob(pattern))), None)


def has_driver() -> bool:
    """Whether NVIDIA's driver is there; the enterprise builder needs it and a GPU."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def find_flavour(name: str = "auto") -> Flavour:
    """The flavour of that name; "auto" takes TensorRT where it and a driver are, else RTX.

    Raises:
        UserError: it is not installed, or Polygraphy is not.
    """
    candidates = [FLAVOURS[name]] if name != "auto" else [ENTERPRISE, RTX]
    found = [flavour for flavour in candidates if flavour.module]
    if name == "auto" and len(found) == 2 and not has_driver():
        found = [RTX]
    if not found:
        wanted = candidates[-1]
        titles = "TensorRT" if name == "auto" else wanted.title
        raise UserError(
            f"{titles} is not installed; {pip_install_extra(wanted.extra)}"
            + ("" if wanted.enterprise else " (builds without a GPU)")
        )
    if not importlib.util.find_spec("polygraphy"):
        raise UserError(f"Polygraphy is not installed; {pip_install('polygraphy')}")
    return found[0]
