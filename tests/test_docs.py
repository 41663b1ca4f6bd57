"""The README and docs/: links that lead somewhere, commands that some test executes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md",
                                   "scripts/README.md", "plugins/README.md",
                                   "trt_plugins/README.md", "plugins/sample/README.md",
                                   "trt_plugins/sample/README.md")]  # fmt: skip

# Which test executes a command line of the pages, or why none does.
EXECUTED = {
    "asvit-deploy export --ckpt as_deit_s.pt": "tests/cli/test_three_lines.py",
    "asvit-deploy build-engine --fp16": "tests/cli/test_three_lines.py",
    "asvit-deploy bench": "tests/cli/test_three_lines.py",
    "asvit-deploy doctor": "tests/cli/test_doctor.py",
    "asvit-deploy calibrate --ckpt deit_small.pth": "tests/cli/test_methods_commands.py",
    "asvit-deploy export --ckpt deit_small": "tests/cli/test_methods_commands.py",
    "torchrun --standalone": "tests/training/test_documented_paths.py",
    "asvit-deploy evaluate as_deit_s.safetensors": "tests/training/test_documented_paths.py",
    "asvit-deploy export --ckpt as_deit_s.safetensors": "tests/training/test_documented_paths.py",
    "asvit-deploy finetune --data birds": "tests/training/test_documented_paths.py",
    "asvit-deploy finetune --data DIR": "tests/cli/test_finetune_methods.py",
    "asvit-deploy finetune --data PICTURES": "tests/cli/test_finetune_methods.py",
    "asvit-deploy evaluate birds.safetensors": "tests/training/test_documented_paths.py",
    "asvit-deploy export --ckpt birds.safetensors": "tests/training/test_documented_paths.py",
    "./scripts/test": ".ci/run",
    "pip install": "scripts/setup",
}
BY_HAND = {"./scripts/demo": "installs anew and takes five minutes"}


def fenced(page: Path, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def command_lines(page: Path) -> list[str]:
    lines = [line.split("#")[0].strip() for text in fenced(page) for line in text.splitlines()]
    starts = ("asvit-deploy", "torchrun", "./scripts", "pip", "python")
    return [line for line in lines if line.startswith(starts)]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert ROOT in (target, *target.parents), f"{page.name}: {link} leaves the project"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_reached_from_the_readme():
    links = set(re.findall(r"\]\(([^)#\s]+)", PAGES[0].read_text()))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= links
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"} <= links
    assert len(PAGES[0].read_text().splitlines()) <= 100, "a screen and a half"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_executed_by_a_test(page):
    for line in command_lines(page):
        known = [start for start in (*EXECUTED, *BY_HAND) if line.startswith(start)]
        assert known, f"{page.name}: no test executes {line!r}"
        where = EXECUTED.get(max(known, key=len))
        assert where is None or (ROOT / where).is_file()


def test_options_that_pages_name_are_there(runner_of_help):
    """`--like-this` beside a command's name exists on some command."""
    known = set(re.findall(r"--[a-z][a-zA-Z0-9-]+", runner_of_help))
    foreign = {"--nproc-per-node", "--standalone", "--onnxrt", "--convert-to", "--plugins",
               "--stronglyTyped", "--strongly-typed", "--compute-capabilities"}  # fmt: skip
    for page in PAGES:
        for option in re.findall(r"`(--[a-z][a-zA-Z0-9-]+)", page.read_text()):
            assert option in known | foreign, f"{page.name}: {option}"


@pytest.fixture(scope="module")
def runner_of_help() -> str:
    from click.testing import CliRunner

    from asvit_deploy.cli.main import group

    texts = [CliRunner().invoke(group, ["--help"]).output]
    context = group.make_context("asvit-deploy", [], resilient_parsing=True)
    for name in group.list_commands(context):
        texts.append(CliRunner().invoke(group, [name, "--help"]).output)
    return "\n".join(texts)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if fenced(page, "python")],
                         ids=lambda p: p.name)  # fmt: skip
def test_python_of_the_pages_runs(page, mini_checkpoint, tmp_path):
    (tmp_path / "as_deit_s.pt").symlink_to(mini_checkpoint)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    export = [sys.executable, "-m", "asvit_deploy", "export", "--ckpt", "as_deit_s.pt"]
    subprocess.run(export, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for code in fenced(page, "python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
