"""A TensorRT plan, loaded: the flavour's module, its logger, the plugin, the engine's contexts.

Written for TensorRT 10, 11 and RTX: what only some of them have is asked for by name.

A plan is a program, and what stands beside it was written by whoever wrote the plan. So no sidecar
says what is loaded: the plugin is the one that this user built or named, and code that a plan
brings along runs only where the user allows it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from asvit_deploy import precision
from asvit_deploy.errors import UserError
from asvit_deploy.files import sha256
from asvit_deploy.ops import onnx_op
from asvit_deploy.requirements import pip_install_extra
from asvit_deploy.runners.place import Place
from asvit_deploy.runners.trt_flavour import FLAVOURS, Flavour, find_flavour
from asvit_deploy.text import one_line

if TYPE_CHECKING:
    from asvit_deploy.runners.trt_buffers import Scratch

_DTYPES = {row.tensorrt_name: row.torch_type for row in precision.TABLE}
_DTYPES |= {"INT32": torch.int32, "INT64": torch.int64}


def require_gpu(name: str) -> None:
    """Refuse to run an engine where PyTorch sees no GPU.

    Raises:
        UserError: it says what to do.
    """
    if (why := _no_gpu()) is not None:
        raise UserError(
            f"{name} is an engine and runs on an NVIDIA GPU, which PyTorch must see ({why}); "
            "install a CUDA build of torch on a machine with a GPU, or name the .onnx file"
        )


def _no_gpu() -> str | None:
    if torch.cuda.is_available():
        return None
    return "this PyTorch is built without CUDA" if torch.version.cuda is None else "no GPU is found"


def why_not() -> str | None:
    """Why engines cannot be built and run here, with what to do; None where they can."""
    if (why := _no_gpu()) is not None:
        return (
            f"tensorrt runs engines on an NVIDIA GPU, which PyTorch must see ({why}); install a "
            "CUDA build of torch on a machine with a GPU, or leave it out"
        )
    try:
        find_flavour()
    except UserError as error:
        return str(error)
    return None


def gpu_name() -> str | None:
    """What engines run on; None where PyTorch sees no GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def import_flavour(name: str) -> tuple[Flavour, Any]:
    """The flavour that a sidecar names, and its Python module.

    Raises:
        UserError: it is unknown or not installed.
    """
    if name not in FLAVOURS:
        raise UserError(f"no flavour of TensorRT is called {name!r}; build the engine again")
    flavour = FLAVOURS[name]
    if flavour.module is None:
        raise UserError(f"{flavour.title} is not installed; {pip_install_extra(flavour.extra)}")
    return flavour, importlib.import_module(flavour.module)


@dataclass(frozen=True)
class Allowed:
    """The code, beside a plan's own kernels, that the user lets an engine run.

    Attributes:
        plugin: the op's TensorRT library that the user named, or None for the cache's.
        engine_code: run host code that the plan itself carries.
    """

    plugin: Path | None = None
    engine_code: bool = False


NOTHING = Allowed()


def named_plugin(path: Path | None) -> Path | None:
    """The plugin library that the user named, once a child process could load it.

    Raises:
        UserError: it is no plugin library, or one that runs on no GPU.
    """
    from asvit_deploy.ops.trt_library import check_trt_library, runs_on_gpus

    if path is None:
        return None
    make = "`asvit-deploy build-plugins trt` makes one"
    if reason := check_trt_library(path):
        raise UserError(f"{path} cannot be used: {reason}; {make}")
    if not runs_on_gpus(path):
        raise UserError(f"{path} holds no CUDA code (a host twin, for building only); {make}")
    return path.resolve()


def carries_code(fields: dict[str, Any]) -> str | None:
    """What host code a plan brings along, as its sidecar says; None for none."""
    if _recorded_plugin(fields).get("embedded"):
        return "the plugin's library is embedded in it"
    if fields.get("version_compatible"):
        return "it holds a runtime of its own TensorRT version"
    return None


def require_allowed(fields: dict[str, Any], name: str, allowed: Allowed) -> None:
    """Refuse an engine that carries host code, unless the user allows that.

    Raises:
        UserError: it says what to do.
    """
    if (what := carries_code(fields)) and not allowed.engine_code:
        raise UserError(
            f"{name} carries code that would run with your rights ({what}); pass "
            "--allow-engine-code if you trust who built it, or build it again without "
            "--embed-plugin and --version-compatible"
        )


def _recorded_plugin(fields: dict[str, Any]) -> dict[str, Any]:
    recorded = fields.get("plugin")
    return recorded if isinstance(recorded, dict) else {}


def plugin_for(
    fields: dict[str, Any], name: str, allowed: Allowed = NOTHING
) -> Path | None:  # fmt: skip
    """The plugin library to load before a plan: None where the plan needs or carries none.

    The one that the user named, else the one in the user's cache that fits our sources. What the
    sidecar says of the one that it was built with is compared, and a difference costs a line.

    Raises:
        UserError: there is none.
    """
    from asvit_deploy.ops.trt_library import find_trt_plugin

    recorded = _recorded_plugin(fields)
    if fields.get("plugin") is None or recorded.get("embedded"):
        return None
    library = allowed.plugin or find_trt_plugin()
    if library is None:
        raise UserError(
            f"{name} needs the TensorRT plugin, which is not built here; run `asvit-deploy "
            "build-plugins trt`, or name it with --plugin"
        )
    if sha256(library) != recorded.get("sha256"):
        _warn(f"{name} was built with another file of the plugin than {library}, which is used")
    return library


@functools.cache
def _warn(line: str) -> None:
    """One line on stderr, once: a model has several engines, or runs in several ways."""
    print(one_line(line), file=sys.stderr)


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
    trt: Any, flavour: Flavour, plan: bytes, fields: dict[str, Any], name: str,
    allowed: Allowed = NOTHING,
) -> tuple[Any, Any]:  # fmt: skip
    """The runtime, which must outlive the engine, and the engine; its plugin is loaded too.

    Raises:
        UserError: the plan carries code that is not allowed, the plugin is missing, or TensorRT
            does not take it or the plan.
    """
    require_allowed(fields, name, allowed)
    logger = logger_of(trt)
    logger.errors = []
    runtime = trt.Runtime(logger)  # first: before it, errors go to a logger that prints them
    if library := plugin_for(fields, name, allowed):
        _load_plugin(trt, str(library.resolve()))
    if carries_code(fields) and allowed.engine_code:
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


class Engine:
    """A plan on a GPU, where TensorRT then has it and its contexts for good.

    Args:
        plan: its bytes.
        fields: the sidecar or manifest.
        name: how messages call it.
        device: a CUDA device.
        allowed: the code that it may run beside its own kernels.

    Raises:
        UserError: it carries code that is not allowed, no such GPU, the flavour is not installed,
            the plugin is missing, or TensorRT does not take the plan.
    """

    def __init__(
        self, plan: bytes, fields: dict[str, Any], name: str, device: str | Place = "cuda",
        allowed: Allowed = NOTHING,
    ) -> None:  # fmt: skip
        require_allowed(fields, name, allowed)
        require_gpu(name)
        self.place = device if isinstance(device, Place) else Place(device)
        self.flavour, self.trt = import_flavour(fields["flavour"])
        self.name, self._logger = name, logger_of(self.trt)
        with self.place.current():
            self._runtime, self.engine = load_plan(
                self.trt, self.flavour, plan, fields, name, allowed
            )
        self._cache: Any = None
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        mode = self.trt.TensorIOMode.INPUT
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == mode]
        self.outputs = [n for n in names if n not in self.inputs]

    def dtype(self, tensor: str) -> torch.dtype:
        """The type of an input or output."""
        return _DTYPES[self.engine.get_tensor_dtype(tensor).name]

    def largest(self, tensor: str, profile: int = 0) -> tuple[int, ...]:
        """An input's largest shape."""
        shape = tuple(self.engine.get_tensor_shape(tensor))
        if min(shape) >= 0:
            return shape
        return tuple(self.engine.get_tensor_profile_shape(tensor, profile)[2])

    def scratch_bytes(self) -> int:
        """Device memory that a context of it needs while it runs, on whichever profile."""
        # TensorRT 10.0 has but the older name, 11 and RTX but the newer.
        newer = getattr(self.engine, "device_memory_size_v2", None)
        return self.engine.device_memory_size if newer is None else newer

    def _context_arguments(self) -> tuple[Any, ...]:
        """What makes a context that gets its scratch from us, and on RTX runs final kernels.

        RTX compiles kernels for a shape in the background and swaps them in when they are ready: a
        CUDA graph would hold the preliminary ones for good, and a bench would time both kinds.
        """
        ours = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        strategies = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:
            return (ours,)
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(ours)
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        # Contexts of one engine share what was compiled: bucketed mode has one for each bucket.
        if hasattr(config, "create_runtime_cache"):
            if self._cache is None:
                self._cache = config.create_runtime_cache()
            if not config.set_runtime_cache(self._cache):
                raise UserError(
                    f"{self.flavour.title} took no runtime cache for {self.name}{self.said()}; "
                    "build it again on this machine"
                )
        return (config,)

    def context(self, scratch: Scratch, profile: int = 0) -> Any:
        """An execution context on that optimisation profile, which runs in `scratch`.

        Raises:
            UserError: there is no memory for it, or no such profile.
        """
        with self.place.current():
            return self._context(scratch, profile)

    def _context(self, scratch: Scratch, profile: int) -> Any:
        context = self.engine.create_execution_context(*self._context_arguments())
        if context is None:
            raise UserError(
                f"{self.flavour.title} cannot make an execution context for {self.name}"
                f"{self.said()}; free GPU memory, or build it again on this machine"
            )
        if self.engine.num_optimization_profiles > 1:
            stream = torch.cuda.current_stream(self.place.index)
            if not context.set_optimization_profile_async(profile, stream.cuda_stream):
                raise UserError(
                    f"{self.name} has no optimisation profile {profile}{self.said()}; build it "
                    "again"
                )
            stream.synchronize()
        scratch.lend(context)
        return context

    def said(self) -> str:
        """What TensorRT logged since it was last asked, in brackets, or nothing."""
        return said(self._logger)
