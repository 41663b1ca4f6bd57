"""`scripts/method_training`: what it compares is of the same seeds, or of the one dense network."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "method_training"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="scripts stand in the repository only")


def test_differences_are_of_the_seeds_that_both_have():
    loader = importlib.machinery.SourceFileLoader("method_training", str(SCRIPT))
    spec = importlib.util.spec_from_loader("method_training", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["method_training"] = module  # dataclasses look their own module up
    loader.exec_module(module)
    found = {
        "digits topk 0.5 0": {"right": "1111"}, "digits topk 0.5 2": {"right": "1100"},
        "digits bat 0.5 1": {"right": "0000"}, "digits bat 0.5 2": {"right": "1000"},
        "digits dense 0": {"right": "1111"}, "digits evit 0.5 1": {"right": "1111"},
        "digits threshold 0.5 0": {"right": "0" * 4}, "digits threshold 0.5 2": {"right": "0" * 4},
    }  # fmt: skip
    over = module.compared(found, (0, 1, 2))["digits topk 0.5"]
    assert over["digits bat 0.5"]["seeds"] == [0.25]
    assert over["digits bat 0.5"]["value"] == 0.25
    assert over["digits dense"]["seeds"] == [0.0, -0.5]  # where every seed started
    behind = module.compared(found, (0, 1, 2))["digits threshold 0.5"]
    assert behind["digits topk 0.5"]["interval"] == [-1.0, -0.5]
    said = {(row["first"], row["second"]): row["here"]
            for row in module.orderings(found, (0, 1, 2))}  # fmt: skip
    assert said == {
        ("digits threshold 0.5", "digits topk 0.5"): "does not hold",
        ("digits bat 0.5", "digits evit 0.5"): "does not hold",
    }  # threshold and EViT have no seed in common
