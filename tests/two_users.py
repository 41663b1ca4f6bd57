"""Another user of this machine, and a library that leaves a mark where it is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

OTHER = 12345  # a number that is nobody's here

_PLANTED = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void loaded() {
    if (char const* mark = getenv("ASVIT_PLANTED")) {
        if (FILE* file = fopen(mark, "w")) { fclose(file); }
    }
}
"""


def other(*command: object) -> None:
    """Run a command as the other user."""
    subprocess.run(list(map(str, command)), user=OTHER, group=OTHER, extra_groups=[], check=True)


class Shared:
    """A folder that every user reaches, and what can be done in it.

    Attributes:
        folder: ours, where others may not write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open_folder(self, name: str, mode: int = 0o777) -> Path:
        """A folder of ours in which others may write, all the same."""
        path = self.folder / name
        path.mkdir()
        path.chmod(mode)
        return path


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Shared]:
    """Skips where there can be no second user."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can write as another user")
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="asvit-shared-"))
    folder.chmod(0o755)
    try:
        other("test", "-x", folder)
    except (subprocess.SubprocessError, OSError) as error:
        shutil.rmtree(folder)
        pytest.skip(f"another user cannot be had, or reach the temporary folder: {error}")
    yield Shared(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def planted(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that every user may read, and that makes the file ASVIT_PLANTED when loaded."""
    source = tmp_path_factory.mktemp("planted") / "planted.cc"
    source.write_text(_PLANTED)
    library = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    return library


class Mark:
    """Whether the planted library has been loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def left(self) -> bool:
        """Whether it has, since this was last asked."""
        there = self.path.exists()
        self.path.unlink(missing_ok=True)
        return there


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mark:
    path = tmp_path / "loaded"
    monkeypatch.setenv("ASVIT_PLANTED", str(path))
    return Mark(path)
