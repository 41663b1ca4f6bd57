"""Two runs and one output: one makes it, whole, the other says why not; no link bends a write."""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import conftest
import pytest

from asvit_deploy import claims, files
from asvit_deploy import sidecar as artifact
from asvit_deploy.artefacts import bundle
from asvit_deploy.errors import UserError
from asvit_deploy.files import atomic, write_bytes, write_text


def child(code: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> list[str]:
    """The lines that a process printed, once it has ended well."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return out.splitlines()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- pairs of writers at one instant ------------------------------------------------------------

WRITER = """
    import contextlib, sys, time
    from pathlib import Path
    from asvit_deploy import sidecar as artifact
    from asvit_deploy.errors import UserError
    folder, me, how, start, count = Path(sys.argv[1]), *sys.argv[2:4], *map(float, sys.argv[4:])
    for i in range(int(count)):
        path = folder / f"{i}.onnx"
        while time.time() < start + i * 0.03:
            pass
        try:
            claim = artifact.claimed(path, "onnx", how == "force")
            with contextlib.nullcontext() if how == "plain" else claim:
                artifact.write(path, me.encode() * 50_000, {"kind": "onnx", "by": me})
            print("wrote")
        except UserError as error:
            print(error)
"""


def pairs(folder: Path, how: str, count: int) -> list[list[str]]:
    """What two processes said that wrote `count` artefacts at the same moments."""
    start = time.time() + 1.5
    writers = [child(WRITER, folder, me, how, start, count) for me in "ab"]
    said = [ended(writer) for writer in writers]
    assert names(folder) == sorted(f"{i}.onnx{end}" for i in range(count) for end in ("", ".json"))
    for i in range(count):
        path = folder / f"{i}.onnx"
        assert path.read_bytes() == artifact.read(path)["by"].encode() * 50_000
    return list(map(list, zip(*said)))


def check_pairs(folder: Path, how: str, count: int) -> None:
    for one, other in pairs(folder, how, count):
        if how == "plain":
            assert one == other == "wrote"  # the later one after the earlier
        else:
            lost = one if other == "wrote" else other
            assert "wrote" in (one, other)
            if how == "force":  # or one after the other
                assert lost == "wrote" or lost.startswith("another run is making")
            else:
                assert lost.startswith("another run is making") or "exists already" in lost


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "claimed", "force"])
def test_pairs_of_writers(tmp_path, how):
    check_pairs(tmp_path, how, 40)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "claimed"])
def test_300_pairs_of_writers(tmp_path, how):
    check_pairs(tmp_path, how, 300)


def test_threads_of_one_process_wait_for_each_other(tmp_path):
    path, failed = tmp_path / "x.onnx", []

    def write(me: str) -> None:
        for _ in range(20):
            try:
                artifact.write(path, me.encode() * 1000, {"kind": "onnx", "by": me})
            except UserError as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(me,)) for me in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert path.read_bytes() == artifact.read(path)["by"].encode() * 1000
    assert names(tmp_path) == ["x.onnx", "x.onnx.json"]


def test_a_reader_between_two_renames_waits_for_the_second(tmp_path):
    path = tmp_path / "x.onnx"
    writer = child(
        """
        import itertools, sys
        from pathlib import Path
        from asvit_deploy import sidecar as artifact
        for i in itertools.count():
            artifact.write(Path(sys.argv[1]), b"%d" % i, {"kind": "onnx", "i": i})
        """,
        path,
    )
    try:
        while not artifact.sidecar_path(path).exists():
            time.sleep(0.01)
        for _ in range(300):
            artifact.read(path)
    finally:
        writer.kill()
        writer.communicate()


# --- containers with equal process numbers ------------------------------------------------------

SAME_NUMBER = """
    import os, sys
    os.getpid = lambda: 1
    from pathlib import Path
    from asvit_deploy.files import write_bytes
    for i in range(int(sys.argv[3])):
        write_bytes(Path(sys.argv[1]), sys.argv[2].encode() * 200_000)
    print("done")
"""


def test_writers_with_equal_process_numbers(tmp_path):
    path = tmp_path / "x"
    write_bytes(path, b"a" * 200_000)
    writers = [child(SAME_NUMBER, path, me, 150) for me in "ab"]
    while any(writer.poll() is None for writer in writers):
        content = path.read_bytes()
        assert (len(content), len(set(content))) == (200_000, 1)
    for writer in writers:
        assert ended(writer) == ["done"]
    assert names(tmp_path) == ["x"]


# --- claims -------------------------------------------------------------------------------------

HOLDER = """
    import sys, time
    from pathlib import Path
    from asvit_deploy.claims import claimed
    with claimed(Path(sys.argv[1])):
        print("mine", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has a claim on `x.onnx`."""
    process = child(HOLDER, tmp_path / "x.onnx")
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.communicate()


def enter(context) -> None:
    with context:
        pass


def test_a_claim_ends_with_its_process_however_that_ends(tmp_path, holder):
    path = tmp_path / "x.onnx"
    conftest.raises_one_line(
        lambda: enter(artifact.claimed(path, "onnx", True)), f"another run is making {path}"
    )
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert names(tmp_path) == [".x.onnx.lock"]  # blocks nothing, and goes with the next claim
    artifact.write(path, b"x", {"kind": "onnx"})
    assert names(tmp_path) == ["x.onnx", "x.onnx.json"]


def test_a_write_waits_for_a_claim_a_while(tmp_path, holder, monkeypatch):
    path = tmp_path / "x.onnx"
    monkeypatch.setattr(artifact, "PATIENCE", 0.2)
    conftest.raises_one_line(lambda: artifact.write(path, b"x", {}), "another run is making")
    assert not path.exists()
    monkeypatch.setattr(artifact, "PATIENCE", 20)
    threading.Timer(0.3, holder.kill).start()
    artifact.write(path, b"x", {"kind": "onnx"})
    assert artifact.read(path)["kind"] == "onnx"


def test_a_claim_covers_every_spelling_of_a_path(tmp_path, holder, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in (Path("x.onnx"), tmp_path / "link" / "x.onnx", Path("link/./x.onnx")):
        conftest.raises_one_line(lambda path=path: enter(claims.claimed(path)), "another run")


@pytest.mark.parametrize("late", ["x.onnx", "x.onnx.json"])
@pytest.mark.parametrize("links", [True, False])
def test_what_comes_during_the_work_stays(tmp_path, monkeypatch, late, links):
    path, mine = tmp_path / "x.onnx", tmp_path / late
    if not links:  # a file system without hard links
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))

    def work() -> None:
        with artifact.claimed(path, "onnx", False):
            mine.write_text("mine")
            artifact.write(path, b"x", {"kind": "onnx"})

    conftest.raises_one_line(work, f"{mine} exists already; pass --force")
    assert mine.read_text() == "mine"
    assert names(tmp_path) == [late]


@pytest.mark.parametrize("late", ["x.onnx", "x.onnx.json"])
@pytest.mark.parametrize("links", [True, False])
def test_what_comes_at_the_last_moment_stays(tmp_path, monkeypatch, late, links):
    """Between the second look and the renames: of a program that knows no claims."""
    path, mine, real = tmp_path / "x.onnx", tmp_path / late, files._asked_again
    if not links:
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(PermissionError()))

    def asked(paths) -> bool:
        replace = real(paths)
        mine.write_text("mine")
        return replace

    monkeypatch.setattr(files, "_asked_again", asked)

    def work() -> None:
        with artifact.claimed(path, "onnx", False):
            artifact.write(path, b"x", {"kind": "onnx"})

    conftest.raises_one_line(work, f"{mine} exists already; pass --force")
    assert mine.read_text() == "mine"
    assert names(tmp_path) == [late]


def test_a_folder_that_comes_during_the_work_stays(tmp_path):
    path = tmp_path / "m.bucketed"

    def work(force: bool) -> None:
        with bundle.claimed(path, "bucketed", force):
            path.mkdir(exist_ok=True)
            (path / "notes.txt").write_text("mine")
            bundle.write(path, {"a.bin": b"one"}, {"kind": "bucketed"})

    for force, words in ((False, "exists already"), (True, "not a folder that this tool made")):
        conftest.raises_one_line(lambda force=force: work(force), words)
        assert names(path) == ["notes.txt"]
        assert names(tmp_path) == ["m.bucketed"]
        (path / "notes.txt").unlink()
        path.rmdir()


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def none(*_) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    path = tmp_path / "x.onnx"
    with artifact.claimed(path, "onnx", False):
        artifact.write(path, b"x", {"kind": "onnx"})
    assert names(tmp_path) == ["x.onnx", "x.onnx.json"]
    assert artifact.read(path)["kind"] == "onnx"


@pytest.mark.parametrize("hours", [0, 2])
def test_without_locks_only_what_is_old_is_swept(tmp_path, monkeypatch, hours):
    left = tmp_path / f".x.{files._KERNEL}0123456789.tmp"
    left.mkdir()
    (left / "x").touch()
    for path in (left / "x", left):
        os.utime(path, (time.time() - 3600 * hours,) * 2)

    def none(*_) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    write_text(tmp_path / "x", "new")
    assert left.exists() == (hours == 0)


@pytest.mark.parametrize("hours", [0, 2])
def test_another_machine_s_temporary_is_swept_once_it_is_old(tmp_path, hours):
    """Its locks need not reach here."""
    other = "0000" if files._KERNEL != "0000" else "1111"
    left = tmp_path / f".x.{other}0123456789.tmp"
    left.mkdir()
    os.utime(left, (time.time() - 3600 * hours,) * 2)
    write_text(tmp_path / "x", "new")
    assert left.exists() == (hours == 0)


# --- planted links ------------------------------------------------------------------------------


@pytest.fixture
def precious(tmp_path):
    """A file, and a folder with a file, that nothing may change."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for file in (tmp_path / "precious", folder / "x.onnx"):
        file.write_text("precious")
    yield tmp_path / "precious", folder
    assert (tmp_path / "precious").read_text() == "precious"
    assert names(folder) == ["x.onnx"]
    assert (folder / "x.onnx").read_text() == "precious"


@pytest.mark.parametrize("to", [0, 1])
def test_links_at_names_that_we_might_use(tmp_path, precious, monkeypatch, to):
    """Also where somebody guesses the random part: the name is taken, and another one is tried."""
    home = tmp_path / "home"
    home.mkdir()
    guessed, real = iter(["0" * 10, "f" * 10]), secrets.token_hex
    monkeypatch.setattr(secrets, "token_hex", lambda count: next(guessed, None) or real(count))
    planted = [f".x.onnx{json}.{middle}tmp" for json in ("", ".json") for middle in (
        f"{os.getpid()}.", f"{os.getpid()}.old.", f"{files._KERNEL}{'0' * 10}.",
        f"{files._KERNEL}{'f' * 10}.", "")]  # fmt: skip
    for name in planted:
        (home / name).symlink_to(precious[to])
    path = home / "x.onnx"
    artifact.write(path, b"new", {"kind": "onnx"})
    assert artifact.read(path)["kind"] == "onnx"
    assert set(names(home)) == {"x.onnx", "x.onnx.json", *planted}
    assert all((home / name).is_symlink() for name in planted)


def test_links_at_the_outputs_own_names(tmp_path, precious):
    home = tmp_path / "home"
    home.mkdir()
    path = home / "x.onnx"
    for name in ("x.onnx", "x.onnx.json"):
        (home / name).symlink_to(precious[0])
    conftest.raises_one_line(lambda: enter(artifact.claimed(path, "onnx", False)), "--force")
    artifact.write(path, b"new", {"kind": "onnx"})
    assert artifact.read(path)["kind"] == "onnx"
    assert not path.is_symlink()


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "fifo"])
def test_no_file_in_the_lock_s_place(tmp_path, precious, kind):
    lock = tmp_path / ".x.onnx.lock"
    if kind == "folder":
        lock.mkdir()
    elif kind == "fifo":
        os.mkfifo(lock)
    else:
        lock.symlink_to(precious[0] if kind == "link" else tmp_path / "nowhere")
    conftest.raises_one_line(
        lambda: artifact.write(tmp_path / "x.onnx", b"x", {}), f"cannot access {lock}", "remove it"
    )
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "x.onnx").exists()


def test_a_hard_link_in_the_lock_s_place(tmp_path, precious):
    os.link(precious[0], tmp_path / ".x.onnx.lock")
    artifact.write(tmp_path / "x.onnx", b"x", {"kind": "onnx"})
    assert artifact.read(tmp_path / "x.onnx")["kind"] == "onnx"


def test_temporaries_are_ours_alone(tmp_path):
    seen = set()
    for _ in range(3):
        with atomic(tmp_path / "x") as temporary:
            (folder,) = tmp_path.glob(".x.*.tmp")
            seen.add(folder.name)
            assert folder.stat().st_mode & 0o777 == 0o700
            assert temporary.parent == folder
            temporary.write_text("new")
    assert len(seen) == 3


def test_what_is_swept_is_ours_and_no_link(tmp_path, precious):
    """A link, and a folder of another user, that look like leftovers of ours."""
    link = tmp_path / f".x.{files._KERNEL}{'a' * 10}.tmp"
    link.symlink_to(precious[1])
    others = tmp_path / f".x.{files._KERNEL}{'b' * 10}.tmp"
    others.mkdir()
    inner = tmp_path / f".x.{files._KERNEL}{'c' * 10}.tmp"
    inner.mkdir()
    (inner / "x").symlink_to(precious[0])
    (inner / "deep").symlink_to(precious[1])
    if os.geteuid() == 0:
        os.chown(others, 65534, 65534)
    write_text(tmp_path / "x", "new")
    assert link.is_symlink()
    assert others.exists() == (os.geteuid() == 0)
    assert not inner.exists()


def test_the_mode_of_what_is_written_is_the_umask_s(tmp_path):
    before = os.umask(0o027)
    try:
        artifact.write(tmp_path / "x.onnx", b"x", {"kind": "onnx"})
        bundle.write(tmp_path / "m.bucketed", {"a.bin": b"one"}, {"kind": "bucketed"})
    finally:
        os.umask(before)
    for name, mode in (("x.onnx", 0o640), ("x.onnx.json", 0o640), ("m.bucketed", 0o750),
                       ("m.bucketed/a.bin", 0o640)):  # fmt: skip
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
