"""The libraries that families of ViTs come from, for tests against their own code.

They are no dependencies of the package; `scripts/setup EXTRAS families` installs them, pinned.
Where one is missing, the test that asks for it is skipped and says so.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import pytest
import torch


def timm() -> ModuleType:
    """timm, or the test is skipped."""
    return _library("timm")


def transformers() -> ModuleType:
    """transformers, or the test is skipped."""
    return _library("transformers")


def open_clip() -> ModuleType:
    """OpenCLIP, or the test is skipped."""
    return _library("open_clip")


def _library(name: str) -> ModuleType:
    _name_operators()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported ({error}); scripts/setup EXTRAS families")


@functools.cache
def _name_operators() -> torch.library.Library | None:
    """torchvision's wheel for CUDA cannot load its operators beside a torch without it, and dies on
    the first name that it looks up; nothing here calls them. Kept, since they go with the library.
    """
    try:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:  # there they are
        return None
    return library
