"""A TensorRT plan and what it takes to load one: the flavour's module, its logger, the plugin."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import torch

from asvit_deploy.engine.flavour import FLAVOURS, Flavour
from asvit_deploy.errors import UserError
from asvit_deploy.files import sha256
from asvit_deploy.ops import onnx_op
from asvit_deploy.requirements import pip_install_extra


def require_gpu(name: str) -> None:
    """Refuse to run an engine where PyTorch sees no GPU.

    Raises:
        UserError: it names the mend.
    """
    if torch.cuda.is_available():
        return
    why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "no GPU is found"
    raise UserError(
        f"{name} is an engine and runs on an NVIDIA GPU, which PyTorch must see ({why}); "
        "install a CUDA build of torch on a machine with a GPU, or name the .onnx file"
    )


def import_flavour(name: str) -> tuple[Flavour, Any]:
    """The flavour that a sidecar names, and its Python module.

    Raises:
        UserError: it is not installed.
    """
    flavour = FLAVOURS[name]
    if flavour.module is None:
        raise UserError(f"{flavour.title} is not installed; {pip_install_extra(flavour.extra)}")
    return flavour, importlib.import_module(flavour.module)


def plugin_for(fields: dict[str, Any], name: str) -> Path | None:
    """The plugin library to load before a plan: None where the plan needs or carries none.

    The one that it was built with, as long as that is unchanged and no host twin; else the one that
    this machine built.

    Raises:
        UserError: there is none, or the recorded one has changed.
    """
    from asvit_deploy.ops.trt_library import find_trt_plugin, runs_on_gpus

    recorded = fields.get("plugin")
    if recorded is None or recorded["embedded"]:
        return None
    path = Path(recorded["path"])
    changed = path.is_file() and sha256(path) != recorded["sha256"]
    if path.is_file() and not changed and runs_on_gpus(path):
        return path
    if (here := find_trt_plugin()) is not None:
        return here
    build = "run `asvit-deploy build-plugins trt`"
    if changed:
        raise UserError(f"{path} changed since {name} was built with it; {build}")
    raise UserError(f"{name} needs the TensorRT plugin, which is not built here; {build}")


@functools.cache
def logger_of(trt: Any) -> Any:
    """The process's logger, of which TensorRT takes but one: it keeps errors and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def said(logger: Any) -> str:
    """What TensorRT logged since it was last asked, in brackets, or nothing."""
    errors, logger.errors = logger.errors, []
    return f" ({' '.join(errors[0].split())[:200]})" if errors else ""


def load_plan(
    trt: Any, flavour: Flavour, plan: bytes, fields: dict[str, Any], name: str
) -> tuple[Any, Any]:
    """The runtime, which must outlive the engine, and the engine; its plugin is loaded too.

    Raises:
        UserError: the plugin is missing, or TensorRT does not take it or the plan.
    """
    logger = logger_of(trt)
    logger.errors = []
    runtime = trt.Runtime(logger)  # first: before it, errors go to a logger that prints them
    if library := plugin_for(fields, name):
        _load_plugin(trt, str(library.resolve()))
    # Such plans carry code: the plugin's library, or the runtime of their own version.
    if (fields.get("plugin") or {}).get("embedded") or fields.get("version_compatible"):
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise UserError(
            f"{flavour.title} {trt.__version__} cannot load {name}, which "
            f"{fields['flavour_version']} built for {_built_for(flavour, fields)}"
            f"{said(logger)}; run `asvit-deploy build-engine` on this machine"
        )
    return runtime, engine


def _built_for(flavour: Flavour, fields: dict[str, Any]) -> str:
    if fields["target_sms"]:
        return ", ".join(f"SM {sm}" for sm in fields["target_sms"])
    return "the GPU it found" if flavour.enterprise else "the GPUs of its own list"


@functools.cache
def _load_plugin(trt: Any, path: str) -> None:
    """Load a plugin library into the process's registry, which refuses a second one of a name."""
    registry = trt.get_plugin_registry()
    if any(creator.name == onnx_op.OP_TYPE for creator in registry.all_creators):
        return
    build = "run `asvit-deploy build-plugins trt --force`"
    try:
        handle = registry.load_library(path)
    except Exception as error:
        raise UserError(
            f"{path} cannot be loaded ({' '.join(str(error).split())}); {build}"
        ) from None
    if handle is None:
        raise UserError(f"{path} cannot be loaded{said(logger_of(trt))}; {build}")
