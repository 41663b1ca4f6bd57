"""Scripts are linted and typed like the package, and nothing reaches into another folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    path
    for path in sorted((ROOT / "scripts").iterdir())
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env python3\n")
]


@pytest.fixture(scope="module")
def tools() -> dict[str, Any]:
    toml = pytest.importorskip("tomllib" if __import__("sys").version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text())["tool"]


def test_there_are_scripts() -> None:
    assert {"gpu_suite", "train_default"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_linted_and_typed(tools: dict[str, Any], script: Path) -> None:
    """Both tools pass over a file without an ending unless it is named."""
    name = script.relative_to(ROOT).as_posix()
    assert name in tools["ruff"]["extend-include"]
    assert name in tools["mypy"]["files"]


def test_nothing_imports_by_changing_the_path() -> None:
    """But the GPU suite, which runs where nothing is installed."""
    files = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("scripts/**/*.py"), *SCRIPTS]
    changing = re.compile(r"^\s*sys\.path(\.(append|insert|extend)\(|\[.*\]\s*=)", re.M)
    found = {
        path.relative_to(ROOT).as_posix() for path in files if changing.search(path.read_text())
    }
    assert found == {"scripts/gpu_suite"}
