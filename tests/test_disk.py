"""A full disk is named, and the file that did not fit; what killed runs left goes with the next."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from asvit_deploy import child, disk, files, sidecar, trusted
from asvit_deploy.errors import UserError
from asvit_deploy.ops import trt_library
from asvit_deploy.ops.library import run_compiler


@pytest.fixture
def small(tmp_path):
    """A disk of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", folder],
                             capture_output=True, text=True)  # fmt: skip
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def full(error: UserError, disk: Path, file: str, temporary: bool = False) -> None:
    line = str(error)
    assert line.startswith(f"cannot write {disk}"), line
    assert file in line
    assert f"No space left on device on the disk of {disk}; free space there" in line
    assert ("TMPDIR" in line) == temporary
    for blame in ("reinstall", "export it again", "another compiler", "--headers"):
        assert blame not in line


def test_the_file_that_did_not_fit_is_named(small):
    """Of an artefact and its sidecar the one that was being written, not the last of both."""
    path = small / "m.onnx"
    with pytest.raises(UserError) as caught:
        sidecar.write(path, bytes(1 << 20), {"kind": "onnx"})
    full(caught.value, small, "m.onnx: No space")
    with pytest.raises(UserError) as caught:
        sidecar.write(path, bytes(16), {"kind": "onnx", "classes": "x" * (1 << 20)})
    full(caught.value, small, "m.onnx.json: No space")
    assert list(small.iterdir()) == []


def test_programs_that_had_no_room_are_not_blamed(small, tmp_path, monkeypatch):
    """pip says ERROR: Exception, apt that a signature is missing."""
    folder = tmp_path / "wheel"
    folder.mkdir()
    (small / "fill").write_bytes(bytes(240 << 10))  # more than a probe writes is left
    monkeypatch.setenv("TMPDIR", str(small))
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    with pytest.raises(UserError) as caught:
        trt_library._download_wheel(folder)
    full(caught.value, small, "small: No space", temporary=True)
    (small / "fill").unlink()
    disk.require_room(folder)


def test_a_compiler_at_a_limit_on_file_sizes(tmp_path):
    output = tmp_path / "out"
    line = f'echo "{output}: {os.strerror(errno.EFBIG)}" >&2; exit 1'
    with pytest.raises(UserError, match=f"^cannot write {output}: File too large; a limit on"):
        run_compiler(["sh", "-c", line])


def test_what_fails_in_a_scratch_folder_on_a_full_disk(small, monkeypatch):
    """Whatever a library makes of it: it knows a number, or nothing at all."""
    monkeypatch.setattr(tempfile, "tempdir", str(small))

    def by_python(folder):
        (folder / "graph").write_bytes(bytes(1 << 20))

    def by_another(folder):
        with pytest.raises(OSError, match="No space"):
            (folder / "plan").write_bytes(bytes(1 << 20))
        raise RuntimeError("an error 17 that says nothing")

    def blamed(folder):
        with pytest.raises(OSError, match="No space"):
            (folder / "plan").write_bytes(bytes(1 << 20))
        raise UserError("the model cannot be loaded; export it again")

    for fails in (by_python, by_another, blamed):
        with pytest.raises(UserError) as caught, files.scratch("test") as folder:
            fails(folder)
        full(caught.value, small, ".asvit-test.", temporary=True)
        assert list(small.iterdir()) == []
    with pytest.raises(RuntimeError, match="ours"), files.scratch("test"):
        raise RuntimeError("ours")  # where there is room, a defect stays one


def test_a_child_whose_input_does_not_fit(small, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    with pytest.raises(UserError) as caught:
        child.tried("import sys; sys.stdin.read()", given=bytes(1 << 20))
    full(caught.value, small, "", temporary=True)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):  # tests' own folders come before
    """No folder takes temporary files: what `tempfile` then finds."""

    def search():
        places = ["/tmp", "/var/tmp", "/usr/tmp", os.getcwd()]
        raise FileNotFoundError(errno.ENOENT, f"No usable temporary directory found in {places}")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", search)


NOWHERE = "no folder takes temporary files: "


def test_the_library_without_a_folder_for_temporary_files(nowhere, tmp_path):
    import asvit_deploy

    with pytest.raises(UserError, match=f"^{NOWHERE}.*; free space there, or set TMPDIR"):
        child.tried("pass")
    with pytest.raises(UserError, match=NOWHERE), files.scratch("test"):
        pytest.fail("there is no place for it")
    with pytest.raises(UserError, match=NOWHERE):
        trusted.require_temporary()
    with pytest.raises(UserError, match=NOWHERE):
        asvit_deploy.export("default", output=tmp_path / "m.onnx")
    assert list(tmp_path.glob("m.onnx*")) == []
    with files.scratch("test", tmp_path) as folder:  # one that is named needs none
        assert folder.is_dir()
    line = str(disk.unwritten(tmp_path / "x", OSError(errno.ENOSPC, "No space left on device")))
    assert line.startswith(f"cannot write {tmp_path / 'x'}: No space left on device on the disk of")
    assert line.endswith("; free space there, then run it again")


@pytest.mark.parametrize("name", [None, "out.json"])
@pytest.mark.parametrize("raised", ["a full disk", "a search", "what hides it"])
def test_a_command_without_a_folder_for_temporary_files(cli, nowhere, monkeypatch, raised, name):
    import asvit_deploy

    def fails(**_):
        if raised == "a full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        try:
            tempfile.gettempdir()
        except OSError as error:
            if raised == "a search":
                raise
            raise RuntimeError("step 1 of 3 failed") from error  # as PyTorch's exporter does

    monkeypatch.setattr(asvit_deploy, "predict", fails)
    result = cli("predict", "m.onnx", "a.png")
    assert result.code == 2
    wanted = "cannot write " if raised == "a full disk" else NOWHERE
    assert result.err.startswith(f"Error: {wanted}")
    assert result.err.count("\n") == 1


def test_a_command_on_a_disk_that_is_full_at_once(tmp_path, small):
    """The whole search, by Python itself: each of its places lies on a full disk."""
    subprocess.run(["dd", "if=/dev/zero", f"of={small / 'filler'}", "bs=4k"], capture_output=True)
    code = (
        f"import tempfile; tempfile._candidate_tempdir_list = lambda: [{str(small)!r}]\n"
        "import sys; from asvit_deploy.cli.main import main; main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, "build-plugins", "--force"], cwd=tmp_path,
                          capture_output=True, text=True,
                          env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "c")})  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"Error: {NOWHERE}")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64k", "2500k", "3500k"])
def test_build_engine_on_a_full_disk(cli, rtx, tmp_path, small, mini_artifacts, monkeypatch, size):
    """Where the graph does not fit, and where the builder's own files do not."""
    subprocess.run(["mount", "-o", f"remount,size={size}", small], check=True)
    monkeypatch.setattr(tempfile, "tempdir", str(small))
    monkeypatch.setenv("TMPDIR", str(small))
    filler, model = small / "filler", mini_artifacts["1", "auto"]
    graph = model.stat().st_size
    if size != "64k":  # room for the graph and a little
        room = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
        filler.write_bytes(bytes(max(0, room - graph - (300 << 10))))
    line = ["build-engine", "--onnx", model, "--flavour", "tensorrt-rtx", "--mode", "padded"]
    result = cli(*line, "--no-check", "-o", tmp_path / "e.engine")
    assert result.code == 2
    (line,) = (line for line in result.err.splitlines() if line.startswith("Error:"))
    full(UserError(line.removeprefix("Error: ")), small, ".asvit-engine.", temporary=True)
    assert [path.name for path in small.iterdir()] in ([], ["filler"])


def test_a_limit_on_file_sizes_is_no_full_disk(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError) as caught:
            files.write_bytes(tmp_path / "x", bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "x: File too large; a limit on file sizes is set here (ulimit -f)" in str(caught.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM])
def test_what_the_machine_fails_in_is_no_traceback(cli, monkeypatch, number):
    import asvit_deploy

    def fails(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(asvit_deploy, "predict", fails)
    result = cli("predict", "m.onnx", "a.png")
    assert result.code == 2
    assert result.err.startswith(f"Error: the system does not go on: {os.strerror(number)}")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="Linux's, which fails to be read")
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.onnx", "x.bin"])
def test_a_read_error_names_the_file(tmp_path, name):
    """/proc/self/mem is a regular file whose beginning cannot be read."""
    from asvit_deploy.bounded import open_regular
    from asvit_deploy.checkpoints.load import load_checkpoint

    path = tmp_path / name
    path.symlink_to("/proc/self/mem")
    with open_regular(path) as file, pytest.raises(OSError, match=name) as caught:
        file.read(10)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, str(path))
    with pytest.raises(UserError, match=rf"{name} cannot be read: Input/output error; check the d"):
        load_checkpoint(path)


# --- what killed runs leave ----------------------------------------------------------------------

_HOLDS = """
import sys, time
from asvit_deploy.files import scratch
with scratch("test") as folder:
    (folder / "plan").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_run_left_goes_with_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", _HOLDS], stdout=subprocess.PIPE, text=True,
                                env=environment) for _ in range(2)]  # fmt: skip
    (tmp_path / ".asvit-test.mine.tmp").mkdir()  # a name that is not ours
    try:
        killed, kept = (Path(one.stdout.readline().strip()) for one in running)
        running[0].kill()
        running[0].wait()
        assert killed.is_dir()
        with files.scratch("test") as folder:
            assert not killed.exists()
            assert (kept / "plan").is_file()
        assert {path.name for path in tmp_path.iterdir()} == {kept.name, ".asvit-test.mine.tmp"}
        del folder
    finally:
        for one in running:
            one.kill()
            one.wait()


def test_a_child_ends_with_its_parent(tmp_path):
    """Also one whose parent is gone before it could ask for that."""
    code = (
        "import subprocess, sys, time\n"
        "from asvit_deploy import child\n"
        "one = subprocess.Popen(child.command('import time; time.sleep(60)'))\n"
        "print(one.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    number = int(parent.stdout.readline())
    time.sleep(1.0)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while time.monotonic() < until and _lives(number):
        time.sleep(0.05)
    assert not _lives(number)


def test_a_child_of_a_parent_that_is_gone_does_nothing(tmp_path):
    words = child.command(f"open({str(tmp_path / 'ran')!r}, 'w')")
    here = f"os.getppid() != {os.getpid()}"
    assert here in words[2]
    words[2] = words[2].replace(here, "os.getppid() != 1 << 30")
    assert subprocess.run(words).returncode == 1
    assert not (tmp_path / "ran").exists()


def _lives(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
