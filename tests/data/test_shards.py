"""Shards: the pictures of a folder by number, and every way in which a tar file can be bad."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import raises_one_line
from PIL import Image
from shard_files import picture_folder, png, samples, shards_of, write_tar

from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.data.augment import Augmentation
from asvit_deploy.data.folders import FolderPictures
from asvit_deploy.data.shard_order import GROUP, ShardOrder
from asvit_deploy.data.shards import ShardPictures, _mapped
from asvit_deploy.data.sources import open_labelled, open_source
from asvit_deploy.errors import UserError
from asvit_deploy.models.archs import arch

TWO = arch("as_deit_mini").at(num_classes=2)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def classes(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(names or ("cat", "dog")) + "\n")
    return folder


def some(count: int = 3) -> list[tuple[str, bytes]]:
    return samples([(f"k{i}", png(i), i % 2) for i in range(count)])


def refused(folder: Path, *words: str) -> None:
    raises_one_line(lambda: open_source(str(folder), TWO, 0), *words)


# --- what they hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_pictures_come_by_number_in_any_order(tmp_path, form):
    classes(tmp_path)
    pictures = [png(i, (40 + i, 30)) for i in range(6)]
    long = "a" * (130 if form != tarfile.USTAR_FORMAT else 60) + "/" + "k" * 90
    keys = ["a", "b/one", "./c", "d", long, "f"]
    entries = [(key, picture, i % 2) for i, (key, picture) in enumerate(zip(keys, pictures))]
    write_tar(tmp_path / "0.tar", samples(entries[:4]), form)
    write_tar(tmp_path / "1.tar", samples(entries[4:]), form)
    found = ShardPictures(tmp_path)
    assert len(found) == 6
    assert found.counts == (4, 2)
    for i in (5, 0, 3, 4, 1, 2, 5):
        assert found.load(i).size == (40 + i, 30)
        assert found.label(i) == i % 2
        said = found.name(i).removeprefix(f"{tmp_path / ('0.tar' if i < 4 else '1.tar')}:")
        assert said == f"{keys[i]}.png", "two formats keep so long a name apart from the header"


def test_shards_of_a_folder_hold_its_pictures(tmp_path):
    folder = FolderPictures(picture_folder(tmp_path / "folder", count=7))
    shards = ShardPictures(shards_of(tmp_path / "folder", tmp_path / "shards", per_shard=5))
    assert len(shards) == len(folder) == 14
    assert shards.classes == folder.classes
    for i in range(14):
        assert shards.label(i) == folder.label(i)
        assert np.array_equal(np.asarray(shards.load(i)), np.asarray(folder.load(i)))


def test_members_of_other_kinds_are_passed_over(tmp_path):
    classes(tmp_path)
    members = [("README", b"no sample"), ("k0.json", b"{}"), *some(1),
               ("k0.txt", b"a cat"), ("._k0.png", b"macOS"), ("k1.PNG", png(1)),
               ("k1.seg.png", b"a mask"), ("k1.cls", b"1\n"), ("only.json", b"{}")]  # fmt: skip
    path = write_tar(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("k9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    for _ in range(2):  # scanned, and from the index
        found = ShardPictures(tmp_path)
        assert found.passed_over == {
            ".json": 2, ".txt": 1, ".seg.png": 1, "no ending": 1, "hidden": 1,
            "link or special member": 1,
        }  # fmt: skip
        assert found.notes[0].startswith(f"passed over in 1 shard of {tmp_path}: 5 members (.json ")
    assert [found.label(i) for i in range(len(found))] == [0, 1]
    assert np.array_equal(np.asarray(found.load(1)), np.asarray(Image.open(io.BytesIO(png(1)))))


def test_shards_that_webdataset_wrote(tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    classes(tmp_path)
    with webdataset.ShardWriter(str(tmp_path / "%04d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(7):
            writer.write({"__key__": f"{i:04}", "png": png(i, (40 + i, 30)), "cls": i % 2})
    found = ShardPictures(tmp_path)
    assert found.counts == (3, 3, 1)
    assert [found.load(i).width - 40 for i in range(7)] == list(range(7))
    assert [found.label(i) for i in range(7)] == [0, 1, 0, 1, 0, 1, 0]


def test_an_empty_shard_among_others_does_no_harm(tmp_path):
    classes(tmp_path)
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", some())
    write_tar(tmp_path / "2.tar", [])
    source = open_source(str(tmp_path), TWO, 0)
    assert source.epoch == 3
    assert source.train_batch(0, 9).labels.sum() == 3


def test_a_sample_may_hold_a_mask_beside_its_picture(tmp_path):
    classes(tmp_path)
    members = [("a.ppm", png(0)), ("a.png", png(1, (44, 30))), ("a.cls", b"1"),
               ("b.jpg", png(2, (45, 30))), ("b.pgm", png(3)), ("b.cls", b"0"),
               ("c.bmp", png(4, (46, 30))), ("c.cls", b"1")]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    found = ShardPictures(tmp_path)
    assert [found.load(i).width for i in range(3)] == [44, 45, 46]
    assert found.passed_over == {".ppm": 1, ".pgm": 1}


@pytest.mark.parametrize(
    ("train", "val"),
    [("imagenet-train-{}.tar", "imagenet-validation-{}.tar"), ("train{}.tar", "val{}.tar"),
     ("TRAIN_{}.tar", "Valid_{}.tar"), ("imagenet1kTrain{}.tar", "imagenet1kVal{}.tar")],
)  # fmt: skip
def test_shards_of_one_folder_are_told_apart_by_name(tmp_path, train, val):
    classes(tmp_path)
    for i in range(2):
        write_tar(tmp_path / train.format(f"00{i}"), some(3))
    write_tar(tmp_path / val.format("000"), some(2))
    write_tar(tmp_path / "imagenet-test-000.tar", some(1))
    source = open_source(str(tmp_path), TWO, 0)
    assert (source.epoch, source.held_out) == (6, 2)
    assert sum(len(batch.labels) for batch in source.validation(9)) == 2
    assert any("imagenet-test-000.tar" in note for note in source.notes)
    assert open_labelled(str(tmp_path), TWO).held_out == 2


@pytest.mark.parametrize("other", ["b-000.tar", "trainval-0.tar", "train-val-0.tar"])
def test_shards_that_names_cannot_tell_apart_are_refused(tmp_path, other):
    classes(tmp_path)
    write_tar(tmp_path / "a-val-000.tar", some(2))
    write_tar(tmp_path / other, some(2))
    refused(tmp_path, "such as a-val-000.tar", other, "into train/ and val/")
    raises_one_line(lambda: open_labelled(str(tmp_path), TWO), "a-val-000.tar", other)


def test_what_lies_beside_shards_is_said(tmp_path):
    classes(tmp_path)
    write_tar(tmp_path / "0.tar", some(3))
    for name in ("1.tar.gz", "2.tgz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "cat").mkdir()
    (tmp_path / "train").mkdir()
    said = "\n".join(open_source(str(tmp_path), TWO, 0).notes)
    assert "compressed shards" in said
    assert "such as 1.tar.gz (2 in all)" in said
    assert f"not read in {tmp_path}: cat" in said
    assert f"not used: {tmp_path / 'train'}" in said
    assert "no validation pictures" in said


def test_compressed_shards_alone_are_named(tmp_path):
    classes(tmp_path / "train")
    (tmp_path / "train" / "0.tar.gz").write_bytes(b"")
    refused(tmp_path, "compressed shards, such as 0.tar.gz", "unpack them")


def test_shards_of_one_other_part_are_used_with_a_line(tmp_path):
    classes(tmp_path)
    write_tar(tmp_path / "a-val-0.tar", some(3))
    source = open_source(str(tmp_path), TWO, 0)
    assert source.epoch == 3
    assert "are trained on, and their names say val" in source.notes[0]
    assert open_labelled(str(tmp_path), TWO).held_out == 3
    (tmp_path / "a-val-0.tar").rename(tmp_path / "a-test-0.tar")
    assert "their names say test" in open_labelled(str(tmp_path), TWO).notes[0]


def test_a_pipe_among_shards_is_not_waited_for(tmp_path):
    classes(tmp_path)
    write_tar(tmp_path / "0.tar", some())
    os.mkfifo(tmp_path / "1.tar")
    refused(tmp_path, "1.tar: it is a device, a pipe or a socket")
    (tmp_path / "1.tar").unlink()
    (tmp_path / "classes.txt").unlink()
    os.mkfifo(tmp_path / "classes.txt")
    refused(tmp_path, "classes.txt is no regular file")


# --- the order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(5,), (3, 0, 7, 1), tuple(range(1, 3 * GROUP + 3)), (4,) * 40])
def test_an_epoch_is_a_permutation_and_another_one_next_time(counts):
    order, total = ShardOrder(counts, 3), sum(counts)
    epochs = [[order(e * total + i) for i in range(total)] for e in range(3)]
    for numbers in epochs:
        assert sorted(numbers) == list(range(total))
    assert epochs[0] != epochs[1] != epochs[2]
    assert [ShardOrder(counts, 3)(i) for i in range(total)] == epochs[0]
    assert [ShardOrder(counts, 4)(i) for i in range(total)] != epochs[0]
    assert [order(i) for i in reversed(range(total))] == epochs[0][::-1]


def test_reads_stay_within_a_few_shards_and_mix_them():
    counts = (50,) * (4 * GROUP)
    order = ShardOrder(counts, 0)
    shards = np.array([order(i) // 50 for i in range(sum(counts))])
    for group in shards.reshape(4, -1):
        assert len(set(group)) == GROUP
        assert len(set(group[:50])) >= GROUP // 2
    assert not np.array_equal(np.unique(shards[: 50 * GROUP]), np.arange(GROUP))


# --- the index ----------------------------------------------------------------------------------


def indices(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}


def test_an_index_is_made_once_and_anew_for_another_file(tmp_path, cache):
    classes(tmp_path)
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", some())
    open_source(str(tmp_path), TWO, 0)
    first = indices(cache)
    assert len(first) == 3
    assert not [p for p in cache.rglob("*") if p.is_file() and p.suffix != ".npy"]
    assert open_source(str(tmp_path), TWO, 0).epoch == 9
    assert indices(cache) == first
    write_tar(tmp_path / "1.tar", some(5))
    assert open_source(str(tmp_path), TWO, 0).epoch == 11
    later = indices(cache)
    assert len(later) == 4
    assert first.items() <= later.items()


def test_the_data_are_known_by_their_shards(tmp_path):
    classes(tmp_path)
    write_tar(tmp_path / "0.tar", some())
    before = open_source(str(tmp_path), TWO, 0).identity
    assert open_source(str(tmp_path), TWO, 1).identity == before
    write_tar(tmp_path / "1.tar", some())
    after = open_source(str(tmp_path), TWO, 0).identity
    assert before["pictures"] != after["pictures"]


def test_a_shard_that_changes_during_a_run_stops_it(tmp_path):
    classes(tmp_path)
    path = write_tar(tmp_path / "0.tar", some())
    source = open_source(str(tmp_path), TWO, 0)
    source.train_batch(0, 2)
    write_tar(path, some(4))
    with pytest.raises(UserError, match=f"the shard {path} was changed meanwhile"):
        source.train_batch(0, 2)
    path.unlink()
    with pytest.raises(UserError, match=f"cannot read the shard {path}: No such file"):
        source.train_batch(0, 2)


def test_a_damaged_index_is_named(tmp_path, cache):
    classes(tmp_path)
    write_tar(tmp_path / "0.tar", some())
    open_source(str(tmp_path), TWO, 0)
    (index,) = indices(cache)
    index.write_bytes(b"")
    _mapped.cache_clear()
    refused(tmp_path, str(index), "delete it")


def test_flipped_bytes_in_an_index(tmp_path, cache):
    """They would be other labels, or other parts of the shard."""
    classes(tmp_path)
    write_tar(tmp_path / "0.tar", some())
    open_source(str(tmp_path), TWO, 0)
    (index,) = indices(cache)
    data = index.read_bytes()
    for offset in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[offset] ^= 0xFF
        index.write_bytes(damaged)
        _mapped.cache_clear()
        refused(tmp_path, str(index), "delete it")
    index.write_bytes(data)
    _mapped.cache_clear()
    assert open_source(str(tmp_path), TWO, 0).epoch == 3


def test_an_index_that_another_could_have_planted_is_not_read(tmp_path, cache, monkeypatch, capsys):
    """Its seal fits, as anyone can make one."""
    classes(tmp_path)
    write_tar(tmp_path / "0.tar", some())
    before = os.umask(0)
    try:
        open_source(str(tmp_path), TWO, 0)
    finally:
        os.umask(before)
    (index,) = indices(cache)
    index.chmod(0o666)
    _mapped.cache_clear()
    refused(tmp_path, f"others may write {index}", "not trusted")
    index.chmod(0o600)
    kept = index.rename(tmp_path / "kept.npy")
    index.symlink_to(kept)
    _mapped.cache_clear()
    refused(tmp_path, f"{index} is a link and is not trusted")
    index.unlink()
    kept.rename(index)
    index.parent.chmod(0o777)
    _mapped.cache_clear()
    capsys.readouterr()
    assert open_source(str(tmp_path), TWO, 0).epoch == 3
    assert f"kept for this run only: others may write in {index.parent}" in capsys.readouterr().err
    index.parent.chmod(0o700)


def test_a_large_shard_is_never_in_memory(tmp_path):
    """A sparse 2 GB member is skipped over under a limit of memory far below it."""
    classes(tmp_path)
    path = write_tar(tmp_path / "0.tar", some(2))
    body = path.read_bytes().rstrip(b"\0")
    body += bytes(-len(body) % 512)
    huge = tarfile.TarInfo("film.bin")
    huge.size = 2 << 30
    with open(path, "wb") as file:
        file.write(body + huge.tobuf())
        file.seek(huge.size, os.SEEK_CUR)
        info = tarfile.TarInfo("z.png")
        info.size = len(png(9))
        file.write(info.tobuf() + png(9) + bytes(-info.size % 512))
        info = tarfile.TarInfo("z.cls")
        info.size = 1
        file.write(info.tobuf() + b"1" + bytes(511) + bytes(1024))
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from asvit_deploy.data.shards import ShardPictures\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = ShardPictures(Path(sys.argv[1]))\n"
        "assert len(found) == 3 and found.load(2).size == (50, 40), len(found)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000  # KiB


def test_sources_of_shards_pickle_small(tmp_path):
    classes(tmp_path)
    write_tar(tmp_path / "0.tar", some(40))
    source = open_source(str(tmp_path), TWO, 0, Augmentation(mixup=0.8))
    assert len(pickle.dumps(source)) < 20_000


# --- bad shards ---------------------------------------------------------------------------------


def test_every_cut_of_a_shard_is_noticed(tmp_path):
    classes(tmp_path)
    path = write_tar(tmp_path / "0.tar", some(2))
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in [0, 1, 100, 511, 512, 513, 700, *range(1024, end + 500, 512), end]:
        path.write_bytes(whole[:size])
        refused(tmp_path, f"the shard {path}")
    path.write_bytes(whole)
    assert open_source(str(tmp_path), TWO, 0).epoch == 2


def test_an_overwritten_header_is_noticed(tmp_path):
    classes(tmp_path)
    path = write_tar(tmp_path / "0.tar", some(3))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar.getmembers()]
    for offset in offsets:
        path.write_bytes(whole[:offset] + b"\xff" * 512 + whole[offset + 512 :])
        refused(tmp_path, f"the shard {path} is damaged")


def test_files_that_are_no_tar_are_named(tmp_path):
    classes(tmp_path)
    path = tmp_path / "0.tar"
    path.write_bytes(os.urandom(5000))
    refused(tmp_path, str(path), "no tar file")
    with tarfile.open(path, "w:gz") as tar:  # never decompressed behind one's back
        tar.addfile(tarfile.TarInfo("a"))
    refused(tmp_path, str(path), "no tar file")
    path.unlink()
    path.mkdir()
    refused(tmp_path, str(path), "Is a directory")
    path.rmdir()
    path.symlink_to("nowhere")
    refused(tmp_path, str(path), "No such file")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.png", png(0))], "a has no .cls beside it"),
        ([("a.cls", b"0")], "a has no picture beside it"),
        ([("a.png", png(0)), ("b.png", png(0)), ("a.cls", b"0")], "a has no .cls beside it"),
        ([("a.png", png(0)), ("a.jpg", png(0)), ("a.cls", b"0")], "two pictures a"),
        ([("a.png", png(0)), ("a.cls", b"cat")], "a.cls is no label"),
        ([("a.png", png(0)), ("a.cls", b"-1")], "a.cls is no label"),
        ([("a.png", png(0)), ("a.cls", b"")], "a.cls is no label"),
        ([("a.png", png(0)), ("a.cls", b"70000")], "a.cls is no label"),
        ([("a.png", png(0)), ("a.cls", b"1" * 10_000)], "a.cls is no label"),
        ([("a.png", png(0)), ("a.cls", b"\x80\x04K\x01.")], "a.cls is no label"),
        ([("a.png", png(0)), ("a.cls", "²".encode())], "a.cls is no label"),
        ([("a.png", png(0)), ("a.cls", b"2")], "label 2, and classes.txt names 2 classes, 0 to 1"),
        ([("a.txt", b"")], "hold no picture"),
        ([], "hold no picture"),
    ],
)
def test_members_that_are_no_samples_are_named(tmp_path, members, words):
    classes(tmp_path)
    write_tar(tmp_path / "0.tar", members)
    refused(tmp_path, str(tmp_path), words)


def test_classes_must_be_written_down(tmp_path):
    write_tar(tmp_path / "0.tar", some())
    path = tmp_path / "classes.txt"
    refused(tmp_path, "holds shards but no classes.txt")
    for text, words in (
        (b"", "is empty"),
        (b"cat\n", "at least 2"),
        (b"cat\n\ndog\n", "no empty line"),
        (b"cat\ndog\ncat\n", "'cat' twice"),
        (b"cat\n\xff\n", "no UTF-8"),
    ):
        path.write_bytes(text)
        refused(tmp_path, str(path), words)
    path.write_bytes(b"\xef\xbb\xbfcat\r\nDogge, deutsche\r\n\r\n")
    assert open_source(str(tmp_path), TWO, 0).classes == ["cat", "Dogge, deutsche"]


def test_train_and_val_have_their_places(tmp_path):
    classes(tmp_path)
    write_tar(tmp_path / "val" / "0.tar", some(2))
    refused(tmp_path, "holds no shards to train on")
    assert len(list(open_labelled(str(tmp_path), TWO).validation(1))) == 2
    write_tar(tmp_path / "train" / "0.tar", some(5))
    source = open_source(str(tmp_path), TWO, 0)
    assert source.epoch == 5
    assert len(list(source.validation(1))) == 2
    (tmp_path / "val" / "classes.txt").write_text("cat\neel\n")
    refused(tmp_path, "differ in class 'dog'")
    (tmp_path / "val" / "classes.txt").write_text("dog\ncat\n")
    refused(tmp_path, "in another order")
    (tmp_path / "val" / "0.tar").unlink()
    assert list(open_source(str(tmp_path), TWO, 0).validation(1)) == []
    with pytest.raises(UserError, match=f"name {tmp_path / 'train'} to evaluate on those"):
        open_labelled(str(tmp_path), TWO)
    assert len(list(open_labelled(str(tmp_path / "train"), TWO).validation(1))) == 5


def test_a_broken_picture_is_passed_over_in_training_and_its_validation(tmp_path):
    classes(tmp_path)
    members = samples([("a", png(0), 0), ("b", png(1)[:200], 1), ("c", b"", 1), ("d", png(3), 1)])
    for split in ("train", "val"):
        write_tar(tmp_path / split / "0.tar", members)
    source = open_source(str(tmp_path), TWO, 0)
    shard = tmp_path / "train" / "0.tar"
    assert source.train_batch(0, 4).skipped == (f"{shard}:b.png", f"{shard}:c.png")
    (batch,) = source.validation(4)
    assert [name.rpartition(":")[2] for name in batch.skipped] == ["b.png", "c.png"]
    assert batch.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match=r"val/0\.tar:b\.png is broken") as said:
        list(open_labelled(str(tmp_path), TWO).validation(4))
    assert "\n" not in str(said.value)


@pytest.mark.slow
def test_shards_and_caches_without_permission(powerless_cli, tmp_path, monkeypatch):
    """Of the four, the last is a cache folder in which nothing may be written."""
    for name in ("folder", "shard", "classes", "cache"):
        classes(tmp_path / name)
        write_tar(tmp_path / name / "train" / "0.tar", some())
    closed = [tmp_path / "folder" / "train", tmp_path / "shard" / "train" / "0.tar",
              tmp_path / "classes" / "classes.txt"]  # fmt: skip
    for path in closed:
        path.chmod(0)
    tail = ["--arch", "as_deit_mini", "--dense", "--steps", "1", "--batch-size", "2"]
    lines = [["finetune", "--data", name, *tail] for name in ("folder", "shard", "classes")]
    results = powerless_cli(tmp_path, *lines)
    for path in closed:
        path.chmod(0o755)
    words = ("cannot read folder/train", "cannot read the shard shard/train/0.tar",
             "classes/classes.txt may not be read")  # fmt: skip
    for result, word in zip(results, words, strict=True):
        said = [line for line in result.err.splitlines() if line.startswith("Error:")]
        assert (result.code, len(said)) == (2, 1), result
        assert word in said[0]
    (tmp_path / "closed").mkdir(mode=0o555)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed"))
    (result,) = powerless_cli(tmp_path, ["finetune", "--data", "cache", *tail])
    assert result.code == 0, result
    assert "the shards' index is kept for this run only" in result.err
    assert list((tmp_path / "closed").iterdir()) == []


# --- what they mean -----------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [("1", "0"), ("1", "1")])
@pytest.mark.parametrize("first", ["picture", "label"])
def test_two_labels_of_one_key(tmp_path, labels, first):
    members = [("k.png", png(1)), *(("k.cls", label.encode()) for label in labels)]
    write_tar(classes(tmp_path) / "0.tar", members if first == "picture" else members[::-1])
    refused(tmp_path, "the shard", "0.tar has two labels k", "take one of them out")


def joined(folder: Path, between: bytes = b"", **more: bytes) -> Path:
    """Two shards of three pictures in one file, as `cat` makes it."""
    parts = []
    for number in range(2):
        part = folder.parent / f"{folder.name}_{number}.tar"
        write_tar(part, samples([(f"k{i + 3 * number}", png(i), i % 2) for i in range(3)]))
        parts.append(part.read_bytes())
    (classes(folder) / "0.tar").write_bytes(between.join(parts) + more.get("behind", b""))
    return folder


@pytest.mark.parametrize("between", [b"", bytes(512), bytes(3 << 20)], ids=len)
def test_joined_shards_are_read_to_the_end(tmp_path, between):
    found = ShardPictures(joined(tmp_path / "x", between))
    assert len(found) == 6
    assert [found.label(i) for i in range(6)] == [0, 1, 0] * 2
    assert [found.name(i).rpartition(":")[2] for i in range(6)] == [f"k{i}.png" for i in range(6)]
    assert [found.load(i).size for i in range(6)] == [(50, 40)] * 6
    assert found.notes == []


def test_a_sample_does_not_reach_from_one_shard_into_the_next(tmp_path):
    members = {"a.tar": ("k.png", png(1)), "b.tar": ("k.cls", b"1")}
    parts = [write_tar(tmp_path / name, [one]).read_bytes() for name, one in members.items()]
    (classes(tmp_path / "x") / "0.tar").write_bytes(b"".join(parts))
    refused(tmp_path / "x", "0.tar: k has no .cls beside it")


@pytest.mark.parametrize("behind", [b"junk" * 300, b"\x1f\x8b" + bytes(2000), b"x"])
def test_what_stands_behind_a_shard_and_is_none_gets_a_line(tmp_path, behind):
    found = ShardPictures(joined(tmp_path / "x", behind=behind))
    assert len(found) == 6
    assert "1 file with data behind the end of its archive" in found.notes[0]


def test_a_second_shard_that_is_cut_is_refused(tmp_path):
    path = joined(tmp_path / "x") / "0.tar"
    path.write_bytes(path.read_bytes()[: -(10 << 10) - 700])
    refused(tmp_path / "x", "the shard", "0.tar is damaged or no tar file", "copy it again")


def test_the_global_headers_of_one_shard_say_nothing_of_the_next(tmp_path):
    parts = []
    for number, headers in enumerate(({"path": "odd.png"}, {})):
        with tarfile.open(tmp_path / f"{number}.tar", "w", pax_headers=headers) as tar:
            for name, data in samples([(f"k{number}", png(1), 1)]) if number else []:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        parts.append((tmp_path / f"{number}.tar").read_bytes())
    (classes(tmp_path / "x") / "0.tar").write_bytes(b"".join(parts))
    found = ShardPictures(tmp_path / "x")
    assert [found.label(i) for i in range(len(found))] == [1]


def test_zeros_without_end_are_passed_over_at_once(tmp_path):
    """A file of holes: 1 TiB that take no disk."""
    path = joined(tmp_path / "x") / "0.tar"
    os.truncate(path, 1 << 40)
    assert len(ShardPictures(tmp_path / "x")) == 6


# --- commands -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_finetune_on_shards_gives_a_network_of_their_classes(tmp_path):
    picture_folder(tmp_path / "pictures", count=8)
    shards_of(tmp_path / "pictures", tmp_path / "data" / "train", per_shard=5)
    output = tmp_path / "a.safetensors"
    line = [
        sys.executable,
        "-m",
        "asvit_deploy",
        "finetune",
        "--data",
        tmp_path / "data",
        "--arch",
        "as_deit_mini",
        "--dense",
        "--steps",
        2,
        "--batch-size",
        4,
        "-o",
        output,
    ]
    done = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = load_checkpoint(output)
    assert json.loads(loaded.metadata["classes"]) == ["cat", "dog"]
    assert torch.isfinite(loaded.state["head.weight"]).all()
