"""Which TensorRT is taken, and what is said where there is none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from asvit_deploy.errors import UserError
from asvit_deploy.runners import trt_flavour as flavour
from asvit_deploy.runners.trt_flavour import ENTERPRISE, RTX, find_flavour


@pytest.fixture
def installed(monkeypatch):
    """Make it look as if only these modules of TensorRT were installed."""
    real = importlib.util.find_spec
    known = {*ENTERPRISE.modules, *RTX.modules, "polygraphy"}

    def only(*names):
        def find_spec(name, package=None):
            if name in known:
                return real("json") if name in names else None
            return real(name, package)

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    return only


@pytest.mark.parametrize(
    ("modules", "driver", "expected"),
    [
        (["tensorrt_rtx_bindings"], False, RTX),
        (["tensorrt_rtx"], True, RTX),
        (["tensorrt"], False, ENTERPRISE),
        (["tensorrt", "tensorrt_rtx"], False, RTX),
        (["tensorrt", "tensorrt_rtx"], True, ENTERPRISE),
    ],
)
def test_auto(installed, monkeypatch, modules, driver, expected):
    installed("polygraphy", *modules)
    monkeypatch.setattr(flavour, "has_driver", lambda: driver)
    assert find_flavour() is expected


@pytest.mark.parametrize(
    ("modules", "name", "words"),
    [
        ([], "auto", 'TensorRT is not installed; pip install .*"tensorrt-rtx-cu13-libs>='),
        (["tensorrt"], "tensorrt-rtx", "TensorRT-RTX is not installed.*tensorrt-rtx-cu13-bindings"),
        (["tensorrt_rtx"], "tensorrt", r'TensorRT is not installed.*"tensorrt>='),
    ],
)
def test_nothing_installed(installed, modules, name, words):
    installed("polygraphy", *modules)
    with pytest.raises(UserError, match=words):
        find_flavour(name)


def test_without_polygraphy(installed):
    installed("tensorrt_rtx")
    with pytest.raises(UserError, match="Polygraphy is not installed"):
        find_flavour()


@pytest.mark.slow
def test_the_command_does_not_import_a_binding(rtx):
    # A binding that ends the process must end the builder's, not the command's.
    code = (
        "import sys; from asvit_deploy.engine import build;"
        "from asvit_deploy.runners import trt_flavour; trt_flavour.find_flavour();"
        "print([m for m in sys.modules if m.startswith('tensorrt') or m == 'polygraphy'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
