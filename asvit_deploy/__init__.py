"""Adaptive ViTs from checkpoint to checked ONNX and TensorRT.

Every command of `asvit-deploy` is a function here, with the command's own option names and
defaults:

    import asvit_deploy

    asvit_deploy.calibrate("deit_small.pth", images="photos", budget=0.65, output="s.safetensors")
    asvit_deploy.export("s.safetensors", output="s.onnx")
    asvit_deploy.predict("s.onnx", ["cat.jpg"])[0].top[0].label

`load` gives a checkpoint's network, or that of a module of timm's or transformers', as a torch
module, and `save` writes one as a checkpoint. The functions raise `UserError` for bad
input, `CheckFailed` where a check does not pass, and `Interrupted` where training was stopped;
they print nothing. What a command writes to stderr goes to their argument `say`.

Importing this imports neither torch nor onnx nor numpy: each function loads what it needs.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asvit_deploy.api.build_engine import build_engine
    from asvit_deploy.api.calibrate import calibrate
    from asvit_deploy.api.evaluate import evaluate
    from asvit_deploy.api.export import export
    from asvit_deploy.api.finetune import finetune
    from asvit_deploy.api.load import load
    from asvit_deploy.api.package import package
    from asvit_deploy.api.predict import predict
    from asvit_deploy.api.report import report
    from asvit_deploy.api.save import save
    from asvit_deploy.api.tune import tune
    from asvit_deploy.api.visualize import visualize
    from asvit_deploy.errors import CheckFailed, Interrupted, UserError
    from asvit_deploy.evaluation.bench import bench  # type: ignore[attr-defined]
    from asvit_deploy.evaluation.checking import check

__version__ = "0.1.0"

__all__ = [
    "CheckFailed",
    "Interrupted",
    "UserError",
    "bench",
    "build_engine",
    "calibrate",
    "check",
    "evaluate",
    "export",
    "finetune",
    "load",
    "package",
    "predict",
    "report",
    "save",
    "tune",
    "visualize",
]

# ONNX Runtime's telemetry keeps an identifier and a database in the home folder. It looks at this
# when it is loaded, so it must be set before any part of the package, or a child, loads it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULES = {
    "CheckFailed": "errors",
    "Interrupted": "errors",
    "UserError": "errors",
    "bench": "evaluation.bench",
    "build_engine": "api.build_engine",
    "calibrate": "api.calibrate",
    "check": "evaluation.checking",
    "evaluate": "api.evaluate",
    "export": "api.export",
    "finetune": "api.finetune",
    "load": "api.load",
    "package": "api.package",
    "predict": "api.predict",
    "report": "api.report",
    "save": "api.save",
    "tune": "api.tune",
    "visualize": "api.visualize",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
