"""A file is the old one or the new one, whole, whatever happens in between."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asvit_deploy import files
from asvit_deploy.errors import UserError
from asvit_deploy.files import (
    atomic,
    atomic_folder,
    cache_dir,
    check_writable,
    make_cache_dir,
    sha256,
    write_bytes,
    write_text,
)

NOBODY = 65534


@contextlib.contextmanager
def without_root() -> Iterator[None]:
    """Root may write everywhere, so that a test of permissions must not be root."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)  # access() asks the real user, open() the effective one
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def child(code: str, *args: object) -> subprocess.Popen[str]:
    """Another process that runs `code`, with the arguments in sys.argv[1:]."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000  # more than one chunk
    (tmp_path / "x").write_bytes(data)
    assert sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_bytes(path, b"one")
    write_text(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_failing_block_changes_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def fail_half_way() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_reader_sees_the_old_file_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


HALF_WRITER = """
    import sys, time
    from pathlib import Path
    from asvit_deploy.files import atomic
    with atomic(Path(sys.argv[1])) as temporary, open(temporary, "wb") as file:
        file.write(b"half" * 100_000)
        file.flush()
        print("half", flush=True)
        time.sleep(60)
"""


def test_kill_9_in_mid_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    process = child(HALF_WRITER, path)
    assert process.stdout
    assert process.stdout.readline() == "half\n"
    left = [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert len(left) == 1
    assert (left[0] / "x").stat().st_size == 400_000
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert path.read_text() == "old"
    write_text(path, "new")  # and the next run clears up
    assert path.read_text() == "new"
    assert names(tmp_path) == ["x"]


def test_interrupt_in_mid_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    process = child(HALF_WRITER, path)
    assert process.stdout
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGINT)
    process.wait()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_kill_9_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    writer = """
        import itertools, sys
        from pathlib import Path
        from asvit_deploy.files import write_bytes
        for round in itertools.count():
            write_bytes(Path(sys.argv[1]), bytes([round % 256]) * 300_000)
            if round == 0:
                print("once", flush=True)
    """
    for milliseconds in (0, 3, 7, 13):
        process = child(writer, path)
        assert process.stdout
        assert process.stdout.readline() == "once\n"
        time.sleep(milliseconds / 1000)
        process.kill()
        process.wait()
        content = path.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1


def test_another_living_run_keeps_its_temporary(tmp_path: Path) -> None:
    path = tmp_path / "x"
    process = child(HALF_WRITER, path)
    try:
        assert process.stdout
        assert process.stdout.readline() == "half\n"
        before = names(tmp_path)
        write_text(path, "mine")
        assert names(tmp_path) == [*before, "x"]
        assert len(before) == 1
    finally:
        process.kill()
        process.wait()


def test_folder_is_listed_once_however_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = []

    def counted(listing: Callable) -> Callable:
        def call(*args: object) -> object:
            listed.append(args)
            return listing(*args)

        return call

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    for i in range(20):
        write_text(tmp_path / f"file{i}", "x")
    monkeypatch.undo()
    assert len(listed) == 1
    assert len(names(tmp_path)) == 20


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for home in ("", "somewhere"):  # a relative one is ignored, as its specification says
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert cache_dir() == tmp_path / ".cache" / "asvit-deploy"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert make_cache_dir("deep") == tmp_path / "own" / "asvit-deploy" / "deep"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a writable folder"):
        make_cache_dir()


def test_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(UserError, match="there is no home folder; set XDG_CACHE_HOME"):
        cache_dir()


def refused(path: Path, words: str) -> None:
    """Writing `path` ends in one line that names it."""
    with pytest.raises(UserError) as error:
        write_bytes(path, b"new")
    message = str(error.value)
    assert str(path) in message
    assert words in message
    assert "\n" not in message


def test_folder_in_the_way_and_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder")
    refused(tmp_path / "no" / "x", f"{tmp_path / 'no'} does not exist")


def test_name_too_long_for_the_file_system(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 255), "File name too long")


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder that everybody may read and nobody may write; it holds the file `x`."""
    with tempfile.TemporaryDirectory() as top:  # tmp_path is closed to other users
        folder = Path(top) / "locked"
        folder.mkdir()
        (folder / "x").write_text("old")
        Path(top).chmod(0o755)
        folder.chmod(0o555)
        yield folder
        assert names(folder) == ["x"]
        assert (folder / "x").read_text() == "old"
        folder.chmod(0o755)


def test_unwritable_folder(locked: Path) -> None:
    with without_root():
        refused(locked / "x", "Permission denied")


def test_check_writable_notices_a_locked_folder(locked: Path) -> None:
    with without_root(), pytest.raises(UserError, match="no permission") as error:
        check_writable(locked / "x", force=True)
    assert str(locked / "x") in str(error.value)


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """A limit on the file size fails in mid-write, as a full disk does."""
    path = tmp_path / "x"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match="File too large") as error:
            write_bytes(path, b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(error.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_check_writable_says_it_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "x"
    check_writable(path, force=False)
    assert names(tmp_path) == []  # it only looks
    path.write_text("old")
    check_writable(path, force=True)
    for target, words in ((path, "--force"), (tmp_path, "is a folder"),
                          (tmp_path / "no" / "x", "does not exist")):  # fmt: skip
        with pytest.raises(UserError, match=words) as error:
            check_writable(target, force=False)
        assert str(target) in str(error.value)


# --- two runs on one folder, in the order that hurts ---------------------------------------------


def put(path: Path, word: str) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "x").write_text(word)


def test_a_sweep_between_a_temporary_and_its_lock_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run starts just when our temporary is made and not yet locked, and takes it away."""
    mkdir, swept = Path.mkdir, list[str]()

    def then_another_starts(folder: Path, *args: int) -> None:
        mkdir(folder, *args)
        if folder.name.endswith(".tmp") and not swept:
            swept.append(folder.name)
            files._sweep(tmp_path / "made")
            assert not folder.exists()

    monkeypatch.setattr(Path, "mkdir", then_another_starts)
    put(tmp_path / "made", "mine")
    assert len(swept) == 1
    assert (tmp_path / "made" / "x").read_text() == "mine"
    assert names(tmp_path) == ["made"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("moment", ["before it is moved away", "before ours takes its place"])
def test_a_folder_that_another_run_puts_there_meanwhile_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, moment: str
) -> None:
    path, rename, others = tmp_path / "made", Path.rename, list[int]()
    if there:
        put(path, "before")

    def and_another_ends(source: Path, target: Path) -> Path:
        if not others and (target == path) == (moment == "before ours takes its place"):
            others.append(1)
            put(path, "theirs")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", and_another_ends)
    put(path, "mine")
    assert len(others) == int(there or moment == "before ours takes its place")
    assert (path / "x").read_text() == "mine"
    assert names(tmp_path) == ["made"]


def test_a_folder_that_is_moved_away_meanwhile_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rename, others = tmp_path / "made", Path.rename, list[int]()
    put(path, "before")

    def and_another_takes_it(source: Path, target: Path) -> Path:
        if source == path and not others:
            others.append(1)
            rename(path, tmp_path / "elsewhere")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", and_another_takes_it)
    put(path, "mine")
    assert others
    assert (path / "x").read_text() == "mine"
    assert (tmp_path / "elsewhere" / "x").read_text() == "before"
