"""Random crops: decoded no larger and no more often than need be, and always the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from asvit_deploy.data.crops import Crops, coarsest, random_crop
from asvit_deploy.data.decode import REDUCED, load_picture
from asvit_deploy.errors import UserError

SIDE = 112


def photograph(width: int, height: int) -> Image.Image:
    """Waves, as smooth as a photograph."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = [np.sin(x / 31 + y / 83), np.cos(x / 57 - y / 29), np.sin(x * y / 6e4)]
    return Image.fromarray((np.stack(waves, 2) * 110 + 128).astype(np.uint8))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """A large picture, lying on its side, and as PNG; a small one; one whose end is missing."""
    folder = tmp_path_factory.mktemp("crops")
    large, exif = photograph(901, 702), Image.Exif()
    exif[0x0112] = 6
    made = [folder / name for name in ("a.jpg", "turned.jpg", "a.png", "small.jpg", "cut.jpg")]
    large.save(made[0], quality=95)
    large.save(made[1], quality=95, exif=exif)
    large.save(made[2])
    photograph(190, 150).save(made[3], quality=95)
    made[4].write_bytes(made[0].read_bytes()[:9000])
    return made


def counted(files: list[Path], sizes: list[tuple[int, int]]) -> Crops:
    """Crops of these files, noting what was decoded."""

    def load(number, reduction):
        picture = load_picture(files[number], reduction)
        sizes.append(picture.size)
        return picture

    return Crops(load, SIDE)


def whole(path: Path, draws: tuple[int, ...]) -> np.ndarray:
    """The crop cut out of a picture that was decoded at its own size."""
    picture, rng = load_picture(path), np.random.default_rng(draws)
    box, mirrored = random_crop(picture.size, rng), rng.random() < 0.5
    crop = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)
    return np.asarray(ImageOps.mirror(crop) if mirrored else crop, np.float64)


@pytest.mark.parametrize("number", [0, 1])
def test_a_jpeg_is_decoded_small_and_shows_the_same(files, number):
    sizes: list[tuple[int, int]] = []
    for seed in range(40):
        crop = counted(files, sizes).one((seed,), number)
        off = np.abs(np.asarray(crop, np.float64) - whole(files[number], (seed,)))
        assert off.mean() < 4, f"{off.mean()} of 255 in crop {seed}"
    assert {451, 226} <= {max(size) for size in sizes} <= {901, 451, 226}


@pytest.mark.parametrize("number", [2, 3])
def test_what_cannot_be_had_smaller_or_is_small_is_cut_as_it_is(files, number):
    for seed in range(10):
        crop = counted(files, []).one((seed,), number)
        assert np.array_equal(np.asarray(crop), whole(files[number], (seed,)))


@pytest.mark.parametrize("number", range(4))
def test_copies_share_what_is_decoded_and_are_what_each_is_alone(files, number):
    sizes: list[tuple[int, int]] = []
    shared = counted(files, sizes)
    for seed in range(30):
        alone = counted(files, []).one((seed,), number)
        assert shared.one((seed,), number).tobytes() == alone.tobytes()
    assert len(sizes) == len(set(sizes))
    assert len(sizes) > 1 if number < 2 else sizes == [load_picture(files[number]).size]


def test_a_picture_that_breaks_off_uses_up_no_draws(files):
    for seed in range(5):
        crops = counted(files, [])
        for _ in range(2):  # the second knows its size
            with pytest.raises(UserError, match=r"cut\.jpg is broken"):
                crops.one((seed,), 4)
        expected = counted(files, []).one((seed,), 0)
        assert crops.one((seed,), 0).tobytes() == expected.tobytes()


def test_crops_are_never_enlarged_for_what_was_saved():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        left, top, right, bottom = box = random_crop((1000, 700), rng)
        times = coarsest(box, SIDE)
        assert times in REDUCED
        least = min(right - left, bottom - top)
        assert least / times >= SIDE or times == 1
        assert times == REDUCED[-1] or least / (2 * times) < SIDE
