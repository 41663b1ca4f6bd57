"""`predict --data`: pictures in bulk, by one process or several, stopped and taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from embedding_files import written
from shard_files import picture_folder, png, write_tar

import asvit_deploy
from asvit_deploy.artefacts.onnx_file import OnnxArtefact
from asvit_deploy.artefacts.runtime_choice import RuntimeChoice
from asvit_deploy.bulk.pictures import CutPictures
from asvit_deploy.bulk.running import Bulk
from asvit_deploy.bulk.store import Share, Store
from asvit_deploy.checkpoints.load import load_checkpoint
from asvit_deploy.data.images import open_images
from asvit_deploy.exporting.export import export
from asvit_deploy.files import sha256

COMMAND = [sys.executable, "-m", "asvit_deploy", "predict"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def packed(mini_checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "packed.onnx"
    checkpoint = load_checkpoint(mini_checkpoint)
    export(checkpoint, path, open_images(None, checkpoint.config, limit=4), "packed")
    return path


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    checkpoint = load_checkpoint(written(folder, "clip"))
    export(checkpoint, folder / "clip.onnx", open_images(None, checkpoint.config, limit=4))
    return folder / "clip.onnx"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Five shards of four pictures without labels, one of the pictures broken."""
    folder = tmp_path_factory.mktemp("shards")
    for s in range(5):
        pictures = [(f"s{s}/{i}.png", png(10 * s + i, (60, 50))) for i in range(4)]
        if s == 2:
            pictures[1] = (pictures[1][0], b"no picture")
        write_tar(folder / f"{s:03}.tar", [*pictures, ("s/notes.json", b"{}")])
    return folder


def run(cli, *args):
    result = cli("predict", *args)
    assert result.code == 0, result.err
    return result


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(one: dict, other: dict) -> None:
    """Two answers, but for the picture's name and the last digits."""
    assert one["kept"] == other["kept"]
    assert [g["index"] for g in one["top"]] == [g["index"] for g in other["top"]]
    assert [g["probability"] for g in one["top"]] == pytest.approx(
        [g["probability"] for g in other["top"]], abs=1e-5
    )


def test_a_folder_as_predict_says_it_picture_by_picture(cli, mini_artifacts, tmp_path):
    model, folder = mini_artifacts["1", "auto"], picture_folder(tmp_path / "photos", count=3)
    (folder / "cat" / "notes.txt").touch()
    done = run(cli, model, "--data", folder, "-o", "out.jsonl")
    assert done.out == "out.jsonl: 6 pictures\n"
    assert "passed over" in done.err
    found = lines(Path("out.jsonl"))
    assert [one["image"] for one in found] == [f"{c}/00{i}.png" for c in ("cat", "dog")
                                               for i in range(3)]  # fmt: skip
    alone = asvit_deploy.predict(model, [folder / one["image"] for one in found])
    for one, other in zip(found, alone):
        assert one == {**other.as_dict(), "image": one["image"]}
    assert not list(Path().glob("*.parts")) + list(Path().glob(".*"))
    refused(cli("predict", model, "--data", folder, "-o", "out.jsonl"), "exists already")
    again = run(cli, model, "--data", folder, "-o", "out.jsonl", "--force", "--json")
    assert json.loads(again.out) == {
        "output": "out.jsonl", "pictures": 6, "skipped": 0, "skipped_by_reason": {},
        "passed_over": {".txt": 1}, "parts": 1, "taken_up": 0,
    }  # fmt: skip


def test_packed_batches_say_the_same(cli, packed, mini_artifacts, shards):
    options = ("--data", shards, "--skip-limit", 1)
    run(cli, packed, *options, "-o", "packed.jsonl")
    run(cli, packed, *options, "-o", "three.jsonl", "--batch", 3)
    run(cli, mini_artifacts["1", "auto"], *options, "-o", "single.jsonl")
    single = lines(Path("single.jsonl"))
    assert len(single) == 20
    for name in ("packed.jsonl", "three.jsonl"):
        for one, other in zip(lines(Path(name)), single):
            assert one["image"] == other["image"]
            if "skipped" in one:
                assert one == other
            else:
                same(one, other)


def test_skipped_pictures_are_counted_and_limited(cli, mini_artifacts, shards):
    model = mini_artifacts["1", "auto"]
    refused(cli("predict", model, "--data", shards, "-o", "x.jsonl"), "002.tar:s2/1.png")
    assert len(list(Path("x.jsonl.parts").glob("*.part"))) == 2, "what was done is kept"
    done = run(cli, model, "--data", shards, "-o", "x.jsonl", "--skip-limit", 1)
    assert done.out.startswith("x.jsonl: 20 pictures, 1 skipped (")
    assert "2 of 5 parts were done before" in done.err
    broken = [one for one in lines(Path("x.jsonl")) if "skipped" in one]
    assert [one["image"] for one in broken] == ["002.tar:s2/1.png"]
    one = run(cli, model, "--data", shards / "000.tar", "-o", "one.jsonl")
    assert one.out == "one.jsonl: 4 pictures\n"
    assert lines(Path("one.jsonl")) == lines(Path("x.jsonl"))[:4]


def test_processes_that_share_a_run_write_the_bytes_of_one(cli, tower, shards, monkeypatch):
    """One after the other, in this process; below as torchrun starts them."""
    options = ("--data", shards, "--skip-limit", 1, "-o")
    run(cli, tower, *options, "alone.jsonl")
    run(cli, tower, *options, "alone.npz")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for ending in ("jsonl", "npz"):
        for rank in (2, 0, 1):
            monkeypatch.setenv("RANK", str(rank))
            assert not Path(f"shared.{ending}").exists()
            run(cli, tower, *options, f"shared.{ending}")
        assert Path(f"shared.{ending}").read_bytes() == Path(f"alone.{ending}").read_bytes()
        assert not Path(f"shared.{ending}.parts").exists()
    with np.load("shared.npz") as found:
        records = [one for one in lines(Path("alone.jsonl")) if "skipped" not in one]
        assert found["embeddings"].dtype == np.float32
        np.testing.assert_array_equal(
            found["embeddings"], np.array([one["embedding"] for one in records], np.float32)
        )
        assert found["images"].tolist() == [one["image"] for one in records]
        assert found["skipped"].tolist() == ["002.tar:s2/1.png"]
        assert str(found["model"]) == asvit_deploy.sidecar.read(tower)["sha256"]
    monkeypatch.setenv("RANK", "3")
    refused(cli("predict", tower, *options, "more.npz"), "RANK 3")
    monkeypatch.delenv("RANK")
    refused(cli("predict", tower, *options, "more.npz"), "RANK not set")


def test_a_limit_on_skipped_pictures_holds_for_all_processes(
    cli, mini_artifacts, tmp_path, monkeypatch
):
    for s in range(2):
        write_tar(tmp_path / "shards" / f"{s}.tar", [("a.png", png(s)), ("b.png", b"broken")])
    args = (mini_artifacts["1", "auto"], "--data", tmp_path / "shards", "--skip-limit", 1,
            "-o", "x.jsonl")  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    run(cli, *args)
    monkeypatch.setenv("RANK", "1")
    refused(cli("predict", *args), "which makes 2 where --skip-limit allows 1")
    assert not Path("x.jsonl").exists()


def test_a_run_of_something_else_is_not_taken_up(cli, mini_artifacts, packed, shards, tmp_path):
    model = mini_artifacts["1", "auto"]
    refused(cli("predict", model, "--data", shards, "-o", "x.jsonl"), "002.tar")
    rest = ("--skip-limit", 1, "-o", "x.jsonl")
    line = "holds what a run of {} has done; finish that one, name another output, or pass --force"
    refused(cli("predict", packed, "--data", shards, *rest), line.format("another model"))
    refused(cli("predict", model, "--data", shards / "000.tar", *rest),
            line.format("other pictures"))  # fmt: skip
    refused(cli("predict", model, "--data", shards, *rest, "--runtime", "torch"),
            line.format("another runtime"))  # fmt: skip
    assert len(list(Path("x.jsonl.parts").glob("*.part"))) == 2
    run(cli, packed, "--data", shards, *rest, "--force")
    (tmp_path / "y.jsonl.parts").mkdir()
    (tmp_path / "y.jsonl.parts" / "mine.txt").write_text("mine")
    for more in ((), ("--force",)):
        refused(cli("predict", model, "--data", shards / "000.tar", "-o", "y.jsonl", *more),
                "holds files that no bulk run wrote")  # fmt: skip
    assert (tmp_path / "y.jsonl.parts" / "mine.txt").read_text() == "mine"


def test_pictures_that_were_replaced_or_lie_elsewhere_are_others(cli, mini_artifacts, tmp_path):
    model, folder = mini_artifacts["1", "auto"], picture_folder(tmp_path / "photos", count=1)
    (folder / "dog" / "z.png").write_bytes(b"broken")
    args = (model, "--data", "photos", "-o", "x.jsonl")
    refused(cli("predict", *args), "z.png")
    kept(model, folder, "x.jsonl")
    args = (*args, "--skip-limit", 1)
    os.utime(folder / "cat" / "000.png", ns=(1, 1))
    refused(cli("predict", *args), "other pictures")
    run(cli, *args, "--force")
    kept(model, folder, "y.jsonl")
    folder.rename(tmp_path / "moved")
    refused(cli("predict", model, "--data", "moved", "-o", "y.jsonl"), "other pictures")

    shard = write_tar(tmp_path / "s" / "0.tar", [("a.png", png(0)), ("b.png", b"broken")])
    kept(model, tmp_path / "s", "z.jsonl")
    os.utime(shard, ns=(1, 1))
    refused(cli("predict", model, "--data", "s", "-o", "z.jsonl"), "other pictures")


def kept(model: Path, data: Path, output: str) -> Store:
    """What a run that was stopped with no part done leaves."""
    from asvit_deploy.api.runner import running_as
    from asvit_deploy.artefacts.onnx_file import OnnxArtefact, find_op_library

    artefact = OnnxArtefact(model, find_op_library(None))
    found = Bulk(artefact, data, Path(output), None, None, 0)
    parts = CutPictures(data).parts
    about = {**found._identity(parts), **running_as(artefact, None, None)}
    return Store(Path(output), about, Share(), parts, force=True)


def test_force_starts_over_and_keeps_nothing_of_before(cli, mini_artifacts, shards):
    args = (mini_artifacts["1", "auto"], "--data", shards, "-o", "x.jsonl")
    refused(cli("predict", *args), "002.tar")
    done = run(cli, *args, "--skip-limit", 1, "--force")
    assert "were done before" not in done.err
    assert not Path("x.jsonl.parts").exists()


def test_what_no_run_wrote_stays(cli, mini_artifacts, shards, tmp_path):
    args = (mini_artifacts["1", "auto"], "--data", shards, "--skip-limit", 1, "-o", "x.jsonl")
    parts = tmp_path / "x.jsonl.parts"
    parts.mkdir()
    for name in ("holiday.part", ".hidden", ".000000.part.mine.tmp"):
        (parts / name).write_text("mine")
        for more in ((), ("--force",)):
            refused(cli("predict", *args, *more), f"holds files that no bulk run wrote ({name})")
        assert (parts / name).read_text() == "mine"
        (parts / name).unlink()
    (parts / "000000.part").write_text("?")
    for said in (None, "[", "[]"):
        if said is not None:
            (parts / "run.json").write_text(said)
        refused(cli("predict", *args), "has parts and no run.json that can be read")
    assert (parts / "000000.part").read_text() == "?"
    left = parts / ".000001.part.0123456789abcd.tmp"
    left.mkdir()
    (left / "000001.part").write_text("half")
    (parts / ".000001.part.lock").touch()
    parts.rename(tmp_path / "elsewhere")
    parts.symlink_to(tmp_path / "elsewhere")
    for more in ((), ("--force",)):
        refused(cli("predict", *args, *more), "x.jsonl.parts is a link; remove it")
    parts.unlink()
    (tmp_path / "elsewhere").rename(parts)
    run(cli, *args, "--force")
    assert not parts.exists()


def test_long_names_are_whole_and_equal_ones_count_each(cli, mini_artifacts, tower, tmp_path):
    long = "d" * 120 + "/" + "k" * 320
    names = [f"{long}{i}.png" for i in range(3)]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        one = write_tar(tmp_path / "a.tar", [(name, png(0)) for name in names], form)
        twice = write_tar(tmp_path / "b.tar", [("x.png", png(1)), ("y.png", b"broken")], form)
        (tmp_path / "c.tar").write_bytes(one.read_bytes() + 2 * twice.read_bytes())
        args = (tower, "--data", tmp_path / "c.tar", "--skip-limit", 2)
        done = run(cli, *args, "-o", f"{form}.jsonl")
        assert "7 pictures, 2 skipped" in done.out
        wanted = [f"c.tar:{name}" for name in (*names, *("x.png", "y.png") * 2)]
        assert [one["image"] for one in lines(Path(f"{form}.jsonl"))] == wanted
        run(cli, *args, "-o", f"{form}.npz")
        with np.load(f"{form}.npz") as found:
            assert found["embeddings"].shape == (5, found["embeddings"].shape[1])
            assert found["images"].tolist() == [*wanted[:4], "c.tar:x.png"]
            assert found["skipped"].tolist() == ["c.tar:y.png"] * 2
    refused(cli("predict", *args[:3], "--skip-limit", 1, "-o", "z.jsonl"), "makes 2 where")


@pytest.mark.parametrize("launch", ["", "one", "two"])
def test_a_late_process_finds_the_parts_and_not_a_folder_of_its_own(
    cli, mini_artifacts, shards, monkeypatch, launch
):
    """All is done but the last part, which rank 0 does; rank 1 comes once rank 0 has ended."""
    args = (mini_artifacts["1", "auto"], "--data", shards, "--skip-limit", 1, "-o", "x.jsonl")
    monkeypatch.setenv("WORLD_SIZE", "2")
    if launch:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    run(cli, *args)
    if launch == "one":  # the same token, as of plain torchrun: its own mark says that all end anew
        monkeypatch.setenv("RANK", "0")
        Path("x.jsonl.parts/0of2.here").write_text("one  ")
    if launch:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        monkeypatch.setenv("RANK", "0")
        run(cli, *args)
        assert not Path("x.jsonl").exists(), "rank 1 has not come yet"
        monkeypatch.setenv("RANK", "1")
    else:
        monkeypatch.setenv("RANK", "0")
    run(cli, *args)
    assert len(lines(Path("x.jsonl"))) == 20
    assert not Path("x.jsonl.parts").exists()


def test_auto_is_what_it_stands_for(cli, mini_artifacts, op_library, shards, monkeypatch):
    """A stopped run goes on with the same way and library alone, however these were named."""
    from asvit_deploy.api import runner
    from asvit_deploy.artefacts import runtime_choice

    model = mini_artifacts["1", "auto"]
    fields = {"runtime": "onnxruntime", "way": "function", "threads": 1, "precision": "float32"}
    artefact = OnnxArtefact(model, op_library)
    monkeypatch.setattr(runtime_choice, "read_choice", lambda *_: RuntimeChoice(model, fields))
    auto = runner.running_as(artefact, "auto", None)
    assert auto == runner.running_as(OnnxArtefact(model), None, None) | {"precision": "float32"}
    own = runner.running_as(artefact, None, None)
    assert (own["way"], own["library"]) == ("library", sha256(op_library))
    refused(cli("predict", model, "--data", shards, "-o", "x.jsonl"), "002.tar")
    refused(cli("predict", model, "--data", shards, "-o", "x.jsonl", "--library", op_library),
            "another way of its runtime")  # fmt: skip


def test_a_damaged_part_is_done_again(cli, mini_artifacts, shards):
    model = mini_artifacts["1", "auto"]
    run(cli, model, "--data", shards, "-o", "whole.jsonl", "--skip-limit", 1)
    refused(cli("predict", model, "--data", shards, "-o", "x.jsonl"), "002.tar")
    part = Path("x.jsonl.parts/000001.part")
    data = bytearray(part.read_bytes())
    data[40] ^= 1
    part.write_bytes(data)
    done = run(cli, model, "--data", shards, "-o", "x.jsonl", "--skip-limit", 1)
    assert "1 of 5 parts were done before" in done.err
    assert Path("x.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


@pytest.mark.parametrize("odd", ["pipe", "bytes"])
def test_what_is_no_mark_of_a_process_says_nothing_of_it(cli, mini_artifacts, shards, odd):
    args = ("predict", mini_artifacts["1", "auto"], "--data", shards, "-o", "x.jsonl")
    refused(cli(*args), "002.tar")
    mark = Path("x.jsonl.parts/0of1.here")
    mark.unlink()
    if odd == "pipe":
        os.mkfifo(mark)
    else:
        mark.write_bytes(b"\xff\xfe")
    assert "2 of 5 parts were done before" in run(cli, *args[1:], "--skip-limit", 1).err
    assert not mark.parent.exists()


def test_places_that_no_launcher_gives(cli, mini_artifacts, tmp_path, monkeypatch):
    picture_folder(tmp_path / "photos", count=1)
    args = ("predict", mini_artifacts["1", "auto"], "--data", "photos", "-o")
    for said in ("two", "0", "-1", ""):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        refused(cli(*args, "x.jsonl"), f"LOCAL_WORLD_SIZE is {said!r}", "start them with torchrun")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    refused(cli(*args, f"{'a' * 245}.jsonl"), "File name too long; name another output")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_a_stop_between_the_output_and_the_end_is_no_loss(cli, mini_artifacts, shards, tmp_path):
    """The parts are all there, and so is the output: the same run ends well, another does not."""
    kept = tmp_path / "kept"
    removing = Store.remove
    Store.remove = lambda self: self.folder.rename(kept)
    try:
        args = (mini_artifacts["1", "auto"], "--data", shards / "000.tar", "-o", "x.jsonl")
        run(cli, *args)
    finally:
        Store.remove = removing
    whole = Path("x.jsonl").read_bytes()
    kept.rename("x.jsonl.parts")
    Path("x.jsonl").write_text("another's\n")
    refused(cli("predict", *args), "x.jsonl exists already")
    Path("x.jsonl").write_bytes(whole)
    run(cli, *args)
    assert Path("x.jsonl").read_bytes() == whole
    assert not Path("x.jsonl.parts").exists()


def cut(shards: Path, folder: Path, keep: int) -> Path:
    folder.mkdir()
    for shard in sorted(shards.glob("*.tar"))[:2]:
        (folder / shard.name).write_bytes(shard.read_bytes())
    last = folder / "001.tar"
    last.write_bytes(last.read_bytes()[:keep])
    return folder


@pytest.mark.parametrize("keep", [700, 512 * 12, 300])
def test_a_shard_that_ends_early_is_refused_first(cli, mini_artifacts, shards, tmp_path, keep):
    short = cut(shards, tmp_path / "short", keep)
    result = cli("predict", mini_artifacts["1", "auto"], "--data", short, "-o", "x.jsonl")
    refused(result, "the shard", "001.tar is damaged or no tar file", "make or copy it again")
    assert not list(Path().glob("x.jsonl*"))


BAD = {
    "no place": (("--data", "gone", "-o", "x.jsonl"), "gone does not exist"),
    "one picture": (("--data", "p.png", "-o", "x.jsonl"), "is neither a folder nor a shard"),
    "empty": (("--data", "empty", "-o", "x.jsonl"), "empty holds no picture"),
    "shards below": (("--data", "below", "-o", "x.jsonl"), "lie in folders in it"),
    "no output": (("--data", "photos"), "--data takes an output"),
    "its folder": (("--data", "photos", "-o", "gone/x.jsonl"), "folder gone does not exist"),
    "ending": (("--data", "photos", "-o", "x.csv"), "ends in neither .jsonl nor .npz"),
    "classes": (("--data", "photos", "-o", "x.npz"), "gives classes"),
    "both": (("p.png", "--data", "photos", "-o", "x.jsonl"), "name either"),
    "neither": ((), "no picture is named; name one or more, or a folder or shards with --data"),
    "output alone": (("p.png", "-o", "x.jsonl"), "--output and --batch go with --data"),
    "drawn": (("--data", "photos", "-o", "x.jsonl", "--save", "d"), "--save draws"),
    "batch": (("--data", "photos", "-o", "x.jsonl", "--batch", "4"), "--batch packed"),
    "a file": (("--data", "photos", "-o", "f.jsonl"), "f.jsonl.parts is no folder"),
    "none readable": (("--data", "broken", "-o", "x.jsonl", "--skip-limit", "9"), "none of the 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(cli, mini_artifacts, tmp_path, case):
    picture_folder(tmp_path / "photos", count=1)
    (tmp_path / "p.png").write_bytes(png(0))
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "below" / "train" / "0.tar", [("a.png", png(0))])
    (tmp_path / "f.jsonl.parts").touch()
    (tmp_path / "broken").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "broken" / name).write_bytes(b"no picture")
    options, word = BAD[case]
    refused(cli("predict", mini_artifacts["1", "auto"], *options), word)
    assert not (tmp_path / "x.jsonl").exists()


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_torchrun_and_a_kill(cli, mini_artifacts, shards, tmp_path):
    """Two processes give the bytes of one; so does a run that was killed, started again."""
    model = mini_artifacts["1", "auto"]
    many = tmp_path / "many"
    for s in range(12):
        write_tar(many / f"{s:02}.tar", [(f"{i}.png", png(100 * s + i)) for i in range(12)])
    options = ["--data", str(many), "-o"]
    run(cli, model, *options, "alone.jsonl")
    alone = (tmp_path / "alone.jsonl").read_bytes()

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", "-m", "asvit_deploy", "predict"]  # fmt: skip
    done = subprocess.run([*torchrun, model, *options, "two.jsonl"], cwd=tmp_path,
                          env=environment(), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "two.jsonl: 144 pictures\n"
    assert (tmp_path / "two.jsonl").read_bytes() == alone

    killed = subprocess.Popen([*COMMAND, model, *options, "killed.jsonl"], cwd=tmp_path,
                              env=environment(), stderr=subprocess.DEVNULL)  # fmt: skip
    parts, until = tmp_path / "killed.jsonl.parts", time.monotonic() + 120
    while not list(parts.glob("*.part")) and time.monotonic() < until:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    found = len(list(parts.glob("*.part")))
    assert 0 < found < 12
    assert not (tmp_path / "killed.jsonl").exists()
    again = run(cli, model, *options, "killed.jsonl")
    assert f"{found} of 12 parts were done before" in again.err
    assert (tmp_path / "killed.jsonl").read_bytes() == alone
    assert not parts.exists()
