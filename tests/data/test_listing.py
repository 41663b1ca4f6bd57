"""What a folder's pictures are: links, loops, endings, and an account of the rest."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shard_files import png

from asvit_deploy.data.images import open_images
from asvit_deploy.data.listing import Seen, pictures_below
from asvit_deploy.models.archs import arch

MINI = arch("as_deit_mini")


def put(root: Path, *names: str, data: bytes = b"") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


# --- links --------------------------------------------------------------------------------------


def test_linked_folders_and_files_are_followed(tmp_path):
    put(tmp_path / "pool", "x/1.png", "x/deep/2.png", "loose.png")
    root = put(tmp_path / "set", "own.png")
    (root / "x").symlink_to(tmp_path / "pool" / "x")
    (root / "file.png").symlink_to(tmp_path / "pool" / "loose.png")
    (root / "way").symlink_to("x", target_is_directory=True)  # a link to a link
    found = pictures_below(root)
    assert found.names == ["file.png", "own.png", "way/1.png", "way/deep/2.png"]
    assert found.passed.again == [f"passed over {root}/x: the same folder as {root}/way"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../sub", "{root}"])
def test_a_loop_of_links_ends_with_a_line(tmp_path, target):
    root = put(tmp_path / "set", "sub/1.png", "sub/in/2.png", "3.png")
    (root / "sub" / "in" / "back").symlink_to(target.format(root=root), target_is_directory=True)
    found = pictures_below(root)
    assert found.names == ["3.png", "sub/1.png", "sub/in/2.png"]
    (line,) = found.passed.again
    assert line.startswith(f"passed over {root}/sub/in/back: a link that leads back to {root}")


def test_links_that_lead_to_one_another_end(tmp_path):
    put(tmp_path / "a", "1.png")
    put(tmp_path / "b", "2.png")
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    found = pictures_below(tmp_path / "a")
    assert found.names == ["1.png", "to_b/2.png"]
    assert len(found.passed.again) == 1
    whole = pictures_below(tmp_path)  # by their own names, though a link comes first
    assert whole.names == ["a/1.png", "b/2.png"]
    assert len(whole.passed.again) == 2


def test_a_folder_that_two_links_reach_counts_once(tmp_path):
    put(tmp_path / "pool", "1.png")
    root = put(tmp_path / "set", "0.png")
    for name in ("p", "q"):
        (root / name).symlink_to(tmp_path / "pool")
    found = pictures_below(root)
    assert found.names == ["0.png", "p/1.png"]
    assert found.passed.lines(root) == [f"passed over {root}/q: the same folder as {root}/p"]


def test_what_is_seen_before_is_not_read_again(tmp_path):
    put(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "b" / "more").symlink_to(tmp_path / "a")
    seen = Seen()
    assert pictures_below(tmp_path / "a", seen).names == ["1.png"]
    assert pictures_below(tmp_path / "b", seen).names == ["2.png"]


def test_what_cannot_be_read_is_counted_and_not_waited_for(tmp_path):
    root = put(tmp_path / "set", "1.png")
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "a.png").symlink_to("b.png")
    (root / "b.png").symlink_to("a.png")
    os.mkfifo(root / "pipe.png")
    (root / "linked.png").symlink_to("pipe.png")
    with socket.socket(socket.AF_UNIX) as bound:
        before = Path.cwd()
        os.chdir(root)
        try:
            bound.bind("s.jpg")  # a socket's whole path must be short
        finally:
            os.chdir(before)
        found = pictures_below(root)
    assert found.names == ["1.png"]
    assert found.passed.counts() == {"link that leads nowhere": 3, "device, pipe or socket": 3}
    assert "3 links that lead nowhere (" in found.passed.summary()
    assert "3 devices, pipes or sockets (" in found.passed.summary()


# --- endings ------------------------------------------------------------------------------------


def test_what_is_no_picture_is_counted_by_ending(tmp_path):
    root = put(
        tmp_path / "set", "1.JPG", "2.jfif", "3.jpe", "4.mpo", "a.txt", "b.TXT", "c.heic", "README",
        "end.", ".DS_Store", "sub/._1.png", ".git/x.png", "__MACOSX/._1.png", "__MACOSX/1.png",
    )  # fmt: skip
    found = pictures_below(root)
    assert found.names == ["1.JPG", "2.jfif", "3.jpe", "4.mpo"]
    (line,) = found.passed.lines(root)
    assert line.startswith(f"passed over in {root}: 5 files (no ending 2, .txt 2, .heic 1)")
    assert "3 hidden" in line
    assert "1 __MACOSX folder" in line


def test_a_hundred_endings_and_odd_ones_make_one_short_line(tmp_path):
    root = put(tmp_path, *(f"x.{i:03}" for i in range(100)), "y.a\nb", "z." + "q" * 200)
    summary = pictures_below(root).passed.summary()
    assert summary.startswith("102 files (no ending 2, .000 1")
    assert "93 other endings 93" in summary
    assert len(summary) < 200
    assert "\n" not in summary


def test_the_set_says_what_was_seen_and_what_was_taken(tmp_path):
    root = put(tmp_path / "set", *(f"{i}.png" for i in range(6)), data=png(0))
    put(root, "a.txt", "b.txt", "c")
    said: list[str] = []
    found = open_images(root, MINI, 4, say=said.append)
    assert said == [f"passed over in {root}: 3 files (.txt 2, no ending 1)"]
    assert found.source == f"4 of 6 pictures in {root}, 3 other entries passed over"
    assert found.passed_over == {".txt": 2, "no ending": 1}


def test_a_pipe_in_place_of_a_folder_is_not_waited_for(tmp_path):
    from conftest import raises_one_line

    os.mkfifo(tmp_path / "p")
    raises_one_line(lambda: open_images(tmp_path / "p", MINI), "is neither a folder nor a file")
    put(tmp_path / "other", "a.heic", "b.heic")
    raises_one_line(lambda: open_images(tmp_path / "other", MINI), "2 files (.heic 2)")


def test_as_many_stats_as_folders_and_no_more(tmp_path, monkeypatch):
    """What is asked of the system per file is what took the time."""
    root = put(tmp_path, *(f"{c}/{i}.png" for c in "abc" for i in range(100)))
    asked: list[object] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **more: asked.append(args) or real(*args, **more))
    assert len(pictures_below(root).names) == 300
    assert len(asked) == 4


# --- trees without end --------------------------------------------------------------------------


@pytest.fixture
def deep(monkeypatch) -> Iterator[Callable[[Path, int], None]]:
    """Makes folders in one another, deeper than a path can say, with a picture in the last."""
    made: list[tuple[Path, int]] = []

    def make(root: Path, levels: int) -> None:
        root.mkdir(parents=True)
        made.append((root, levels))
        monkeypatch.chdir(root)
        for _ in range(levels):
            os.mkdir("d")
            os.chdir("d")
        Path("x.png").touch()
        monkeypatch.undo()

    yield make
    for root, levels in made:  # else pytest, which recurses, would try
        monkeypatch.chdir(root)
        for _ in range(levels):
            os.chdir("d")
        os.unlink("x.png")
        for _ in range(levels):
            os.chdir("..")
            os.rmdir("d")


LISTED = {
    "images": "from asvit_deploy.data.images import open_images\n"
              "    from asvit_deploy.models.archs import arch\n"
              "    open_images(path, arch('as_deit_mini'))",
    "classes": "from asvit_deploy.data.folders import FolderPictures; FolderPictures(path)",
    "data": "from asvit_deploy.data.sources import open_source\n"
            "    from asvit_deploy.models.archs import arch\n"
            "    open_source(str(path), arch('as_deit_mini'), 0)",
    "shards": "from asvit_deploy.data.shards import ShardPictures; ShardPictures(path)",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", ["images", "classes", "data"])
def test_thousands_of_levels_are_one_short_line(ends, tmp_path, deep, how):
    for name in "ab":
        deep(tmp_path / "set" / name, 3_000)
        (tmp_path / "set" / name / "x.png").touch()
    said = ends(LISTED[how], tmp_path / "set", 64)
    assert "File name too long; move what is in it further up" in said
    assert len(said) < 700


@pytest.mark.parametrize("how", ["images", "classes", "data"])
def test_links_without_end_are_followed_once(ends, tmp_path, how):
    """Each of 100 folders leads to ten others: 10^100 ways, and 100 folders."""
    for i in range(100):
        (tmp_path / f"d{i}").mkdir()
        (tmp_path / f"d{i}" / "x.png").touch()
        for j in range(10):
            (tmp_path / f"d{i}" / f"to{j}").symlink_to(f"../d{(i + j + 1) % 100}")
    assert ends(LISTED[how], tmp_path, 64) == "fine"


@pytest.mark.parametrize("how", LISTED)
def test_a_link_to_itself_is_one_line(ends, tmp_path, how):
    (tmp_path / "loop").symlink_to("loop")
    assert ends(LISTED[how], tmp_path / "loop").startswith(
        ("the image folder", "the data folder", f"{tmp_path}/loop")
    )


@pytest.mark.slow
def test_a_wide_folder_takes_a_moment_for_each_entry(ends, tmp_path):
    """10^6 entries would take ten times what these take."""
    import time

    for i in range(100_000):
        (tmp_path / f"{i}.png").touch()
    start = time.process_time()
    assert len(pictures_below(tmp_path).names) == 100_000
    assert time.process_time() - start < 2
    said = ends(LISTED["data"], tmp_path, 128)
    assert "0 class folders and 100,000 pictures outside the class folders" in said
