"""A release is fit to be made, and the site is made without a link that leads nowhere."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import asvit_deploy

ROOT = Path(__file__).resolve().parents[1]


def script(name: str, *arguments: object, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / "scripts" / name, *arguments]
    return subprocess.run(list(map(str, command)), cwd=root, capture_output=True, text=True)


@pytest.mark.slow
def test_the_tree_is_fit_to_be_released(tmp_path):
    pytest.importorskip("hatchling")
    done = script("release_check", tmp_path / "dist")
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(": fit to be released\n")
    assert sorted(path.suffix for path in (tmp_path / "dist").iterdir()) == [".gz", ".whl"]


@pytest.mark.slow
def test_what_is_not_fit_is_said(tmp_path):
    """A tree without a file that must be there, with one that must not, and of another version."""
    pytest.importorskip("hatchling")
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True,
                           capture_output=True, text=True).stdout.splitlines()  # fmt: skip
    tree = tmp_path / "tree"
    for name in names:
        if (ROOT / name).is_file() and not name.startswith("benchmarks/"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    (tree / "CHANGELOG.md").unlink()
    (tree / ".gitignore").unlink()
    (tree / "asvit_deploy" / "left.so").write_bytes(b"built")
    project = (tree / "pyproject.toml").read_text()
    (tree / "pyproject.toml").write_text(project.replace('version = "0.1.0"', 'version = "9.9.9"'))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-Af"], ["commit", "-qm", "a tree"]):
        subprocess.run([*git, *words], cwd=tree, check=True)
    (tree / "asvit_deploy" / "mine.so").write_bytes(b"not committed")
    done = script("release_check", root=tree)
    assert done.returncode == 1
    for word in ("has no CHANGELOG.md", "asvit_deploy/left.so must not be released",
                 "says version 9.9.9, asvit_deploy/__init__.py another"):  # fmt: skip
        assert word in done.stderr
    assert "differ" not in done.stderr
    assert "not committed, and so left out: 1 file(s)" in done.stderr
    assert "mine.so" not in done.stderr


@pytest.fixture(scope="module")
def mkdocs() -> None:
    for name in ("mkdocs", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (the extra `docs`)")


@pytest.mark.slow
def test_the_site_has_every_page_and_the_api(mkdocs, tmp_path):
    done = script("site", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'site' / 'index.html'}\n"
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "site" / "docs" / f"{page.stem}.html").is_file()
    api = (tmp_path / "site" / "api.html").read_text()
    for name in asvit_deploy.__all__:
        assert f">{name}<" in api, name
    assert "more pictures than" in api, "a docstring's own words"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    done = script("site", tmp_path / "mine")
    assert done.returncode == 2
    assert "holds something else" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["gone.md", "commands.md#no-such-part", "../gone"])
def test_a_link_that_leads_nowhere_ends_it(mkdocs, tmp_path, broken):
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "docs",
                 "scripts", "plugins", "trt_plugins", "benchmarks", "asvit_deploy"):  # fmt: skip
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "tests" / "fuzz", tmp_path / "tests" / "fuzz")
    with open(tmp_path / "docs" / "onnx.md", "a") as page:
        page.write(f"\n[there]({broken})\n")
    done = script("site", tmp_path / "site", root=tmp_path)
    assert done.returncode == 1, done.stderr
    assert broken.rpartition("#")[2].rpartition("/")[2] in done.stderr


def test_the_wheel_carries_no_path_of_a_machine(tmp_path):
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            assert str(ROOT).encode() not in archive.read(name), name
