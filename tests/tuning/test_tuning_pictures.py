"""Which pictures calibrate and which judge, and what is odd about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import raises_one_line
from PIL import Image

from asvit_deploy.models.archs import arch
from asvit_deploy.tuning import pictures

MINI = arch("as_deit_mini")
MODEL = Path("model.pt")


def folder(place: Path, count: int, alike: float = 1.0, seed: int = 0) -> Path:
    """Pictures of noise; the smaller `alike`, the more they are one."""
    place.mkdir()
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 256, (56, 56, 3))
    for i in range(count):
        own = rng.integers(0, 256, (56, 56, 3))
        pixels = (alike * own + (1 - alike) * first).round().astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{i:03}.png")
    return place


def read(place: Path | None, **more):
    given = {"labelled": False, "limit": None, "skip_limit": 0, "seed": 0,
             "say": lambda line: None, **more}  # fmt: skip
    return pictures.read(MODEL, place, MINI, None, **given)


def test_no_picture_both_calibrates_and_judges(tmp_path):
    found = read(folder(tmp_path / "a", 40))
    both = [*found.calibrating, *found.judging]
    assert sorted(both) == list(range(40))
    assert len(found.calibrating) == 20
    assert not found.notes


def test_the_parts_are_of_the_seed(tmp_path):
    place = folder(tmp_path / "a", 40)
    one, same, other = read(place), read(place), read(place, seed=1)
    assert one.fingerprint() == same.fingerprint()
    assert one.calibrating.tolist() != other.calibrating.tolist()
    assert one.fingerprint() != other.fingerprint()


def test_beyond_what_calibrates_all_judge():
    calibrating, judging = pictures.sizes_of(MINI)
    found = read(Path("digits"), limit=300)
    assert (len(found.calibrating), len(found.judging)) == (calibrating, 300 - calibrating)
    assert judging >= 598, "fewer can never show half a point"


@pytest.mark.parametrize("count", [1, 15])
def test_too_few_are_refused_in_one_line(tmp_path, count):
    place = folder(tmp_path / "a", count)
    raises_one_line(lambda: read(place), f"{count} picture", "at least 16", "--images")


def test_none_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    raises_one_line(lambda: read(tmp_path / "a"), "holds no picture")
    raises_one_line(lambda: read(tmp_path / "gone"), "does not exist")


def test_the_same_picture_many_times_is_one(tmp_path):
    place = folder(tmp_path / "a", 30, alike=0.0)
    raises_one_line(lambda: read(place), "1 picture", "30 were found, 1 of them distinct")


def test_copies_are_left_out_with_a_line(tmp_path):
    place = folder(tmp_path / "a", 20)
    for i in range(4):
        (place / f"copy{i}.png").write_bytes((place / f"{i:03}.png").read_bytes())
    found = read(place)
    assert len(found.images) == len(found.names) == 20
    assert "4 pictures are the same as another" in found.notes[0]


def test_pictures_that_are_nearly_alike_are_said_to_be(tmp_path):
    found = read(folder(tmp_path / "a", 20, alike=0.02))
    assert any("nearly all alike" in note for note in found.notes)


def test_crops_of_few_photographs_are_no_sample():
    found = read(None, limit=20)
    assert any("crops of few photographs" in note for note in found.notes)


def test_labels_need_a_folder_and_classes_that_fit(tmp_path):
    raises_one_line(lambda: read(None, labelled=True), "--labels", "--images")
    for name in "ab":
        folder(tmp_path / name, 10, seed=ord(name))
    place = tmp_path / "data"
    place.mkdir()
    for name in "ab":
        (tmp_path / name).rename(place / name)
    raises_one_line(lambda: read(place, labelled=True), "cannot be evaluated", "2 classes")


@pytest.mark.parametrize(("have", "judging"), [(64, 598), (200, 150), (16, 12), (300, 900)])
def test_more_pictures_bring_as_many_that_judge(have, judging):
    most = 96
    total = have + pictures.more_pictures(have, 0, judging, most)
    assert total - min(most, total // 2) >= judging
    if total > have:
        assert total - 1 - min(most, (total - 1) // 2) < judging


@pytest.mark.parametrize(("name", "limit", "told"), [("a of b", 40, False), ("a", 30, True)])
def test_a_folder_that_is_cut_off_is_told_by_its_counts(tmp_path, monkeypatch, name, limit, told):
    monkeypatch.setattr(pictures, "sizes_of", lambda config: (16, limit - 16))
    said: list[str] = []
    read(folder(tmp_path / name, 40), say=said.append)
    assert any("--limit takes more" in line for line in said) == told
