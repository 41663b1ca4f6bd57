"""What the builder's process says when it ends before its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest

import asvit_deploy
from asvit_deploy import child
from asvit_deploy import sidecar as artifact
from asvit_deploy.engine.build import Options, build_engine
from asvit_deploy.engine.source import open_source
from asvit_deploy.errors import UserError
from asvit_deploy.runners.trt_flavour import RTX

_LIBRARIES = {
    "aborts": "#include <exception>\nstatic int x = (std::terminate(), 0);",
    "crashes": "#include <csignal>\nstatic int x = raise(SIGSEGV);",
    "empty": "int nothing;",
    # Half a message on the channel, which is the one pipe that it can write to, and dead.
    "cut": """
#include <csignal>
#include <sys/stat.h>
#include <unistd.h>
static int cut()
{
    struct stat is;
    for (int fd = 0; fd < 64; ++fd)
        if (fstat(fd, &is) == 0 && S_ISFIFO(is.st_mode) && write(fd, "{\\"event\\": \\"do", 13) < 0)
            continue;
    return raise(SIGKILL);
}
static int x = cut();
""",
    "talks": '#include <cstdio>\nstatic int x = (puts("hello"), fflush(stdout), 0);',
}


@pytest.fixture
def library(request, compiler, tmp_path):
    """A shared library that does the wrong thing when it is loaded."""
    source, path = tmp_path / "p.cpp", tmp_path / f"{request.param}.so"
    source.write_text(_LIBRARIES[request.param])
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    source.unlink()
    return path


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("aborts", "ended by SIGABRT while loading the plugin: {}"),
        ("crashes", "ended by SIGSEGV while loading the plugin: {}"),
        ("cut", "ended by SIGKILL while loading the plugin: {}"),
        ("empty", "the plugin library {} cannot be loaded"),
        ("talks", "the plugin library {} cannot be loaded"),
    ],
    indirect=["library"],
)
def test_library_that_is_no_plugin(rtx, mini_artifacts, tmp_path, library, words):
    source = open_source(mini_artifacts["1", "auto"])
    with pytest.raises(UserError) as error:
        build_engine(source, tmp_path / "x.engine", rtx, Options(plugin=library))
    message = str(error.value)
    assert words.format(library) in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == [library.name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["polygraphy", "json", "asvit_deploy"])
def test_builder_imports_nothing_from_the_current_folder(
    rtx, mini_artifacts, tmp_path, monkeypatch, name
):
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / f"{name}.py").write_text("open('executed', 'w').close()\nraise SystemExit(1)\n")
    monkeypatch.chdir(folder)
    options = Options(mode="padded", target_sms=("86",), checked=False)
    build_engine(open_source(mini_artifacts["1", "auto"]), tmp_path / "x.engine", rtx, options)
    assert [path.name for path in folder.iterdir()] == [f"{name}.py"]


@pytest.mark.parametrize("check", ["trt", "ort"])
def test_probes_import_nothing_from_the_current_folder(tmp_path, monkeypatch, check):
    from asvit_deploy.ops.library import check_library
    from asvit_deploy.ops.trt_library import check_trt_library

    (tmp_path / "no.so").write_text("not a library")
    for name in ("ctypes", "onnx"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    assert {"trt": check_trt_library, "ort": check_library}[check](Path("no.so"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ctypes.py", "no.so", "onnx.py"]


def test_a_child_keeps_pythonpath_and_finds_the_package(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("x = 'mine'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import sys, mine, asvit_deploy; print(mine.x, asvit_deploy.__file__, sys.argv[1])"
    done = subprocess.run(child.command(code, "a"), capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == ["mine", asvit_deploy.__file__, "a"], done.stderr


def test_the_cause_of_a_parser_error_is_reported(rtx, tmp_path):
    """TensorRT logs the place, the node and then the cause."""
    path = tmp_path / "det.onnx"
    onnx.save(onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20]> g (float[8,8] x) => (float y) { y = Det (x) }'
    ), path)  # fmt: skip
    with pytest.raises(UserError, match=r"cannot build .*det\.onnx: .*ERROR: .*Det") as error:
        build_engine(open_source(path), tmp_path / "x.engine", rtx, Options())
    assert "While parsing" not in str(error.value)
    assert "build-plugins" not in str(error.value), "no plugin of ours would help"


def test_file_that_is_no_library(rtx, mini_artifacts, tmp_path):
    fake = tmp_path / "fake.so"
    fake.write_text("not a library")
    source = open_source(mini_artifacts["1", "auto"])
    with pytest.raises(UserError, match=r"fake\.so cannot be loaded"):
        build_engine(source, tmp_path / "x.engine", rtx, Options(plugin=fake))


@pytest.mark.slow
def test_without_the_link_the_parser_ends_the_process(
    rtx, trt_plugin, mini_artifacts, tmp_path, monkeypatch
):
    # The trap itself: pip's package holds the library only under its versioned name.
    monkeypatch.setattr(type(rtx), "environment", lambda self, folder: {
        **os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"
    })  # fmt: skip
    if list(Path(sys.prefix).rglob("tensorrt_rtx_libs/libtensorrt_rtx.so")):
        pytest.skip("this TensorRT-RTX has the plain name")
    source = open_source(mini_artifacts["1", "auto"])
    with pytest.raises(UserError, match="ended by SIGABRT while reading the graph"):
        build_engine(source, tmp_path / "x.engine", rtx, Options(plugin=trt_plugin))
    assert list(tmp_path.iterdir()) == []


def test_rtx_builds_in_a_private_folder(rtx, tmp_path):
    environment = rtx.environment(tmp_path)
    assert environment["POLYGRAPHY_USE_TENSORRT_RTX"] == "1"
    link = tmp_path / "libtensorrt_rtx.so"
    if link.exists():
        assert environment["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(tmp_path)
    assert os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX") is None


def test_unknown_gpu_is_refused(rtx, mini_artifacts, tmp_path):
    options = Options(mode="padded", target_sms=("90",), checked=False)
    with pytest.raises(UserError, match=r"does not build for SM90; it knows 75, 80"):
        build_engine(open_source(mini_artifacts["1", "auto"]), tmp_path / "x.engine", rtx, options)


def children(pid):
    """Command lines of a process's children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(status[1]) == pid and status[0] != "Z":
                    found.append((int(entry.name), (entry / "cmdline").read_bytes().decode()))
            except (OSError, IndexError):
                continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_build_leaves_nothing(rtx, mini_artifacts, tmp_path, signum):
    command = [
        sys.executable, "-m", "asvit_deploy", "build-engine", "--onnx",
        str(mini_artifacts["dynamic", "auto"]), "--mode", "padded", "--no-check", "-o", "x.engine",
    ]  # fmt: skip
    assert RTX.module
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    worker: list = []
    while process.poll() is None and not worker:
        worker = [pid for pid, line in children(process.pid) if "engine.worker" in line]
        time.sleep(0.01)
    assert worker, "the builder's process never showed up"
    time.sleep(0.3)  # a whole build takes more than a second
    os.killpg(process.pid, signum) if signum == signal.SIGINT else process.kill()
    _, error = process.communicate(timeout=60)
    assert "Traceback" not in error
    assert process.returncode != 0
    # One that is killed cannot take its claim away; the next run does, and is not held up by it.
    left = [".x.engine.lock"] if signum == signal.SIGKILL else []
    assert [path.name for path in tmp_path.iterdir()] == left
    with artifact.claimed(tmp_path / "x.engine", "engine", force=False):
        pass
    assert list(tmp_path.iterdir()) == []
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker[0]}").exists() and time.monotonic() < deadline:
        if "Z" in Path(f"/proc/{worker[0]}/stat").read_text().rsplit(")", 1)[1].split()[0]:
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{worker[0]}").exists(), "the builder lives on"
