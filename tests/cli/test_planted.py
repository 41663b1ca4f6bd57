"""A library that another user planted runs in no command, wherever HOME and the cache stand."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import refused
from two_users import OTHER, Mark, Shared, other

from asvit_deploy.files import sha256
from asvit_deploy.ops.headers import runtime_api
from asvit_deploy.ops.library import library_path
from asvit_deploy.runners.onnx_runtime import import_onnxruntime

Where = Callable[[Shared, Callable[[Path], None]], tuple[str, Path]]


def in_the_cache(shared: Shared, put: Callable[[Path], None]) -> tuple[str, Path]:
    """Our own cache, in which others could write once."""
    cache = shared.open_folder("asvit-deploy")
    put(cache)
    cache.chmod(0o755)
    return "XDG_CACHE_HOME", shared.folder


def in_an_open_cache(shared, put):
    cache = shared.open_folder("asvit-deploy")
    put(cache)
    return "XDG_CACHE_HOME", shared.folder


def in_a_sticky_cache(shared, put):
    cache = shared.open_folder("asvit-deploy", 0o1777)
    put(cache)
    return "XDG_CACHE_HOME", shared.folder


def as_the_cache(shared, put):
    """There first, in a folder such as /tmp."""
    top = shared.open_folder("top", 0o1777)
    other("mkdir", top / "asvit-deploy")
    put(top / "asvit-deploy")
    return "XDG_CACHE_HOME", top


def as_the_cache_s_parent(shared, put):
    top = shared.open_folder("top", 0o1777)
    other("mkdir", "-p", top / "cache/asvit-deploy")
    put(top / "cache/asvit-deploy")
    return "XDG_CACHE_HOME", top / "cache"


def as_the_cache_of_an_open_home(shared, put):
    home = shared.open_folder("home")
    other("mkdir", "-p", home / ".cache/asvit-deploy")
    put(home / ".cache/asvit-deploy")
    return "HOME", home


def in_another_user_s_home(shared, put):
    """As `sudo` leaves HOME."""
    home = shared.open_folder("homes") / "theirs"
    other("mkdir", "-p", home / ".cache/asvit-deploy")
    put(home / ".cache/asvit-deploy")
    home.parent.chmod(0o755)
    return "HOME", home


def behind_a_link(shared, put):
    """Which the other user made in place of our cache."""
    top = shared.open_folder("top", 0o1777)
    other("mkdir", top / "theirs")
    put(top / "theirs")
    other("ln", "-s", top / "theirs", top / "asvit-deploy")
    return "XDG_CACHE_HOME", top


def behind_a_link_of_ours(shared, put):
    top = shared.open_folder("top", 0o1777)
    other("mkdir", top / "theirs")
    put(top / "theirs")
    (shared.folder / "asvit-deploy").symlink_to(top / "theirs")
    return "XDG_CACHE_HOME", shared.folder


PLACES = (
    in_the_cache, in_an_open_cache, in_a_sticky_cache, as_the_cache, as_the_cache_s_parent,
    as_the_cache_of_an_open_home, in_another_user_s_home, behind_a_link, behind_a_link_of_ours,
)  # fmt: skip


@pytest.fixture
def picture(photos, tmp_path) -> Path:
    photos.views[0].picture().save(tmp_path / "x.png")
    return tmp_path / "x.png"


@pytest.fixture
def name() -> str:
    """Of the library that is looked for here."""
    return library_path(runtime_api() or 20).name


def register(library: Path) -> None:
    """Load a library as a session does; the planted one is none of ONNX Runtime's."""
    options = import_onnxruntime().SessionOptions()
    with pytest.raises(Exception, match="RegisterCustomOps"):
        options.register_custom_ops_library(str(library))


def put_there(shared: Shared, planted: Path, name: str) -> Callable[[Path], None]:
    """The other user's hand: the library, and a digest that vouches for it."""
    given = shared.folder / "given"
    shutil.copy(planted, given)
    digest = shared.folder / "digest"
    digest.write_text(f"{sha256(planted)}  {name}\n")
    for file in (given, digest):
        file.chmod(0o755)

    def put(folder: Path) -> None:
        other("cp", given, folder / name)
        other("cp", digest, folder / f"{name}.sha256")

    return put


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
def test_a_planted_library_runs_nowhere(
    shared, planted, mark, name, where, monkeypatch, cli, mini_artifacts, picture
):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    variable, value = where(shared, put_there(shared, planted, name))
    monkeypatch.setenv(variable, str(value))
    (library,) = shared.folder.rglob(name)
    result = cli("predict", mini_artifacts["1", "auto"], picture, "--json")
    assert not mark.left(), "the planted library has run"
    assert result.code == 0, result.err
    assert len(json.loads(result.out)) == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("no library, ")]
    assert str(shared.folder) in line
    assert any(remedy in line for remedy in ("chmod go-w", "rm ", "XDG_CACHE_HOME"))
    register(library)
    assert mark.left(), "it would have been seen"


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o666])
def test_a_library_that_others_may_write_runs_nowhere(
    planted, mark, name, mode, monkeypatch, cli, mini_artifacts, picture, tmp_path
):
    cache = tmp_path / "asvit-deploy"
    cache.mkdir(mode=0o755)
    library = cache / name
    shutil.copy(planted, library)
    (cache / f"{name}.sha256").write_text(f"{sha256(planted)}  {name}\n")
    library.chmod(mode)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ("predict", mini_artifacts["1", "auto"], picture, "--json")
    result = cli(*command)
    assert not mark.left()
    assert result.code == 0, result.err
    assert f"no library, others may write {library}" in result.err
    # Ours alone, it is loaded: what the mark is worth. (It holds no op: that ends in one line.)
    library.chmod(0o755)
    refused(cli(*command), str(library))
    assert mark.left()


def test_a_link_in_place_of_the_library_is_not_followed(
    planted, mark, name, monkeypatch, cli, mini_artifacts, picture, tmp_path
):
    cache = tmp_path / "asvit-deploy"
    cache.mkdir(mode=0o755)
    (cache / name).symlink_to(planted)
    (cache / f"{name}.sha256").write_text(f"{sha256(planted)}  {name}\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = cli("predict", mini_artifacts["1", "auto"], picture, "--json")
    assert (result.code, mark.left()) == (0, False), result.err
    assert f"no library, {cache / name} is a link" in result.err


def test_commands_that_build_refuse_such_a_cache(shared, monkeypatch, cli):
    other_s = shared.open_folder("top", 0o1777)
    other("mkdir", other_s / "asvit-deploy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(other_s))
    for command in (["build-plugins", "ort"], ["build-plugins", "ort", "--force"]):
        refused(cli(*command), f"belongs to user {OTHER}", "XDG_CACHE_HOME")
    assert list((other_s / "asvit-deploy").iterdir()) == []


@pytest.mark.slow
def test_doctor_says_what_is_not_trusted(shared, planted, mark, name, monkeypatch, cli):
    variable, value = in_the_cache(shared, put_there(shared, planted, name))
    trt = shared.folder / "asvit-deploy"
    monkeypatch.setenv(variable, str(value))
    from asvit_deploy.ops.trt_library import library_folder

    folder = library_folder((10, 14), ["ptx75"])
    os.mkdir(folder, 0o777)
    folder.chmod(0o777)
    other("cp", shared.folder / "given", folder / "libasvit_trt.so")
    folder.chmod(0o755)
    result = cli("doctor", "--json")
    rows = {row["name"]: row for row in json.loads(result.out)}
    for row in (rows["op library"], rows["TensorRT plugin"]):
        assert row["status"] == "broken"
        assert f"belongs to user {OTHER}" in row["detail"]
        assert str(trt) in row["detail"]
        assert "rm " in row["remedy"]
    trt.chmod(0o777)
    rows = {row["name"]: row for row in json.loads(cli("doctor", "--json").out)}
    for row in (rows["op library"], rows["TensorRT plugin"]):
        assert row["status"] == "broken"
        assert f"others may write in {trt}" in row["detail"]
        assert "chmod go-w" in row["remedy"]
    assert not mark.left()


def test_files_of_root_serve_every_user(shared, mark: Mark, planted):
    """The way of a container: root builds, another user runs; nothing more is asked of root's."""
    from asvit_deploy import trusted

    if os.geteuid() != 0:
        pytest.skip("only root")
    cache = shared.folder / "asvit-deploy"
    cache.mkdir(mode=0o755)
    shutil.copy(planted, cache / "x.so")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(OTHER)
            os.setuid(OTHER)
            trusted.require_tree(cache)
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
