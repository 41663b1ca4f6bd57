"""A library in the cache is loaded as it was built or not at all, and never ends the process."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import raises_one_line
from two_users import OTHER, other

from asvit_deploy import child
from asvit_deploy.errors import UserError
from asvit_deploy.files import sha256
from asvit_deploy.ops import prebuilt
from asvit_deploy.ops.headers import runtime_api
from asvit_deploy.ops.kernel import Kernel, build_kernel
from asvit_deploy.ops.library import build_ort, find_library, library_path
from asvit_deploy.ops.prebuilt import building, digest_path, usable
from asvit_deploy.ops.trt_library import build_trt, find_trt_plugin, library_folder


def damaged(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A library cut, and with a byte flipped, at places from its header to its end."""
    size = len(data)
    for cut in (0, 1, 63, 64, 1000, size // 4, size // 2, size * 3 // 4, size - 1):
        yield f"cut at {cut}", data[:cut]
    for place in (0, 4, 16, 24, 32, 40, 54, 72, 120, size // 3, size // 2, size - 100, size - 1):
        flipped = bytearray(data)
        flipped[place] ^= 0xFF
        yield f"flipped at {place}", bytes(flipped)
    yield "longer", data + b"\0"


def keep(library: Path) -> None:
    """Put a digest beside a library that stands in the cache."""
    digest_path(library).write_text(f"{sha256(library)}  {library.name}\n")


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "asvit-deploy"
    folder.mkdir(parents=True, mode=0o700)
    (tmp_path / "cache").chmod(0o700)
    return folder


@pytest.fixture
def ort_library(op_library, own_cache) -> Path:
    """The op's library in a cache of its own, of the name that is looked for."""
    library = own_cache / op_library.name
    for path in (op_library, digest_path(op_library)):
        shutil.copy(path, own_cache / path.name)
    assert find_library() == library
    return library


# ---------------------------------------------------------------- damage


def test_a_damaged_library_ends_a_process_that_loads_it(op_library, tmp_path):
    """Why it is looked at before: or the tests below would pass whatever the check does."""
    ends = []
    for number, (_, data) in enumerate(damaged(op_library.read_bytes())):
        path = tmp_path / f"{number}.so"
        path.write_bytes(data)
        code = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).RegisterCustomOps"
        ends.append(subprocess.run([sys.executable, "-c", code, path], capture_output=True))
    assert any(-done.returncode in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL) for done in ends)


@pytest.mark.slow
def test_every_damaged_library_costs_a_line_and_the_function_runs(
    ort_library, mini_artifacts, photos, tmp_path
):
    """One child runs them all: a signal would end it."""
    photos.views[0].picture().save(tmp_path / "x.png")
    cases = dict(damaged(ort_library.read_bytes()))
    for number, data in enumerate(cases.values()):
        folder = tmp_path / str(number) / "asvit-deploy"
        folder.mkdir(parents=True, mode=0o700)
        (folder / ort_library.name).write_bytes(data)
        shutil.copy(digest_path(ort_library), folder)
    code = """
import contextlib, io, json, os, sys
from asvit_deploy.cli.main import main
top, model, results = sys.argv[1], sys.argv[2], []
for number in range(int(sys.argv[3])):
    os.environ["XDG_CACHE_HOME"] = f"{top}/{number}"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(["predict", model, f"{top}/x.png", "--json"])
        except SystemExit as end:
            results.append((end.code, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""
    model = mini_artifacts["1", "auto"]
    done = subprocess.run(
        child.command(code, str(tmp_path), str(model), str(len(cases))),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
    results = json.loads(done.stdout)
    assert len(results) == len(cases)
    for case, (code, out, err) in zip(cases, results):
        assert code == 0, (case, err)
        assert len(json.loads(out)) == 1, case
        (line,) = [line for line in err.splitlines() if "libasvit" in line]
        assert line.startswith("no library, "), case
        assert line.endswith("run `asvit-deploy build-plugins ort`"), case


@pytest.mark.slow
def test_an_unchanged_library_runs(ort_library, mini_artifacts, photos, cli, tmp_path):
    photos.views[0].picture().save(tmp_path / "x.png")
    args = ("--limit", 1, "--runtime", "onnxruntime", "--json")
    result = cli("check", mini_artifacts["1", "auto"], *args)
    assert [run["run"] for run in json.loads(result.out)] == ["function, batch 1",
                                                              "library, batch 1"]  # fmt: skip


@pytest.mark.parametrize("text", [None, "", "0" * 64 + "\n", "x" * 300, b"\xff" * 70, "pipe"])
def test_a_digest_that_is_none_vouches_for_nothing(ort_library, text):
    path, said = digest_path(ort_library), []
    path.unlink()
    if text == "pipe":
        os.mkfifo(path)
    elif text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert find_library(say=said.append) is None
    (line,) = said
    assert str(ort_library) in line
    assert "\n" not in line


def test_digests_have_the_form_of_sha256sum(ort_library):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum")
    command = ["sha256sum", "-c", digest_path(ort_library).name]
    assert subprocess.run(command, cwd=ort_library.parent, capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_damaged_library_is_built_again(ort_library, ort_headers):
    ort_library.write_bytes(ort_library.read_bytes()[:5000])
    said: list[str] = []
    cuda = "cuda" in ort_library.name
    built = build_ort(cuda=cuda, say=said.append)
    assert any("is damaged" in line for line in said)
    assert find_library() == built == ort_library
    built = build_ort(cuda=cuda, say=said.append)
    assert said[-1].startswith("built before"), said


def test_a_damaged_kernel_is_built_again_and_says_so(compiler, own_cache, capsys):
    library = build_kernel(cuda=False)
    good = library.read_bytes()
    assert build_kernel(cuda=False) == library
    assert capsys.readouterr().err == ""
    for case, data in [("cut", good[:6000]), ("flipped", good[:500] + b"!" + good[501:])]:
        library.unlink()
        library.write_bytes(data)
        assert build_kernel(cuda=False) == library, case
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{library} is damaged" in line
        Kernel(library)
        assert library.read_bytes() == good, case


@pytest.mark.slow
def test_a_damaged_plugin_is_passed_over_and_built_again(trt_headers, own_cache, monkeypatch):
    monkeypatch.setenv("TensorRT_ROOT", str(trt_headers.folder))
    twin = build_trt(twin=True)
    # The twin under the name of one for GPUs: nothing here asks what it holds.
    folder = library_folder(trt_headers.version, ["ptx75"])
    folder.mkdir(mode=0o700)
    library = folder / "libasvit_trt.so"
    shutil.copy(twin, library)
    keep(library)
    said: list[str] = []
    assert (find_trt_plugin(said.append), said) == (library, [])
    for case, data in damaged(twin.read_bytes()):
        library.write_bytes(data)
        assert find_trt_plugin(said.append) is None, case
        assert said.pop().endswith("run `asvit-deploy build-plugins trt`"), case
    twin.write_bytes(twin.read_bytes()[:4096])
    assert build_trt(twin=True, say=said.append) == twin
    assert any(f"{twin} is damaged" in line for line in said)
    ctypes.CDLL(str(twin)).getCreators  # noqa: B018


def test_of_two_libraries_the_good_one_is_taken(op_library, own_cache, monkeypatch):
    names = [library_path(runtime_api(), targets) for targets in ((), ("sm86",))]
    for path in names:
        shutil.copy(op_library, path)
        keep(path)
    said: list[str] = []
    assert (find_library(say=said.append), said) == (names[1], [])
    names[1].write_bytes(b"cut")
    assert find_library(say=said.append) == names[0]
    assert len(said) == 1


# ---------------------------------------------------------------- a library and its digest


def test_a_kill_between_the_two_renames_costs_a_build(own_cache, monkeypatch):
    library, said = own_cache / "libasvit_x.so", []
    real, names = os.replace, []

    def killed(source, target):
        names.append(Path(target).name)
        if len(names) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), building(library) as temporary:
        temporary.write_bytes(b"built")
    assert names == ["libasvit_x.so.sha256", "libasvit_x.so"], "the digest first"
    assert not usable(library, "build it", said.append)
    assert said == [], "it is just not there"
    monkeypatch.undo()
    with building(library) as temporary:
        temporary.write_bytes(b"built")
    assert usable(library, "build it", said.append)


def test_two_who_build_at_once_and_one_who_looks(own_cache):
    """Compilers need not give the same bytes twice."""
    library = own_cache / "libasvit_x.so"
    with building(library) as temporary:
        temporary.write_bytes(b"first")
    code = """
import os, sys; from pathlib import Path; from asvit_deploy.ops.prebuilt import building
for _ in range(60):
    with building(Path(sys.argv[1])) as temporary:
        temporary.write_bytes(os.urandom(50000))
"""
    builders = [subprocess.Popen(child.command(code, str(library))) for _ in range(2)]
    said: list[str] = []
    looks = 0
    while any(builder.poll() is None for builder in builders):
        assert usable(library, "build it", said.append), said
        looks += 1
    assert [builder.returncode for builder in builders] == [0, 0]
    assert looks > 10
    assert usable(library, "build it", said.append), said


def test_a_failed_build_leaves_both_as_they_were(own_cache):
    library = own_cache / "libasvit_x.so"
    with building(library) as temporary:
        temporary.write_bytes(b"first")

    def fail() -> None:
        with building(library) as temporary:
            temporary.write_bytes(b"second")
            raise UserError("no")

    raises_one_line(fail, "no")
    assert usable(library, "build it")
    assert library.read_bytes() == b"first"
    assert len(list(own_cache.iterdir())) == 2


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077])
def test_what_is_built_only_we_may_write(compiler, own_cache, umask):
    own_cache.chmod(0o755)
    before = os.umask(umask)
    try:
        library = build_kernel(cuda=False)
    finally:
        os.umask(before)
    assert library.stat().st_mode & 0o777 == 0o700, "also while it was compiled"
    assert digest_path(library).stat().st_mode & 0o022 == 0
    assert usable(library, "")


def test_who_holds_the_folder_s_lock_holds_nobody_up(own_cache, monkeypatch):
    monkeypatch.setattr(prebuilt, "_LONGEST_WAIT", 0.2)
    fcntl = pytest.importorskip("fcntl")
    library = own_cache / "libasvit_x.so"
    held = os.open(own_cache, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        done = threading.Event()

        def work() -> None:
            with building(library) as temporary:
                temporary.write_bytes(b"x")
            assert usable(library, "")
            done.set()

        threading.Thread(target=work, daemon=True).start()
        assert done.wait(20)
    finally:
        os.close(held)


# ---------------------------------------------------------------- another user's


def plant(shared, planted: Path, *names: str) -> Path:
    """A cache of ours that once was open, in which the other user has put files, digests too."""
    folder = shared.folder / "asvit-deploy"
    folder.mkdir()
    folder.chmod(0o777)
    for name in names:
        target = folder / name
        if target.parent != folder:
            other("mkdir", target.parent)
        given = shared.folder / "given"
        given.write_text(f"{sha256(planted)}  {target.name}\n")
        shutil.copy(planted, shared.folder / "given.so")
        for file in (given, shared.folder / "given.so"):
            file.chmod(0o755)
        other("cp", shared.folder / "given.so", target)
        other("cp", given, digest_path(target))
    folder.chmod(0o755)
    return folder


def load(path: Path) -> None:
    """As every loader did."""
    ctypes.CDLL(str(path))


Way = tuple[str, Callable[[], object]]


@pytest.fixture
def ways(compiler, tmp_path, monkeypatch, trt_headers) -> dict[str, Way]:
    """Of each kind of library: its name in the cache, and what looks for it."""
    monkeypatch.setenv("TensorRT_ROOT", str(trt_headers.folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    library = library_folder((10, 14), ["ptx75"]) / "libasvit_trt.so"
    return {
        "ort": (library_path(runtime_api() or 20).name, find_library),
        "kernel": (build_kernel(cuda=False).name, lambda: load(build_kernel(cuda=False))),
        "trt": (f"{library.parent.name}/{library.name}", find_trt_plugin),
    }


@pytest.mark.parametrize("kind", ["ort", "kernel", "trt"])
def test_a_planted_library_is_not_loaded(shared, planted, mark, ways, kind, monkeypatch, capsys):
    name, look = ways[kind]
    path = plant(shared, planted, name) / name
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared.folder))
    load(path)
    assert mark.left(), "the old way"
    assert look() is None
    assert not mark.left()
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path.parent if kind == 'trt' else path} belongs to user {OTHER}" in line
    if kind == "kernel":
        assert path.stat().st_uid == 0, "built again in its place, in a folder of ours alone"


@pytest.mark.parametrize("kind", ["ort", "kernel", "trt"])
def test_nothing_is_loaded_from_a_cache_where_others_may_write(
    shared, planted, mark, ways, kind, monkeypatch
):
    """Not even what is ours: others can exchange it between the look and the use."""
    name, look = ways[kind]
    folder = shared.open_folder("asvit-deploy")
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(planted, folder / name)
    keep(folder / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared.folder))
    raises_one_line(look, f"others may write in {folder}", "chmod go-w")
    folder.chmod(0o700)
    shared.folder.chmod(0o777)
    raises_one_line(look, f"others may write in {shared.folder}")
    assert not mark.left()
    shared.folder.chmod(0o755)
    result = look()
    if kind == "kernel":
        assert mark.left(), "what is ours alone is loaded: the mark would have been seen"
    else:
        assert result == folder / name


def test_planted_headers_are_not_compiled(shared, tmp_path, monkeypatch, capsys):
    from asvit_deploy.ops import headers, trt_library

    cache = shared.open_folder("asvit-deploy")
    other("mkdir", "-p", cache / "headers/api-17", cache / "headers/tensorrt-07cc714e")
    for name in ("onnxruntime_c_api.h", "onnxruntime_cxx_api.h"):
        file = tmp_path / name
        file.write_text("#define ORT_API_VERSION 17\n")
        other("sh", "-c", f"echo '#define ORT_API_VERSION 17' > {cache}/headers/api-17/{name}")
    cache.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared.folder))
    assert headers._cached() == []
    assert f"belongs to user {OTHER}" in capsys.readouterr().err
    monkeypatch.delenv("TensorRT_ROOT", raising=False)
    monkeypatch.setattr(trt_library, "SYSTEM", ())
    raises_one_line(trt_library.find_trt_headers, f"belongs to user {OTHER}")
    # A single header in a folder of ours.
    shutil.rmtree(cache / "headers")
    shutil.copytree(tmp_path, cache / "headers/api-17")
    assert [found.api for found in headers._cached()] == [17]
    os.chown(cache / "headers/api-17/onnxruntime_c_api.h", OTHER, OTHER)
    assert headers._cached() == []


def test_other_timings_are_not_read(shared, monkeypatch, capsys):
    from asvit_deploy.engine import build

    cache = shared.open_folder("asvit-deploy")
    other("touch", cache / "timing-10.14.1.cache")
    cache.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared.folder))
    assert build._timing_folder() is None
    assert "timings are not kept, " in capsys.readouterr().err
    (cache / "timing-10.14.1.cache").unlink()
    assert build._timing_folder() == cache
