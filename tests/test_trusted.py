"""What another user may have written, or can exchange, is refused in one line with its remedy."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import raises_one_line
from two_users import OTHER, other

from asvit_deploy import trusted
from asvit_deploy.files import cache_dir, cached, make_cache_dir
from asvit_deploy.trusted import opened, require_folder, require_tree


def read(path: Path) -> bytes:
    with opened(path) as file:
        return file.read()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, and no XDG_CACHE_HOME."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o755)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.parametrize("umask", [0, 0o002, 0o022, 0o077])
def test_a_cache_is_made_for_us_alone_whatever_the_umask(home, umask):
    before = os.umask(umask)
    try:
        made = make_cache_dir("headers")
    finally:
        os.umask(before)
    assert made == home / ".cache/asvit-deploy/headers"
    for folder in (made, *made.parents[:2]):
        assert folder.stat().st_mode & 0o777 == 0o700, folder


def test_a_cache_of_umask_022_goes_on_working(home):
    folder = home / ".cache/asvit-deploy"
    folder.mkdir(parents=True)
    for place in (folder, folder.parent):
        place.chmod(0o755)
    (folder / "libasvit_x.so").touch()
    (folder / "libasvit_x.so").chmod(0o755)
    assert cache_dir() == folder
    assert [path.name for path in cached("libasvit_*")] == ["libasvit_x.so"]
    require_tree(folder)
    assert read(folder / "libasvit_x.so") == b""


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o707, 0o722, 0o1777])
@pytest.mark.parametrize("which", ["", ".cache", ".cache/asvit-deploy"])
def test_a_place_where_others_may_write_is_refused(home, which, mode):
    make_cache_dir()
    (home / which).chmod(mode)
    if mode & 0o1000 and which != ".cache/asvit-deploy":
        assert cache_dir().is_dir(), "in a sticky folder nobody can put away what is ours"
        return
    place = str(home / which)
    for call in (cache_dir, make_cache_dir, lambda: cached("*")):
        raises_one_line(call, place, f"chmod go-w {place}", "XDG_CACHE_HOME")
    (home / which).chmod(mode & ~0o022)
    assert cache_dir().is_dir(), "the mend helps"


def test_nothing_is_made_where_others_may_write(home):
    home.chmod(0o777)
    raises_one_line(make_cache_dir, str(home))
    assert list(home.iterdir()) == []


def test_a_private_group_is_no_other(monkeypatch, tmp_path):
    """As systems have it that make a group for each user. Their databases are made up."""
    user, group = os.geteuid(), tmp_path.stat().st_gid
    tmp_path.chmod(0o775)
    monkeypatch.setattr(trusted.os, "geteuid", lambda: 1000)
    status = SimpleNamespace(st_mode=0o40775, st_gid=group, st_uid=user)
    me = SimpleNamespace(pw_name="ada", pw_gid=group, pw_uid=1000)
    bob = SimpleNamespace(pw_name="bob", pw_gid=group + 1, pw_uid=1001)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: me)
    monkeypatch.setattr(pwd, "getpwall", lambda: [me, bob])

    def open_to_others(name: str, members: list[str]) -> bool:
        monkeypatch.setattr(
            grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_mem=members)
        )
        return trusted._others_write(status)

    assert not open_to_others("ada", [])
    assert not open_to_others("ada", ["ada"])
    assert open_to_others("ada", ["bob"]), "a member"
    assert open_to_others("staff", []), "a group of another name"
    bob.pw_gid = group
    assert open_to_others("ada", []), "another user's primary group"
    bob.pw_gid = group + 1
    status.st_mode = 0o40777
    assert open_to_others("ada", []), "everybody may write"


def test_root_s_group_is_not_private():
    assert trusted._others_write(SimpleNamespace(st_mode=0o40775, st_gid=0)) or os.geteuid() != 0


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o666, 0o622])
def test_a_file_that_others_may_write_is_refused(tmp_path, mode):
    path = tmp_path / "libasvit_x.so"
    path.write_bytes(b"x")
    path.chmod(mode)
    raises_one_line(lambda: read(path), f"others may write {path}", f"rm {path}", "chmod go-w")
    path.chmod(mode & ~0o022)
    assert read(path) == b"x"


@pytest.mark.parametrize("what", ["link", "link to nothing", "pipe", "folder"])
def test_links_pipes_and_folders_are_no_files(tmp_path, what):
    (tmp_path / "file").write_bytes(b"x")
    path = tmp_path / "odd"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("file" if what == "link" else "gone")
    raises_one_line(lambda: read(path), str(path), "remove it")
    if what != "folder":
        raises_one_line(lambda: require_tree(tmp_path), str(path), "remove it")


def test_a_link_of_ours_to_a_folder_of_ours_is_followed(home, tmp_path):
    """A cache on another disk is common."""
    disk = tmp_path / "disk"
    disk.mkdir(mode=0o700)
    (home / ".cache").symlink_to("../disk")
    assert make_cache_dir() == home / ".cache/asvit-deploy"
    assert (disk / "asvit-deploy").is_dir()
    tmp_path.chmod(0o777)
    raises_one_line(cache_dir, str(tmp_path))
    tmp_path.chmod(0o700)
    disk.chmod(0o777)
    raises_one_line(cache_dir, f"others may write in {disk}")


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    raises_one_line(lambda: require_folder(tmp_path / "a/x"), "too many links")


# ---------------------------------------------------------------- two users


def test_what_belongs_to_another_user_is_refused(shared):
    place = shared.open_folder("was_open")
    other("mkdir", place / "theirs")
    other("cp", "/bin/true", place / "file")
    other("chmod", "755", place / "file")
    place.chmod(0o700)
    user = f"user {OTHER}"
    raises_one_line(lambda: require_folder(place / "theirs"), str(place / "theirs"), user)
    raises_one_line(lambda: require_folder(place / "theirs/deep/er"), str(place / "theirs"), user)
    raises_one_line(lambda: read(place / "file"), str(place / "file"), user, "rm ")
    raises_one_line(lambda: require_tree(place), str(place), user)


def test_another_user_s_link_is_refused_wherever_it_leads(shared):
    sticky, ours = shared.open_folder("sticky", 0o1777), shared.folder / "ours"
    ours.mkdir(mode=0o700)
    other("ln", "-s", ours, sticky / "link")
    raises_one_line(lambda: require_folder(sticky / "link"), str(sticky / "link"), f"{OTHER}")


def test_our_link_to_another_user_s_folder_is_refused(shared):
    sticky = shared.open_folder("sticky", 0o1777)
    other("mkdir", sticky / "theirs")
    (shared.folder / "link").symlink_to(sticky / "theirs")
    raises_one_line(lambda: require_folder(shared.folder / "link"), str(sticky / "theirs"))


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_root_with_another_user_s_home_makes_nothing_there(shared, variable, monkeypatch):
    theirs = shared.open_folder("open") / "theirs"
    other("mkdir", theirs)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(theirs))
    raises_one_line(make_cache_dir, "others may write in")
    theirs.parent.chmod(0o755)
    raises_one_line(make_cache_dir, str(theirs), f"user {OTHER}", "XDG_CACHE_HOME")
    assert list(theirs.iterdir()) == []


def test_a_user_takes_root_s_places_for_good_and_not_ours_the_other_way(shared):
    """What root has built into a folder that all may read serves a user without rights too."""
    (shared.folder / "built").write_bytes(b"x")
    code = (
        # Imported as root: the interpreter may lie where the other user may not look.
        "import os, sys, pathlib, tempfile, grp, pwd, asvit_deploy.trusted\n"
        f"os.setgroups([]); os.setgid({OTHER}); os.setuid({OTHER})\n"
        "asvit_deploy.trusted.require_tree(pathlib.Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, shared.folder], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_temporary_folder_where_others_exchange_names_is_refused(tmp_path, monkeypatch):
    import tempfile

    from asvit_deploy.ops.library import run_compiler

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o777)
    raises_one_line(lambda: run_compiler(["true"]), str(tmp_path), "TMPDIR")
    tmp_path.chmod(0o1777)
    assert run_compiler(["true"]) is None
