"""The folder of drawings: what is shown, where it may be written, what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import raises_one_line

from asvit_deploy import sidecar
from asvit_deploy.artefacts.opening import open_artefact
from asvit_deploy.drawing.album import Answer, album, check_target, kinds_of, shown
from asvit_deploy.runners.onnx_runtime import OrtRunner


def test_cuts_that_are_shown():
    assert shown(3, 6) == [0, 1, 2]
    assert shown(11, 6) == [0, 2, 4, 6, 8, 10]
    assert shown(12, 6) == [0, 2, 4, 7, 9, 11]
    assert shown(5, 1) == [4]
    for cuts in range(1, 40):
        for most in range(2, 40):
            found = shown(cuts, most)
            assert len(set(found)) == min(cuts, most)
            assert (found[0], found[-1]) == (0 if cuts > 1 else cuts - 1, cuts - 1)


def test_pictures_that_the_gallery_shows():
    assert kinds_of([5]) == [("", [0])]
    assert kinds_of([5, 5, 5]) == [("", [0, 1, 2])]
    assert len(kinds_of([5] * 40)[0][1]) == 6
    assert kinds_of([7, 5]) == [("easy", [1]), ("hard", [0])]
    assert kinds_of([7, 5, 6]) == [("easy", [1]), ("normal", [2]), ("hard", [0])]
    many = [3, 9, 1, 7, 5, 8, 2, 6, 4]
    assert kinds_of(many) == [("easy", [2, 6]), ("normal", [8, 4]), ("hard", [5, 1])]
    for count in range(3, 30):
        places = [place for _, some in kinds_of(list(range(count))) for place in some]
        assert len(places) == len(set(places)) == 3 * min(2, count // 3)


def test_answers():
    assert str(Answer("cat", 3, 0.873)) == "cat  87.3%"
    assert str(Answer("", score=1.25)) == "score 1.25"
    assert str(Answer("risk", score=-3e9)) == "score -3e+09  risk"


def test_where_it_may_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = Path("out")
    check_target(place, False)
    place.mkdir()
    check_target(place, False)  # an empty one is as good as none
    (place / "mine.txt").write_text("mine")
    for force in (False, True):
        raises_one_line(lambda force=force: check_target(place, force), "out holds 'mine.txt'",
                        "name another folder")  # fmt: skip
    for name in (".", "..", "out/..", "/"):
        raises_one_line(lambda name=name: check_target(Path(name), True), "names no folder")
    raises_one_line(lambda: check_target(Path("gone/out"), True), "gone does not exist")
    raises_one_line(lambda: check_target(place / "mine.txt", True), "it is no folder")
    Path("link").symlink_to("nowhere")
    raises_one_line(lambda: check_target(Path("link"), True), "it is no folder")


def test_a_list_that_names_others_files_gives_no_leave(tmp_path):
    """Only a list that this tool wrote says what in a folder may go."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    fields = {"kind": "visualize", "files": ["thesis.tex"]}
    for text in (json.dumps(fields), sidecar.signed({**fields, "kind": "other"}), "[1", "3"):
        (tmp_path / "out" / "kept.json").write_text(text)
        raises_one_line(lambda: check_target(tmp_path / "out", True), "which is no drawing")


@pytest.fixture
def artefact(mini_artifacts):
    return open_artefact(mini_artifacts["1", "auto"])


def test_counts_alone_are_refused_and_nothing_is_written(artefact, photos, tmp_path):
    """As an engine without --stage-outputs gives them: here ONNX Runtime, not asked for more."""
    runner = OrtRunner(artefact.model, record=False)
    prediction = runner(photos[0][None])
    assert prediction.kept is None
    assert prediction.lengths

    def draw():
        with album(tmp_path / "out", artefact, False) as made:
            made.add("x.png", photos[0], prediction, None)

    raises_one_line(draw, "how many tokens stay and not which", "--stage-outputs")
    assert list(tmp_path.iterdir()) == []


def test_an_error_half_way_leaves_what_was_there(artefact, photos, tmp_path):
    runner = artefact.in_runtime()
    prediction = runner(photos[0][None])
    for answer in (Answer("first"), Answer("second")):
        with album(tmp_path / "out", artefact, True) as made:
            made.add("x.png", photos[0], prediction, answer)
            made.finish(runner.describe(), "one", {})
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def stopped():
        with album(tmp_path / "out", artefact, True) as made:
            made.add("y.png", photos[0], prediction, None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    fields = sidecar.read_signed(tmp_path / "out" / "kept.json", "list", "", "pictures")
    assert fields["pictures"][0]["answer"]["label"] == "second"
    assert fields["pictures"][0]["kept"] == [stage[0].tolist() for stage in prediction.kept]


def test_more_than_may_be_written_down_is_refused_at_once(artefact, photos, tmp_path, monkeypatch):
    prediction = artefact.in_runtime()(photos[0][None])
    monkeypatch.setattr("asvit_deploy.drawing.album.MOST_TEXT", (1 << 20) + 3000)

    def draw():
        with album(tmp_path / "out", artefact, False) as made:
            for _ in range(9):
                made.add("x.png", photos[0], prediction, None)

    raises_one_line(draw, "look at fewer with --limit")


def test_names_of_drawings_are_plain_and_never_collide(artefact, photos, tmp_path):
    prediction = artefact.in_runtime()(np.stack([photos[0]]))
    names = ["a/x.jpg", "b/x.jpg", "x.png", "\x1b[31m.png", "猫.png", "y" * 250 + ".png", ".hid",
             "gallery", "../up.png"]  # fmt: skip
    with album(tmp_path / "out", artefact, False) as made:
        for name in names:
            made.add(name, photos[0], prediction, None)
        made.finish({}, "some", {})
    files = [one.file for one in made.drawn]
    assert len(set(files)) == len(names)
    assert all(name.isascii() and name.isprintable() and "/" not in name for name in files)
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {*files, "gallery.png", "kept.json"}
