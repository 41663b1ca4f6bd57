"""RandAugment, erasing, mixing: each draw a picture's own, whoever makes it."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from asvit_deploy.data.augment import Augmentation, erase, mixed
from asvit_deploy.data.randaugment import OPERATIONS, randaugmented
from asvit_deploy.errors import UserError

GREY = (124, 116, 104)


def picture(side: int = 32) -> Image.Image:
    """Ramps, and some noise for what blurs and sharpens."""
    ramp = np.linspace(25, 230, side)
    planes = [
        np.tile(ramp, (side, 1)),
        np.tile(ramp, (side, 1)).T,
        128 - np.tile(ramp, (side, 1)) / 2,
    ]
    noise = np.random.default_rng(0).normal(0, 9, (side, side, 3))
    return Image.fromarray(np.clip(np.stack(planes, 2) + noise, 0, 255).astype(np.uint8))


def changed(number: int, magnitude: float = 9.0) -> np.ndarray:
    return np.asarray(randaugmented(picture(), magnitude, GREY, np.random.default_rng(number)))


# --- RandAugment and erasing --------------------------------------------------------------------


def timms() -> ModuleType:
    """timm's file alone, which needs no more than Pillow; timm itself wants torchvision."""
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("timm is not installed; scripts/setup EXTRAS families")
    path = Path(found.origin).parent / "data" / "auto_augment.py"
    spec = importlib.util.spec_from_file_location("timms_auto_augment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


THEIRS = {
    **{name: f"{name}Increasing" for name in
       ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")},
    "TranslateX": "TranslateXRel", "TranslateY": "TranslateYRel",
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0.0, 3.2, 9.0, 9.9])
def test_each_operation_is_timms(name, level, monkeypatch):
    module, name_there = timms(), THEIRS.get(name, name)
    how = {"img_mean": GREY, "interpolation": Image.Resampling.BILINEAR}
    theirs = module.AugmentOp(name_there, prob=1.0, magnitude=level, hparams=how)
    for sign, drawn in ((1, 0.0), (-1, 1.0)):
        monkeypatch.setattr(random, "random", lambda drawn=drawn: drawn)
        ours = OPERATIONS[name](picture(), level / 10, sign, GREY)
        assert ours.tobytes() == theirs(picture()).tobytes()


def test_the_fifteen_are_those_of_timms_policy():
    there = timms()._RAND_INCREASING_TRANSFORMS
    assert sorted(there) == sorted(THEIRS.get(name, name) for name in OPERATIONS)


def test_two_operations_are_drawn_and_every_second_is_carried_out():
    calls: list[tuple[str, float, int]] = []
    rng = np.random.default_rng(0)

    def counted(name):
        def operation(given, strength, sign, fill):
            calls.append((name, strength, sign))
            return given

        return operation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asvit_deploy.data.randaugment._ALL", [*map(counted, OPERATIONS)])
        for _ in range(3000):
            randaugmented(picture(2), 9.0, GREY, rng)
    assert len(calls) == pytest.approx(3000, rel=0.05)
    names, strengths, signs = zip(*calls)
    assert all(140 < names.count(name) < 260 for name in OPERATIONS)
    assert np.mean(strengths) == pytest.approx(0.9, abs=0.005)
    assert np.std(strengths) == pytest.approx(0.05, abs=0.01)  # cut off at 1
    assert max(strengths) <= 1
    assert np.mean(signs) == pytest.approx(0, abs=0.06)


def test_what_happens_to_a_picture_is_its_draws_affair():
    assert np.array_equal(changed(3), changed(3))
    assert len({changed(number).tobytes() for number in range(40)}) > 20


def test_randaugment_leaves_something_to_see():
    for magnitude in (0.5, 9.0, 9.99):
        blank = sum(changed(number, magnitude).std((0, 1)).mean() < 5 for number in range(200))
        assert blank < 10, f"{blank} of 200 pictures are of one colour at {magnitude}"

    def far(magnitude: float) -> float:
        before = np.asarray(picture(), np.float64)
        return float(np.mean([abs(changed(n, magnitude) - before).mean() for n in range(100)]))

    assert far(9.0) > far(1.0)


def test_erasing_meets_its_probability_and_fills_one_rectangle_with_noise():
    hit, filled = 0, []
    for number in range(400):
        image = torch.full((3, 32, 32), 50.0)
        erase(image, 0.25, np.random.default_rng(number))
        rows, columns = (image[0] != 50).nonzero(as_tuple=True)
        if not len(rows):
            continue
        hit += 1
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert box == len(rows) == int((image[2] != 50).sum())
        assert 0.01 < box / 32**2 < 0.36  # 2-33 % up to whole pixels
        filled.append(image[image != 50])
    assert 0.18 < hit / 400 < 0.32
    noise = torch.cat(filled)
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)


# --- mixing -------------------------------------------------------------------------------------


def mix(augmentation: Augmentation, count: int = 200, seed: int = 0, step: int = 0, part=None):
    """Flat pictures, the i-th of value i, mixed; labels i % 10."""
    part = range(count) if part is None else part
    images = torch.tensor(part, dtype=torch.float32).view(-1, 1, 1, 1).repeat(1, 3, 16, 16)
    labels = torch.tensor([n % 10 for n in part])
    return images, mixed(images, labels, 10, augmentation, seed, step, part)


@pytest.mark.parametrize("odds", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_pixels_and_labels_say_the_same_shares(odds):
    images, labels = mix(Augmentation(**odds))
    assert labels.dtype == torch.float32
    assert labels.shape == (200, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(200))
    for i in range(0, 200, 2):
        for a, b in ((i, i + 1), (i + 1, i)):
            own = labels[a, a % 10]
            mean = own * a + (1 - own) * b  # of flat pictures, pixels show how much of each is in
            assert images[a].mean().item() == pytest.approx(mean.item(), abs=2e-4)
        assert labels[i, i % 10] == pytest.approx(labels[i + 1, (i + 1) % 10].item())


def test_cutmix_exchanges_one_rectangle_and_mixup_all_pixels():
    images, labels = mix(Augmentation(cutmix=1.0))
    assert all(set(image.unique().tolist()) <= {2.0 * (i // 2), 2.0 * (i // 2) + 1}
               for i, image in enumerate(images))  # fmt: skip
    for i in range(0, 200, 2):
        rows, columns = (images[i, 0] != i).nonzero(as_tuple=True)
        if len(rows):
            box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert box == len(rows)
    assert labels.max(1).values.min() < 0.6
    images, _ = mix(Augmentation(mixup=0.8))
    assert all(len(image.unique()) == 1 for image in images)


def test_with_both_on_each_pair_takes_either():
    images, _ = mix(Augmentation(mixup=0.8, cutmix=1.0), 400)
    flat = [len(image.unique()) == 1 and image.flatten()[0] % 1 != 0 for image in images[::2]]
    assert 0.38 < sum(flat) / 200 < 0.62


def test_draws_are_the_pairs_own():
    both = Augmentation(mixup=0.8, cutmix=1.0)
    whole = mix(both, 12)
    parts = [mix(both, part=range(0, 6)), mix(both, part=range(6, 12))]
    for index in (0, 1):
        assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))
    assert not torch.equal(whole[1], mix(both, 12, step=1)[1])
    assert not torch.equal(whole[1], mix(both, 12, seed=1)[1])


def test_the_last_of_an_odd_batch_stays_as_it_is():
    images, labels = mix(Augmentation(mixup=0.8), 7)
    assert (images[6] == 6).all()
    assert labels[6].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("size", "part", "fits"),
    [
        (8, range(0, 4), True),
        (8, range(4, 8), True),
        (7, range(4, 7), True),
        (6, range(0, 3), False),
        (6, range(3, 6), False),
        (10, range(2, 5), False),
    ],
)
def test_an_odd_share_is_refused_while_mixing_is_on(size, part, fits):
    Augmentation(randaugment=9, erase=0.5).check_part(size, part)
    for wanted in (Augmentation(mixup=0.8), Augmentation(cutmix=1.0)):
        if fits:
            wanted.check_part(size, part)
        else:
            with pytest.raises(UserError, match="make --batch-size an even number for each"):
                wanted.check_part(size, part)


# --- repeats ------------------------------------------------------------------------------------


def test_repeats_walk_the_order_without_gaps():
    wanted = Augmentation(repeats=3)
    seen = [[wanted.position(step, 8, n) for n in range(8)] for step in range(3)]
    assert seen[0] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert seen[1] == [3, 4, 5, 3, 4, 5, 3, 4]
    assert [Augmentation().position(2, 8, n) for n in range(8)] == list(range(16, 24))


@pytest.mark.parametrize("repeats", [2, 3, 4])
@pytest.mark.parametrize("size", [1, 7, 32, 64, 512])
def test_copies_stand_close_and_are_not_mixed_with_each_other(repeats, size):
    wanted = Augmentation(repeats=repeats)
    seen = [[wanted.position(step, size, n) for n in range(size)] for step in range(2)]
    whole = sorted({position for batch in seen for position in batch})
    assert whole == list(range(len(whole)))
    assert not set(seen[0]) & set(seen[1])
    for position in set(seen[0]):
        places = [n for n, other in enumerate(seen[0]) if other == position]
        assert len(places) <= repeats
        assert places[-1] - places[0] < repeats**2
    assert all(a != b for a, b in zip(seen[0][::2], seen[0][1::2]))
    assert len(set(seen[0])) < size / repeats + repeats
