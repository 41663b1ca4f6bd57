"""The data's classes in the order of the head that learns them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import raises_one_line
from shard_files import picture_folder, png, samples, shards_of, write_tar

from asvit_deploy.checkpoints.load import Checkpoint, load_checkpoint, save_checkpoint
from asvit_deploy.data.augment import Augmentation
from asvit_deploy.data.head_order import check_teacher, in_head_order
from asvit_deploy.data.sources import open_labelled, open_source
from asvit_deploy.models import build
from asvit_deploy.models.archs import arch

NUMBERS = [str(i) for i in range(12)]
TEXT = sorted(NUMBERS)


def config(count: int):
    return arch("as_deit_mini").at(20, count)


def network(tmp_path: Path, count: int, classes: list[str] | None) -> Checkpoint:
    torch.manual_seed(0)
    path = tmp_path / f"start{count}.safetensors"
    metadata = {"classes": json.dumps(classes)} if classes else {}
    save_checkpoint(path, build(config(count), adaptive=False), metadata)
    return load_checkpoint(path)


def opened(data: Path, count: int, **options):
    return open_source(str(data), config(count), 0, **options)


def seen(source) -> dict[str, list[int]]:
    """The class of every picture that training and validation see, by its pixels."""
    found: dict[bytes, set[str]] = {}
    batches = [source.train_batch(step, 4) for step in range(6)] + list(source.validation(4))
    for batch in batches:
        for image, label in zip(batch.images, batch.labels):
            found.setdefault(image.numpy().tobytes(), set()).add(source.classes[int(label)])
    assert all(len(names) == 1 for names in found.values())
    return {image.hex(): sorted(names) for image, names in found.items()}


@pytest.fixture
def data(tmp_path) -> Path:
    picture_folder(tmp_path / "data" / "train", NUMBERS, 2)
    picture_folder(tmp_path / "data" / "val", NUMBERS, 1)
    return tmp_path / "data"


def test_folders_of_numbers_go_by_number(data):
    assert opened(data, 12).classes == NUMBERS
    assert open_labelled(str(data), config(12)).classes == NUMBERS


def test_two_folders_of_one_number(data):
    picture_folder(data / "more", ["01"], 1)
    (data / "more" / "01").rename(data / "train" / "01")
    raises_one_line(lambda: opened(data, 12), "01 and 1", "the same number")


def test_a_head_that_is_kept_keeps_its_order(tmp_path, data):
    """Weights of before: their twelve classes stand as text."""
    said: list[str] = []
    plain = opened(data, 12)
    start = network(tmp_path, 12, TEXT)
    source = in_head_order(plain, None, None, start, said.append)
    assert source.classes == TEXT
    assert seen(source) == seen(plain), "each picture is what it was"
    assert int(source.fitting(1, 0).labels[0]) == TEXT.index(
        plain.classes[int(plain.fitting(1, 0).labels[0])]
    )
    assert source.identity["classes"] != plain.identity["classes"]
    assert "in the order of its outputs" in said[-1]


def test_shares_of_mixed_pictures_move_with_their_classes(tmp_path, data):
    plain = opened(data, 12, augmentation=Augmentation(mixup=0.8))
    source = in_head_order(plain, None, None, network(tmp_path, 12, TEXT), lambda _: None)
    ours, theirs = source.train_batch(0, 8), plain.train_batch(0, 8)
    assert ours.labels.shape == (8, 12)
    for i, name in enumerate(TEXT):
        assert ours.labels[:, i].equal(theirs.labels[:, NUMBERS.index(name)])
    assert ours.images.equal(theirs.images)


def test_a_new_head_takes_the_order_of_the_data(tmp_path, data):
    plain = opened(data, 12)
    for start in (None, network(tmp_path, 3, ["a", "b", "c"])):
        assert in_head_order(plain, None, None, start, print) is plain


def test_weights_without_names_are_reported(tmp_path, data):
    said: list[str] = []
    plain = opened(data, 12)
    assert in_head_order(plain, None, None, network(tmp_path, 12, None), said.append) is plain
    assert "by number" in said[0]
    assert "--classes" in said[0]


def test_weights_of_other_classes_are_reported(tmp_path, data):
    said: list[str] = []
    start = network(tmp_path, 12, [*"abcdefgh", *NUMBERS[:4]])
    plain = opened(data, 12)
    assert in_head_order(plain, None, None, start, said.append) is plain
    assert len(said) == 1
    assert start.path.name in said[0]


def test_the_users_order(tmp_path, data):
    said: list[str] = []
    names = tmp_path / "names.txt"
    plain = opened(data, 12)
    source = in_head_order(plain, NUMBERS[::-1], names, network(tmp_path, 12, TEXT), said.append)
    assert source.classes == NUMBERS[::-1]
    assert source.classes_from == "--classes names.txt"
    assert seen(source) == seen(plain)
    assert "--classes wins" in said[0]
    for wrong, words in (
        (NUMBERS[1:], "lacks the class '0'"),
        ([*NUMBERS, "cat"], "names 'cat'"),
        ([*NUMBERS[1:], "cat"], "lacks the class '0'"),
    ):
        raises_one_line(lambda wrong=wrong: in_head_order(plain, wrong, names, None, print),
                        str(names), words)  # fmt: skip


def test_names_stand_in_for_classes_txt(tmp_path):
    write_tar(tmp_path / "s" / "0.tar", samples([("a", png(0), 1), ("b", png(1), 0)]))
    raises_one_line(lambda: opened(tmp_path / "s", 2), "no classes.txt", "--classes")
    source = opened(tmp_path / "s", 2, names=["cat", "dog"])
    assert source.classes == ["cat", "dog"]
    raises_one_line(lambda: opened(tmp_path / "s", 2, names=["cat"]), "label 1", "names 1 classes")
    shards_of(picture_folder(tmp_path / "f", ["x", "y"]), tmp_path / "t")
    assert opened(tmp_path / "t", 2, names=["cat", "dog"]).classes == ["cat", "dog"]
    own = open_labelled(str(tmp_path / "t"), config(2), ["cat", "dog"])
    assert (own.classes, own.classes_from) == (["x", "y"], "classes.txt")


def test_a_teacher_of_another_order_is_refused(tmp_path, data):
    plain = opened(data, 12)
    check_teacher(plain, network(tmp_path, 12, NUMBERS), print)
    check_teacher(plain, network(tmp_path, 3, None), print)
    teacher = network(tmp_path, 12, TEXT)
    raises_one_line(lambda: check_teacher(plain, teacher, print), "output 2 is '10'", "'2'")
