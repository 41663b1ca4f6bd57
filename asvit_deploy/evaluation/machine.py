"""What a measurement ran on."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

from asvit_deploy.processor import cpu_name, usable_cores


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """CPU, usable cores, system and the versions that matter."""
    packages = ("asvit-deploy", "torch", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino",
                "numpy")  # fmt: skip
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: v for name in packages if (v := _version(name))},
    }
